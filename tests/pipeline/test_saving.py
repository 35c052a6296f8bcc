"""What is beside the training never ends it: saves that fail, old files that stay, records that cannot be written."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkpoint.reader import CheckpointReader, checkpoints, step_name, step_of
from pipeline.monitoring.metrics import MetricsFile
from pipeline.monitoring.tensorboard import TensorBoard
from tests.pipeline.batch_runs import on_ranks
from tests.pipeline.runs import (
    PATIENCE_SECONDS,
    command,
    curve,
    events,
    last_state,
    last_step,
    rows,
    started,
    wait_until,
)
from tests.pipeline.storage_faults import FULL, MUTE, limit_files
from tests.pipeline.test_monitoring import in_tensorboard, shown_by_tensorboard

STEPS = 8
Failing = dict[int, tuple[int, str]]
"""The steps whose save fails, each with the rank that cannot write, and how."""


def arguments(digits: Path, run: Path, *more: object) -> list[str]:
    data = [f"data.train={digits}/train", "data.val=null", f"run.dir={run}", "evaluate.every=null", "log.every=1"]
    sizes = ["train.global_batch=16", "train.micro_batch=4", "checkpoint.every=1", f"train.steps={STEPS}"]
    return list(map(str, ["configs/tiny.yaml", *data, *sizes, *more]))


# ------------------------------------------------------------------------------------------------- saves that fail


def promise(failing: Failing) -> tuple[int, int]:
    """The last step that a run does, and that of its newest good checkpoint."""
    saved = in_a_row = 0
    for step in range(1, STEPS + 1):
        saved, in_a_row = (saved, in_a_row + 1) if step in failing else (step, 0)
        if in_a_row == 3:
            return step, saved
    return STEPS, saved


def draw(chance: random.Random) -> dict[str, Failing]:
    """A schedule of each kind: the run recovers, ends after three failures in a row, cannot save its last step."""
    found: dict[str, Failing] = {}
    while len(found) < 3:
        failing = {step: (chance.randrange(2), FULL) for step in range(1, STEPS + 1) if chance.random() < 0.5}
        failing |= {step: (1, MUTE) for step in list(failing)[:-1:2]}
        last, saved = promise(failing)
        kind = "recovers" if saved == STEPS else "ends early" if last < STEPS else "ends unsaved"
        if len(failing) > 2 and saved > 0:
            found.setdefault(kind, failing)
    return found


STALLED = {"copy": [0, 2, 5], "live": [1, 2, 5]}
"""The second where no copy of the state fits into memory."""


@pytest.fixture(scope="module")
def runs(digits: Path) -> tuple[Path, dict[str, Failing]]:
    """A run that nothing happened to, one of each schedule, and two in which a rank's writing stalls; those that ended
    are resumed where nothing fails any more."""
    folder, schedules = digits / "saving", draw(random.Random(0))
    folder.mkdir()

    def job(name: str, **faults: Any) -> dict[str, Any]:
        return {"arguments": arguments(digits, folder / name), **({"storage": faults} if faults else {})}

    failing = [job(name, failing=schedule) for name, schedule in schedules.items()]
    stalled = [job(name, stalled=how, blocking=name == "live") for name, how in STALLED.items()]
    on_ranks(2, [job("whole"), *failing, *stalled], folder)
    for name in ("ends early", "ends unsaved"):
        shutil.copytree(folder / name, folder / f"{name}, resumed")
    on_ranks(2, [job(f"{name}, resumed") for name in ("ends early", "ends unsaved")], folder)
    return folder, schedules


@pytest.mark.parametrize("kind", ["recovers", "ends early", "ends unsaved"])
def test_a_run_outlives_failed_saves_up_to_three_in_a_row(runs: Any, kind: str) -> None:
    folder, schedules = runs
    last, saved = promise(schedules[kind])
    steps = [row["step"] for row in events(folder / kind, "checkpoint_failed")]
    assert list(dict.fromkeys(steps)) == sorted(step for step in schedules[kind] if step <= last)
    root = folder / kind / "checkpoints"
    assert max(map(step_of, checkpoints(root))) == saved and set(root.iterdir()) == set(checkpoints(root))
    assert max(row["step"] for row in rows(folder / kind / "metrics.jsonl")) == last
    ends = {(folder / kind / f"ended-{rank}.txt").read_text() for rank in (0, 1)}  # alike
    if kind == "recovers":
        assert ends == {""} and events(folder / kind, "finished")
    else:
        (end,) = ends
        assert "cannot be written: " in end and end.endswith(f"the same command resumes from step {saved}")


@pytest.mark.parametrize("name", ["recovers", "ends early, resumed", "ends unsaved, resumed", *STALLED])
def test_whatever_saves_failed_the_trained_run_is_the_same_to_the_bit(runs: Any, name: str) -> None:
    folder, _ = runs
    assert curve(folder / name) == curve(folder / "whole") and last_state(folder / name) == last_state(folder / "whole")


@pytest.mark.parametrize("name", STALLED)
def test_steps_do_not_wait_for_a_writer_that_stalls_and_saves_are_left_out(runs: Any, name: str) -> None:
    run, (_, first, end) = runs[0] / name, STALLED[name]
    skipped = [(row["step"], row["writing"]) for row in events(run, "checkpoint_skipped")]
    assert skipped == [(step, first) for step in range(first + 1, end)]
    assert [row["step"] for row in events(run, "checkpoint_failed")] == [first]  # a pipe cannot be synced
    assert [row["step"] for row in events(run, "checkpoint")] == [1, *range(end, STEPS + 1)]
    assert {row["blocking"] for row in events(run, "checkpoint")} == {name == "live"}


# --------------------------------------------------------------------------------------- old files, and other files


def without_rights_of_root(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command whose user owns the files and is bound by their modes."""
    prefix = ["unshare", "-U", "--map-user=54321", "--map-group=54321"] if os.geteuid() == 0 else []
    if prefix and subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a user namespace")
    return subprocess.run([*prefix, *command(*arguments)], capture_output=True, text=True, timeout=PATIENCE_SECONDS)


@pytest.mark.torture
def test_what_can_neither_be_removed_nor_written_ends_no_run(digits: Path, tmp_path: Path) -> None:
    """A protected checkpoint, a leftover that stays, files of others, no logs, and a folder that takes no curves."""
    run = tmp_path / "run"
    root, few = run / "checkpoints", ["checkpoint.keep_last=1", "log.profile=3-3"]
    first = without_rights_of_root("pretrain", *arguments(digits, run, "train.steps=2", "checkpoint.keep_last=2"))
    assert first.returncode == 0, first.stderr
    stuck, stranger = root / ".step-00000001.pruned" / "folder", root / ".step-00000002.swp"
    stuck.mkdir(parents=True)
    shutil.rmtree(run / "logs")
    for file in (stuck / "file", stranger, run / "profile", run / "logs"):
        file.touch()
    for folder in (root / step_name(1), stuck, run / "tensorboard"):
        folder.chmod(0o555)
    for steps in (4, 5):
        done = without_rights_of_root("pretrain", *arguments(digits, run, f"train.steps={steps}", *few))
        assert done.returncode == 0, done.stderr
        names = {root / step_name(1), root / step_name(steps), stuck.parent, stranger}
        assert set(root.iterdir()) == names and (stuck / "file").exists()
        CheckpointReader(root / step_name(1)).verify_all()
        attempt = events(run, "attempt_started")[-1]["attempt"]
        told = [row["checkpoint"] for row in events(run, "prune_failed") if row["attempt"] == attempt]
        assert sorted(told) == [".step-00000001.pruned", step_name(1)]
        assert done.stderr.count(f"warning: {root / step_name(1)} cannot be removed: it is write-protected") == 1
        assert "tensorboard" in done.stderr and "lacks" in done.stderr
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert any("profile" in row["file"] for row in events(run, "write_failed"))


@given(st.lists(st.tuples(st.sampled_from(["row", "row", "full", "free"]), st.integers(0, 400)), max_size=25))
def test_records_that_a_full_disk_refused_are_written_whole_later(
    tmp_path_factory: pytest.TempPathFactory, happens: list[tuple[str, int]]
) -> None:
    """Wherever in a record the disk is full; and what is in the files can always be read."""
    run, step = tmp_path_factory.mktemp("run"), 0
    told: list[Path] = []
    sinks = [
        MetricsFile(run, 0, lambda path, _: told.append(path)),
        TensorBoard(run / "tensorboard", 0, 0, lambda path, _: told.append(path)),
    ]
    try:
        for what, number in [*happens, ("free", 0), ("row", 0)]:
            if what == "row":
                step += 1
                for sink in sinks:
                    sink.write({"step": step, "loss": number / 7, "lr": 1e-3})
            else:
                full = (run / "metrics.jsonl").stat().st_size + number
                limit_files(full if what == "full" else -1)
            lines = (run / "metrics.jsonl").read_bytes()
            assert len(rows(run / "metrics.jsonl")) == lines.count(b"\n") and lines[-1:] in (b"", b"\n")
            shown_by_tensorboard(run / "tensorboard")
    finally:
        limit_files(-1)
    for sink in sinks:
        sink.close(done=True)
    found = rows(run / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, step + 1))
    assert shown_by_tensorboard(run / "tensorboard") == [point for row in found for point in in_tensorboard(row)]
    assert len(told) == len(set(told))


# ----------------------------------------------------------------------------------------------------------- the mirror


@pytest.mark.torture
@pytest.mark.parametrize("end", ["finished", "interrupted"])
def test_a_mirror_that_hangs_does_not_fail_a_run_that_ends(end: str, digits: Path, tmp_path: Path) -> None:
    """For longer than a collective may take; a pipe that nobody writes to, for a file system that does not answer."""
    run, timeout = tmp_path / "run", 5
    pipe = run / "source.json"  # which is copied, too
    run.mkdir()
    os.mkfifo(pipe)
    more = [f"run.hang_timeout={timeout}", f"checkpoint.mirror={tmp_path / 'mirror'}", "--procs", 2]
    steps = "train.steps=2" if end == "finished" else "train.steps=100000"
    process = started("pretrain", *arguments(digits, run, *more, steps))
    if end == "interrupted":
        wait_until(lambda: last_step(run) >= 1, process)
        process.send_signal(signal.SIGTERM)
    wait_until(lambda: bool((run / "events.jsonl").exists() and events(run, end)), process)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2.2 * timeout)
    with pipe.open("wb"):
        pipe.unlink()  # the next copy is without it
    assert process.wait(PATIENCE_SECONDS) == (0 if end == "finished" else 3)
