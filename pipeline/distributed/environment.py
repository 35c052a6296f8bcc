"""Rank and world size of this process, from the environment that torchrun, srun or our own launcher sets."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping

FILE, START = "COATNET_FAILURES", "COATNET_START"
LAUNCHER = "COATNET_LAUNCHER"
"""Environment variable of a launched rank: its launcher's process id."""


def is_rank() -> bool:
    """Whether this process is one rank of a launcher's (ours, torchrun's or srun's)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def read_slurm_env() -> None:
    """Sets RANK, WORLD_SIZE, MASTER_ADDR ... from srun's variables, where it started several tasks, or a job's ranks.

    A shell that srun opened is a single task, and commands typed there start their own ranks.
    """
    environment = os.environ
    single = int(environment.get("SLURM_NTASKS", 1)) < 2 and START not in environment
    if is_rank() or "SLURM_PROCID" not in environment or single:
        return
    on_nodes = tasks_on_nodes(environment.get("SLURM_STEP_TASKS_PER_NODE") or environment["SLURM_TASKS_PER_NODE"])
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = str(on_nodes[int(environment["SLURM_NODEID"])])
    environment.setdefault("OMP_NUM_THREADS", environment.get("SLURM_CPUS_PER_TASK", str(cpus_per_rank())))
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = nodes_of_step()[0]
    environment.setdefault("MASTER_PORT", str(slurm_port(environment)))


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
    """The ranks' port, another one for each restart, since the last start may still hold its port."""
    job, restart = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT", 0))
    return 20000 + (7 * job + restart) % 10000


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
