"""Many short trainings in the same ranks, since starting ranks takes time.

Each job of the JSON file is `{"arguments": ["preset.yaml", "key=value", ...]}`: a `coatnet pretrain` without its start.
With `"source": RUN, "step": K` its folder first gets a copy of what that run had when it had saved step K. With
`"resave": FOLDER` nothing is trained: the checkpoint is loaded into an engine, evaluated by the model's weights and by
their average, and saved again in FOLDER, with the losses in FOLDER/losses.json. With `"poison_padding"` the padding
passes of ranks see NaN; with `"faults"` steps go wrong (`Faults`); with `"storage"` saves do
(`StorageFaults`), and ended-RANK.txt in the run's folder has the error that a rank ended with. With `"waits": K` waits
for the device are counted in step K (`Waits`). With `"replay": K` nothing is trained: step K is done again (`replay`).
No training may draw from a random generator that has a state.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.checkpoint.reader import checkpoints, step_name
from pipeline.commands.pretrain import import_training
from pipeline.distributed.environment import rank_and_world_size
from pipeline.distributed.launcher import launch
from pipeline.errors import RunFailed
from tests import forked
from tests.pipeline.runs import PATIENCE_SECONDS, contents
from tests.pipeline.storage_faults import StorageFaults
from tests.pipeline.waits import Waits

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
    from pipeline.train import micro_batch_loss, train
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
    if "replay" in job:
        return replay(Path(config.run.dir), job["replay"], Path(job["out"]), Faults(**job["faults"]))
    before = generators()
    forward = Faults(**job["faults"]) if "faults" in job else micro_batch_loss
    if "waits" in job:
        forward = Waits(job["waits"], rank_and_world_size()[0], forward)
    if "storage" in job:
        return record_end(
            Path(config.run.dir), partial(train, config, plan, [], forward=StorageFaults(**job["storage"]))
        )
    train(config, plan, [], forward=poisoned_padding(forward) if job.get("poison_padding") else forward)
    assert generators() == before


def replay(run: Path, step: int, out: Path, forward: Faults) -> None:
    """Replays a step into a folder; rank 0 leaves what was printed and whether the run's folder is as it was."""
    from pipeline.commands.replay import find, replay_on_ranks
    from pipeline.distributed.collectives import from_rank_zero
    from pipeline.training.engine import start_process_group

    device = start_process_group()
    before = from_rank_zero(lambda: contents(run))
    with redirect_stdout(io.StringIO()) as printed:
        status = replay_on_ranks(from_rank_zero(lambda: find(run, step, None, False)), out, device, forward)
    if rank_and_world_size()[0] == 0:
        told = {"status": status, "unchanged": contents(run) == before, "printed": printed.getvalue()}
        (out / "told.json").write_text(json.dumps(told))


def record_end(run: Path, training: Callable[[], None]) -> None:
    end = ""
    try:
        training()
    except RunFailed as error:
        end = str(error)
    (run / f"ended-{rank_and_world_size()[0]}.txt").write_text(end)


def generators() -> tuple[object, ...]:
    """The states of all random generators that a program might use without saying so."""
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().numpy().tobytes()


def poisoned_padding(forward: Any) -> Any:
    """A forward pass that sees NaN where it is a padding pass: the second one of a micro batch."""
    seen: list[Any] = [None]

    def poisoned(engine: Any, batch: Any, *more: Any) -> torch.Tensor:
        padding = batch is seen[0]
        seen[0] = batch
        return forward(engine, replace(batch, images=batch.images * math.nan) if padding else batch, *more)

    return poisoned


class Faults:
    """A forward pass of which steps (from 1) go wrong: rank 1's pixels have a NaN, a gradient of rank 0 an Inf, losses
    are a hundred times too high on all ranks, or what a layer makes of the sample at a slot of the global batch is
    multiplied (`rows`: step -> slot, layer, factor); before step `kill` is done again after a rollback, or for the
    first time, all ranks are killed."""

    def __init__(
        self,
        nan: Sequence[int] = (),
        inf: Sequence[int] = (),
        spikes: Sequence[int] = (),
        kill: int = 0,
        rows: Mapping[str, tuple[int, str, float]] | None = None,
    ) -> None:
        self.nan, self.inf, self.spikes, self.kill, self.rows = nan, inf, spikes, kill, rows or {}
        self.of_row: list[Any] = []
        self.rank, self.step, self.seen = rank_and_world_size()[0], 0, set[int]()
        self.hooks: list[Any] = []

    def __call__(self, engine: Any, batch: Any, config: Any, *more: Any) -> torch.Tensor:
        from pipeline.train import micro_batch_loss

        step = int(batch.positions[0]) // config.train.global_batch + 1
        if step != self.step:
            self.begin_step(engine, step)
        self.spoil_row(engine, batch.positions % config.train.global_batch, *self.rows.get(str(step), (-1, "", 1.0)))
        if step in self.nan and self.rank == 1:
            images = batch.images.float()
            images[0, 0, 0, 0] = math.nan
            batch = replace(batch, images=images)
        return micro_batch_loss(engine, batch, config, *more) * (100 if step in self.spikes else 1)

    def spoil_row(self, engine: Any, positions: Any, slot: int, layer: str, factor: float) -> None:
        while self.of_row:
            self.of_row.pop().remove()
        is_it = torch.from_numpy(positions == slot)
        factors = torch.where(is_it, factor, 1.0)

        def multiplied(_layer: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output * factors.view(-1, *[1] * (output.dim() - 1))

        if is_it.any():
            self.of_row.append(engine.module.get_submodule(layer).register_forward_hook(multiplied, prepend=True))

    def begin_step(self, engine: Any, step: int) -> None:
        if step == self.kill and (self.kill > max(self.spikes, default=0) or step in self.seen):
            os.kill(os.getpid(), signal.SIGKILL)
        self.step = step
        self.seen.add(step)
        while self.hooks:
            self.hooks.pop().remove()
        if step in self.inf and self.rank == 0:
            middle = list(engine.module.parameters())[10]
            self.hooks.append(middle.register_hook(with_infinity))


def with_infinity(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.index_fill(0, torch.tensor([0], device=gradient.device), math.inf)


def copy_run(source: Path, step: int, run: Path) -> None:
    name = Path("checkpoints") / step_name(step)
    shutil.copytree(source / name, run / name)
    shutil.copy(source / "config.yaml", run)


def resave(config: Any, plan: Any, folder: Path) -> None:
    from pipeline.checkpoint.restore import restore, warn_of_damage
    from pipeline.checkpoint.writer import CheckpointWriter
    from pipeline.config.schema import Checkpoint
    from pipeline.run.events import Events
    from pipeline.training import ema
    from pipeline.training.batches import loader_spec
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
    state = restore(engine, checkpoints(Path(config.run.dir) / "checkpoints"), average, plan.train, warn_of_damage)
    assert state is not None
    losses, spec = {}, loader_spec(config, device)
    for kind, swapped in (("ema", average), ("model", None)):
        with evaluation_mode(engine, swapped):
            result = evaluate(engine, plan.val, config.evaluate.crop_fraction, config.train.loss, spec)
            assert result is not None
            losses[kind] = result.loss
    (folder / "losses.json").write_text(json.dumps(losses))
    writer = CheckpointWriter(folder / "checkpoints", 0, rank, world_size, Checkpoint(keep_last=1), events)
    writer.save(engine, average, state)
    writer.wait()


def main() -> None:
    if len(sys.argv) == 3:
        jobs_file = Path(sys.argv[2])
        sys.exit(launch([str(jobs_file)], int(sys.argv[1]), jobs_file.parent / "logs", import_training, MODULE))
    for each in json.loads(Path(sys.argv[1]).read_text()):
        do(each)


if __name__ == "__main__":
    main()
