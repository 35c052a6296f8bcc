"""What of the environment in which a person submits reaches the job: nothing of another job, step or rank.

sbatch hands its whole environment on, and srun reads its options from it. So a job submitted from inside another (an
interactive allocation, a desktop or notebook on a node) would begin with that one's memory, task counts and GPUs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

_KEPT = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
"""Which cluster is asked, and as whom."""
_FOREIGN = re.compile(
    r"(SLURM|SLURMD|SRUN|SALLOC|SBATCH|SCANCEL|SCONTROL|SINFO|SQUEUE)_"  # a job's, or defaults of Slurm's programs
    r"|(PMI|PMI2|PMIX|OMPI_COMM_WORLD|TORCHELASTIC|COATNET)_"
    r"|((LOCAL|GROUP|ROLE|NODE)_)?(RANK|WORLD_SIZE)$|ROLE_NAME$|MASTER_(ADDR|PORT)$"
)
_GPUS = {
    "CUDA_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
}
_DEFAULTS = ("account", "constraint", "export", "partition", "qos", "reservation")
"""Options of sbatch that people set for all their jobs, as SBATCH_ACCOUNT; sbatch prefers them to a script's."""


def outside_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what describes a job, a step or a rank, or changes what Slurm's programs select and print."""
    return {name: value for name, value in environment.items() if name in _KEPT or not _FOREIGN.match(name)}


def for_sbatch(environment: Mapping[str, str], options: Collection[str]) -> dict[str, str]:
    """The same, with a person's defaults for what a script's `options` leave open, and without another job's GPUs."""
    defaults = {f"SBATCH_{name.upper()}" for name in _DEFAULTS if name not in options}
    dropped = _GPUS if "SLURM_JOB_ID" in environment else set()
    outside = {name: value for name, value in outside_jobs(environment).items() if name not in dropped}
    return outside | {name: environment[name] for name in defaults if name in environment}


@contextmanager
def replaced_environment(environment: Mapping[str, str]) -> Iterator[None]:
    """This process's environment meanwhile: submitit hands on no other."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
