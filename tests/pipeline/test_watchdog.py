"""A run that hangs ends by itself, names the suspect rank, and resumes as if nothing had happened.

Faults are those of hang_injection.py, in real ranks, and SIGSTOP.
"""

from __future__ import annotations

import ast
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.distributed.heartbeat import HeartbeatMonitor
from pipeline.distributed.launcher import free_port
from pipeline.run.events import Events
from pipeline.training.engine import start_process_group
from pipeline.watchdog.stack_dump import (
    AWAITS_RANKS,
    AWAITS_WRITER,
    FOREIGN,
    LOOP,
    Frame,
    StackSnapshot,
    Thread,
    capture,
    format_ranks,
    render,
    suspect_ranks,
    top_frame,
)
from pipeline.watchdog.watchdog import start_watchdog
from tests import forked
from tests.pipeline.hang_injection import MODULE, SLOW_SECONDS
from tests.pipeline.runs import (
    PATIENCE_SECONDS,
    ROOT,
    coatnet,
    curve,
    events,
    last_state,
    last_step,
    ranks_of,
    started,
    wait_until,
)

# ----------------------------------------------------------------------------------------------------------- heartbeats

TIMEOUT_SECONDS, INTERVAL = 100.0, 5.0


def observed_until(end: int, alive: Callable[[int, int], bool], beat: Callable[[int, int], int]) -> HeartbeatMonitor:
    """The monitor of rank 0 of four after so many seconds; it ticks while rank 0 is alive itself."""
    monitor = HeartbeatMonitor(TIMEOUT_SECONDS, INTERVAL, [1, 2, 3], 0.0)
    for second in range(0, end, int(INTERVAL)):
        if alive(0, second):
            monitor.tick(second)
            for rank in range(4):
                if alive(rank, second):
                    monitor.observe(rank, beat(rank, second), second)
            assert not (monitor.lost_ranks() and monitor.is_hung())
    return monitor


@given(st.integers(0, 3), st.integers(0, 200), st.integers(0, 400))
def test_a_rank_that_stops_is_lost_after_the_timeout_and_never_a_hang(rank, stops, after):
    """Ranks make progress only while all live; rank 0, if it stops, reports no rank."""
    monitor = observed_until(stops + after, lambda each, at: each != rank or at < stops, lambda _, at: min(at, stops))
    assert not monitor.is_hung()
    if after > TIMEOUT_SECONDS + 3 * INTERVAL:
        assert monitor.lost_ranks() == ([rank] if rank else [])
    if after < TIMEOUT_SECONDS - INTERVAL:
        assert monitor.lost_ranks() == []


@given(st.integers(0, 200), st.integers(0, 400), st.sets(st.integers(0, 3), min_size=1))
def test_ranks_that_live_without_progress_are_a_hang_after_the_timeout(stops, after, slow):
    """Where one still makes progress, though the others wait for it, there is none."""
    monitor = observed_until(stops + after, lambda *_: True, lambda rank, at: min(at, stops))
    assert monitor.lost_ranks() == []
    if after > TIMEOUT_SECONDS + 3 * INTERVAL:
        assert monitor.is_hung()
    if after < TIMEOUT_SECONDS - INTERVAL:
        assert not monitor.is_hung()
    one_continues = observed_until(
        stops + after, lambda *_: True, lambda rank, at: at if rank in slow else min(at, stops)
    )
    assert not one_continues.is_hung()


@given(st.sets(st.integers(0, 3), min_size=1), st.integers(50, 200), st.integers(1, 10_000))
def test_time_in_which_the_monitor_or_all_ranks_hung_is_held_against_no_rank(still, stops, seconds):
    """As where a laptop sleeps: all resume soon after waking. Where only others hung, they wake in time."""
    seconds = seconds if 0 in still else seconds % int(TIMEOUT_SECONDS - 2 * INTERVAL)
    wakes = stops + seconds + 2 * INTERVAL

    def alive(rank: int, at: int) -> bool:
        return rank not in still or not stops <= at < stops + seconds

    monitor = observed_until(
        int(wakes + TIMEOUT_SECONDS), alive, lambda _, at: at if at < stops or at > wakes else stops
    )
    assert monitor.lost_ranks() == [] and not monitor.is_hung()


# ------------------------------------------------------------------------------------------------------- suspect ranks


def stack(*calls: str) -> tuple[Frame, ...]:
    """Of `file:function` or `file:function:text`, the innermost first."""
    parts = [[*call.split(":"), ""] for call in calls]
    return tuple(Frame(file, len(function), function, text) for file, function, text, *_ in parts)


TRAIN = "pipeline/train.py:train"
IN_ALL_REDUCE = [Thread("MainThread", stack("torch/distributed/distributed_c10d.py:all_reduce", TRAIN))]
IN_GATHER = [Thread("MainThread", stack("deepspeed/runtime/zero/partition_parameters.py:wait", TRAIN))]
READING = [Thread("MainThread", stack("threading.py:wait", "queue.py:get", "data/loader.py:items", TRAIN))]
AUGMENTING = [Thread("MainThread", stack("pipeline/training/mixup.py:mixed", TRAIN))]
ITEM = [Thread("MainThread", stack(f"{TRAIN}:[losses.item(), broken_here]"))]
SYNCHRONIZING = [Thread("MainThread", stack("torch/cuda/streams.py:synchronize", TRAIN))]
IN_BACKWARD = Thread("MainThread", stack("torch/autograd/graph.py:_engine_run_backward", TRAIN))
HOOK_WAITS = [IN_BACKWARD, Thread(FOREIGN, stack("torch/distributed/distributed_c10d.py:all_gather"))]
HOOK_SLEEPS = [IN_BACKWARD, Thread(FOREIGN, stack("models/norm.py:take"))]
SAVING = Thread("MainThread", stack("threading.py:join", "pipeline/checkpoint/writer.py:wait", TRAIN))
WRITES = [SAVING, Thread("checkpoint", stack("pipeline/checkpoint/writer.py:_write_all"))]
AWAITS_PARTS = [SAVING, Thread("checkpoint", stack("pipeline/checkpoint/writer.py:_await_part"))]
KINDS = [IN_ALL_REDUCE, IN_GATHER, READING, AUGMENTING, ITEM, SYNCHRONIZING, HOOK_WAITS, HOOK_SLEEPS, WRITES]


@pytest.mark.parametrize(
    ("threads", "suspects"),
    [
        ([READING, IN_ALL_REDUCE], [0]),
        ([IN_ALL_REDUCE, AUGMENTING], [1]),
        ([IN_ALL_REDUCE, None], [1]),
        ([READING, None, IN_ALL_REDUCE, None], [1, 3]),  # who gives no answer is the first to look at
        ([ITEM, ITEM, READING, ITEM], [2]),  # on GPUs
        ([SYNCHRONIZING, READING], [1]),
        ([HOOK_WAITS, HOOK_WAITS, HOOK_SLEEPS], [2]),
        ([HOOK_WAITS, HOOK_WAITS, [IN_BACKWARD]], [2]),
        ([AWAITS_PARTS, IN_ALL_REDUCE, WRITES], [2]),  # rank 0 waits for the part of rank 2
        ([IN_ALL_REDUCE, IN_ALL_REDUCE, IN_GATHER], [2]),  # other collectives than the others
        ([READING] * 5 + [AUGMENTING], [5]),
        ([READING] * 4, []),  # the storage is gone for all
        ([IN_ALL_REDUCE] * 4, []),
        ([IN_ALL_REDUCE, IN_GATHER], []),
        ([READING, READING, AUGMENTING, AUGMENTING], []),
        ([AUGMENTING], [0]),
    ],
)
def test_the_rank_that_the_others_wait_for_is_suspect(threads, suspects):
    assert suspect_ranks(dict(enumerate(threads)))[0] == suspects


@given(st.lists(st.sampled_from([*KINDS, None]), min_size=1, max_size=9), st.randoms())
def test_suspects_do_not_depend_on_ranks_numbers_and_equal_ranks_are_equally_suspect(threads, chance: random.Random):
    suspects, why = suspect_ranks(dict(enumerate(threads)))
    assert bool(why) == bool(suspects)
    assert [threads[rank] for rank in range(len(threads)) if rank not in suspects].count(None) == 0
    assert not {str(threads[rank]) for rank in suspects} & {
        str(own) for rank, own in enumerate(threads) if rank not in suspects
    }
    assert len(suspects) < len(threads) or len(threads) == 1 or threads.count(None) == len(threads)
    order = chance.sample(range(len(threads)), len(threads))
    assert {order[rank] for rank in suspect_ranks({rank: threads[order[rank]] for rank in range(len(order))})[0]} == {
        *suspects
    }


@given(st.lists(st.sampled_from(KINDS), min_size=3, max_size=9), st.data())
def test_of_many_that_wait_one_that_does_not_is_the_only_suspect(threads, data):
    waiting = [own for own in threads if own not in (READING, AUGMENTING, HOOK_SLEEPS, WRITES)]
    rank = data.draw(st.integers(0, len(waiting)))
    for busy in (READING, AUGMENTING, HOOK_SLEEPS, WRITES):
        ranks = [*waiting[:rank], busy, *waiting[rank:]]
        assert suspect_ranks(dict(enumerate(ranks)))[0] == [rank]


# ------------------------------------------------------------------------------------------------------------ the page


@given(st.sets(st.integers(0, 300), min_size=1))
def test_ranks_are_written_so_that_all_of_them_can_be_read_back(ranks):
    word, _, text = format_ranks(ranks).partition(" ")
    assert (word == "rank") == (len(ranks) == 1)
    parts = [(int(first), int(last or first)) for first, _, last in (part.partition("-") for part in text.split(", "))]
    assert [rank for first, last in parts for rank in range(first, last + 1)] == sorted(ranks)


@given(st.lists(st.sampled_from([*KINDS, None]), min_size=1, max_size=9))
def test_the_page_has_every_rank_once_with_its_process_and_suspects_first(threads):
    found = {
        rank: own and StackSnapshot(1000 + rank, f"n{rank}", rank, "a step", tuple(own))
        for rank, own in enumerate(threads)
    }
    suspects, _ = suspect_ranks(dict(enumerate(threads)))
    text = render("title", found, suspects)
    lines = [
        re.fullmatch(r"rank (\d+): process (\d+) on n(\d+), after step (\d+), .*", line) for line in text.split("\n")
    ]
    numbers = [[int(number) for number in match.groups()] for match in lines if match]
    assert sorted(numbers) == [[rank, 1000 + rank, rank, rank] for rank, own in found.items() if own]
    first = [rank for rank in suspects if found[rank]]
    assert {rank for rank, *_ in numbers[: len(first)]} == {*first}
    for own in filter(None, found.values()):
        assert top_frame(own.threads) in text


def test_a_snapshot_has_the_stacks_of_all_threads_and_survives_json():
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait, name="a thread that waits")
    thread.start()
    try:
        found = capture()
    finally:
        ended.set()
    assert found.process == os.getpid() and StackSnapshot.from_json(found.to_json()) == found
    own = f"{Path(__file__).relative_to(ROOT)}"
    assert own in {frame.file for frame in found.threads[0].frames} and found.threads[0].name == "MainThread"
    (other,) = (thread.frames for thread in found.threads if thread.name == "a thread that waits")
    assert other[0].file == "threading.py" and other[0].function == "wait"


@pytest.mark.parametrize(("file", "function"), [LOOP, AWAITS_WRITER, AWAITS_RANKS])
def test_functions_that_are_known_by_name_exist(file: str, function: str) -> None:
    nodes = ast.walk(ast.parse((ROOT / file).read_text()))
    assert function in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


# --------------------------------------------------------------------------------------------- from the very beginning


def freeze_at_once(run: Path, rank: int, port: int, frozen: int) -> None:
    """A rank of two that watches; one hangs as soon as it does, before the other has monitor of it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    start_process_group()
    with start_watchdog(2.0, Events(run, 0, rank), run / "logs" / "stacks-attempt-0.txt"):
        if rank == frozen:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(PATIENCE_SECONDS)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_rank_frozen_before_the_others_heard_of_it_is_named_by_its_process(tmp_path: Path, frozen: int) -> None:
    port = free_port()
    ranks = [forked.forkserver.Process(target=freeze_at_once, args=(tmp_path, rank, port, frozen)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        ranks[1 - frozen].join(PATIENCE_SECONDS)
        assert ranks[1 - frozen].exitcode == 1
    finally:
        for process in ranks:
            process.kill()
            process.join()
    (event,) = events(tmp_path, "heartbeat_lost")
    assert event["ranks"] == [{"rank": frozen, "process": ranks[frozen].pid, "host": os.uname().nodename}]


# ------------------------------------------------------------------------------------------------------------ real runs

TIMEOUT = 10
STEPS = 8


@pytest.fixture(scope="module")
def request_of(digits: Path) -> Callable[..., list[object]]:
    """A training in which windows are opened at every second step; the first step's time counts, too."""

    def arguments(run: Path, stage: int, *more: object) -> list[object]:
        data = [f"data.train={digits}/train", f"data.val={digits}/val", "data.shuffle_window=2", f"run.dir={run}"]
        length = [f"train.steps={STEPS}", "evaluate.every=null", "checkpoint.every=2", "checkpoint.keep_last=100"]
        other = ["log.every=1", f"run.hang_timeout={TIMEOUT}", f"zero.stage={stage}"]
        return ["pretrain", "configs/tiny.yaml", *data, *length, *other, *more]

    return arguments


def with_fault(ranks: int, fault: str, rank: int, call: int, arguments: list[object]) -> subprocess.CompletedProcess:
    return forked.run(MODULE, ranks, fault, rank, call, *arguments, timeout=PATIENCE_SECONDS)


def check_reports(run: Path, output: str, kind: str, rank: int, ranks: int, within: str | None) -> None:
    """That the line, the event and the page name this rank and where it hangs; None: it gave no answer."""
    (event,) = events(run, kind)
    (named_rank,) = event["ranks"]
    assert named_rank["rank"] == rank and not events(run, "finished")
    stacks = run / "logs" / "stacks-attempt-0.txt"
    assert event["stacks"] == str(stacks)
    (line,) = (line for line in output.splitlines() if line.startswith("coatnet: "))
    assert f"rank {rank} (process {named_rank['process']} on {named_rank['host']})" in line
    assert f"stacks in {stacks}" in line and "the same command resumes" in line
    text = stacks.read_text()
    first, *others = re.findall(r"^=+\n(.+)\n=+\n", text, re.MULTILINE)
    assert first.startswith(f"rank {rank}") and (within or "NO ANSWER") in first and len(others) == ranks - 1
    assert all("SUSPECT" not in heading for heading in others)
    steps = re.findall(r"^rank \d+: process \d+ on .+, (?:after step \d+|in its first step), ", text, re.MULTILINE)
    assert len(steps) == ranks - (not within)
    assert within is None or within in line


TORTURE = pytest.mark.torture


@pytest.mark.parametrize(
    ("stage", "rank", "resumes"),
    [(2, 1, False), *(pytest.param(stage, stage % 2, True, marks=TORTURE) for stage in (1, 2, 3))],
)
def test_a_rank_that_sleeps_forever_is_named_and_the_run_resumes_unchanged(
    request_of: Callable[..., list[object]], stage: int, rank: int, resumes: bool, tmp_path: Path
) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    hung = with_fault(2, "sleep", rank, 6, request_of(run, stage))
    assert hung.returncode == 1, hung.stderr
    check_reports(run, hung.stderr, "hang", rank, 2, "sleep_forever (tests/pipeline/hang_injection.py:")
    for folder in [run, undisturbed] if resumes else []:
        done = coatnet(*request_of(folder, stage), "--procs", 2)
        assert done.returncode == 0, done.stderr
    if resumes:
        assert events(run, "training_resumed")[0]["step"] == 4
        assert curve(run) == curve(undisturbed) and last_state(run) == last_state(undisturbed)


@pytest.mark.torture
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_that_waits_for_data_forever_is_named(
    request_of: Callable[..., list[object]], stage: int, tmp_path: Path
) -> None:
    """Its main thread does, the one that reads is on the page, too."""
    run = tmp_path / "run"
    hung = with_fault(2, "read", 1, 100, request_of(run, stage))
    assert hung.returncode == 1, hung.stderr
    check_reports(run, hung.stderr, "hang", 1, 2, "called by items (data/loader.py:")
    assert " wait_forever " in (run / "logs" / "stacks-attempt-0.txt").read_text()


@pytest.mark.torture
@pytest.mark.parametrize(("stage", "rank"), [(1, 0), (1, 1), (2, 1), (3, 1)])
def test_a_frozen_rank_is_named_and_the_other_shows_where_it_waits(
    request_of: Callable[..., list[object]], stage: int, rank: int, tmp_path: Path
) -> None:
    """In short form it is one of the faults of test_faults.py."""
    run = tmp_path / "run"
    frozen = started(*request_of(run, stage, "train.steps=1000", "--procs", 2))
    wait_until(lambda: last_step(run) >= 2, frozen)
    os.kill(ranks_of(frozen)[rank], signal.SIGSTOP)
    assert frozen.wait(PATIENCE_SECONDS) == 1
    assert frozen.stderr is not None
    check_reports(run, last_line(frozen.stderr.read(), run, rank), "heartbeat_lost", rank, 2, None)


def last_line(output: str, run: Path, frozen: int) -> str:
    """Where rank 0 is frozen, rank 1 speaks, in its log."""
    return output if frozen else (run / "logs" / "rank-1.log").read_text()


@pytest.mark.torture
def test_a_training_on_one_rank_that_hangs_shows_where(request_of: Callable[..., list[object]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    hung = with_fault(1, "sleep", 0, 6, request_of(run, 1))
    assert hung.returncode == 1, hung.stderr
    check_reports(run, hung.stderr, "hang", 0, 1, "sleep_forever (tests/pipeline/hang_injection.py:")


@pytest.mark.torture
def test_a_page_that_cannot_be_written_does_not_keep_the_run_from_ending(
    request_of: Callable[..., list[object]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "logs" / "stacks-attempt-0.txt").mkdir(parents=True)
    hung = with_fault(1, "sleep", 0, 6, request_of(run, 1))
    assert hung.returncode == 1, hung.stderr
    assert f"no progress for {TIMEOUT} s" in hung.stderr and "stacks-attempt-0.txt could not be written" in hung.stderr


@pytest.mark.torture
def test_what_is_only_slow_is_no_hang(request_of: Callable[..., list[object]], tmp_path: Path) -> None:
    """One rank's step of four micro batches, three of them slow, and its evaluation, take longer than hang_timeout."""
    run, timeout = tmp_path / "run", 20
    assert 2 * timeout > 5 * SLOW_SECONDS and 3 * SLOW_SECONDS > timeout > SLOW_SECONDS  # twice: a collective
    length = ["train.steps=1", "train.global_batch=256", f"run.hang_timeout={timeout}"]
    slow = with_fault(2, "slow", 1, 2, request_of(run, 1, *length))
    assert slow.returncode == 0, slow.stderr
    assert events(run, "finished") and not events(run, "hang")


@pytest.mark.torture
def test_ranks_that_were_all_frozen_for_longer_resume_when_they_wake_up(
    request_of: Callable[..., list[object]], tmp_path: Path
) -> None:
    """As where a laptop sleeps."""
    run = tmp_path / "run"
    asleep = started(*request_of(run, 1, "train.steps=100", "--procs", 2))
    wait_until(lambda: last_step(run) >= 2, asleep)
    for pid in ranks_of(asleep):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5 * TIMEOUT)
    for pid in ranks_of(asleep):
        os.kill(pid, signal.SIGCONT)
    assert asleep.wait(PATIENCE_SECONDS) == 0
    assert events(run, "finished") and not events(run, "hang") and not events(run, "heartbeat_lost")
