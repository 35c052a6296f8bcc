"""`coatnet report`: where a run's time went, and a page that a browser shows whole, of runs in any state."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.commands.report import judge_run, report, report_when_done
from pipeline.errors import UsageError
from pipeline.formatting import format_percent, format_seconds
from pipeline.report.accounting import (
    EVALUATION,
    HUNG,
    KINDS,
    PRODUCTIVE,
    REPEATED,
    STALL,
    START_UP,
    STOPPED,
    WAITING,
    Start,
    account,
)
from pipeline.report.against_plan import against_plan
from pipeline.report.record import read_record
from pipeline.run.lock import acquire_lock
from tests.browser import chromium
from tests.pipeline.runs import ROOT, coatnet, events, rows

TINY = ROOT / "configs" / "tiny.yaml"

# ----------------------------------------------------------------------------------------------------------------- time

SECONDS = st.floats(0.05, 500)


class Simulated:
    """A run whose seconds of each kind are known, and what it writes of them."""

    def __init__(self, by_slurm: bool) -> None:
        self.now, self.step, self.saved, self.attempt = 1e9, 0, 0, -1
        self.events: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.starts: list[Start] = []
        self.submitted = [self.now] if by_slurm else []
        self.seconds = [0.0] * len(KINDS)

    def spend(self, kind: int, seconds: float) -> None:
        self.seconds[kind] += seconds
        self.now += seconds

    def event(self, event: str, **facts: Any) -> None:
        self.events.append({"time": self.now, "attempt": self.attempt, "event": event, **facts})

    def begin(self, before: float, start_up: float) -> None:
        """A start, `before` which it waits, or nobody starts it."""
        if self.submitted:
            self.spend(WAITING, before)
            self.starts.append(Start(self.now))
            self.spend(START_UP, start_up)
        elif self.attempt >= 0:
            self.spend(STOPPED, before)
        began, self.attempt = self.now, self.attempt + 1
        self.spend(START_UP, start_up)
        left = {"left_step": self.rows[-1]["step"], "left_time": self.rows[-1]["time"]} if self.rows else {}
        self.event("attempt_started", began=began, world_size=2, **left)

    def train(self, start_up: float, steps: int, each: float, pauses: dict[int, float]) -> None:
        self.step, first = self.saved, self.saved
        self.rows = [row for row in self.rows if row["step"] <= self.step]
        self.event("training_resumed" if self.step else "training_started", step=self.step)
        self.spend(START_UP, start_up)
        self.event("first_step", step=first + 1)
        for self.step in range(first + 1, first + steps + 1):
            if self.step > first + 1:
                self.spend(PRODUCTIVE, each)
            self.rows.append({"step": self.step, "loss": 1.0, "time": self.now})
            for kind, event, every in ((STALL, "checkpoint_stall", 3), (EVALUATION, "evaluation", 5)):
                if self.step % every == 0:
                    self.spend(kind, pauses[kind])
                    self.event(event, step=self.step, seconds=pauses[kind])
                    self.saved = self.step if kind == STALL else self.saved
        self.lost = (self.step - max(self.saved, first + 1)) * each if steps else 0.0

    def end(self, how: str, after: float) -> None:
        if how == "killed":
            self.spend(REPEATED if self.starts else STOPPED, after)
        elif how == "hang":
            self.spend(HUNG, after)
            self.event("hang", ranks=[])
        elif how == "rollback":
            self.event("rollback", to=self.saved, first=self.saved + 1, last=self.step, reason="")
            self.attempt += 1
        else:
            self.saved, self.lost = self.step, 0.0
            self.event(how, step=self.step)
        self.seconds[PRODUCTIVE] -= self.lost
        self.seconds[REPEATED] += self.lost
        if self.starts and how != "rollback":
            self.starts[-1] = Start(self.starts[-1].began, self.now, "crash", again=True)


LIVES = st.lists(
    st.tuples(st.sampled_from(["killed", "hang", "rollback", "interrupted"]), st.integers(1, 40), SECONDS, SECONDS),
    max_size=6,
)


@given(st.booleans(), LIVES, st.integers(1, 40), st.sampled_from(["finished", "alive"]), st.tuples(SECONDS, SECONDS))
def test_each_second_of_a_run_is_of_the_kind_that_it_was_spent_on(
    by_slurm: bool, lives: list[tuple[str, int, float, float]], steps: int, how: str, pauses: tuple[float, float]
) -> None:
    run, hang_timeout, follows_rollback = Simulated(by_slurm), 77.0, False
    for end, count, other, each in [*lives, (how, steps, 3.0, 2.0)]:
        if not follows_rollback:
            run.begin(other, other / 3)
        run.train(other / 2, count, each, {STALL: pauses[0], EVALUATION: pauses[1]})
        if end == "alive":
            break
        run.end(end, hang_timeout if end == "hang" else other)
        follows_rollback = end == "rollback"
    now = run.now if how == "alive" else None
    found = account(run.events, run.rows, run.starts, run.submitted, hang_timeout, now)
    assert found.seconds == pytest.approx(run.seconds, rel=1e-3, abs=0.01)
    assert found.wall == pytest.approx(run.now - 1e9, rel=1e-6, abs=1e-3)
    assert found.goodput == pytest.approx(run.seconds[PRODUCTIVE] / sum(run.seconds[:WAITING]), rel=1e-3)


def test_of_an_older_run_all_is_accounted_for_that_its_events_tell() -> None:
    run = [(0, "attempt_started", {}), (1, "training_started", {"step": 0}), (21, "checkpoint", {"step": 20})]
    run += [(30, "attempt_started", {}), (32, "training_resumed", {"step": 10}), (52, "finished", {"step": 30})]
    events = [{"time": at, "attempt": at // 30, "event": event, **facts} for at, event, facts in run]
    found = account(events, [])
    assert found.wall == 52 and found.seconds[STOPPED] == 9
    assert (found.seconds[PRODUCTIVE], found.seconds[REPEATED], found.seconds[START_UP]) == (30, 10, 3)
    assert account([], []).goodput is None


# ----------------------------------------------------------------------------------------------------------------- page

HOSTILE = "<script>alert(1)<b>", "a & 'b' $x$"
"""Names of classes, and with them of samples."""


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks on two classes with such names, that has just finished; its data is beside it."""
    folder = tmp_path_factory.mktemp("report")
    for digit, name in zip((3, 8), HOSTILE, strict=True):
        shutil.copytree(digits / "digits" / "val" / str(digit), folder / "images" / name)
    assert coatnet("data", "pack", folder / "images", folder / "packed").returncode == 0
    sizes = ["train.steps=6", "train.global_batch=32", "train.micro_batch=16", "evaluate.every=3", "checkpoint.every=4"]
    data = [f"data.train={folder}/packed", f"data.val={folder}/packed", f"run.dir={folder}/run"]
    done = coatnet("pretrain", TINY, "--procs", 2, *sizes, *data, "log.samples=false", "optim.warmup_steps=2")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy that was killed in its second attempt, without its data and its configuration's preset."""
    run = shutil.copytree(finished, tmp_path / "run")
    for line in ("config.yaml", "events.jsonl"):
        text = (run / line).read_text()
        (run / line).write_text(text.replace(str(finished.parent / "packed"), str(tmp_path / "gone")))
    rows_ = [row for row in rows(run / "events.jsonl") if row["event"] != "finished"]
    again = [{**row, "attempt": 1, "time": row["time"] + 60} for row in rows_ if row["event"] != "evaluation"]
    again += [
        {"event": "step_skipped", "attempt": 1, "time": again[-1]["time"], "step": 5, "reason": "<i>", "keys": []}
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows_, *again]) + '{"event": "fini')
    shutil.rmtree(run / "checkpoints")
    (run / "report.html").unlink()
    return run


def test_a_finished_run_has_its_page_and_its_seconds_are_those_of_its_events(finished: Path) -> None:
    page, record = (finished / "report.html").read_text(), read_record(finished)
    assert "run: done" in page and "Training samples as" not in page and f"coatnet report {finished}" in page
    (attempt,) = record.accounts.attempts
    assert (attempt.first, attempt.first_done, attempt.last, attempt.ranks) == (0, 1, 6, 2)
    (started,) = events(finished, "attempt_started")
    assert started["began"] <= started["time"]
    assert record.accounts.wall == pytest.approx(record.events[-1]["time"] - started["began"], rel=0.01)
    evaluations = [row["seconds"] for row in events(finished, "evaluation")]
    assert len(evaluations) == 2 and record.accounts.seconds[EVALUATION] == pytest.approx(sum(evaluations), abs=0.01)


def test_a_run_stands_beside_what_it_would_have_cost_by_plan(finished: Path) -> None:
    record = read_record(finished)
    with pytest.raises(UsageError, match="fewer than ten"):  # a CPU's, which is calibrated by the run itself
        against_plan(record)
    on_gpu = [{**event, "device": "NVIDIA H100 80GB HBM3"} for event in record.events]
    found = against_plan(replace(record, events=on_gpu))
    rows_ = {name: values for name, *values in found.rows}
    assert rows_["goodput"][1] == format_percent(record.accounts.goodput or 0, 1)
    assert rows_["6 steps"][1] == format_seconds(record.accounts.seconds[PRODUCTIVE])
    (began,), last = events(finished, "attempt_started"), record.events[-1]
    assert rows_["the same, over all ranks"][1] == format_seconds(2 * (last["time"] - began["began"]))
    assert "60% of the peak" in found.basis
    with pytest.raises(UsageError, match="the device Abacus"):
        against_plan(replace(record, events=[{**event, "device": "Abacus"} for event in record.events]))


def test_a_submitted_run_differs_from_the_preset_that_was_submitted(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    text = (run / "events.jsonl").read_text().replace(f'"{TINY}"', f'"{run}/slurm/config.yaml"')
    (run / "events.jsonl").write_text(text)
    (run / "slurm").mkdir()
    (run / "slurm" / "config.yaml").write_text((run / "config.yaml").read_text())
    (run / "slurm" / "jobs.jsonl").write_text(json.dumps({"job": "1", "time": 1.0, "preset": str(TINY)}) + "\n")
    assert read_record(run).against_preset() == read_record(finished).against_preset()
    assert (found := read_record(run).against_preset()) and found[1]["train.steps"] == (None, 6)


def test_a_run_that_is_alive_is_accounted_for_until_now(copied: Path) -> None:
    assert read_record(copied).end == "killed"
    with acquire_lock(copied):
        record = read_record(copied)
    assert record.end == "running" and record.accounts.attempts[-1].ended == pytest.approx(time.time(), abs=60)


def test_the_mistakes_are_those_that_the_evaluation_counted(finished: Path) -> None:
    found = judge_run(read_record(finished), str(finished.parent / "packed"))
    recorded = [row for row in rows(finished / "metrics.jsonl") if "top1" in row][-1]
    wrong = sum(times for _, _, times, _ in found.worst_pairs(99))
    assert found.top1 == recorded["top1"] == 1 - wrong / found.samples
    assert sum(right for _, _, right in found.by_class()) == round(found.top1 * found.samples)
    assert len(found.mistakes) == min(wrong, 24) and not any(each.predicted in each.true for each in found.mistakes)
    sure = [each.confidence for each in found.mistakes]
    assert sure == sorted(sure, reverse=True)
    confidence, accuracy, share, error = found.calibration()
    assert share @ accuracy == pytest.approx(found.top1) and share.sum() == pytest.approx(1)
    assert abs(share @ (confidence - accuracy)) <= error + 1e-9 <= 1


def test_a_browser_shows_every_page_whole_and_asks_nothing_of_any_network(
    finished: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, several, data = tmp_path / "whole.html", tmp_path / "several.html", str(finished.parent / "packed")
    assert (
        report([finished], data, whole)
        == report([copied], None, None)
        == report([finished, copied], None, several)
        == 0
    )
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:2/x.png'><script>console.error(1)</script><svg></svg>")
    pictures = {
        whole: (24 + len(judge_run(read_record(finished), data).mistakes), 9),
        copied / "report.html": (0, 7),
        several: (0, 9),
    }
    with chromium(tmp_path / "chromium") as browser:
        for page, width in itertools.product(pictures, (1280, 400)):
            shown = browser.show(page, width)
            assert (shown.problems, shown.requests) == ([], []), page
            found = shown.facts
            assert (found["images"], found["drawings"], found["broken"]) == (*pictures[page], 0), page
            assert found["overflow"] <= 0 and found["scripts"] == 0, (page, width)
            assert page.stat().st_size < 2e6
            if page == whole:
                assert all(name in found["text"] for name in HOSTILE), "as text"
            if page.parent == copied:
                assert "training samples: " in found["text"] and "<i>" in found["text"]
        noticed = browser.show(bad, 1280)
        assert len(noticed.problems) == 2 and len(noticed.requests) == 1 and noticed.facts["broken"] == 2


def test_what_cannot_be_reported_is_refused_in_a_line_or_warned_of(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for runs, data, out, message in (
        ([tmp_path], None, None, "no events.jsonl"),
        ([finished, finished.parent], "x", None, "one run"),
        ([finished], str(tmp_path), None, "manifest.json does not exist"),
        ([finished], None, tmp_path / "no" / "page.html", "--out"),
    ):
        with pytest.raises(UsageError, match=message):
            report(runs, data, out)
    report_when_done(tmp_path)
    assert (
        capsys.readouterr().err == f"warning: {tmp_path}/report.html could not be written: {tmp_path} is not a run"
        " that has started: it has no events.jsonl; pass a run's folder\n"
    )
