"""The training loop, top to bottom: data, forward, backward, step, log, checkpoint, evaluate.

    coatnet pretrain configs/tiny.yaml                               # one process
    coatnet pretrain configs/tiny.yaml --procs 2                     # two ranks on this machine
    torchrun --nproc-per-node 8 --no-python coatnet pretrain ...     # or any launcher that sets torchrun's variables

A step is one global batch of `global_batch / micro_batch` micro batches, distributed over the ranks; it takes as many
accumulation steps as the busiest rank needs. No random number comes from a generator with state: a run that resumes
from a checkpoint at step k continues as if it had never been interrupted, on as many ranks to the bit, on others up to
the rounding of sums.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NoReturn

import torch

from data.loader import Batch, LoaderSpec
from models.coatnet import stochastic_depth_rates
from pipeline.attempt import Attempt, begin_attempt
from pipeline.checkpoint.checkpointer import Checkpointer
from pipeline.config.batch_size import micro_batches_of
from pipeline.config.contradictions import cpu_flags, warnings
from pipeline.config.schema import Config
from pipeline.distributed import heartbeat
from pipeline.ending import BoundedCleanup
from pipeline.errors import Interrupted
from pipeline.monitoring.metrics import Metrics, open_metrics
from pipeline.monitoring.profiler import Profiler
from pipeline.monitoring.summary import print_summary
from pipeline.plan import Plan
from pipeline.training import ema
from pipeline.training import engine as deepspeed_engine
from pipeline.training.batches import loader_spec, training_steps
from pipeline.training.evaluation import evaluate
from pipeline.training.loss_guard import Verdict
from pipeline.training.losses import Reduction, loss_fn, one_hot
from pipeline.training.mixup import mixup
from pipeline.training.model import InitialWeights, drop_path_mask, normalize
from pipeline.training.optimizer import learning_rate
from pipeline.training.state import TrainState
from pipeline.training.step import StepReport
from pipeline.training.step_events import record_epochs, record_step


def micro_batch_loss(
    engine: Any, batch: Batch, config: Config, classes: int, drop_rates: list[float], reduction: Reduction = "mean"
) -> torch.Tensor:
    """The forward pass: the mean loss of a micro batch, or each sample's. What is drawn depends only on positions."""
    seed, images, targets = config.run.seed, normalize(batch.images), batch.labels
    if config.augment.mixup:
        targets = one_hot(targets, classes, config.train.loss)
        images, targets = mixup(images, targets, config.augment.mixup, seed, batch.positions)
    logits = engine(images, drop_path_mask(seed, batch.positions, drop_rates, engine.device))
    return loss_fn(logits, targets, config.train.loss, config.train.label_smoothing, reduction)


Forward = Callable[..., torch.Tensor]
"""micro_batch_loss, or what takes its place where faults are injected."""


def train(
    config: Config,
    plan: Plan,
    ancestors: list[dict[str, Any]],
    initial_weights: InitialWeights | None = None,
    forward: Forward = micro_batch_loss,
) -> None:
    """Trains to the plan's last step, from the newest good checkpoint if there is one.

    `initial_weights` gives the weights of a new run when fine-tuning (else they are drawn), `ancestors` lists the runs
    that they come from (lineage.py), `forward` is replaced where faults are injected. Raises Interrupted if a signal
    requested a stop.
    """
    with begin_attempt(config, plan) as attempt:
        cpu = cpu_flags() if attempt.device.type == "cpu" else None
        for warning in warnings(config, plan.steps, len(plan.train.classes), cpu):
            attempt.console.print(f"warning: {warning}")
        model = deepspeed_engine.build_initial_model(config, plan, attempt.device, initial_weights)
        engine = deepspeed_engine.build_engine(model, config.train, config.optim, config.zero)
        checkpoints = Checkpointer(engine, config, plan, ancestors, attempt.events)
        print_summary(attempt.console, config, plan, model, attempt.device)
        while True:
            attempt.serve_stops_at_once()
            state = checkpoints.resume()
            if state.step > 0:
                attempt.console.print(f"resumes from step {state.step:,}")
            if train_steps(config, plan, attempt, engine, state, checkpoints, forward):
                break
        checkpoints.finish(state)
        attempt.events.write("finished", step=plan.steps)
        checkpoints.close()
        attempt.console.print(f"done: {plan.steps} steps, the last checkpoint is {checkpoints.path(plan.steps)}")


def train_steps(
    config: Config,
    plan: Plan,
    attempt: Attempt,
    engine: Any,
    state: TrainState,
    checkpoints: Checkpointer,
    forward: Forward,
) -> bool:
    """Trains from `state` to the plan's last step; returns False after a rollback."""
    model, events, log = engine.module, attempt.events, attempt.console.print
    drop_rates = stochastic_depth_rates(model, config.train.stochastic_depth)
    micro_batches_per_step, accumulation_steps = micro_batches_of(config.train), engine.gradient_accumulation_steps()
    spec, spare = loader_spec(config, attempt.device, attempt.would_lose_steps), []
    gc.collect()
    gc.freeze()  # else a collection visits every object of torch: a tenth of a second in which nothing runs
    with BoundedCleanup(attempt.run, events, first=checkpoints.wait) as opened:
        enter = opened.enter_context
        metrics = enter(open_metrics(config, plan, attempt.events, attempt.console, attempt.device, state.step))
        steps = enter(training_steps(config, plan, spec, state.step, state.skipped_steps()))
        profiler = enter(Profiler(config.log.profile, attempt.run / "profile", events, log, state.step))
        heartbeat.beat_step(None)
        if not evaluate_if_due(config, plan, attempt, engine, state, metrics, spec):  # a stop had cut it short
            save_and_stop(attempt, checkpoints, state, plan)
        for step, micro_batches, data_wait in steps:
            last = step + 1 == plan.steps
            profiler.before(step + 1)
            if micro_batches is None:  # a rollback skips this step
                state.audit.skip(plan.order, step)
                state.step = step + 1
                record_epochs(events, log, state)
                continue

            # Forward and backward; then applied, skipped or rolled back: the same verdict on every rank.
            report = StepReport(attempt.device, micro_batches, micro_batches_per_step, plan.take_read_errors())
            spare = micro_batches[:1] or spare  # other ranks wait for as many passes where this one gives the step up
            passes = micro_batches or accumulation_steps * spare
            verdict, reason = do_step(engine, config, plan, state, report, passes, forward, drop_rates, attempt.asked)
            totals = report.totals
            if verdict is None:
                log(f"step {step + 1} is given up, since one of its batches does not arrive")
                save_and_stop(attempt, checkpoints, state, plan)
            if totals.superseded:
                attempt.raise_if_superseded()
            if heartbeat.last_beat().step is None:
                events.write("first_step", step=state.step)
            heartbeat.beat_step(state.step)

            # Records: samples consumed, bad samples, retried reads, skipped steps, finished epochs, metrics.
            metrics.log_samples(state.step, micro_batches)
            norm = engine.get_global_grad_norm()
            record_step(events, log, plan, config, state, report, reason, norm)
            if verdict is Verdict.ROLLBACK and not (last or totals.stop):
                log(f"{state.guard.bad_in_a_row} bad steps in a row: rolling back")
                checkpoints.roll_back(state, reason)
                return False
            record_epochs(events, log, state)
            lr = learning_rate(config.optim, step, plan.steps)
            metrics.log_step(state.step, totals.mean_loss, lr, norm, data_wait, last)

            # Checkpoint, evaluate, stop.
            if last or is_due(state.step, config.checkpoint.every):
                checkpoints.save(state)
            evaluated = evaluate_if_due(config, plan, attempt, engine, state, metrics, spec)
            if not evaluated or (totals.stop and not last):
                save_and_stop(attempt, checkpoints, state, plan)
    return True


def do_step(
    engine: Any,
    config: Config,
    plan: Plan,
    state: TrainState,
    report: StepReport,
    passes: list[Batch],
    forward: Forward,
    drop_rates: list[float],
    asked: Callable[[], tuple[bool, bool]],
) -> tuple[Verdict | None, str]:
    """Does the step after `state`, which it moves on; returns the verdict, the same on all ranks, and why if it is bad.

    The verdict is None, and the state what it was, where a rank gives the step up. `asked` is whether this rank
    received a signal, and has seen a newer attempt. Collective.
    """
    # Schedules are functions of the step: nothing to save, nothing to resume.
    step, accumulation_steps = state.step, engine.gradient_accumulation_steps()
    ema_decay = ema.ema_decay(config.train.ema, step) if config.train.ema else None
    deepspeed_engine.set_schedule(engine, learning_rate(config.optim, step, plan.steps), ema_decay)

    # Forward and backward, one pass per micro batch; DeepSpeed accumulates, and steps after the last pass.
    gradient_scale = deepspeed_engine.gradient_scale(config.train)
    for number in range(accumulation_steps):
        padding = number == len(passes)  # other ranks have one more: a pass whose gradients are zero
        batch = passes[0 if padding else number]
        with deepspeed_engine.padding_pass(engine) if padding else nullcontext():
            loss = forward(engine, batch, config, len(plan.train.classes), drop_rates)
            if not padding:
                report.add_loss(loss)
            if number == accumulation_steps - 1:  # the gate is NaN for a bad loss: no gradient
                mean_loss = report.all_reduce(*asked())
                loss = loss * state.guard.gate(mean_loss)
            engine.backward(gradient_scale * loss)
            engine.step()
        heartbeat.beat("a micro batch")

    # What follows, on every rank alike.
    totals, applied = report.totals, engine.was_step_applied()
    if totals.given_up:
        return None, ""
    verdict, reason, state.guard = state.guard.update(step + 1, totals.mean_loss, applied)
    assert applied == (verdict is Verdict.APPLY), f"step {step + 1} was applied although {reason}"
    ema.sync_batch_norm(engine.module, apply=applied)
    if applied:
        state.applied_steps += 1
        ema.update(state.bn_ema, engine.module, ema_decay)
    state.step = step + 1
    return verdict, reason


def evaluate_if_due(
    config: Config, plan: Plan, attempt: Attempt, engine: Any, state: TrainState, metrics: Metrics, spec: LoaderSpec
) -> bool:
    """Evaluates where that is due after this step and not yet recorded; False where a request to stop cut it short."""
    due = state.step == plan.steps or is_due(state.step, config.evaluate.every)
    if plan.val is None or not due or state.step == 0 or metrics.is_evaluated(state.step):
        return True
    bn_ema = state.bn_ema if config.evaluate.weights == "ema" else None
    crop, loss = config.evaluate.crop_fraction, config.train.loss
    timed = attempt.events.timed("evaluation", step=state.step)
    with timed, deepspeed_engine.evaluation_mode(engine, bn_ema):
        result = evaluate(engine, plan.val, crop, loss, spec, attempt.is_stop_requested)
    if result is not None:
        metrics.log_evaluation(state.step, result, "model" if bn_ema is None else "ema")
    return result is not None


def save_and_stop(attempt: Attempt, checkpoints: Checkpointer, state: TrainState, plan: Plan) -> NoReturn:
    """Returns to the launcher by Interrupted, once the last step is in a durable checkpoint."""
    checkpoints.finish(state)
    attempt.record_interruption(state.step)
    checkpoints.close()
    raise Interrupted(f"stopped after step {state.step} of {plan.steps}; run the same command to resume")


def is_due(step: int, every: int | None) -> bool:
    """Whether something due every `every` steps is due after this one."""
    return every is not None and step % every == 0
