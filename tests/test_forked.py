"""A fork of the tests' fork server is as good as a new process: the server has only imported."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.pipeline.runs import PATIENCE_SECONDS, coatnet, wait_until

OWN = ("pipe:", "socket:", "anon_inode:", os.devnull)
"""Open files of multiprocessing's server itself."""


def describe(file: str) -> None:
    """Writes the state of a fork and of the server, its parent."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from tests.preloaded import set_by_imports

    server = Path("/proc", str(os.getppid()))
    at_start = dict(pair.split("=", 1) for pair in (server / "environ").read_text().split("\0") if pair)
    files = [os.readlink(each) for each in (server / "fd").iterdir() if int(each.name) > 2]
    fresh = torch.Generator().manual_seed(torch.initial_seed())
    facts = {
        "threads": len(list((server / "task").iterdir())),
        "files": sorted(name for name in files if not name.startswith(OWN)),
        "process group": dist.is_initialized(),
        "environment": sorted(name for name, _ in os.environ.items() ^ {**at_start, **set_by_imports}.items()),
        "drawn": not torch.equal(torch.get_rng_state(), fresh.get_state()),
        "numpy": repr(np.random.get_state()),
        "missing": sorted({"torch", "deepspeed", "nvidia.dali.fn", "pipeline.train"} - set(sys.modules)),
        "signals": [str(signal.getsignal(number)) for number in signal.valid_signals() - {signal.SIGCHLD}],
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    }
    Path(file).write_text(json.dumps(facts))


def described(file: Path) -> dict[str, Any]:
    process = forked.forkserver.Process(target=describe, args=(str(file),))
    process.start()
    process.join()
    return json.loads(file.read_text())


@pytest.mark.skipif(forked.WITH_GPU, reason="commands have interpreters of their own there")
def test_the_fork_server_has_no_state_and_commands_leave_none_in_it(digits: Path, tmp_path: Path) -> None:
    before = described(tmp_path / "before")
    of_a_new_process = {
        "threads": 1, "files": [], "process group": False, "environment": [], "drawn": False, "mask": [], "missing": []
    }  # fmt: skip
    assert {name: before[name] for name in of_a_new_process} == of_a_new_process
    run = [f"data.train={digits}/train", "data.val=null", f"run.dir={tmp_path}/run", "train.steps=1"]
    done = coatnet("pretrain", "configs/tiny.yaml", "--procs", 2, *run)
    assert done.returncode == 0, done.stderr
    assert described(tmp_path / "after") == before


def main() -> None:
    """The command of the tests below."""
    print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]), flush=True)
    print("words", file=sys.stderr)
    if sys.argv[1] == "waits":
        signal.pause()
    sys.exit(3)


def test_a_forked_command_has_its_arguments_environment_and_exit_status() -> None:
    environment = {"PATH": "/bin", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "of this test"}
    done = forked.run("tests.test_forked", "a b", 7, env=environment, timeout=PATIENCE_SECONDS)
    arguments, found, folder = json.loads(done.stdout)
    assert (arguments, folder) == (["a b", "7"], str(forked.ROOT))
    assert found | environment == found and "HOME" not in found
    assert done.stderr == "words\n" and done.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_forked_command_that_is_killed_ends_by_that_signal(number: int) -> None:
    process = forked.start("tests.test_forked", "waits")
    assert process.stderr is not None
    words: list[str] = []
    wait_until(lambda: bool(words.append(process.stderr.read()) or "".join(words)), process)
    process.send_signal(number)
    assert process.wait(PATIENCE_SECONDS) == -number


@pytest.mark.skipif(forked.WITH_GPU, reason="commands have interpreters of their own there")
def test_a_command_after_the_server_was_ended_starts_another() -> None:
    forked.end_server()
    assert forked.run("tests.test_forked", "again", timeout=PATIENCE_SECONDS).returncode == 3
