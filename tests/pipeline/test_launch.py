"""Laws of launching: a rank's end is the launcher's, with its status; no rank outlives its launcher, however it ends.

The ranks are a few lines of Python in place of the command line; launcher, processes and signals are real.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.launch import is_rank, local_world_size, processor_share, rank_and_world_size

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 300
LAUNCHER = """
    import sys
    from pathlib import Path
    from pipeline import launch
    grace, ranks, logs, program = sys.argv[1:5]
    launch.GRACE_SECONDS = float(grace)
    sys.exit(launch.run_ranks(sys.argv[5:], int(ranks), Path(logs), [sys.executable, "-c", program]))
"""
RANK = """
    import itertools, os, sys, signal, time
    from pathlib import Path
    from pipeline.launch import end_with_launcher
    end_with_launcher()
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    def note(name, text=""):
        (folder / f".{name}").write_text(str(text))
        (folder / f".{name}").rename(folder / name)
    def all_are(name):
        while len(list(folder.glob(f"{name}-*"))) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.01)
    def note_each_term():
        count = itertools.count(1)
        signal.signal(signal.SIGTERM, lambda *_: note(f"term-{next(count)}-{rank}"))
"""


def launched(folder: Path, ranks: int, rest_of_rank: str, *arguments: str, grace: float = 0.3) -> subprocess.Popen[str]:
    program = textwrap.dedent(RANK) + textwrap.dedent(rest_of_rank)
    logs = str(folder / "logs")
    command = [sys.executable, "-c", textwrap.dedent(LAUNCHER), str(grace), str(ranks), logs, program, str(folder)]
    return subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(folder: Path, ranks: int, rest_of_rank: str, *arguments: str, grace: float = 0.3) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a launch that ends by itself."""
    process = launched(folder, ranks, rest_of_rank, *arguments, grace=grace)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, out, err


def names(folder: Path, beginning: str) -> list[str]:
    return sorted(path.name for path in folder.glob(f"{beginning}-*"))


def wait_for(folder: Path, *expected: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not all((folder / name).exists() for name in expected):
        assert time.monotonic() < deadline, f"{expected} did not come"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def waiting_ranks(folder: Path, ranks: int) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A launch whose ranks note SIGTERM and otherwise wait for ever, and their process ids."""
    program = "note_each_term(); note(f'begun-{rank}', os.getpid())\nwhile True: time.sleep(0.01)"
    process = launched(folder, ranks, program)
    try:
        wait_for(folder, *(f"begun-{rank}" for rank in range(ranks)))
        yield process, [int((folder / f"begun-{rank}").read_text()) for rank in range(ranks)]
    finally:
        process.kill()
        for begun in folder.glob("begun-*"):  # where the law does not hold they would hold the pipes for ever
            if alive(rank := int(begun.read_text())):
                os.kill(rank, signal.SIGKILL)
        process.communicate()


def test_each_rank_gets_the_arguments_and_the_environment_that_torchrun_would_give_it(tmp_path):
    program = """
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        note(f"seen-{rank}", [sys.argv[2:], *map(os.environ.get, names)])
    """
    assert ended(tmp_path, 3, program, "pretrain", "a b.yaml")[0] == 0
    seen = [(tmp_path / f"seen-{rank}").read_text() for rank in range(3)]
    port = eval(seen[0])[-1]
    for rank, text in enumerate(seen):
        assert eval(text) == [["pretrain", "a b.yaml"], str(rank), str(rank), "3", "3", "127.0.0.1", port]


def test_rank_0_has_the_terminal_and_the_others_their_logs_which_are_only_added_to(tmp_path):
    program = "print('out', rank, flush=True); print('err', rank, file=sys.stderr)"
    for _ in range(2):
        assert ended(tmp_path, 3, program) == (0, "out 0\n", "err 0\n")
    assert names(tmp_path / "logs", "rank") == ["rank-1.log", "rank-2.log"]
    assert (tmp_path / "logs" / "rank-2.log").read_text() == "out 2\nerr 2\n" * 2


@pytest.mark.parametrize("status", [1, 2, 3])
@pytest.mark.parametrize("failing", [0, 1])
def test_the_launcher_ends_with_the_failing_ranks_status_and_ends_the_others(tmp_path, failing, status):
    program = f"""
        note(f"begun-{{rank}}", os.getpid()); all_are("begun")
        if rank == {failing}:
            print("before"); print("the reason"); print("  and what to do"); sys.exit({status})
        while True: time.sleep(0.01)
    """
    found, out, err = ended(tmp_path, 2, program)
    assert found == status
    if failing:
        log = tmp_path / "logs" / "rank-1.log"
        assert err == f"rank 1 ended with status {status}: the reason\n  and what to do (see {log})\n"
    else:
        assert (out, err) == ("before\nthe reason\n  and what to do\n", "")
    assert not any(alive(int((tmp_path / name).read_text())) for name in names(tmp_path, "begun"))


def test_all_ranks_that_stop_before_the_end_are_a_launch_that_stopped_before_the_end(tmp_path):
    assert ended(tmp_path, 2, "sys.exit(3)")[0] == 3


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_a_failure_that_is_named_with_what_to_do_and_ends_the_others(tmp_path, killed):
    program = f"""
        note(f"begun-{{rank}}", os.getpid()); all_are("begun")
        if rank == {killed}: os.kill(os.getpid(), signal.SIGKILL)
        while True: time.sleep(0.01)
    """
    status, _, err = ended(tmp_path, 2, program)
    assert status == 1
    assert (
        err
        == f"rank {killed} was killed by SIGKILL; the same command goes on from the last checkpoint, if there is one\n"
    )
    assert not any(alive(int((tmp_path / name).read_text())) for name in names(tmp_path, "begun"))


def test_the_others_may_end_by_themselves_after_one_has_failed(tmp_path):
    program = (
        "note(f'begun-{rank}'); all_are('begun')\nif rank: time.sleep(0.1); note('ended')\nsys.exit(0 if rank else 2)"
    )
    assert ended(tmp_path, 2, program, grace=PATIENCE_SECONDS)[0] == 2
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGQUIT])
def test_no_rank_outlives_a_launcher_that_was_killed(tmp_path, number):
    with waiting_ranks(tmp_path, 3) as (process, ranks):
        assert all(map(alive, ranks))
        process.send_signal(number)
        process.wait()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while any(map(alive, ranks)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(map(alive, ranks))
        assert names(tmp_path, "term") == []


def test_a_rank_whose_launcher_ended_before_it_could_ask_ends_too(tmp_path):
    """It sees that its parent is another process than the one that launched it."""
    environment = {**os.environ, "COATNET_LAUNCHER": "1", "RANK": "0", "WORLD_SIZE": "1"}
    program = textwrap.dedent(RANK) + "note('lived')"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env=environment, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 1 and not (tmp_path / "lived").exists()


@pytest.mark.parametrize(
    "numbers", [[signal.SIGTERM, signal.SIGINT], [signal.SIGINT], [signal.SIGTERM] * 3 + [signal.SIGINT]]
)
def test_requests_to_stop_reach_every_rank_as_sigterm_and_a_second_ctrl_c_kills_them(tmp_path, numbers):
    with waiting_ranks(tmp_path, 2) as (process, ranks):
        for count, number in enumerate(numbers, start=1):
            process.send_signal(number)
            wait_for(tmp_path, f"term-{count}-0", f"term-{count}-1")
        assert process.poll() is None and all(map(alive, ranks))
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_SECONDS) == 1
        assert not any(map(alive, ranks))


def test_a_process_is_a_rank_only_in_a_launchers_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not is_rank() and local_world_size(5) == 5 and processor_share() == len(os.sched_getaffinity(0))
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "1000")):
        monkeypatch.setenv(name, value)
    assert is_rank() and rank_and_world_size() == (3, 8) and local_world_size(5) == 1000 and processor_share() == 1
