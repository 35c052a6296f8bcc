"""Attempts of a run can't harm each other: each has a number of its own, and what a stale one finishes is not used."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.attempt import claim
from pipeline.checkpoint.attempts import (
    allocate,
    allocate_next,
    latest_attempt,
    raise_if_superseded,
    recorded_rollbacks,
    trusted_checkpoints,
)
from pipeline.checkpoint.reader import FORMAT, checkpoints, digest_of, step_name
from pipeline.checkpoint.weights import latest_checkpoint
from pipeline.errors import RunFailed
from pipeline.run.jsonl import JsonLines
from tests.pipeline.runs import (
    PATIENCE_SECONDS,
    ROOT,
    alive,
    coatnet,
    contents,
    curve,
    events,
    last_state,
    last_step,
    ranks_of,
    started,
    wait_until,
)


def finish_checkpoint(run: Path, step: int, attempt: int) -> Path:
    """An empty checkpoint of an attempt."""
    folder = run / "checkpoints" / step_name(step)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "format": FORMAT, "step": step, "attempt": attempt, "world_size": 1, "block_bytes": 1,
        "parameters": {}, "files": {}, "slices": [],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({"sha256": digest_of(manifest), **manifest}))
    return folder


@given(st.lists(st.none() | st.integers(0, 5), max_size=25))
def test_a_checkpoint_is_trusted_if_the_newest_attempt_of_its_time_finished_it(history):
    """None begins an attempt; with a number, the attempt of that age (0: the newest) finishes its next step."""
    with tempfile.TemporaryDirectory() as folder:
        run, begun, good = Path(folder), -1, []
        for step, age in enumerate(history):
            if age is None:
                begun = allocate(run)
            elif begun - age >= 0:
                made = finish_checkpoint(run, step, begun - age)
                good += [made] * (age == 0)
            assert trusted_checkpoints(run) == good
            assert latest_attempt(run) == begun


@given(st.lists(st.none() | st.integers(0, 3), max_size=20), st.data())
def test_where_records_are_damaged_the_next_one_that_can_be_read_decides(history, data):
    """Nothing good is lost, and nothing stale is trusted while the newest record can be read."""
    with tempfile.TemporaryDirectory() as folder:
        run, begun = Path(folder), -1
        for step, age in enumerate(history):
            if age is None:
                begun = allocate(run)
            elif begun - age >= 0:
                finish_checkpoint(run, step, begun - age)
        good = trusted_checkpoints(run)
        damaged = data.draw(st.sets(st.integers(0, begun))) if begun >= 0 else set()
        for number in damaged:
            contents = data.draw(st.sampled_from([b"", b"{", b"[]", b"null", bytes(99), b"{}", b'{"found": 3}']))
            (run / "attempts" / f"{number}.json").write_bytes(contents)
        found = trusted_checkpoints(run)
        assert set(good) <= set(found) and (begun in damaged or found == good)
        assert allocate(run) == begun + 1 and trusted_checkpoints(run) == found


def test_rollbacks_whose_record_is_lost_are_read_from_the_events(tmp_path):
    first, back = allocate(tmp_path), {"to": 2, "first": 4, "last": 6}
    lines = JsonLines(tmp_path / "events.jsonl")
    for row in ({"event": "rollback", **back}, {"event": "rollback", "to": "two"}, {"event": "attempt_started"}):
        lines.write(row)
    second = allocate_next(tmp_path, first, 2, [back])
    (tmp_path / "attempts" / f"{second}.json").write_bytes(b"")
    assert recorded_rollbacks(tmp_path) == [back]
    allocate(tmp_path)
    assert recorded_rollbacks(tmp_path) == [back]


def test_a_checkpoint_that_was_moved_away_and_back_is_trusted_and_a_stale_one_not(tmp_path):
    allocate(tmp_path)
    saved = finish_checkpoint(tmp_path, 4, 0)
    allocate(tmp_path)
    hidden = saved.rename(tmp_path / "elsewhere")
    allocate(tmp_path)
    assert trusted_checkpoints(tmp_path) == []
    hidden.rename(saved)
    finish_checkpoint(tmp_path, 8, 0)
    assert trusted_checkpoints(tmp_path) == [saved]
    assert latest_checkpoint(tmp_path).folder == saved


def test_numbers_continue_from_the_events_where_records_are_missing(tmp_path):
    lines = JsonLines(tmp_path / "events.jsonl")
    for event in ("attempt_started", "training_resumed", "attempt_started"):
        lines.write({"event": event})
    assert [allocate(tmp_path), allocate(tmp_path)] == [2, 3]


def test_processes_that_start_at_once_get_different_numbers(tmp_path):
    program = "import sys; from pathlib import Path; from pipeline.checkpoint.attempts import allocate\n"
    program += "for _ in range(20): print(allocate(Path(sys.argv[1])))"

    def taken(_: int) -> list[int]:
        done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [int(line) for line in done.stdout.split()]

    with ThreadPoolExecutor(4) as pool:
        numbers = [number for each in pool.map(taken, range(4)) for number in each]
    assert sorted(numbers) == list(range(80))


def test_an_older_attempt_fails_with_the_number_of_the_newer_one(tmp_path):
    first = allocate(tmp_path)
    raise_if_superseded(tmp_path, first)
    allocate(tmp_path)
    with pytest.raises(RunFailed, match="attempt 1 of this run has begun while this one, attempt 0,"):
        raise_if_superseded(tmp_path, first)


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def request_of(digits: Path) -> Callable[[Path], list[object]]:
    def arguments(run: Path) -> list[object]:
        data = [f"data.train={digits}/train", "data.val=null", f"run.dir={run}", "log.every=1"]
        length = ["train.steps=30", "checkpoint.every=3", "checkpoint.keep_last=100"]
        return ["pretrain", "configs/tiny.yaml", "--procs", 2, *data, *length]

    return arguments


def test_a_frozen_attempt_that_wakes_up_after_another_ends_and_changes_nothing(
    request_of: Callable[[Path], list[object]], tmp_path: Path
) -> None:
    """As where a node was cut off: its lock is gone, its processes are not."""
    run = tmp_path / "run"
    stale = started(*request_of(run))
    wait_until(lambda: last_step(run) >= 6 and any((run / "checkpoints").glob(".step-*")), stale, 0.001)
    frozen = [stale.pid, *ranks_of(stale)]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    (run / ".lock").unlink()
    resumed = coatnet(*request_of(run))
    assert resumed.returncode == 0, resumed.stderr
    assert events(run, "training_resumed")[-1]["attempt"] == 1
    state, kept, logged = last_state(run), contents(run / "checkpoints"), curve(run)
    for pid in reversed(frozen):
        os.kill(pid, signal.SIGCONT)
    assert stale.wait(PATIENCE_SECONDS) == 1
    assert stale.stderr is not None and "attempt 1 of this run has begun" in stale.stderr.read()
    assert last_state(run) == state and curve(run) == logged
    now = contents(run / "checkpoints")
    assert [(name, now[name]) for name in sorted(now) if name.startswith("step-")] == [
        (name, kept[name]) for name in sorted(kept) if name.startswith("step-")
    ]
    assert trusted_checkpoints(run) == checkpoints(run / "checkpoints")


def test_ranks_of_torchrun_end_with_it(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pipeline.distributed.launcher import die_with_parent\n"
        "die_with_parent()\n"
        f"open(f'{tmp_path}/pid-{{os.getpid()}}', 'w').close()\n"
        "time.sleep(600)\n"
    )
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", rank],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: len(list(tmp_path.glob("pid-*"))) == 2)
    ranks = [int(file.name[4:]) for file in tmp_path.glob("pid-*")]
    time.sleep(1)
    assert torchrun.poll() is None and all(map(alive, ranks))
    torchrun.kill()
    torchrun.wait()
    wait_until(lambda: not any(map(alive, ranks)))


def test_on_a_file_system_without_locks_a_start_continues_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as Lustre without its option flock, simulated here."""

    def answer(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", answer)
    assert [claim(tmp_path).attempt, claim(tmp_path).attempt] == [0, 1]
    assert "has no locks" in capsys.readouterr().err
