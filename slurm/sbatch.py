"""From the configuration's slurm section to what sbatch is asked for, and the batch script, which submitit writes.

submitit writes and submits the script; it neither runs our function nor requeues (it could do that on rank 0 alone,
inside a signal handler). The script starts job.py, which starts the ranks.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pipeline
from pipeline.config.schema import Slurm

MOST_RESTARTS_BY_ARRAY = 1000


def tasks_per_node(slurm: Slurm) -> int:
    """Ranks on each node."""
    return slurm.tasks_per_node or slurm.gpus_per_node or 1


def parameters(slurm: Slurm, name: str, dependency: str | None = None) -> dict[str, Any]:
    """submitit's parameters; `dependency` as sbatch has it, afterok:4711."""
    options = (option.removeprefix("--").partition("=") for option in slurm.sbatch)
    more: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes"}
    more |= {name: value if equals else True for name, equals, value in options}
    if slurm.min_nodes is not None and slurm.min_nodes < slurm.nodes:
        # Slurm counts tasks, so it may only count those of the fewest nodes; then each node is wanted whole. A job that
        # lives on when a node is lost can ask for fewer itself (job.py): after its start Slurm would wait for as many.
        fewest = slurm.min_nodes * tasks_per_node(slurm)
        more |= {"nodes": f"{slurm.min_nodes}-{slurm.nodes}", "ntasks": fewest, "exclusive": True, "no-kill": True}
    if slurm.requeue == "array":
        more |= {"array": f"0-{MOST_RESTARTS_BY_ARRAY}%1", "requeue": None}
    wanted = {
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
    return {key: value for key, value in wanted.items() if value is not None}


def batch_command(python: str, code: Path, module: str, run: Path, request: Path) -> str:
    """The script's last line: the program that starts the ranks and decides what follows from how they ended."""
    words = ["env", f"PYTHONPATH={code}", python, "-P", "-m", module, str(run), str(request)]
    return f"exec {shlex.join(words)}"


def script(folder: Path, command: str, wanted: dict[str, Any]) -> str:
    """The batch script as it would be submitted."""
    from submitit.slurm.slurm import _make_sbatch_string

    return _make_sbatch_string(command=command, folder=folder, **wanted)


PACKAGES = ("pipeline", "models", "data", "slurm")


def snapshot(folder: Path) -> Path:
    """FOLDER/code-HASH with all modules; one that is there already has the same bytes."""
    source = Path(pipeline.__file__).resolve().parent.parent
    files = sorted(file for package in PACKAGES for file in (source / package).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(source)}\n".encode() + file.read_bytes())
    code = folder / f"code-{digest.hexdigest()[:12]}"
    if not code.exists():
        hidden = folder / f".{code.name}.{os.getpid()}"
        for file in files:
            (hidden / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, hidden / file.relative_to(source))
        os.replace(hidden, code)
    return code
