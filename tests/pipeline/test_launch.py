"""Laws of launching: a rank's end is the launcher's, with its status; no rank outlives its launcher, however it ends.

The ranks are a few lines of Python in place of the command line; launcher, processes and signals are real. Each law is
that of ranks that are forks of the launcher, and of ranks that are new interpreters.
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
from types import SimpleNamespace

import pytest

from pipeline.distributed import preload
from pipeline.distributed.environment import cpus_per_rank, is_rank, local_world_size, rank_and_world_size
from tests.pipeline.runs import alive

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 300
LAUNCHER = """
    import signal, sys
    from pathlib import Path
    from pipeline.distributed import launcher
    for number in (signal.SIGHUP, signal.SIGQUIT):  # may be ignored where the tests run in the background
        signal.signal(number, signal.SIG_DFL)
    start, grace, ranks, logs = sys.argv[1:5]
    launcher.GRACE_SECONDS = float(grace)
    exec(BEFORE)
    how = (lambda: None, "rank_of_a_test", getattr(launcher, start))
    sys.exit(launcher.launch(sys.argv[5:], int(ranks), Path(logs), *how))
"""
RANK = """
    import itertools, os, sys, signal, time
    from pathlib import Path
    from pipeline.distributed.launcher import die_with_parent
    die_with_parent()
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


@pytest.fixture(params=["fork", "spawn"])
def start(request: pytest.FixtureRequest) -> str:
    return request.param


def write_rank(folder: Path, rest_of_rank: str) -> None:
    """The module that ranks run."""
    program = textwrap.indent(textwrap.dedent(RANK) + textwrap.dedent(rest_of_rank), "    ")
    (folder / "rank_of_a_test.py").write_text(f"def main():\n{program}\nif __name__ == '__main__': main()\n")


def launched(
    start: str, folder: Path, ranks: int, rest_of_rank: str, *arguments: str, grace: float = 0.3, before: str = ""
) -> subprocess.Popen[str]:
    write_rank(folder, rest_of_rank)
    launcher = textwrap.dedent(LAUNCHER).replace("BEFORE", repr(textwrap.dedent(before)))
    command = [sys.executable, "-c", launcher, start, grace, ranks, folder / "logs", folder]
    return subprocess.Popen(
        [*map(str, command), *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(
    start: str, folder: Path, ranks: int, rest_of_rank: str, *arguments: str, grace: float = 0.3, before: str = ""
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a launch that ends by itself."""
    process = launched(start, folder, ranks, rest_of_rank, *arguments, grace=grace, before=before)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, out, err


def names(folder: Path, beginning: str) -> list[str]:
    return sorted(path.name for path in folder.glob(f"{beginning}-*"))


def wait_for(folder: Path, *expected: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not all((folder / name).exists() for name in expected):
        assert time.monotonic() < deadline, f"{expected} did not come"
        time.sleep(0.01)


@contextmanager
def waiting_ranks(start: str, folder: Path, ranks: int) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A launch whose ranks note SIGTERM and otherwise wait forever, and their process ids."""
    program = "note_each_term(); note(f'begun-{rank}', os.getpid())\nwhile True: time.sleep(0.01)"
    process = launched(start, folder, ranks, program)
    try:
        wait_for(folder, *(f"begun-{rank}" for rank in range(ranks)))
        yield process, [int((folder / f"begun-{rank}").read_text()) for rank in range(ranks)]
    finally:
        process.kill()
        for begun in folder.glob("begun-*"):  # where the law does not hold they would hold the pipes forever
            if alive(rank := int(begun.read_text())):
                os.kill(rank, signal.SIGKILL)
        process.communicate()


def test_each_rank_gets_its_arguments_and_the_environment_of_torchrun(start, tmp_path):
    program = """
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        note(f"seen-{rank}", [sys.argv[2:], *map(os.environ.get, names)])
    """
    assert ended(start, tmp_path, 3, program, "pretrain", "a b.yaml")[0] == 0
    seen = [(tmp_path / f"seen-{rank}").read_text() for rank in range(3)]
    port = eval(seen[0])[-1]
    for rank, text in enumerate(seen):
        assert eval(text) == [["pretrain", "a b.yaml"], str(rank), str(rank), "3", "3", "127.0.0.1", port]


def test_rank_0_has_the_terminal_and_the_others_logs_where_these_can_be_written(start, tmp_path):
    program = "os.write(1, f'out {rank}\\n'.encode()); os.write(2, f'err {rank}\\n'.encode())"  # whole lines, each
    assert ended(start, tmp_path, 3, program) == (0, "out 0\n", "err 0\n")
    assert names(tmp_path / "logs", "rank") == ["rank-1.log", "rank-2.log"]
    (log := tmp_path / "logs" / "rank-1.log").unlink()
    log.mkdir()
    status, out, err = ended(start, tmp_path, 3, program)
    assert (status, sorted(out.splitlines())) == (0, ["out 0", "out 1"])
    said = ("err 0", "err 1", f"warning: {log} cannot be written: Is a directory; rank 1 prints here instead")
    assert all(each in err for each in said), err  # a line may be written in two parts
    assert (tmp_path / "logs" / "rank-2.log").read_text() == "out 2\nerr 2\n" * 2


@pytest.mark.parametrize("status", [1, 2, 3])
@pytest.mark.parametrize("failing", [0, 1])
def test_the_launcher_ends_with_the_failing_ranks_status_and_ends_the_others(start, tmp_path, failing, status):
    program = f"""
        note(f"begun-{{rank}}", os.getpid()); all_are("begun")
        if rank == {failing}:
            print("before"); print("the reason"); print("  and what to do"); sys.exit({status})
        while True: time.sleep(0.01)
    """
    found, out, err = ended(start, tmp_path, 2, program)
    assert found == status
    if failing:
        log = tmp_path / "logs" / "rank-1.log"
        assert err == f"rank 1 ended with status {status}: the reason\n  and what to do (see {log})\n"
    else:
        assert (out, err) == ("before\nthe reason\n  and what to do\n", "")
    assert not any(alive(int((tmp_path / name).read_text())) for name in names(tmp_path, "begun"))


def test_all_ranks_that_stop_before_the_end_are_a_launch_that_stopped_before_the_end(start, tmp_path):
    assert ended(start, tmp_path, 2, "sys.exit(3)")[0] == 3


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_a_failure_that_is_named_and_ends_the_others(start, tmp_path, killed):
    program = f"""
        note(f"begun-{{rank}}", os.getpid()); all_are("begun")
        if rank == {killed}: os.kill(os.getpid(), signal.SIGKILL)
        while True: time.sleep(0.01)
    """
    status, _, err = ended(start, tmp_path, 2, program)
    assert status == 1
    assert (
        err
        == f"rank {killed} was killed by SIGKILL; the same command resumes from the last checkpoint, if there is one\n"
    )
    assert not any(alive(int((tmp_path / name).read_text())) for name in names(tmp_path, "begun"))


def test_the_others_may_end_by_themselves_after_one_has_failed(start, tmp_path):
    program = (
        "note(f'begun-{rank}'); all_are('begun')\nif rank: time.sleep(0.1); note('ended')\nsys.exit(0 if rank else 2)"
    )
    assert ended(start, tmp_path, 2, program, grace=PATIENCE_SECONDS)[0] == 2
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT])
def test_no_rank_outlives_a_launcher_that_was_killed(start, tmp_path, number):
    with waiting_ranks(start, tmp_path, 3) as (process, ranks):
        assert all(map(alive, ranks))
        process.send_signal(number)
        process.wait()
        for rank in ranks:
            wait_for_end(rank)
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
def test_requests_to_stop_reach_every_rank_as_sigterm_and_a_second_ctrl_c_kills_them(start, tmp_path, numbers):
    with waiting_ranks(start, tmp_path, 2) as (process, ranks):
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
    assert not is_rank() and local_world_size(5) == 5 and cpus_per_rank() == len(os.sched_getaffinity(0))
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "1000")):
        monkeypatch.setenv(name, value)
    assert is_rank() and rank_and_world_size() == (3, 8) and local_world_size(5) == 1000 and cpus_per_rank() == 1


def test_a_request_that_comes_while_ranks_are_being_started_reaches_all_of_them(start, tmp_path):
    """Here a SIGTERM comes before rank 1 is; a rank that it did not reach would be waited for."""
    program = f"""
        import os, signal
        from pipeline.distributed import launcher
        started = launcher.{start}
        def interrupted(module, arguments, environment, log):
            if environment["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return started(module, arguments, environment, log)
        launcher.{start} = interrupted
    """
    rank = "while True: time.sleep(0.01)"
    status, _, err = ended(start, tmp_path, 3, rank, grace=PATIENCE_SECONDS, before=program)
    assert status == 3 and "was stopped by SIGTERM" in err


def test_a_start_that_fails_leaves_no_rank(start, tmp_path):
    program = f"""
        from pipeline.distributed import launcher
        started = launcher.{start}
        def failing(module, arguments, environment, log):
            if environment["RANK"] == "2":
                while not Path(arguments[0], "begun-1").exists(): pass
                raise OSError("no more processes")
            return started(module, arguments, environment, log)
        launcher.{start} = failing
    """
    rank = "note(f'begun-{rank}', os.getpid())\nwhile True: time.sleep(0.01)"
    status, _, err = ended(start, tmp_path, 3, rank, before=program)
    assert status == 1 and "no more processes" in err
    wait_for_end(int((tmp_path / "begun-1").read_text()))


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --------------------------------------------------------------------------------------------- what a launcher preloads


def test_ranks_are_forks_where_that_is_safe_and_new_interpreters_where_it_is_not(tmp_path):
    """By itself a launcher decides; here one that has a single thread, has two, or has joined a process group."""
    program = """
        import os, sys, threading
        from pathlib import Path
        from pipeline.distributed import launcher
        from pipeline.commands.pretrain import import_training
        from pipeline.distributed.preload import may_fork, preload
        assert preload(import_training) and {"torch", "deepspeed", "pipeline.train"} <= set(sys.modules)
        assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ and may_fork()
        folder = sys.argv[1]
        for what in ("alone", "with a thread"):
            if what != "alone":
                threading.Thread(target=threading.Event().wait, daemon=True).start()
            assert launcher.launch([folder, what], 2, Path(folder, "logs"), import_training, "rank_of_a_test") == 0
    """
    rank = "import multiprocessing; note(f'{sys.argv[2]}-{rank}', multiprocessing.parent_process() is not None)"
    write_rank(tmp_path, rank)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    found = {
        what: [(tmp_path / f"{what}-{rank}").read_text() for rank in (0, 1)] for what in ("alone", "with a thread")
    }
    assert found == {"alone": ["True"] * 2, "with a thread": ["False"] * 2}


@pytest.mark.parametrize(("answer", "initialized"), [(0, True), (100, True), (3, False), (None, False)])
def test_cudas_driver_is_at_work_once_it_answers_anything_but_not_initialized(monkeypatch, answer, initialized):
    """cuda.h: 0 is success, 100 no device, 3 not initialized; None: there is no driver."""

    def library(name: str) -> SimpleNamespace:
        if answer is None:
            raise OSError(f"{name}: cannot open shared object file")
        return SimpleNamespace(cuDeviceGetCount=lambda count: answer)

    monkeypatch.setattr(preload.ctypes, "CDLL", library)
    assert preload.cuda_is_initialized() is initialized
