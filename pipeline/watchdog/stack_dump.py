"""The Python stacks of all ranks, side by side: which ranks are suspect, and the page that shows it.

On a CPU a rank waits for others inside a collective. On a GPU a collective only queues work, and the host waits where
it reads a result (`.item()`); there a thread of autograd, which Python did not start, may run DeepSpeed's hooks for the
main thread. A kernel that hangs by itself looks from Python like one that waits for others.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from pipeline.distributed.environment import host_name
from pipeline.distributed.heartbeat import last_beat
from pipeline.formatting import format_ranges

OURS = ("data/", "models/", "pipeline/")
WATCHING = "heartbeats"
"""The name of threads that are left out."""
FOREIGN = "a thread that Python did not start"
_WRAPPERS = {
    "deepspeed/utils/nvtx.py", "torch/_compile.py", "torch/_dynamo/eval_frame.py",
    "torch/distributed/c10d_logger.py", "torch/utils/_contextlib.py",
}  # fmt: skip
"""Frames that only call the next, left out."""
_READS = (".item()", ".tolist()")
LOOP = ("pipeline/train.py", "train_steps")
AWAITS_WRITER = ("pipeline/checkpoint/writer.py", "wait")
AWAITS_RANKS = ("pipeline/checkpoint/writer.py", "_await_part")
"""Functions of ours that are known by file and name, as frames have them; a test holds that they are there."""
_FOR_A_THREAD = {("torch/autograd/graph.py", "_engine_run_backward"): FOREIGN, AWAITS_WRITER: "checkpoint"}
"""Where the main thread waits for another one of its process, and that one's name."""


class Frame(NamedTuple):
    file: str
    """Below the folder that Python found it in."""
    line: int
    function: str
    text: str

    def __str__(self) -> str:
        return f"{self.function} ({self.file}:{self.line})"


class Thread(NamedTuple):
    name: str
    frames: tuple[Frame, ...]
    """The innermost call first."""


@dataclass(frozen=True)
class StackSnapshot:
    """The stacks of a rank's threads, the main one first, and its last beat."""

    process: int
    host: str
    step: int | None
    beat: str
    threads: tuple[Thread, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> StackSnapshot:
        facts = json.loads(text)
        threads = tuple(Thread(name, tuple(Frame(*frame) for frame in frames)) for name, frames in facts.pop("threads"))
        return StackSnapshot(threads=threads, **facts)


def capture() -> StackSnapshot:
    """The stacks of this process now."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: (item[0] != main, names.get(item[0], "")))
    threads = [Thread(names.get(ident, FOREIGN), _frames(frame)) for ident, frame in frames]
    beat = last_beat()
    kept = tuple(thread for thread in threads if thread.name != WATCHING)
    return StackSnapshot(os.getpid(), host_name(), beat.step, beat.what, kept)


def _frames(frame: FrameType) -> tuple[Frame, ...]:
    places = sorted({str(Path(__file__).parents[2]), *filter(None, sys.path)}, key=len, reverse=True)
    found: list[Frame] = []
    for each in traceback.StackSummary.extract(traceback.walk_stack(frame)):
        place = next((place for place in places if each.filename.startswith(f"{place}/")), None)
        file = each.filename[len(place) + 1 :] if place else each.filename
        found.append(Frame(file, each.lineno or 0, each.name, each.line or ""))
        if (file, each.name) == LOOP:
            break  # its callers are the same everywhere
    while len(found) > 1 and found[-1].file == "threading.py":  # how threads begin
        del found[-1]
    return tuple(frame for frame in found if frame.file not in _WRAPPERS) or tuple(found)


# ------------------------------------------------------------------------------------------------------- suspect ranks


def suspect_ranks(threads: Mapping[int, Sequence[Thread] | None]) -> tuple[list[int], str]:
    """The ranks that may be why the run hangs, maybe none, and why; of each its threads, the main one first, None: no
    answer."""
    silent = [rank for rank, stacks in threads.items() if stacks is None]
    if silent:
        return silent, "no answer"
    answers = {rank: stacks for rank, stacks in threads.items() if stacks is not None}
    if len(answers) == 1:
        return list(answers), "the only rank"
    busy = [rank for rank, stacks in answers.items() if not _waits(stacks)]
    if 0 < len(busy) < len(answers):
        return busy, "while all others wait"
    places = {rank: _place(stacks) for rank, stacks in answers.items()}
    most, count = Counter(places.values()).most_common(1)[0]
    if len(answers) / 2 < count < len(answers):
        return [rank for rank, place in places.items() if place != most], "unlike most"
    return [], ""


def _waits(threads: Sequence[Thread]) -> bool:
    """Whether a rank waits for others, by the innermost call of its decisive thread."""
    frame = _decisive(threads).frames[0]
    if frame.file.startswith("torch/cuda/"):
        return frame.function == "synchronize"
    if frame.file.startswith("pipeline/"):
        return (frame.file, frame.function) == AWAITS_RANKS or any(read in frame.text for read in _READS)
    return frame.file.startswith(("torch/distributed/", "deepspeed/"))


def _decisive(threads: Sequence[Thread]) -> Thread:
    """The main thread, or the one that it waits for."""
    main, *rest = threads
    name = next(
        (_FOR_A_THREAD[place] for frame in main.frames if (place := (frame.file, frame.function)) in _FOR_A_THREAD),
        None,
    )
    return next((thread for thread in rest if thread.name == name), main)


def _place(threads: Sequence[Thread]) -> tuple[tuple[Frame, ...], ...]:
    """What is compared; threads that read ahead differ by chance."""
    return threads[0].frames, _decisive(threads).frames


def top_frame(threads: Sequence[Thread]) -> str:
    """The innermost call of the decisive thread, and the innermost of ours that led to it."""
    frames = _decisive(threads).frames
    ours = next((frame for frame in frames if frame.file.startswith(OURS)), frames[0])
    return str(frames[0]) if ours is frames[0] else f"{frames[0]}, called by {ours}"


# ------------------------------------------------------------------------------------------------------------- the page


def render(title: str, found: Mapping[int, StackSnapshot | None], suspects: Sequence[int]) -> str:
    """The page: ranks with equal stacks together, the suspects first."""
    groups: dict[object, list[int]] = {}
    for rank in sorted(found, key=lambda rank: (rank not in suspects, rank)):
        answer = found[rank]
        groups.setdefault((rank in suspects, answer and _place(answer.threads)), []).append(rank)
    lines = [title, ""]
    for ranks in groups.values():
        lines += _group(ranks, found, ranks[0] in suspects)
    return "\n".join(lines)


def _group(ranks: Sequence[int], found: Mapping[int, StackSnapshot | None], suspect: bool) -> list[str]:
    answers = {rank: answer for rank in ranks if (answer := found[rank]) is not None}
    rule = "=" * 120
    if not answers:
        return [rule, f"{format_ranks(ranks)}: NO ANSWER", rule, ""]
    first = next(iter(answers.values()))
    lines = [rule, f"{format_ranks(ranks)}{' SUSPECT' if suspect else ''}: {top_frame(first.threads)}", rule]
    for rank, each in answers.items():
        at = f"after step {each.step}" if each.step is not None else "in its first step"
        lines.append(f"rank {rank}: process {each.process} on {each.host}, {at}, last finished: {each.beat}")
    threads: dict[tuple[Frame, ...], dict[str, list[int]]] = {}
    for rank, each in answers.items():
        for number, thread in enumerate(each.threads):
            name = "main thread, innermost call first" if number == 0 else thread.name
            threads.setdefault(thread.frames, {}).setdefault(name, []).append(rank)
    for frames, names in threads.items():
        having = sorted({rank for ranks in names.values() for rank in ranks})
        of = "" if having == sorted(answers) else f" ({format_ranks(having)})"
        lines += ["", f"{', '.join(names)}{of}:", *_table(frames)]
    return [*lines, ""]


def _table(frames: Sequence[Frame]) -> list[str]:
    places = [f"{frame.file}:{frame.line}" for frame in frames]
    wide, names = max(map(len, places)), max(len(frame.function) for frame in frames)
    return [f"  {at:<{wide}}  {f.function:<{names}}  {f.text}" for at, f in zip(places, frames, strict=True)]


def format_ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0, 2-7`."""
    found = list(ranks)
    return f"rank{'s' if len(found) > 1 else ''} {', '.join(format_ranges(found))}"
