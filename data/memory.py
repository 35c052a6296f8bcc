"""What of the data a rank keeps in memory, and whether the ranks of a machine fit. Next: loader.py."""

import os

from data.errors import BadRequest
from data.shards import Manifest

MEMORY_SHARE = 0.5
"""Share of the machine's memory that the data of its ranks may take."""
READ_AHEAD_BYTES = 256 << 20
"""Bytes of the windows that are read ahead, beside the one of each slot that is in use."""
DECODED_AT_ONCE = 256
"""Samples in one run of DALI, whose cost per run is worth spreading over several micro batches."""
RUNS_IN_MEMORY = 6
"""Such runs whose images, with the bytes they come from, are under way at once, DALI's operators included: measured."""


def check_memory(manifest: Manifest, slots: int, window: int, resolution: int, local_world_size: int) -> None:
    """Raises BadRequest where what this machine's ranks hold of their data would not fit its memory.

    `slots` is how many samples of a step the busiest rank takes.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    of_all_slots = slots * manifest.mean_sample_bytes
    decoded = RUNS_IN_MEMORY * DECODED_AT_ONCE * (3 * resolution**2 + manifest.mean_sample_bytes)
    held = local_world_size * (window * of_all_slots + READ_AHEAD_BYTES + decoded)
    if held <= MEMORY_SHARE * memory:
        return
    fitting = int((MEMORY_SHARE * memory / local_world_size - READ_AHEAD_BYTES - decoded) / of_all_slots)
    way_out = f"data.window={fitting} would fit" if fitting > 0 else "no window fits: take a smaller train.global_batch"
    raise BadRequest(
        f"data.window={window} with {slots} samples a step on a rank keeps {held / 2**30:.1f} GiB of images"
        f" in this machine's {memory / 2**30:.1f} GiB of memory; {way_out}, or take more machines"
    )
