"""The steps of a run again, in memory: from a checkpoint of its own up to one step, which is looked into.

They are the steps of the training loop (train.do_step), with what the run's records say of the attempts that did them
(checkpoint/history.py); nothing is written to the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from models.coatnet import stochastic_depth_rates
from pipeline.checkpoint.history import Span, Values, skipped_on, span_of
from pipeline.checkpoint.restore import restore, warn_of_damage
from pipeline.config.batch_size import micro_batches_of, planned_steps
from pipeline.config.schema import Config
from pipeline.distributed.collectives import manifest_from_rank_zero
from pipeline.distributed.environment import rank_and_world_size
from pipeline.monitoring.mfu import device_name
from pipeline.plan import Plan, training_set
from pipeline.train import Forward, do_step, micro_batch_loss
from pipeline.training import ema
from pipeline.training import engine as deepspeed_engine
from pipeline.training.batches import loader_spec, training_steps
from pipeline.training.epoch_audit import EpochAudit
from pipeline.training.model import InitialWeights
from pipeline.training.probe import Examination, Losses, examine, probe_of
from pipeline.training.state import TrainState
from pipeline.training.step import StepReport

Agreement = Literal["equal to the bit", "equal within rounding", "different"]
LOSS_TOLERANCE, NORM_TOLERANCE = 0.01, 0.1
"""Relative differences that other ranks, another ZeRO stage or another device may make (docs/howto/replay.md)."""


@dataclass(frozen=True)
class Replay:
    """A step that was done again: the same on every rank.

    `first` is the first step that was, `reason` why the last one was not applied, if so, `values` are those of each.
    `exact` is whether all was as when the run did them, so that the values must be the recorded ones to the bit.
    """

    plan: Plan
    config: Config
    first: int
    reason: str
    values: dict[int, Values]
    exact: bool
    examination: Examination


def replay_step(
    path: list[Span],
    folders: list[Path],
    device: torch.device,
    initial_weights: InitialWeights | None = None,
    forward: Forward = micro_batch_loss,
) -> Replay:
    """Does the last steps of a path again, from the newest good one of these checkpoints on, or without any all.

    `initial_weights` and `forward` as in train.train. Collective.
    """
    config, step = _uncompiled(path[0].stretch.config), path[0].end
    train, order = training_set(config, read=manifest_from_rank_zero)
    plan = Plan(train, None, order, planned_steps(config.train, train.samples), {}, 0 if folders else None, False, [])
    engine, state = _restored(config, plan, folders, device, initial_weights)
    first, classes = state.step + 1, len(plan.train.classes)
    rates = stochastic_depth_rates(engine.module, config.train.stochastic_depth)
    spec, values, reason, examination = loader_spec(config, device), dict[int, Values](), "", None
    with training_steps(config, replace(plan, steps=step), spec, state.step, skipped_on(path)) as steps:
        for number, micro_batches, _ in steps:
            if micro_batches is None:  # a rollback skipped this step
                state.step = number + 1
                continue
            if number + 1 == step:
                probe = probe_of(engine, config, classes, device)
                losses = _losses_by(forward, config, classes, rates)
                examination = examine(probe, micro_batches, losses, config)
            then = span_of(path, number + 1).stretch.config  # with the learning rate and the length of its time
            of_then = replace(plan, steps=planned_steps(then.train, train.samples))
            report = StepReport(device, micro_batches, micro_batches_of(config.train), [])
            _, reason = do_step(engine, then, of_then, state, report, micro_batches, forward, rates, _nothing_asked)
            values[number + 1] = Values(report.totals.mean_loss, float(engine.get_global_grad_norm()))
    assert examination is not None  # no rollback skipped the step
    here = _computed(config, rank_and_world_size()[1], device_name(device), torch.__version__)
    did = [span.stretch for span in path if span.end >= first]
    same = all(_computed(each.config, each.world_size, each.device, each.torch) == here for each in did)
    return Replay(plan, config, first, reason, values, same and device.type == "cpu", examination)


def agreement(recorded: Values, replayed: Values) -> Agreement:
    """How the values of a step agree with the recorded ones; any norm does with one that was not recorded."""
    norm = replayed.grad_norm if math.isnan(recorded.grad_norm) else recorded.grad_norm
    pairs = (recorded.loss, replayed.loss, LOSS_TOLERANCE), (norm, replayed.grad_norm, NORM_TOLERANCE)
    equal = [repr(there) == repr(here) for there, here, _ in pairs]  # NaN too
    near = [math.isfinite(there) and abs(there - here) <= share * abs(there) for there, here, share in pairs]
    if all(equal):
        return "equal to the bit"
    return "equal within rounding" if all(map(max, equal, near)) else "different"


def _restored(
    config: Config, plan: Plan, folders: list[Path], device: torch.device, initial_weights: InitialWeights | None
) -> tuple[Any, TrainState]:
    """An engine, and the state of the training that it has."""
    model = deepspeed_engine.build_initial_model(config, plan, device, initial_weights)
    engine = deepspeed_engine.build_engine(model, config.train, config.optim, config.zero)
    bn_ema = ema.clone(ema.statistics(model)) if config.train.ema else None
    audit = EpochAudit(plan.train.samples, config.train.global_batch, None)
    saved = restore(engine, folders, bn_ema, plan.train, warn_of_damage, "--from-start trains from step 1 instead")
    return engine, TrainState.from_json(saved, audit, [], bn_ema) if saved else TrainState.begin(audit, [], bn_ema)


def _losses_by(forward: Forward, config: Config, classes: int, rates: list[float]) -> Losses:
    return lambda probe, batch: forward(probe, batch, config, classes, rates, "none")


def _uncompiled(config: Config) -> Config:
    """Without torch.compile, in which layers could not be looked into."""
    return config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})


def _computed(config: Config, world_size: int, device: str | None, version: str | None) -> tuple[object, ...]:
    """What decides in which order numbers are added up."""
    train = config.train
    settings = config.zero, train.precision, train.compile, train.activation_checkpointing, config.model.attention
    return world_size, device, version, *settings


def _nothing_asked() -> tuple[bool, bool]:
    return False, False
