"""Keys that are good by themselves and contradict each other.

Errors are what no job can run with: they are looked for in requests, not where a configuration is read, so that a run
that has such keys can still be resumed with others. Warnings are what is trained as it stands, and hardly meant.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from pipeline.config import sbatch_options
from pipeline.config.schema import Config, Slurm, parse_duration, profiled_steps
from pipeline.errors import UsageError

FAST_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of CPUs that compute in bf16, as Linux names them; the last is Arm's."""
EARLY_SECONDS = 60
"""How much earlier than asked Slurm sends a job's signal at most."""


def check_job(slurm: Slurm) -> None:
    """UsageError where a job that is requested so could not run, or would never end."""
    problems, limit = [], parse_duration(slurm.time)
    if limit and slurm.signal_seconds >= limit:
        problems.append(
            f"slurm.signal_seconds={slurm.signal_seconds} is not less than slurm.time={slurm.time} ({limit} s): the job"
            " would be told to stop as it starts and be requeued, endlessly; lower the first or raise the second"
        )
    if slurm.gpus_per_node and (slurm.tasks_per_node or 0) > slurm.gpus_per_node:
        problems.append(
            f"slurm.tasks_per_node={slurm.tasks_per_node} is more than slurm.gpus_per_node={slurm.gpus_per_node}: every"
            " rank needs a GPU of its own"
        )
    problems += sbatch_options.problems(slurm)
    if problems:
        raise UsageError("\n".join(problems))


def warnings(config: Config, steps: int | None, classes: int | None, cpu: set[str] | None) -> list[str]:
    """A line for each contradiction. Pure.

    `steps`: the training's length, and `classes`, where they are known. `cpu`: the flags of the CPU that computes; None
    where a GPU does.
    """
    optim, train, slurm, found = config.optim, config.train, config.slurm, []
    if classes == 1 and train.loss == "softmax":
        found.append(
            "train.loss=softmax is always 0 with one class, whatever the network predicts; set train.loss=sigmoid"
        )
    if cpu and train.precision == "bf16" and not cpu & FAST_BF16:
        found.append(
            "train.precision=bf16 takes about ten times as long as fp32 on this machine's CPU, which has neither"
            " AVX512-BF16 nor AMX; set train.precision=fp32"
        )
    if steps is not None and optim.warmup_steps >= steps:
        found.append(
            f"optim.warmup_steps={optim.warmup_steps} is not less than the training's {steps} steps: the learning rate"
            " rises until the end, and never decays"
        )
    if optim.decay != "none" and optim.final_learning_rate > optim.learning_rate:
        found.append(
            f"optim.final_learning_rate={optim.final_learning_rate} is above optim.learning_rate={optim.learning_rate}:"
            " the learning rate rises after the warm-up, where it should decay"
        )
    every, kept = config.checkpoint.every, config.checkpoint.keep_every
    if kept is not None and kept % every and every % kept:
        found.append(
            f"checkpoint.keep_every={kept} is not a multiple of checkpoint.every={every}: only checkpoints at multiples"
            f" of {math.lcm(kept, every)} steps are kept for good"
        )
    profiled = profiled_steps(config.log.profile)
    if steps is not None and profiled and profiled[0] > steps:
        found.append(f"log.profile={config.log.profile} begins after the last step, {steps}: no trace is written")
    if config.data.cache.max_bytes is not None and config.data.cache.dir is None:
        found.append("data.cache.max_bytes is set and data.cache.dir is not: nothing is cached")
    if train.batch_norm_group is not None and config.model.norm == "layer":
        found.append(f"train.batch_norm_group={train.batch_norm_group} normalises nothing: model.norm is layer")
    if slurm.gpus_per_node and slurm.tasks_per_node and slurm.tasks_per_node < slurm.gpus_per_node:
        found.append(
            f"slurm.tasks_per_node={slurm.tasks_per_node} is less than slurm.gpus_per_node={slurm.gpus_per_node}: a"
            " rank uses one GPU, and the others are idle"
        )
    limit = parse_duration(slurm.time)
    if limit and limit - EARLY_SECONDS <= slurm.signal_seconds < limit:
        found.append(
            f"slurm.signal_seconds={slurm.signal_seconds} leaves {limit - slurm.signal_seconds} s of"
            f" slurm.time={slurm.time}, and Slurm sends the signal up to {EARLY_SECONDS} s early: a start that is told"
            " to stop before its first step is requeued endlessly; lower the first or raise the second"
        )
    return found


def cpu_flags() -> set[str]:
    """What this machine's CPU can do, as Linux names it."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return set(found[1].split()) if found else set()
