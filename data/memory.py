"""What of the data a rank keeps in memory, and whether the ranks of a machine fit."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from data.errors import UsageError
from data.shards.manifest import Manifest

MEMORY_SHARE = 0.5
"""Share of the machine's memory that the data of its ranks may take."""
READ_AHEAD_BYTES = 256 << 20
"""Bytes of the windows that are read ahead, beside the one of each slot that is in use."""
DECODED_AT_ONCE = 256
"""Samples in one run of DALI, whose cost per run is worth spreading over several micro batches."""
DECODED_BYTES = 256 << 20
"""Bytes of a run's crops before they are resized, as of seven images of 12 megapixels; what is larger runs alone."""
AHEAD = 2
"""Runs that DALI is working on or has ready, the one handed over included."""
RUNS_IN_MEMORY = 6
"""Runs under way at once, by their resized images and the bytes they come from, DALI's operators included: measured."""
JPEG_BUFFER_BYTES = 16 << 20
"""What a thread of DALI's JPEG decoder allocates of a GPU at its start (`device_memory_padding`)."""


def decoder_gpu_bytes(resolution: int, threads: int) -> int:
    """Bytes of a GPU that a pipeline of DALI, with so many threads, takes at most, the batches it hands over included.

    From DALI's sources: its pools keep what they once had. nvJPEG's buffers for images of several megapixels add to it.
    """
    return AHEAD * DECODED_BYTES + RUNS_IN_MEMORY * DECODED_AT_ONCE * 3 * resolution**2 + threads * JPEG_BUFFER_BYTES


def check_memory(manifest: Manifest, slots: int, window: int, resolution: int, local_world_size: int) -> None:
    """Raises UsageError where what this machine's ranks hold of their data would not fit its memory.

    `slots` is how many samples of a step the busiest rank takes.
    """
    memory = granted_bytes()
    of_all_slots = slots * manifest.mean_sample_bytes
    decoded = RUNS_IN_MEMORY * DECODED_AT_ONCE * (3 * resolution**2 + manifest.mean_sample_bytes)
    held = local_world_size * (window * of_all_slots + READ_AHEAD_BYTES + decoded)
    if held <= MEMORY_SHARE * memory:
        return
    fitting = int((MEMORY_SHARE * memory / local_world_size - READ_AHEAD_BYTES - decoded) / of_all_slots)
    suggestion = (
        f"data.shuffle_window={fitting} would fit"
        if fitting > 0
        else "no window fits: use a smaller train.global_batch"
    )
    raise UsageError(
        f"data.shuffle_window={window} with {slots} samples per rank and step needs {held / 2**30:.1f} GiB for images,"
        f" more than {MEMORY_SHARE:.0%} of the {memory / 2**30:.1f} GiB of memory that this machine allows;"
        f" {suggestion}, or use more machines"
    )


def granted_bytes() -> int:
    """The machine's memory, or less where a container's or Slurm's control group grants less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *filter(None, map(group_limit, _groups()))])


def available_bytes() -> int:
    """Bytes that may be taken without swapping: of the machine, and of every control group that this process is in."""
    return min([_available_in_machine(), *filter(None, map(available_in_group, _groups()))])


def available_addresses() -> int | None:
    """What is left of this process's limit of address space (ulimit -v); None where it has none."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit - _held()[0]


def resident() -> int:
    """The bytes of memory that this process holds."""
    return _held()[1]


def _held() -> tuple[int, int]:
    """This process's bytes: of addresses, and of memory."""
    addresses, memory, *_ = Path("/proc/self/statm").read_text().split()
    return int(addresses) * os.sysconf("SC_PAGE_SIZE"), int(memory) * os.sysconf("SC_PAGE_SIZE")


def _available_in_machine() -> int:
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(facts["MemAvailable"].split()[0]) * 1024


def _groups() -> Iterator[Path]:
    """The folders of the memory groups, innermost first; in a container the kernel may name one that is not seen."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers in ("", "memory"):
            top = Path("/sys/fs/cgroup", controllers)
            below = Path(name.strip("/"))
            yield from (top / folder for folder in (below, *below.parents))


_OF_GROUPS = (
    ("memory.max", "memory.current", "inactive_file"),  # version 2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
)
"""The files of a group's limit and use, and what `memory.stat` calls files that were read."""


def group_limit(folder: Path) -> int | None:
    """A group's limit in bytes; None where it has none."""
    for limit, _, _ in _OF_GROUPS:
        if (folder / limit).exists() and (most := (folder / limit).read_text().strip()) != "max":
            return int(most)
    return None


def available_in_group(folder: Path) -> int | None:
    """What is left of a group's limit, files that were read count as free; None where it has no limit."""
    if (most := group_limit(folder)) is None:
        return None
    _, usage, inactive = next(names for names in _OF_GROUPS if (folder / names[0]).exists())
    facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return most - int((folder / usage).read_text()) + int(facts[inactive])


MESSAGES = ("out of memory", "allocate memory", "enough memory", "bad_alloc", "allocation failed", "ALLOC_FAILED")
"""Of the allocators of torch (the CPU's raises a mere RuntimeError), C++, CUDA's libraries and DALI."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in MESSAGES)
