"""Rank and world size of this process, from the environment that torchrun, srun or our own launcher sets."""

from __future__ import annotations

import os
import re
import subprocess
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.errors import UsageError

FILE, START = "COATNET_FAILURES", "COATNET_START"
LAUNCHER = "COATNET_LAUNCHER"
"""Environment variable of a launched rank: its launcher's process id."""
IDENTITY = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
"""The variables of torchrun, and of torch.distributed's env://: which rank a process is, and where rank 0 listens."""
STEP = (
    "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID",
    "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST",
)  # fmt: skip
"""What srun sets for each task of a step."""


def command_began() -> float:
    """When the command that this process is, or is a rank of, was started; in seconds since 1970."""
    stat = Path("/proc", os.environ.get(LAUNCHER, "self"), "stat").read_text()
    ticks = int(stat.rpartition(")")[2].split()[19])  # since the machine was started
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def is_rank() -> bool:
    """Whether this process is one rank of a launcher's (ours, torchrun's or srun's)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_launcher(procs: int | None = None) -> int:
    """Makes the environment that of a rank, if a launcher started this process; else returns how many ranks to start.

    UsageError where its variables are incomplete or contradict each other, or `procs` was asked for beside them.
    """
    environment = os.environ
    found = rank_variables(environment, in_interactive_shell())
    if found and procs is not None and LAUNCHER not in environment:
        by = IDENTITY if environment.get("RANK") else ("SLURM_STEP_NUM_TASKS",)
        raise UsageError(
            f"--procs={procs} would start ranks, but this process is rank {found['RANK']} of {found['WORLD_SIZE']} by"
            f" {_assigned(environment, by)}: leave out --procs, or unset {' '.join(by)}"
        )
    if not found:
        ignore_launcher()
        return procs or 1
    environment.update(found)
    if "MASTER_ADDR" not in found:
        environment["MASTER_ADDR"] = _first_node()
    if "MASTER_PORT" not in found:
        environment["MASTER_PORT"] = str(slurm_port(environment))
    if "SLURM_STEP_NUM_TASKS" in environment:
        environment.setdefault("OMP_NUM_THREADS", environment.get("SLURM_CPUS_PER_TASK", str(cpus_per_rank())))
    return procs or 1


def ignore_launcher() -> None:
    """Makes the environment that of no rank, whatever it was: for this process and all that it starts."""
    for name in IDENTITY:
        os.environ.pop(name, None)


def rank_variables(environment: Mapping[str, str], interactive: bool) -> dict[str, str]:
    """IDENTITY and ADDRESS, from themselves or from srun's variables; {} of a process that is no rank.

    A task of srun's needs no ADDRESS. `interactive`: whether the process was started from an interactive shell.
    """
    given = {name: environment[name] for name in (*IDENTITY, *ADDRESS) if environment.get(name)}
    step = {} if given.keys() >= set(IDENTITY) else _task_of_step(environment, interactive)
    claimed = [name for name in IDENTITY if name in given]
    if not claimed and not step:
        return {}
    if wrong := [name for name in claimed if step and given[name] != step[name]]:
        raise UsageError(
            f"{_assigned(given, wrong)}, but srun says {_assigned(step, wrong)}: unset {' '.join(wrong)}, or, if srun"
            " did not start this, unset SLURM_STEP_NUM_TASKS"
        )
    found = {**step, **given}
    if not step:
        _require((*IDENTITY, *ADDRESS), found, claimed)
        _check_rank([_number(found, name) for name in IDENTITY], _assigned(found, IDENTITY), IDENTITY)
    if "MASTER_PORT" in found and not _number(found, "MASTER_PORT") < 1 << 16:
        raise UsageError(f"MASTER_PORT={found['MASTER_PORT']} is not a port: set one below 65536")
    return found


def _task_of_step(environment: Mapping[str, str], interactive: bool) -> dict[str, str]:
    """IDENTITY of a task of an srun step with several tasks, or with one that a job of ours started; else {}.

    A batch script has no step, but what it inherits where it was submitted from within one: then the job's number of
    tasks is another. The shell of an interactive allocation is the only task of its step; that of `srun --ntasks=4
    --pty bash` is not, but the other shells ended at once.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS")
    alone = tasks == "1" or environment.get("SLURM_NTASKS", tasks) != tasks
    if not tasks or (START not in environment and (alone or ("SLURM_PTY_PORT" in environment and interactive))):
        return {}
    claimed = ("SLURM_STEP_NUM_TASKS",)
    _require(STEP, environment, claimed)
    _number(environment, "SLURM_JOB_ID")
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID")
    *numbers, node = (_number(environment, name) for name in names)
    on_nodes = tasks_on_nodes(environment["SLURM_STEP_TASKS_PER_NODE"])
    numbers.append(on_nodes[node] if node < len(on_nodes) else 0)
    _check_rank(numbers, _assigned(environment, (*names, "SLURM_STEP_TASKS_PER_NODE")), claimed)
    return dict(zip(IDENTITY, map(str, numbers), strict=True))


def _check_rank(numbers: Iterable[int], said: str, claimed: Iterable[str]) -> None:
    """UsageError where no rank has these numbers, in IDENTITY's order; `said` are the variables that say so."""
    rank, size, local_rank, local_size = numbers
    if not (rank < size and local_rank < local_size <= size):
        raise UsageError(f"{said} contradict each other: correct them, or unset {' '.join(claimed)}")


def _require(names: Iterable[str], environment: Mapping[str, str], claimed: Iterable[str]) -> None:
    """UsageError unless all of these are set; `claimed` are the ones by which this process is a rank."""
    if missing := [name for name in names if not environment.get(name)]:
        raise UsageError(
            f"{_assigned(environment, claimed)} would make this process a launcher's rank, but {', '.join(missing)}"
            f" {'is' if len(missing) == 1 else 'are'} not set: set all of them, or unset {' '.join(claimed)}"
        )


def _number(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdecimal():
        raise UsageError(f"{name}={environment[name]!r} is not a number: correct it, or unset it")
    return int(environment[name])


def _assigned(environment: Mapping[str, str], names: Iterable[str]) -> str:
    return ", ".join(f"{name}={environment[name]}" for name in names if name in environment)


def in_interactive_shell() -> bool:
    """Whether a command typed into a shell started this process: it has a terminal, and is not of its task's group."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return os.environ.get("SLURM_TASK_PID") != str(os.getpgrp())


def _first_node() -> str:
    try:
        return nodes_of_step()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UsageError(
            f"no answer from scontrol ({error}): set MASTER_ADDR to the name of the step's first node"
        ) from None


def nodes_of_step() -> list[str]:
    """The host names of the srun step's nodes."""
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return hosts.stdout.split()


def host_name() -> str:
    """This machine's name; under Slurm the node's name."""
    return os.environ.get("SLURMD_NODENAME", os.uname().nodename)


def tasks_on_nodes(text: str) -> list[int]:
    """Tasks by node, as Slurm writes them: `2(x3),1` is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def slurm_port(environment: Mapping[str, str]) -> int:
    """The ranks' port, which all must know without asking: each cluster, job, restart and step has its own.

    A start may find the port of the one before still in use. Two on one node meet in one of 10,000 cases.
    """
    names = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    return 20000 + zlib.crc32(" ".join(environment.get(name, "") for name in names).encode()) % 10000


def is_first_process() -> bool:
    """Whether this is the process in which the command was started, or rank 0 of another launcher."""
    return LAUNCHER not in os.environ and is_rank_zero()


def is_rank_zero() -> bool:
    """Whether this is rank 0, or no rank at all."""
    return os.environ.get("RANK", "0") == "0"


def rank_and_world_size() -> tuple[int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def local_world_size(procs: int) -> int:
    """Ranks on this machine; `procs` where none has been started yet."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", procs))


def cpus_per_rank(procs: int = 1) -> int:
    """CPUs of this machine for each rank, at least 1; `procs` as in local_world_size."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size(procs))
