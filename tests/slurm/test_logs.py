"""The last lines of the right log, and what is added to it, across restarts and submissions."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.run.lock import lock_holder
from slurm.logs import exit_reason, logs, newest_log, tail
from tests.pipeline.runs import ROOT, wait_until

NOW = time.time()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for folder in ("logs", "slurm"):
        (tmp_path / folder).mkdir()
    (tmp_path / "events.jsonl").touch()
    return tmp_path


def write(run: Path, name: str, text: str, seconds_ago: float) -> Path:
    (run / name).write_text(text)
    os.utime(run / name, (NOW - seconds_ago, NOW - seconds_ago))
    return run / name


@pytest.mark.parametrize("lines", [1, 2, 3, 99])
@pytest.mark.parametrize("text", ["", "a\n", "a\nb", "a\r50 %\nb\nc\n", "long " * 50_000 + "\nb\n" + "c" * 200_000])
def test_the_last_lines_are_found_from_the_end_however_long_they_are(tmp_path: Path, text: str, lines: int) -> None:
    (tmp_path / "log").write_text(text)
    size, found = tail(tmp_path / "log", lines)
    whole = text.split("\n")
    whole = [line + "\n" for line in whole[:-1]] + ([whole[-1]] if whole[-1] else [])
    assert (size, found.decode()) == (len(text), "".join(whole[-lines:]))


def test_the_newest_log_of_a_rank_is_taken_and_else_the_batch_script_s(run: Path) -> None:
    assert newest_log(run, None) is None
    batch = write(run, "slurm/7_0_log.out", "srun: no\n", 500)
    assert (newest_log(run, None), newest_log(run, 0)) == (batch, None)
    plain = write(run, "logs/rank-0.log", "by hand\n", 400)
    assert newest_log(run, None) == plain
    job = write(run, "logs/7-0.log", "7\n", 300)
    write(run, "logs/7-10.log", "7\n", 200)
    assert newest_log(run, None) == newest_log(run, 0) == job
    write(run, "logs/rank-0.log", "the job's rank 0, without how it ended\n", 299)
    assert newest_log(run, 0) == job
    newer = write(run, "logs/8-0.log", "8\n", 100)
    assert newest_log(run, 0) == newer
    assert newest_log(run, 3) is None
    assert newest_log(run, 10) == run / "logs" / "7-10.log"
    write(run, "logs/rank-0.log", "by hand\n", 1)
    assert newest_log(run, 0) == plain


def test_the_exit_reason_is_the_last_error_or_line_of_the_batch_log(run: Path) -> None:
    assert exit_reason(run) is None
    write(run, "slurm/7_0_log.out", "module: not found\n\n", 9)
    assert exit_reason(run) == "module: not found"
    write(run, "slurm/7_0_log.out", "srun: error: n2: task 3: Killed\nsrun: error: n1: task 0: Terminated\nend\n", 8)
    assert exit_reason(run) == "srun: error: n2: task 3: Killed"


def test_the_last_lines_are_printed_and_a_missing_log_is_an_error(
    run: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    with pytest.raises(UsageError, match="no log of any rank"):
        logs(run, None, False, 9)
    with pytest.raises(UsageError, match="no log of any rank"):
        logs(run, None, True, 9)
    with pytest.raises(UsageError, match="is not a run"):
        logs(run / "logs", None, False, 9)
    (run / "logs" / "rank-0.log").write_bytes(b"a\nb \xff\nc\n")
    assert logs(run, 0, True, 2) == 0, "the run is over, so there is nothing to wait for"
    assert capfdbinary.readouterr().out == b"b \xff\nc\n"
    with pytest.raises(UsageError, match="no log of rank 3"):
        logs(run, 3, False, 9)


def test_follow_continues_into_the_next_job_until_the_run_is_over(run: Path) -> None:
    """Another process holds the run's lock for as long as it is alive."""
    first = write(run, "logs/7-1.log", "old\none\n", 60)
    (run / ".lock").touch()
    holding = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", holding, run / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None and holder.stdout is not None and holder.stdout.readline()
    assert lock_holder(run) is not None
    printed = run / "printed"
    following = "import sys; from pathlib import Path; from slurm import logs; logs.SLURM_POLL_SECONDS = 0.1\n"
    following += "sys.exit(logs.logs(Path(sys.argv[1]), 1, True, 1))"
    with printed.open("wb") as output:
        follower = subprocess.Popen([sys.executable, "-c", following, run], cwd=ROOT, stdout=output, text=True)
    try:
        wait_until(lambda: printed.read_text() == "one\n", follower)
        with first.open("a") as log:
            log.write("two\nthr")
            log.flush()
            wait_until(lambda: printed.read_text() == "one\ntwo\nthr", follower)
            log.write("ee\n")
        wait_until(lambda: printed.read_text().endswith("three\n"), follower)
        second = write(run, "logs/8-1.log", "four\n", 0)
        os.utime(second, (time.time() + 60, time.time() + 60))  # newer than what was just written
        wait_until(lambda: printed.read_text().endswith(f"==> {second} <==\nfour\n"), follower)
        with second.open("a") as log:
            log.write("five\n")
    finally:
        holder.stdin.close()
        holder.wait()
    assert follower.wait(60) == 0
    assert printed.read_text() == f"one\ntwo\nthree\n==> {second} <==\nfour\nfive\n"
