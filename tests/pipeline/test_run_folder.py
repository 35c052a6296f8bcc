"""Laws of a run's folder: one holder at a time, until its process ends; what may change; lines that survive kills."""

import itertools
import json
import math
import pickle
import random
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.attempt import claim, write_config
from pipeline.checkpoint.attempts import latest_step
from pipeline.checkpoint.reader import step_name
from pipeline.config.parsing import read_config, read_resolved
from pipeline.config.schema import Config
from pipeline.distributed.environment import START
from pipeline.errors import UsageError
from pipeline.plan import config_changes
from pipeline.run import lock
from pipeline.run.jsonl import JsonLines, cut_back, evaluated_steps, read_lines, read_metrics
from pipeline.run.lock import acquire_lock, check_folder
from tests.pipeline.storage_faults import limit_files

ROOT = Path(__file__).parents[2]
HOLDING = """
    import sys
    from pathlib import Path
    from pipeline.attempt import claim
    claimed = claim(Path(sys.argv[1]))
    print(claimed.attempt, flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has claimed the run, alive inside."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDING), run],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "0\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


# -------------------------------------------------------------------------------------------------------------- claims


def test_a_run_is_refused_while_another_process_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_TIMEOUT_SECONDS", 0.3)
    acquire_lock(tmp_path).close()  # an earlier holder is not named
    with holder(tmp_path) as process:
        for _ in range(2):  # a refused claim does not change the holder
            with pytest.raises(
                UsageError, match=rf"already running \(process {process.pid} on \S+\); end it first"
            ) as refused:
                claim(tmp_path)
            assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)  # so it reaches all ranks
        process.send_signal(signal.SIGKILL)
        process.wait()
        claim(tmp_path).lock.close()


def test_a_claim_waits_for_a_killed_holder_to_disappear(tmp_path):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        claim(tmp_path).lock.close()


@pytest.mark.parametrize(
    ("holders", "ours", "is_refused"),
    [("7.0", "7.2", False), ("7.2", "7.0", True), ("7.0", "8.0", True), ("7.0", None, True), (None, "7.1", True)],
)
def test_an_earlier_start_of_the_same_job_is_overtaken_and_nothing_else(
    tmp_path, monkeypatch, holders: str | None, ours: str | None, is_refused: bool
):
    """Slurm has abandoned it; it is still alive, and ends when it sees the newer attempt."""
    monkeypatch.setattr(lock, "LOCK_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setenv(START, holders) if holders else monkeypatch.delenv(START, raising=False)
    with holder(tmp_path):
        monkeypatch.setenv(START, ours) if ours else monkeypatch.delenv(START, raising=False)
        if is_refused:
            with pytest.raises(UsageError, match="already running"):
                claim(tmp_path)
        else:
            assert claim(tmp_path).attempt == 1


def test_a_claim_ends_with_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_TIMEOUT_SECONDS", 0.1)
    first = claim(tmp_path / "new" / "run")
    with pytest.raises(UsageError, match="already running"):
        claim(first.path)
    first.lock.close()
    claim(first.path).lock.close()


def test_a_run_on_a_full_disk_is_held_and_one_in_no_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_TIMEOUT_SECONDS", 0.1)
    limit_files(0)  # no byte can be written
    try:
        held = acquire_lock(tmp_path)
    finally:
        limit_files(-1)
    with pytest.raises(UsageError, match="already running"):
        acquire_lock(tmp_path)
    held.close()
    acquire_lock(tmp_path).close()
    for place in (tmp_path / ".lock", tmp_path / ".lock" / "a" / "run"):
        with pytest.raises(UsageError, match=rf"run\.dir={place}: {tmp_path}/\.lock is not a folder"):
            check_folder(place)
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UsageError, match=rf"run\.dir={tmp_path}: {tmp_path}/\.lock, .*, is a folder: remove it"):
        acquire_lock(tmp_path)


def test_an_attempt_counts_the_starts_before_it(tmp_path):
    for attempt in range(3):
        claimed = claim(tmp_path)
        assert claimed.attempt == attempt
        events = JsonLines(tmp_path / "events.jsonl")
        for event in ("attempt_started", "training_started", "checkpoint"):
            events.write({"event": event, "attempt": attempt})
        events.close()
        with (tmp_path / "events.jsonl").open("a") as file:
            file.write('{"event": "attempt_started", "att')  # killed while it wrote
        claimed.lock.close()
    (tmp_path / "checkpoints" / ".step-00000004.attempt-6.1").mkdir(parents=True)  # which may not be removable
    assert claim(tmp_path).attempt == 7


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match=rf"run\.dir={path}: .*; choose a folder that can be written"):
            claim(path)


def test_the_newest_step_is_that_of_the_newest_complete_checkpoint(tmp_path):
    assert latest_step(tmp_path) is None
    for name in (step_name(9), step_name(100), ".step-00000200.attempt-0"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert latest_step(tmp_path) == 100


# --------------------------------------------------------------------------------------------------- what may change


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("configs") / "small.yaml"
    path.write_text("data: {train: a}\nmodel: {name: coatnet_0}\ntrain: {steps: 10, global_batch: 16, micro_batch: 4}")
    return str(path)


def changed(preset: str, *overrides: str) -> Config:
    return read_config(preset, list(overrides))


def test_neither_a_first_start_nor_the_same_request_changes_anything(tmp_path, preset):
    config = changed(preset, "optim.eps=1e-9", "augment.crop_area=[0.3, 0.7]")
    assert config_changes(tmp_path, config, "pretrain") == {}
    write_config(tmp_path, config)
    assert config_changes(tmp_path, config, "pretrain") == {}
    assert read_resolved(tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_what_does_not_define_the_run_may_change_and_is_listed_with_both_values(tmp_path, preset):
    write_config(tmp_path, changed(preset))
    now = changed(preset, "train.epochs=2", "optim.learning_rate=0.5", "checkpoint.every=7", "train.precision=fp32")
    assert config_changes(tmp_path, now, "pretrain") == {
        "train.epochs": [None, 2.0],
        "train.steps": [10, None],
        "train.precision": ["bf16", "fp32"],
        "optim.learning_rate": [0.001, 0.5],
        "checkpoint.every": [1000, 7],
    }


def test_what_defines_the_run_may_not_change_and_every_such_key_is_named(tmp_path, preset):
    write_config(tmp_path, changed(preset))
    now = changed(preset, "run.seed=3", "train.global_batch=32", "model.name=coatnet_1", "log.every=1")
    with pytest.raises(UsageError) as refused:
        config_changes(tmp_path, now, "finetune")
    message = str(refused.value)
    assert "\n" not in message and "log.every" not in message
    for change in ("run.seed was 0, now 3", "train.global_batch was 16, now 32", "model.name was 'coatnet_0', now"):
        assert change in message
    assert "or finetune into another folder with run.dir=..." in message
    assert read_resolved(tmp_path / "config.yaml") == changed(preset)


# ------------------------------------------------------------------------------------------------------------- lines

rows = st.lists(
    st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False) | st.none()), max_size=8
)


@given(rows, st.data())
def test_after_a_kill_in_a_line_all_complete_and_later_ones_are_read(tmp_path_factory, written, data):
    path = tmp_path_factory.mktemp("lines") / "deep" / "events.jsonl"
    lines = JsonLines(path)
    for row in written:
        lines.write(row)
    lines.close()
    contents = path.read_bytes()
    kept = data.draw(st.integers(0, len(contents)))
    path.write_bytes(contents[:kept])
    ends = itertools.accumulate(len(line) for line in contents.splitlines(keepends=True))
    whole = sum(end - 1 <= kept for end in ends)  # a line that lacks only its newline is complete
    again = JsonLines(path)
    again.write({"later": 1})
    again.close()
    path_of_all = path.with_name("all.jsonl")
    path_of_all.write_bytes(contents)
    assert list(read_lines(path)) == [*itertools.islice(read_lines(path_of_all), whole), {"later": 1}]


def test_anything_but_objects_is_skipped_and_a_missing_file_is_empty(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"a": 1}\n\n[1]\n3\n"x"\n{"b"\n\xff\n{"a": NaN}\n\0\0\0\n{"a": "x"}\n{"c": 3}\n{"a": 2}')
    assert list(read_lines(path, a=int)) == [{"a": 1}, {"a": 2}]
    assert list(read_lines(path)) == [{"a": 1}, {"a": "x"}, {"c": 3}, {"a": 2}]
    assert list(read_lines(tmp_path / "nothing.jsonl")) == []
    cut_back(tmp_path / "nothing.jsonl", 3)
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_is_flushed_at_once_and_valid_json_with_any_numbers(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"loss": math.nan, "rate": math.inf, "fine": 1e-5, "name": "straße"})
    (row,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row, parse_constant=pytest.fail) == {"loss": "nan", "rate": "inf", "fine": 1e-5, "name": "straße"}
    lines.close()


@given(
    st.lists(st.none() | st.integers(0, 20), max_size=10),
    st.integers(0, 20),
    st.booleans(),
)
def test_cutting_back_keeps_the_lines_up_to_the_step_unchanged(tmp_path_factory, written, step, killed):
    """And those of no step, which a person wrote."""
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    lines = JsonLines(path)
    for number in [step for step in written if step is None] + sorted({step for step in written if step is not None}):
        lines.write({"loss": 0.5} if number is None else {"step": number, "loss": number / 7})
    lines.close()
    before = path.read_text().splitlines(keepends=True)
    if killed:
        with path.open("a") as file:
            file.write('{"step": 0, "lo')
    cut_back(path, step)
    assert path.read_text() == "".join(line for line in before if json.loads(line).get("step", 0) <= step)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=6))
def test_a_file_that_is_never_cut_back_reads_as_one_that_was_at_every_start(tmp_path_factory, starts):
    """Starts from a step, of so many steps, of which every second is evaluated."""
    cut, uncut = tmp_path_factory.mktemp("cut"), tmp_path_factory.mktemp("uncut")
    for start, (first, steps) in enumerate(starts):
        cut_back(cut / "metrics.jsonl", first)
        for run in (cut, uncut):
            lines = JsonLines(run / "metrics.jsonl")
            for step in range(first + 1, first + steps + 1):
                lines.write({"step": step, "loss": start})
                if step % 2 == 0:
                    lines.write({"step": step, "eval_loss": start})
            lines.close()
    assert read_metrics(uncut) == read_metrics(cut)
    assert evaluated_steps(uncut) == {row["step"] for row in rows_of(cut) if row.get("eval_loss") is not None}
    cut_back(uncut / "metrics.jsonl", 99)
    assert rows_of(uncut) == rows_of(cut)


def rows_of(run: Path) -> list[dict]:
    return list(read_lines(run / "metrics.jsonl"))


def test_a_kill_leaves_complete_lines_and_at_most_half_a_last_one(tmp_path):
    program = """
        import itertools, sys
        from pathlib import Path
        from pipeline.run.jsonl import JsonLines
        lines = JsonLines(Path(sys.argv[1]))
        print("begun", flush=True)
        for number in itertools.count():
            lines.write({"number": number, "text": "x" * (number * 37 % 20000)})
    """
    path, choice = tmp_path / "lines.jsonl", random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), path], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline()
        while not path.exists() or path.stat().st_size < choice.randrange(1, 10**6):
            pass
        process.kill()
        process.wait()
        process.stdout.close()
        numbers = [row["number"] for row in read_lines(path)]
        assert numbers == list(range(len(numbers))) and numbers
        assert len(re.findall(rb"\n", path.read_bytes())) in (len(numbers), len(numbers) - 1)
        path.unlink()
