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

from pipeline.checkpoint import step_name
from pipeline.launch import processor_share, rank_and_world_size, run_ranks
from tests import forked
from tests.pipeline.runs import PATIENCE_SECONDS

MODULE = "tests.pipeline.many_runs"


def on_ranks(world_size: int, jobs: list[dict[str, Any]], folder: Path, status: int = 0) -> str:
    """Does the jobs one after the other on so many ranks, which end with this status; returns what rank 0 said."""
    file = folder / f"jobs-{world_size}-{len(list(folder.glob('jobs-*')))}.json"
    file.write_text(json.dumps(jobs))
    done = forked.run(MODULE, world_size, file, timeout=2 * PATIENCE_SECONDS)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def do(job: dict[str, Any]) -> None:
    from pipeline.engine import on_rank_zero, start_process_group
    from pipeline.overrides import read_config
    from pipeline.prepare import prepare
    from pipeline.train import train

    config = read_config(job["arguments"][0], job["arguments"][1:])
    world_size = rank_and_world_size()[1]
    if "source" in job:
        start_process_group()
        on_rank_zero(lambda: copy_run(Path(job["source"]), job["step"], Path(config.run.dir)))
    plan = prepare(config, "pretrain", world_size, world_size)
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

    idle_pass, inputs = loop.idle_pass, loop.inputs

    @contextmanager
    def poisoned(engine: Any) -> Iterator[None]:
        with idle_pass(engine), mock.patch.object(loop, "inputs", lambda images: inputs(images) * np.nan):
            yield

    with mock.patch.object(loop, "idle_pass", poisoned):
        yield


@contextmanager
def faulty(
    nan: Sequence[int] = (), inf: Sequence[int] = (), spikes: Sequence[int] = (), kill: int = 0
) -> Iterator[None]:
    """Inside, steps (from 1) go wrong: rank 1's pixels have a NaN, a gradient of rank 0 an Inf, losses are a hundred
    times too high on all ranks; before step `kill` is done again after a going back, or for the first time, all ranks
    are killed."""
    from pipeline import train as loop

    rank, now, seen = rank_and_world_size()[0], 0, set()
    set_rates, learning_rate, inputs, loss_of = loop.set_rates, loop.learning_rate, loop.inputs, loop.loss_of
    hooks: list[Any] = []

    def note_step(optim: Any, step: int, steps: int) -> float:
        nonlocal now
        now = step + 1
        if now == kill and (kill > max(spikes, default=0) or now in seen):
            os.kill(os.getpid(), signal.SIGKILL)
        seen.add(now)
        return learning_rate(optim, step, steps)

    def spoil_gradient(engine: Any, *rates: Any) -> None:
        set_rates(engine, *rates)
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
        return loss_of(*given) * (100 if now in spikes else 1)

    instead = {"learning_rate": note_step, "set_rates": spoil_gradient, "inputs": spoil_pixels, "loss_of": raise_loss}
    with mock.patch.multiple(loop, **instead):
        yield


def copy_run(source: Path, step: int, run: Path) -> None:
    name = Path("checkpoints") / step_name(step)
    shutil.copytree(source / name, run / name)
    shutil.copy(source / "config.yaml", run)


def resave(config: Any, plan: Any, folder: Path) -> None:
    from data.loader import Share
    from pipeline import ema
    from pipeline.config import Checkpoint
    from pipeline.engine import build_engine, evaluation_mode, sharding, start_process_group
    from pipeline.evaluate import evaluate
    from pipeline.network import build_network, no_values
    from pipeline.record import Events
    from pipeline.restore import restore
    from pipeline.save import CheckpointWriter

    device, (rank, world_size) = start_process_group(), rank_and_world_size()
    shard = sharding(config.train, config.optim, config.zero)
    model = build_network(config.model, config.train, len(plan.train.classes), device, no_values, shard)
    engine = build_engine(model, config.train, config.optim, config.zero)
    average = ema.copied(ema.statistics(model))
    folder.mkdir(parents=True, exist_ok=True)
    events = Events(folder, 0, rank)
    state = restore(engine, Path(config.run.dir), average, plan.train.fingerprint, events)
    assert state is not None
    share = Share(rank, world_size, config.train.micro_batch, config.model.resolution, device, processor_share())
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
        sys.exit(run_ranks([str(jobs_file)], int(sys.argv[1]), jobs_file.parent / "logs", MODULE))
    for each in json.loads(Path(sys.argv[1]).read_text()):
        do(each)


if __name__ == "__main__":
    main()
