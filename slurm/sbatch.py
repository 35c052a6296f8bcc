"""From the configuration's slurm section to sbatch's options and the batch script, which submitit writes.

submitit writes and submits the script; it neither runs our function nor requeues (it could only do that on rank 0,
inside a signal handler). The script starts job.py, which starts the ranks.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from pipeline.config.schema import Slurm
from pipeline.distributed.launcher import ROOT, module_command

MAX_ARRAY_RESTARTS = 1000


def tasks_per_node(slurm: Slurm) -> int:
    """Ranks on each node."""
    return slurm.tasks_per_node or slurm.gpus_per_node or 1


def parameters(slurm: Slurm, name: str, dependency: str | None = None) -> dict[str, Any]:
    """submitit's parameters; `dependency` as sbatch has it, afterok:4711."""
    extra = (option.removeprefix("--").partition("=") for option in slurm.sbatch)
    more: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes"}
    more |= {name: value if equals else True for name, equals, value in extra}
    if slurm.min_nodes is not None and slurm.min_nodes < slurm.nodes:
        # ntasks must fit the fewest nodes; exclusive, since each node runs its full number of ranks all the same. A job
        # that survives the loss of a node lowers its request itself (job.py): Slurm would wait for as many as before.
        min_tasks = slurm.min_nodes * tasks_per_node(slurm)
        more |= {"nodes": f"{slurm.min_nodes}-{slurm.nodes}", "ntasks": min_tasks, "exclusive": True, "no-kill": True}
    if slurm.requeue == "array":
        more |= {"array": f"0-{MAX_ARRAY_RESTARTS}%1", "requeue": None}
    options = {
        "job_name": name,
        "nodes": slurm.nodes,
        "ntasks_per_node": tasks_per_node(slurm),
        "cpus_per_task": slurm.cpus_per_task,
        "gpus_per_node": slurm.gpus_per_node,
        "mem": slurm.memory,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "dependency": dependency,
        "signal_delay_s": slurm.signal_seconds,
        "setup": list(slurm.setup) or None,
        "stderr_to_stdout": True,
        "use_srun": False,
        "additional_parameters": {key: value for key, value in more.items() if value is not None},
    }
    return {key: value for key, value in options.items() if value is not None}


def batch_command(python: str, code: Path, module: str, run: Path, request: Path) -> str:
    """The script's last line: the program that starts the ranks and requeues the job."""
    return f"exec {shlex.join([*module_command(module, python, code), str(run), str(request)])}"


def script(folder: Path, command: str, options: dict[str, Any]) -> str:
    """The batch script as it would be submitted."""
    from submitit.slurm.slurm import _make_sbatch_string

    return _make_sbatch_string(command=command, folder=folder, **options)


PACKAGES = ("pipeline", "models", "data", "slurm")


def snapshot(folder: Path) -> Path:
    """Copies all modules to FOLDER/code-HASH; a folder of that name already has the same bytes."""
    files = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    files.append(ROOT / "coatnet_main.py")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    code = folder / f"code-{digest.hexdigest()[:12]}"
    if not code.exists():
        partial = folder / f".{code.name}.{os.getpid()}"
        for file in files:
            (partial / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, partial / file.relative_to(ROOT))
        os.replace(partial, code)
    return code
