"""From the configuration's slurm section to sbatch's options and the batch script, which submitit writes.

submitit writes and submits the script; it neither runs our function nor requeues (it could only do that on rank 0,
inside a signal handler). The script starts job.py, which starts the ranks.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from pathlib import Path
from typing import Any

from pipeline.config.sbatch_options import names_gpus, split_option
from pipeline.config.schema import Slurm
from pipeline.distributed.launcher import ROOT, module_command
from pipeline.errors import UsageError
from pipeline.run.small_files import publish, write_atomically

MAX_ARRAY_RESTARTS = 1000


def tasks_per_node(slurm: Slurm) -> int:
    """Ranks on each node."""
    return slurm.tasks_per_node or slurm.gpus_per_node or 1


def parameters(
    slurm: Slurm, name: str, folder: Path, dependency: str | None = None, array: bool = False
) -> dict[str, Any]:
    """submitit's parameters; `folder` is the batch log's, `dependency`, afterok:4711, comes beside a person's own."""
    # An array's element ends where another job is requeued: the next one takes its place.
    again = {"array": f"0-{MAX_ARRAY_RESTARTS}%1", "no-requeue": True} if array else {"requeue": True}
    more: dict[str, Any] = {"kill-on-invalid-dep": "yes", **again}
    more |= {"output": f"{literal(folder)}/%j_0_log.out", "propagate": "NONE"}  # limits: the nodes', not this shell's
    extra = dict(map(split_option, slurm.sbatch))
    dependency = ",".join(filter(None, (dependency, extra.pop("dependency", None)))) or None
    more |= {name: value or True for name, value in extra.items()}
    if slurm.min_nodes is not None and slurm.min_nodes < slurm.nodes:
        # ntasks must fit the fewest nodes; exclusive, since each node runs its full number of ranks all the same. A job
        # that survives the loss of a node lowers its request itself (job.py): Slurm would wait for as many as before.
        min_tasks = slurm.min_nodes * tasks_per_node(slurm)
        more |= {"nodes": f"{slurm.min_nodes}-{slurm.nodes}", "ntasks": min_tasks, "exclusive": True, "no-kill": True}
    options = {
        "job_name": name,
        "nodes": slurm.nodes,
        "ntasks_per_node": tasks_per_node(slurm),
        "cpus_per_task": slurm.cpus_per_task,
        "gpus_per_node": None if names_gpus(slurm) else slurm.gpus_per_node,
        "mem": slurm.memory,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "exclude": slurm.exclude,
        "dependency": dependency,
        "signal_delay_s": slurm.signal_seconds,
        "setup": list(slurm.setup) or None,
        "stderr_to_stdout": True,
        "use_srun": False,
        "additional_parameters": more,
    }
    return {key: value for key, value in options.items() if value is not None}


def literal(path: Path) -> str:
    """A path for --output, where % begins a pattern, and a backslash anywhere turns patterns off."""
    if re.search(r"[\\\x00-\x1f]", str(path)):
        raise UsageError(f"a job's folder must not contain a backslash or line break: {str(path)!r}")
    return str(path).replace("%", "%%")


def batch_command(python: str, code: Path, module: str, run: Path, request: Path) -> str:
    """The script's last line: the program that starts the ranks and requeues the job."""
    return f"exec {shlex.join([*module_command(module, python, code), str(run), str(request)])}"


def script(folder: Path, command: str, options: dict[str, Any]) -> str:
    """The batch script as it would be submitted."""
    from submitit.slurm.slurm import _make_sbatch_string

    return _make_sbatch_string(command=command, folder=folder, **options)


PACKAGES = ("pipeline", "models", "data", "slurm")


def snapshot(folder: Path) -> Path:
    """Copies all modules to FOLDER/code-HASH; a folder of that name that has other bytes is damaged, and replaced."""
    modules = _modules(ROOT)
    code = folder / f"code-{_digest(modules)}"
    if not code.is_dir() or _digest(_modules(code)) != _digest(modules):
        partial = folder / f".{code.name}.{os.getpid()}"
        for name, content in modules.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(partial / name, content)
        publish(partial, code)
    return code


def _modules(folder: Path) -> dict[str, bytes]:
    """The program's modules in a folder, and the template of its pages, by their names."""
    found = [file for package in PACKAGES for kind in ("py", "html") for file in (folder / package).rglob(f"*.{kind}")]
    files = sorted(file for file in (*found, folder / "coatnet_main.py") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _digest(modules: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in modules.items():
        digest.update(f"{name}\n".encode() + content)
    return digest.hexdigest()[:12]
