"""Which rank this process is, of how many, as torchrun, srun or our own launcher says in the environment."""

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
    """Takes rank, world size and meeting place from srun's environment, where it started several tasks, or a job's.

    A shell that srun opened is one task, and what is typed there starts its own ranks.
    """
    environment = os.environ
    alone = int(environment.get("SLURM_NTASKS", 1)) < 2 and START not in environment
    if is_rank() or "SLURM_PROCID" not in environment or alone:
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
    """The names of srun's nodes, from the node list that it set."""
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return hosts.stdout.split()


def host_name() -> str:
    """This machine's name, as Slurm calls it where it started us."""
    return os.environ.get("SLURMD_NODENAME", os.uname().nodename)


def tasks_on_nodes(text: str) -> list[int]:
    """Tasks by node, as Slurm writes them: `2(x3),1` is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def slurm_port(environment: Mapping[str, str]) -> int:
    """The ranks' port, another one for each restart, so that none waits for a port that the last start still holds."""
    job, restart = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT", 0))
    return 20000 + (7 * job + restart) % 10000


def is_first_process() -> bool:
    """Whether this is the process that a person's command began as, or rank 0 of another launcher's."""
    return LAUNCHER not in os.environ and os.environ.get("RANK", "0") == "0"


def rank_and_world_size() -> tuple[int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def local_world_size(procs: int) -> int:
    """Ranks on this machine; `procs` where none has been started yet."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", procs))


def cpus_per_rank(procs: int = 1) -> int:
    """The processors of this machine that fall to a rank, at least 1; `procs` as in local_world_size."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size(procs))
