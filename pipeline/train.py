"""The training loop, top to bottom: data, forward, backward, step, log, evaluate, checkpoint.

    coatnet pretrain configs/tiny.yaml                        # one process
    coatnet pretrain configs/tiny.yaml --procs 2              # two ranks on this machine
    torchrun --nproc-per-node 8 -m pipeline.cli pretrain ...  # any launcher that sets RANK and WORLD_SIZE

A step is one global batch: `global_batch / micro_batch` micro batches, dealt to the ranks; each of a rank's passes is
one micro batch. Where the last pass has too few for all ranks, the others do one that counts for nothing. Nothing here
draws random numbers with a state, so a run that resumes from a checkpoint at step k is, from there, the run that was
never stopped, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.loader import LoaderSpec, steps_of_batches, training_batches
from data.order import accumulation_steps
from models.coatnet import CoAtNet, stochastic_depth_rates
from models.count import count_network
from models.norm import apply_statistics, pop_statistics
from pipeline.attempt import begin_attempt
from pipeline.checkpoint.attempts import SupersededCheck, raise_if_superseded
from pipeline.checkpoint.reader import step_name
from pipeline.checkpoint.restore import restore
from pipeline.checkpoint.rollback import load_rollbacks, roll_back, skipped_steps
from pipeline.checkpoint.writer import CheckpointWriter
from pipeline.config.batch_size import micro_batches_of
from pipeline.config.schema import Config
from pipeline.distributed import signals
from pipeline.distributed.collectives import all_gather, all_reduce_sum, from_rank_zero
from pipeline.distributed.environment import cpus_per_rank, rank_and_world_size
from pipeline.distributed.heartbeat import beat, beat_step, pause
from pipeline.errors import Interrupted
from pipeline.formatting import format_percent
from pipeline.lineage import lineage_entry
from pipeline.monitoring.metrics import Metrics, Samples, build_sinks
from pipeline.monitoring.mfu import device_name, peak_images_per_second
from pipeline.monitoring.profiler import Profiler
from pipeline.monitoring.progress import Reporter, reporter
from pipeline.monitoring.summary import training_summary
from pipeline.plan import Plan, augmentation
from pipeline.run.events import Events
from pipeline.training import ema, loss_guard
from pipeline.training.ema import ema_decay
from pipeline.training.engine import (
    build_engine,
    evaluation_mode,
    gradient_scale,
    padding_pass,
    set_schedule,
    start_process_group,
    zero3_init,
)
from pipeline.training.epoch_audit import EpochAudit
from pipeline.training.evaluation import evaluate
from pipeline.training.loss_guard import Guard, Verdict
from pipeline.training.losses import loss_fn, one_hot
from pipeline.training.mixup import mixup
from pipeline.training.model import (
    ShardLayer,
    attention_backends,
    drop_path_mask,
    empty_weights,
    init_weights,
    load_values,
    meta_model,
    normalize,
)
from pipeline.training.optimizer import learning_rate
from pipeline.training.step import StepReport
from pipeline.training.step_events import drain, record_read_faults, record_replaced, record_skipped
from pipeline.watchdog.watchdog import start_watchdog


def train(
    config: Config,
    plan: Plan,
    ancestors: list[dict[str, Any]],
    first_weights: Callable[[CoAtNet, torch.device, ShardLayer | None], CoAtNet] | None = None,
) -> None:
    """Trains to the plan's last step, beginning or resuming; Interrupted where it was asked to stop before.

    `first_weights` gives the network of a run that begins its weights (fine-tuning; else they are drawn); `ancestors`
    are its ancestry.
    """
    run, (rank, world_size) = Path(config.run.dir), rank_and_world_size()
    device = start_process_group(config.run.hang_timeout)
    first_attempt, events = begin_attempt(run, config, plan)
    stacks = run / "logs" / f"stacks-attempt-{first_attempt}.txt"
    watching = start_watchdog(config.run.hang_timeout, events, stacks)

    # Model, and the engine that shards its states over the ranks.
    classes, shard = len(plan.train.classes), zero3_init(config.train, config.optim, config.zero)
    network = meta_model(config.model, config.train, classes)
    counts = count_network(network)
    if plan.is_new_run and first_weights is not None:
        model = first_weights(network, device, shard)
    else:
        model = load_values(network, device, init_weights(config.run.seed) if plan.is_new_run else empty_weights, shard)
    engine = build_engine(model, config.train, config.optim, config.zero)
    average = ema.clone(ema.statistics(model)) if config.train.ema else None

    # An attempt leads to the last step, or to where the guards roll back on it; then the next one follows.
    lineage = [*ancestors, lineage_entry(config, plan.steps, ancestors)]
    writer = CheckpointWriter(run / "checkpoints", first_attempt, rank, world_size, config.checkpoint, events)
    peak = peak_images_per_second(device_name(device), config.train.precision, counts.multiply_adds, world_size)
    summary = training_summary(config.model, config.train, config.zero, classes, counts, world_size, plan.train.samples)
    with watching, reporter(rank, run / "logs", plan.steps) as report:
        for line in [*summary, attention_backends(model, config.train, device)]:
            report.say(line)
        attempt: int | None = first_attempt
        while attempt is not None:
            attempt = train_attempt(config, plan, lineage, engine, average, attempt, events, writer, report, peak)
        pause()
        writer.wait()
        events.write("finished", step=plan.steps)
        writer.close()
        report.say(f"done: {plan.steps} steps, the last checkpoint is {run}/checkpoints/{step_name(plan.steps)}")


def train_attempt(
    config: Config,
    plan: Plan,
    lineage: list[dict[str, Any]],
    engine: Any,
    average: ema.Statistics | None,
    attempt: int,
    events: Events,
    writer: CheckpointWriter,
    report: Reporter,
    peak: float | None,
) -> int | None:
    """Trains from the newest good checkpoint to the last step: None; or rolls back: the attempt that is next.

    `peak` is how many images a second the devices could do at their best, where that is known.
    """
    run, seed, global_batch = Path(config.run.dir), config.run.seed, config.train.global_batch
    rank, world_size = rank_and_world_size()
    model, device, classes = engine.module, engine.device, len(plan.train.classes)
    drop_rates = stochastic_depth_rates(model, config.train.stochastic_depth)
    events.attempt = writer.attempt = attempt

    # Resume from the newest good checkpoint, or begin.
    pause()
    state = restore(engine, run, average, plan.train.fingerprint, events)
    first_step = state["step"] if state else 0
    applied_steps = state["applied_steps"] if state else 0
    guard = Guard(**state.get("guard", {})) if state else Guard()
    epochs = EpochAudit(plan.train.samples, global_batch, state["epochs"] if state else None)
    history = from_rank_zero(lambda: load_rollbacks(run, state))
    if state:
        report.say(f"resumes from step {first_step:,}")
    events.write(
        "training_resumed" if state else "training_started",
        step=first_step,
        new_augmentations=lineage[-1]["new_augmentations"],
    )

    # What the run writes about itself.
    sinks = build_sinks(run, config, attempt, first_step) if rank == 0 else []
    metrics = Metrics(sinks, config.log.every, global_batch, plan.train.samples, peak)
    samples = Samples(run, attempt, rank, world_size, config.log.samples == "pixels") if config.log.samples else None
    newer = SupersededCheck(run, attempt)

    # A step's micro batches, in as many rounds of one pass a rank as that takes.
    micro_batches_a_step = micro_batches_of(config.train)
    rounds, scale = accumulation_steps(micro_batches_a_step, world_size), gradient_scale(config.train)

    # Data: this rank's micro batches of every step from here on, read, decoded and augmented ahead of time.
    spec = LoaderSpec(rank, world_size, config.train.micro_batch, config.model.resolution, device, cpus_per_rank())
    loading = partial(training_batches, plan.train, plan.order, augmentation(config.augment), spec, seed)

    reading = closing(steps_of_batches(loading, first_step, plan.steps, skipped_steps(history)))
    profiling = Profiler(config.log.profile, run / "profile", rank, report.say, first_step, plan.steps)
    with metrics, reading as steps, profiling as profiler:
        beat_step(None)
        for step, micro_batches, waited_seconds in steps:
            done = step + 1
            last = done == plan.steps
            profiler.before(done)
            if micro_batches is None:
                epochs.skip(plan.order, step)
                for line in epochs.completed(done, events):
                    report.say(line)
                continue

            rate = learning_rate(config.optim, step, plan.steps)
            decay = ema_decay(config.train.ema, step) if config.train.ema else None
            set_schedule(engine, rate, decay)

            # What all ranks must know of each other.
            read_faults = drain(plan.read_faults)
            shared = StepReport(
                device,
                micro_batches_a_step,
                bad_samples=sum(len(batch.broken) for batch in micro_batches),
                read_retries=len(read_faults),
                stop=signals.requested() is not None,
                superseded=rank == 0 and newer.is_superseded(),
            )

            # Forward and backward, one pass a micro batch; the engine adds up gradients and steps after the last pass.
            for number in range(rounds):
                idle = number == len(micro_batches)
                batch = micro_batches[0 if idle else number]
                with padding_pass(engine) if idle else nullcontext():
                    images, wanted = normalize(batch.images), batch.labels
                    if config.augment.mixup:
                        wanted = one_hot(wanted, classes, config.train.loss)
                        images, wanted = mixup(images, wanted, config.augment.mixup, seed, batch.positions)
                    logits = engine(images, drop_path_mask(seed, batch.positions, drop_rates, device))
                    loss = loss_fn(logits, wanted, config.train.loss, config.train.label_smoothing)
                    if not idle:
                        shared.add_loss(loss)
                    if number == rounds - 1:  # a bad loss gets a gradient that is not applied, unseen by the host
                        loss = loss * loss_guard.gate(shared.all_reduce(), guard.limit)
                    engine.backward(scale * loss)
                    engine.step()
                beat("a micro batch")
            applied = engine.was_step_applied()

            # The verdict on the step, the same on all ranks.
            totals = shared.totals()
            mean_loss, stop = totals.mean_loss, totals.stop
            verdict, why, guard = loss_guard.update(guard, done, mean_loss, applied)
            assert applied == (verdict is Verdict.APPLY), f"step {done} was applied, and yet {why}"
            if totals.superseded:
                from_rank_zero(lambda: raise_if_superseded(run, attempt))

            # Batch-norm statistics and their average move with an applied step, never with a skipped one.
            group_statistics = all_reduce_sum(pop_statistics(model))
            if applied:
                applied_steps += 1
                apply_statistics(model, group_statistics)
                if average is not None and decay is not None:
                    ema.update(average, model, decay)

            # From here on the step is done.
            beat_step(done)
            if samples is not None:
                samples.write(done, micro_batches, global_batch, plan.train.samples)
            epochs.add(micro_batches, applied)
            if totals.bad_samples:
                most = config.data.max_bad_fraction
                record_replaced(events, done, micro_batches, epochs.replaced(), plan.train.samples, most)
            if totals.read_retries:
                record_read_faults(events, done, read_faults)
            if not applied:
                record_skipped(events, done, micro_batches, mean_loss, why)
                report.say(f"step {done:,}/{plan.steps:,}  not applied: {why}")
            if verdict is Verdict.ROLLBACK and not (last or stop):
                report.say(f"{guard.bad} bad steps in a row: rolling back")
                pause()
                writer.wait()
                return from_rank_zero(partial(roll_back, run, writer, events, history, guard.first_bad, done, why))
            for line in epochs.completed(done, events):
                report.say(line)
            if row := metrics.step(done, mean_loss, rate, float(engine.get_global_grad_norm()), waited_seconds, last):
                report.show(row)

            if plan.val is not None and (last or (config.evaluate.every and done % config.evaluate.every == 0)):
                evaluated = average if config.evaluate.weights == "ema" else None
                with evaluation_mode(engine, evaluated):
                    figures = evaluate(engine, plan.val, config.evaluate.crop_fraction, config.train.loss, spec)
                metrics.evaluation(done, figures, "model" if evaluated is None else "ema")
                report.say(
                    f"step {done:,}/{plan.steps:,}  top-1 {format_percent(figures.top1, 2)}  loss {figures.loss:.4f}"
                )

            writer.check()
            if last or stop or done % config.checkpoint.every == 0:
                state = {
                    "step": done,
                    "samples": done * global_batch,
                    "applied_steps": applied_steps,
                    "epochs": epochs.state(),
                    "guard": asdict(guard),
                    "rollbacks": [asdict(each) for each in history],
                    "classes": plan.train.classes,
                    "train_fingerprint": plan.train.fingerprint,
                    "config": config.model_dump(mode="json"),
                    "ancestry": lineage,
                }
                writer.save(engine, average, state)

            if stop and not last:
                pause()
                writer.wait()
                events.write("interrupted", step=done, reason=all_gather(list(filter(None, [signals.requested()])))[0])
                from_rank_zero(writer.close)
                raise Interrupted(f"stopped after step {done} of {plan.steps}; the same command resumes from there")

    return None
