"""Many short trainings in the same ranks, since starting ranks takes time.

Each job of the JSON file is `{"arguments": ["preset.yaml", "key=value", ...]}`: a `coatnet pretrain` without its start.
With `"source": RUN, "step": K` its folder first gets a copy of what that run had when it had saved step K. With
`"resave": FOLDER` nothing is trained: the checkpoint is loaded into an engine, evaluated by the model's weights and by
their average, and saved again in FOLDER, with the losses in FOLDER/losses.json. With `"poison_idle_passes"` the
passes of ranks that have no micro batch see NaN; with `"faults"` steps go wrong (`Faults`). No training may draw from a
random generator that has a state.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from pipeline.checkpoint.reader import step_name
from pipeline.commands.pretrain import import_training
from pipeline.distributed.environment import cpus_per_rank, rank_and_world_size
from pipeline.distributed.launcher import launch
from tests import forked
from tests.pipeline.runs import PATIENCE_SECONDS

MODULE = "tests.pipeline.batch_runs"


def on_ranks(world_size: int, jobs: list[dict[str, Any]], folder: Path, status: int = 0) -> str:
    """Does the jobs one after the other on so many ranks, which end with this status; returns what rank 0 said."""
    file = folder / f"jobs-{world_size}-{len(list(folder.glob('jobs-*')))}.json"
    file.write_text(json.dumps(jobs))
    done = forked.run(MODULE, world_size, file, timeout=2 * PATIENCE_SECONDS)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def do(job: dict[str, Any]) -> None:
    from pipeline.config.parsing import read_config
    from pipeline.distributed.collectives import from_rank_zero
    from pipeline.plan import make_plan
    from pipeline.train import train
    from pipeline.training.engine import start_process_group

    config = read_config(job["arguments"][0], job["arguments"][1:])
    world_size = rank_and_world_size()[1]
    if "source" in job:
        start_process_group()
        from_rank_zero(lambda: copy_run(Path(job["source"]), job["step"], Path(config.run.dir)))
    plan = make_plan(config, "pretrain", world_size, world_size)
    if "resave" in job:
        resave(config, plan, Path(job["resave"]))
        return
    before = generators()
    idle_passes = poisoned_idle_passes() if job.get("poison_idle_passes") else nullcontext()
    with idle_passes, faulty(**job.get("faults", {})):
        train(config, plan, [])
    assert generators() == before


def generators() -> tuple[object, ...]:
    """The states of all random generators that a program might use without saying so."""
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().numpy().tobytes()


@contextmanager
def poisoned_idle_passes() -> Iterator[None]:
    from pipeline import train as loop

    padding_pass, inputs = loop.padding_pass, loop.normalize

    @contextmanager
    def poisoned(engine: Any) -> Iterator[None]:
        with padding_pass(engine), mock.patch.object(loop, "normalize", lambda images: inputs(images) * np.nan):
            yield

    with mock.patch.object(loop, "padding_pass", poisoned):
        yield


@contextmanager
def faulty(
    nan: Sequence[int] = (), inf: Sequence[int] = (), spikes: Sequence[int] = (), kill: int = 0
) -> Iterator[None]:
    """Inside, steps (from 1) go wrong: rank 1's pixels have a NaN, a gradient of rank 0 an Inf, losses are a hundred
    times too high on all ranks; before step `kill` is done again after a rollback, or for the first time, all ranks
    are killed."""
    from pipeline import train as loop

    rank, now, seen = rank_and_world_size()[0], 0, set()
    set_schedule, learning_rate, inputs, loss_fn = loop.set_schedule, loop.learning_rate, loop.normalize, loop.loss_fn
    hooks: list[Any] = []

    def note_step(optim: Any, step: int, steps: int) -> float:
        nonlocal now
        now = step + 1
        if now == kill and (kill > max(spikes, default=0) or now in seen):
            os.kill(os.getpid(), signal.SIGKILL)
        seen.add(now)
        return learning_rate(optim, step, steps)

    def spoil_gradient(engine: Any, *rates: Any) -> None:
        set_schedule(engine, *rates)
        while hooks:
            hooks.pop().remove()
        if now in inf and rank == 0:
            middle = list(engine.module.parameters())[10]
            hooks.append(middle.register_hook(spoiled))

    def spoiled(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.index_fill(0, torch.tensor([0], device=gradient.device), math.inf)

    def spoil_pixels(images: torch.Tensor) -> torch.Tensor:
        made = inputs(images)
        if now in nan and rank == 1:
            made[0, 0, 0, 0] = math.nan
        return made

    def raise_loss(*given: Any) -> torch.Tensor:
        return loss_fn(*given) * (100 if now in spikes else 1)

    instead = {
        "learning_rate": note_step,
        "set_schedule": spoil_gradient,
        "normalize": spoil_pixels,
        "loss_fn": raise_loss,
    }
    with mock.patch.multiple(loop, **instead):
        yield


def copy_run(source: Path, step: int, run: Path) -> None:
    name = Path("checkpoints") / step_name(step)
    shutil.copytree(source / name, run / name)
    shutil.copy(source / "config.yaml", run)


def resave(config: Any, plan: Any, folder: Path) -> None:
    from data.loader import LoaderSpec
    from pipeline.checkpoint.restore import restore
    from pipeline.checkpoint.writer import CheckpointWriter
    from pipeline.config.schema import Checkpoint
    from pipeline.run.events import Events
    from pipeline.training import ema
    from pipeline.training.engine import build_engine, evaluation_mode, start_process_group, zero3_init
    from pipeline.training.evaluation import evaluate
    from pipeline.training.model import build_model, empty_weights

    device, (rank, world_size) = start_process_group(), rank_and_world_size()
    shard = zero3_init(config.train, config.optim, config.zero)
    model = build_model(config.model, config.train, len(plan.train.classes), device, empty_weights, shard)
    engine = build_engine(model, config.train, config.optim, config.zero)
    average = ema.clone(ema.statistics(model))
    folder.mkdir(parents=True, exist_ok=True)
    events = Events(folder, 0, rank)
    state = restore(engine, Path(config.run.dir), average, plan.train.fingerprint, events)
    assert state is not None
    share = LoaderSpec(rank, world_size, config.train.micro_batch, config.model.resolution, device, cpus_per_rank())
    losses = {}
    for kind, swapped in (("ema", average), ("model", None)):
        with evaluation_mode(engine, swapped):
            losses[kind] = evaluate(engine, plan.val, config.evaluate.crop_fraction, config.train.loss, share).loss
    (folder / "losses.json").write_text(json.dumps(losses))
    writer = CheckpointWriter(folder / "checkpoints", 0, rank, world_size, Checkpoint(keep_last=1), events)
    writer.save(engine, average, state)
    writer.close()


def main() -> None:
    if len(sys.argv) == 3:
        jobs_file = Path(sys.argv[2])
        sys.exit(launch([str(jobs_file)], int(sys.argv[1]), jobs_file.parent / "logs", import_training, MODULE))
    for each in json.loads(Path(sys.argv[1]).read_text()):
        do(each)


if __name__ == "__main__":
    main()
