"""Laws of stopping: a request to stop is served wherever it comes and costs no step; lost output costs nothing."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.distributed.launcher import COMMANDS, free_port
from tests import forked
from tests.forked import ROOT, Process
from tests.pipeline import hang_injection
from tests.pipeline.runs import (
    PATIENCE_SECONDS,
    catches,
    coatnet,
    command,
    curve,
    events,
    last_state,
    last_step,
    ranks_of,
    rows,
    started,
    wait_until,
)

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT]
STEPS = 12
SECONDS = 6.0
"""About as long as a start takes until its last step."""


@pytest.fixture(scope="module")
def request_of(digits: Path) -> Callable[..., list[object]]:
    def arguments(run: Path, procs: int | None = 2) -> list[object]:
        data = [f"data.train={digits}/train", f"data.val={digits}/val", f"run.dir={run}"]
        length = [f"train.steps={STEPS}", "evaluate.every=2", "checkpoint.every=5", "log.every=1", "log.samples=true"]
        ranks = [] if procs is None else ["--procs", procs]
        return ["pretrain", "configs/tiny.yaml", *ranks, *data, *length]

    return arguments


@pytest.fixture(scope="module")
def undisturbed(request_of: Callable[..., list[object]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("stops") / "undisturbed"
    done = coatnet(*request_of(run))
    assert done.returncode == 0, done.stderr
    return run


def stop(process: Process, number: int, everyone: bool) -> None:
    """Sends a signal to the launcher, or, as a terminal or Slurm does, to its ranks as well."""
    with suppress(ProcessLookupError, FileNotFoundError):
        for pid in [process.pid, *(ranks_of(process) if everyone else ())] if process.poll() is None else ():
            os.kill(pid, number)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.torture) for seed in range(1, 12))])
def test_stops_at_random_moments_of_a_run_on_two_ranks_cost_no_step(
    seed: int, undisturbed: Path, request_of: Callable[..., list[object]], tmp_path: Path
) -> None:
    run, draw, status, stops = tmp_path / "run", random.Random(seed), 3, 0
    while status:
        process, number, everyone = started(*request_of(run)), draw.choice(SIGNALS), draw.random() < 0.5
        wait_until(lambda process=process: catches(process.pid, signal.SIGUSR2), process)
        deadline = time.monotonic() + draw.uniform(0, SECONDS)
        wait_until(lambda process=process, end=deadline: time.monotonic() > end or process.poll() is not None)
        stop(process, number, everyone and number != signal.SIGINT)  # a second SIGINT would kill
        status, error = process.wait(PATIENCE_SECONDS), process.stderr.read() if process.stderr else ""
        assert status == 0 or (status == 3 and error.count("run the same command to resume") == 1), error
        stops += status != 0
    assert curve(run) == curve(undisturbed) and last_state(run) == last_state(undisturbed)
    for rank in range(2):  # no step was done twice, so none was lost
        assert [row["step"] for row in rows(run / "samples" / f"rank-{rank}.jsonl")] == list(range(1, STEPS + 1))
    stopped = [row["attempt"] for row in events(run, "interrupted")]
    assert len(set(stopped)) == len(stopped) <= stops and len(events(run, "finished")) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_peer_never_comes_stops_at_once(
    rank: int, request_of: Callable[..., list[object]], tmp_path: Path
) -> None:
    """Of rank 0 the store is there, and nobody comes; rank 1 reaches one that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if rank else free_port()
        ranks = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = {**os.environ, **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        process = forked.start(COMMANDS, *request_of(tmp_path / "run", procs=None), env=environment)
        if rank:
            silent.settimeout(PATIENCE_SECONDS)
            silent.accept()
        else:
            wait_until(lambda: is_open(port), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 3
    assert process.stderr is not None and process.stderr.read().endswith("run the same command to resume\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("hanging", "stage"), [(1, 2), *(pytest.param(rank, 3, marks=pytest.mark.torture) for rank in (0, 1))]
)
def test_a_stop_while_one_ranks_batch_never_comes_saves_the_steps_that_all_have_done(
    hanging: int, stage: int, request_of: Callable[..., list[object]], tmp_path: Path
) -> None:
    """Its 400th read is of the second batch of DALI, which has eight steps."""
    run, more = tmp_path / "run", ["data.shuffle_window=2", "evaluate.every=null", "checkpoint.every=100"]
    request = [*request_of(run, procs=None), *more, "train.steps=40", f"zero.stage={stage}"]
    process = forked.start(hang_injection.MODULE, 2, "read", hanging, 400, *request)
    wait_until(lambda: last_step(run) == 8, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_SECONDS) == 3
    assert process.stderr and process.stderr.read().endswith(
        "stopped after step 8 of 40; run the same command to resume\n"
    )
    assert [row["step"] for row in events(run, "interrupted")] == [8] and len(last_state(run)) > 0
    assert not (run / "report.html").exists(), "it is not done"
    for rank in range(2):
        assert [row["step"] for row in rows(run / "samples" / f"rank-{rank}.jsonl")] == list(range(1, 9))


@pytest.mark.parametrize(
    ("number", "words", "remains"),
    [
        (signal.SIGINT, ["data", "verify"], "run the same command again"),
        (signal.SIGUSR1, ["data", "pack"], "finished shards are kept; run the same command to resume"),
    ],
)
def test_a_command_that_is_stopped_says_what_remains(
    number: signal.Signals, words: list[str], remains: str, tmp_path: Path
) -> None:
    """Here while it waits for a server that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE_SECONDS)
        to = [tmp_path / "out"] if "pack" in words else []
        process = started(*words, f"http://127.0.0.1:{silent.getsockname()[1]}/images", *to)
        silent.accept()
        process.send_signal(number)
        assert process.wait(PATIENCE_SECONDS) == 3
    assert process.stderr and process.stderr.read() == f"coatnet: stopped by {number.name}; {remains}\n"


@pytest.mark.parametrize(("words", "statuses"), [(["pretrain", "x.yaml"], {3}), (["data", "verify", "x"], {2, 3})])
def test_signals_that_never_end_do_not_kill_a_command(words: list[str], statuses: set[int]) -> None:
    """From its first moment on, or while it ends: the interpreter restores default actions then."""
    process = subprocess.Popen(command(*words), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    wait_until(lambda: catches(process.pid, signal.SIGUSR2))
    said = process.stderr.readline() if 2 in statuses else ""
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
    assert process.returncode in statuses, said + process.stderr.read()


def test_a_command_that_is_stopped_while_it_reports_an_error_ends_as_stopped() -> None:
    """Here its report waits in a pipe that is full."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"." * 4096)
    os.set_blocking(writing, True)
    process = subprocess.Popen(command("data", "verify", "x"), cwd=ROOT, stderr=writing)
    os.close(writing)
    wait_until(lambda: writes_to_stderr(process.pid))
    process.send_signal(signal.SIGTERM)
    with open(reading) as output:
        assert output.read().endswith("coatnet: stopped by SIGTERM; run the same command again\n")
    assert process.wait(PATIENCE_SECONDS) == 3


def writes_to_stderr(pid: int) -> bool:
    """Whether a process waits in a system call on its file descriptor 2."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[1:2] == ["0x2"]


def is_open(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@pytest.mark.torture
def test_neither_a_lost_terminal_nor_a_reader_that_ends_touches_a_run_under_nohup(
    undisturbed: Path, request_of: Callable[..., list[object]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["nohup", *command(*request_of(run))]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None and process.stdout.readline()
    process.stdout.close()
    wait_until(lambda: last_step(run) >= 2, process)
    stop(process, signal.SIGHUP, everyone=True)
    assert process.wait(PATIENCE_SECONDS) == 0
    assert curve(run) == curve(undisturbed) and not events(run, "interrupted")
    assert [row["reason"] for row in events(run, "output_lost")] == ["stderr: Broken pipe"]
    log = (run / "logs" / "rank-0.log").read_text()
    assert "output is lost (stderr: Broken pipe)" in log and f"done: {STEPS} steps" in log


@pytest.mark.parametrize(
    ("redirected", "status", "error"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        (">/dev/full", 1, "coatnet: standard output cannot be written: No space left on device\n"),
        ("2>/dev/full", 0, ""),
        ("| true", 1, ""),
    ],
)
def test_a_command_whose_output_is_its_result_ends_without_a_traceback(
    redirected: str, status: int, error: str
) -> None:
    words = ["bash", "-c", f'set -o pipefail; "$@" {redirected}', "bash", *command("keys")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert (done.returncode, done.stderr) == (status, error)
