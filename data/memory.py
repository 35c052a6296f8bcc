"""Whether the windows that a machine's ranks keep open fit its memory. Next: loader.py."""

import os

from data.errors import BadRequest
from data.shards import Manifest

MEMORY_SHARE = 0.5
"""Share of the machine's memory that the windows of its ranks may take."""


def check_memory(manifest: Manifest, global_batch: int, window: int, world_size: int, local_world_size: int) -> None:
    """Raises BadRequest where the windows that this machine's ranks hold would not fit its memory."""
    held = global_batch * window * manifest.mean_sample_bytes * local_world_size / world_size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if held > MEMORY_SHARE * memory:
        fitting = int(window * MEMORY_SHARE * memory / held)
        way_out = f"data.window={fitting} would fit" if fitting else "no window fits: take a smaller train.global_batch"
        raise BadRequest(
            f"data.window={window} with train.global_batch={global_batch} keeps {held / 2**30:.1f} GiB of images"
            f" in this machine's {memory / 2**30:.1f} GiB of memory; {way_out}, or take more machines"
        )
