"""Running a command's work as one process per rank: in this process if it is a rank, else by launching them.

Next: out_of_memory.py.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.config import Config, waste
from pipeline.errors import BadRequest
from pipeline.failures import last_words
from pipeline.launch import is_first_process, is_rank, local_world_size, rank_and_world_size, run_ranks
from pipeline.mirror import bring_back
from pipeline.prepare import Plan, check_ranks, prepare
from pipeline.weights_and_biases import check_wandb


def run(config: Config, command: str, procs: int, work: Callable[[Plan], None]) -> int:
    """Does `work` with the plan as every rank of a training run; returns the exit status."""
    bring_back(config)
    world_size = rank_and_world_size()[1] if is_rank() else procs
    plan = prepare(config, command, world_size, local_world_size(procs))
    if plan.finished:
        more = f", at step {plan.newest}" if plan.newest != plan.steps else ""
        print(f"{config.run.dir}: done already, {plan.steps} of {plan.steps} steps{more}; nothing was changed")
        return 0
    _check_attention(config)
    _check_compiler(config)
    check_wandb(config.log.wandb)
    if is_first_process() and (wasted := waste(config.train, world_size)):
        print(f"warning: {wasted}", file=sys.stderr)
    if not is_rank():
        return run_ranks(sys.argv[1:], procs, Path(config.run.dir) / "logs")
    from pipeline.out_of_memory import explained  # it imports torch

    with last_words(Path(config.run.dir)), explained(config, len(plan.train.classes)):
        work(plan)
    return 0


def check_config(config: Config, procs: int, quiet: bool = False, likely_classes: int | None = None) -> int:
    """Checks what can be checked without data, and says what would be trained.

    How many classes the data have is not known where model.classes does not say.
    """
    from pipeline.arithmetic import arithmetic
    from pipeline.network import counts_of

    check_ranks(config, procs)
    check_wandb(config.log.wandb)
    classes = config.model.classes or likely_classes or 1000
    counts = counts_of(config.model, config.train, classes)
    if quiet:
        return 0
    samples = config.data.train_samples
    lines = arithmetic(config.model, config.train, config.zero, classes, counts, procs, samples)
    print("good:", "\n".join(lines))
    if config.model.classes is None:
        print(f"model.classes is null: {classes:,} classes are assumed, and the data will tell")
    if wasted := waste(config.train, procs):
        print(f"warning: {wasted}", file=sys.stderr)
    return 0


def _check_attention(config: Config) -> None:
    """BadRequest where this machine cannot train the attention; only for the one kind in doubt is torch imported."""
    if config.model.attention != "flex":
        return
    import torch

    from models.backends import check_backend

    try:
        check_backend(config.model.attention, "cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        raise BadRequest(f"model.{error}") from None


def _check_compiler(config: Config) -> None:
    """BadRequest where torch.compile would find no compiler."""
    compiler = os.environ.get("CXX", "g++")
    if config.train.compile and shutil.which(compiler) is None:
        raise BadRequest(
            f"train.compile is true, and there is no compiler {compiler} on this machine; install it, name another one"
            " in the environment's CXX, or set train.compile=false"
        )
