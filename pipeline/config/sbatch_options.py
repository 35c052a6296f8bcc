"""Options of sbatch that slurm.sbatch may not have: what our keys, or we ourselves, set."""

from __future__ import annotations

import re

from pipeline.config.schema import Slurm

_KEYS = {
    "account": "slurm.account", "exclude": "slurm.exclude", "job-name": "run.dir", "nodes": "slurm.nodes",
    "no-kill": "slurm.min_nodes", "partition": "slurm.partition", "qos": "slurm.qos", "signal": "slurm.signal_seconds",
    **dict.fromkeys(["array", "requeue", "no-requeue"], "slurm.requeue"),
    **dict.fromkeys(["cpus-per-task", "cpus-per-gpu"], "slurm.cpus_per_task"),
    **dict.fromkeys(
        ["gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task", "tres-per-task"], "slurm.gpus_per_node"
    ),
    **dict.fromkeys(["mem", "mem-per-cpu", "mem-per-gpu"], "slurm.memory"),
    **dict.fromkeys(
        ["ntasks", "ntasks-per-node", "ntasks-per-gpu", "ntasks-per-core", "ntasks-per-socket"], "slurm.tasks_per_node"
    ),
    **dict.fromkeys(["time", "time-min"], "slurm.time"),
}  # fmt: skip
"""Options, and the key that sets them or that they contradict."""
_LOG = "the job's log is RUN/slurm/JOB_0_log.out, which coatnet logs and coatnet status read"
_OUTPUT = "coatnet submit reads sbatch's output"
_REASONS = {
    "dependency": "write --dependency in full: it is added to coatnet submit's own",
    "chdir": "a job starts in the folder from which it is submitted: submit it from there",
    "clusters": "coatnet also asks Slurm about the job later: export SLURM_CLUSTERS instead",
    "error": _LOG, "open-mode": _LOG, "output": _LOG,
    "help": _OUTPUT, "parsable": _OUTPUT, "quiet": _OUTPUT, "usage": _OUTPUT, "version": _OUTPUT,
    "test-only": "coatnet submit --dry-run prints the batch script",
    "wait": "coatnet logs RUN --follow waits for the run's end",
    "wrap": "the job runs coatnet; set slurm.setup for lines before that",
}  # fmt: skip
"""Options that no key sets, and why they cannot be had, or how."""


def problems(slurm: Slurm) -> list[str]:
    """A line for each option of slurm.sbatch that cannot be passed on. Pure.

    Those that we do not know are sbatch's to judge, which also takes abbreviations.
    """
    found, advice = [], {name: f"set {key} instead" for name, key in _KEYS.items()} | _REASONS
    for option in slurm.sbatch:
        name, _ = split_option(option)
        taken = sorted(each for each in advice if name and each.startswith(name))  # the shortest first
        if taken and name != "dependency":
            found.append(f"slurm.sbatch has {option}: {advice[taken[0]]}")
    if (gpus := _gpus_of_gres(slurm)) not in (None, slurm.gpus_per_node):
        found.append(f"slurm.sbatch requests GPUs with --gres: set slurm.gpus_per_node={gpus} as well, or instead")
    return found


def split_option(option: str) -> tuple[str, str]:
    """The name and the value of an option as `slurm.sbatch` has it: --name=value, --name value or --name."""
    name, *value = re.split(r"=|\s+", option.removeprefix("--").strip(), maxsplit=1)
    return name, "".join(value)


def names_gpus(slurm: Slurm) -> bool:
    """Whether slurm.sbatch has --gres=gpu:TYPE:NUMBER, which sbatch refuses beside --gpus-per-node."""
    return _gpus_of_gres(slurm) is not None


def _gpus_of_gres(slurm: Slurm) -> int | None:
    lists = [value.split(",") for name, value in map(split_option, slurm.sbatch) if name == "gres"]
    items = [item.split(":") for items in lists for item in items if re.match(r"(gres[/:])?gpu(:|$)", item)]
    return sum(int(item[-1]) if item[-1].isdecimal() else 1 for item in items) if items else None
