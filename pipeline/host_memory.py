"""How much memory of this machine is still to be had, by what the kernel says.

Next: save.py.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path


def available_bytes() -> int:
    """Bytes that may be taken without swapping: of the machine, and of every control group that this process is in."""
    return min([_of_machine(), *filter(None, map(of_group, _groups()))])


def of_process() -> int | None:
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


def _of_machine() -> int:
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


def of_group(folder: Path) -> int | None:
    """What is left of a group's limit, files that were read count as free; None where it has no limit."""
    for limit, usage, inactive in (
        ("memory.max", "memory.current", "inactive_file"),  # version 2
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
    ):
        if (folder / limit).exists() and (most := (folder / limit).read_text().strip()) != "max":
            facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return int(most) - int((folder / usage).read_text()) + int(facts[inactive])
    return None
