"""The training loop, top to bottom: data, forward, backward, step, log, evaluate, checkpoint.

    coatnet pretrain configs/tiny.yaml                        # one process
    coatnet pretrain configs/tiny.yaml --procs 2              # two ranks on this machine
    torchrun --nproc-per-node 8 -m pipeline.cli pretrain ...  # any launcher that sets RANK and WORLD_SIZE

A step is one global batch: `global_batch / micro_batch` micro batches, dealt to the ranks; each of a rank's passes is
one micro batch. Where the last pass has too few for all ranks, the others do one that counts for nothing. Nothing here
draws random numbers with a state, so a run that goes on from a checkpoint at step k is, from there, the run that was
never stopped, on any number of ranks.

Next: ../data/order.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.loader import Share, training_batches
from data.order import passes
from models.coatnet import CoAtNet, stochastic_depth_rates
from models.count import count_network
from models.norm import apply_statistics, take_statistics
from pipeline import ancestry, ema, stopping
from pipeline.arithmetic import arithmetic
from pipeline.attempt import begin_attempt
from pipeline.attempts import Lookout, check_newest
from pipeline.checkpoint import step_name
from pipeline.config import Config, micro_batches_of
from pipeline.engine import (
    build_engine,
    evaluation_mode,
    gathered,
    idle_pass,
    loss_scale,
    on_rank_zero,
    set_rates,
    sharding,
    start_process_group,
    summed,
)
from pipeline.epochs import EpochCount
from pipeline.errors import RunStopped
from pipeline.evaluate import evaluate
from pipeline.faults import record_read_faults, record_replaced, record_skipped, taken
from pipeline.going_back import go_back, gone_back, steps_passed_over
from pipeline.guards import Guard, Verdict, judge, permission
from pipeline.launch import processor_share, rank_and_world_size
from pipeline.losses import loss_of, targets
from pipeline.marks import mark, mark_step, rest
from pipeline.mixing import mixed
from pipeline.network import (
    Shard,
    attention_backends,
    empty_network,
    initial_values,
    inputs,
    no_values,
    survival,
    with_values,
)
from pipeline.optim import ema_decay, learning_rate
from pipeline.prepare import Plan, augmentation
from pipeline.profiler import Profiler
from pipeline.progress import Reporter, reporter
from pipeline.record import Events, Metrics, Samples, sinks_of
from pipeline.restore import restore
from pipeline.save import CheckpointWriter
from pipeline.signs_of_life import watch_ranks
from pipeline.steps import steps_of_batches
from pipeline.utilisation import device_name, peak_images_per_second
from pipeline.words import percent


def train(
    config: Config,
    plan: Plan,
    ancestors: list[dict[str, Any]],
    first_weights: Callable[[CoAtNet, torch.device, Shard | None], CoAtNet] | None = None,
) -> None:
    """Trains to the plan's last step, beginning or going on; RunStopped where it was asked to stop before.

    `first_weights` gives the network of a run that begins its weights (fine-tuning; else they are drawn); `ancestors`
    are its ancestry.
    """
    run, (rank, world_size) = Path(config.run.dir), rank_and_world_size()
    device = start_process_group(config.run.hang_timeout)
    first_attempt, events = begin_attempt(run, config, plan)
    stacks = run / "logs" / f"stacks-attempt-{first_attempt}.txt"
    watching = watch_ranks(config.run.hang_timeout, events, stacks)

    # Model, and the engine that shards its states over the ranks.
    classes, shard = len(plan.train.classes), sharding(config.train, config.optim, config.zero)
    network = empty_network(config.model, config.train, classes)
    counts = count_network(network)
    if plan.begins and first_weights is not None:
        model = first_weights(network, device, shard)
    else:
        model = with_values(network, device, initial_values(config.run.seed) if plan.begins else no_values, shard)
    engine = build_engine(model, config.train, config.optim, config.zero)
    average = ema.copied(ema.statistics(model)) if config.train.ema else None

    # An attempt leads to the last step, or to where the guards go back on it; then the next one follows.
    lineage = [*ancestors, ancestry.entry(config, plan.steps, ancestors)]
    writer = CheckpointWriter(run / "checkpoints", first_attempt, rank, world_size, config.checkpoint, events)
    peak = peak_images_per_second(device_name(device), config.train.precision, counts.multiply_adds, world_size)
    told = arithmetic(config.model, config.train, config.zero, classes, counts, world_size, plan.train.samples)
    with watching, reporter(rank, run / "logs", plan.steps) as report:
        for line in [*told, attention_backends(model, config.train, device)]:
            report.say(line)
        attempt: int | None = first_attempt
        while attempt is not None:
            attempt = train_attempt(config, plan, lineage, engine, average, attempt, events, writer, report, peak)
        rest()
        writer.wait()
        events.write("done", step=plan.steps)
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
    """Trains from the newest good checkpoint to the last step: None; or goes back: the attempt that is next.

    `peak` is how many images a second the devices could do at their best, where that is known.
    """
    run, seed, global_batch = Path(config.run.dir), config.run.seed, config.train.global_batch
    rank, world_size = rank_and_world_size()
    model, device, classes = engine.module, engine.device, len(plan.train.classes)
    drop_rates = stochastic_depth_rates(model, config.train.stochastic_depth)
    events.attempt = writer.attempt = attempt

    # Go on from the newest good checkpoint, or begin.
    rest()
    state = restore(engine, run, average, plan.train.fingerprint, events)
    first_step = state["step"] if state else 0
    applied_steps = state["applied_steps"] if state else 0
    guard = Guard(**state.get("guard", {})) if state else Guard()
    epochs = EpochCount(plan.train.samples, global_batch, state["epochs"] if state else None)
    history = on_rank_zero(lambda: gone_back(run, state))
    if state:
        report.say(f"goes on from step {first_step:,}")
    events.write("resume" if state else "begin", step=first_step, new_augmentations=lineage[-1]["new_augmentations"])

    # What the run writes about itself.
    sinks = sinks_of(run, config, attempt, first_step) if rank == 0 else []
    metrics = Metrics(sinks, config.log.every, global_batch, plan.train.samples, peak)
    samples = Samples(run, attempt, rank, world_size, config.log.samples == "pixels") if config.log.samples else None
    lookout = Lookout(run, attempt)

    # A step's micro batches, in as many rounds of one pass a rank as that takes.
    micro_batches_a_step = micro_batches_of(config.train)
    rounds, scale = passes(micro_batches_a_step, world_size), loss_scale(config.train)

    # Data: this rank's micro batches of every step from here on, read, decoded and augmented ahead of time.
    share = Share(rank, world_size, config.train.micro_batch, config.model.resolution, device, processor_share())
    loading = partial(training_batches, plan.train, plan.order, augmentation(config.augment), share, seed)

    reading = closing(steps_of_batches(loading, first_step, plan.steps, steps_passed_over(history)))
    profiling = Profiler(config.log.profile, run / "profile", rank, report.say, first_step, plan.steps)
    with metrics, reading as steps, profiling as profiler:
        mark_step(None)
        for step, micro_batches, waited_seconds in steps:
            done = step + 1
            last = done == plan.steps
            profiler.before(done)
            if micro_batches is None:
                epochs.pass_over(plan.order, step)
                for line in epochs.completed(done, events):
                    report.say(line)
                continue

            rate = learning_rate(config.optim, step, plan.steps)
            decay = ema_decay(config.train.ema, step) if config.train.ema else None
            set_rates(engine, rate, decay)

            # What all ranks must know of each other, beside their losses.
            read_faults, overtaken = taken(plan.read_faults), rank == 0 and lookout.sees_newer()
            broken = sum(len(batch.broken) for batch in micro_batches)
            here = [0.0, broken, len(read_faults), stopping.reason() is not None, overtaken]
            shared = torch.tensor(here, dtype=torch.float64, device=device)

            # Forward and backward, one pass a micro batch; the engine adds up gradients and steps after the last pass.
            for number in range(rounds):
                idle = number == len(micro_batches)
                batch = micro_batches[0 if idle else number]
                with idle_pass(engine) if idle else nullcontext():
                    images, wanted = inputs(batch.images), batch.labels
                    if config.augment.mixup:
                        wanted = targets(wanted, classes, config.train.loss)
                        images, wanted = mixed(images, wanted, config.augment.mixup, seed, batch.positions)
                    logits = engine(images, survival(seed, batch.positions, drop_rates, device))
                    loss = loss_of(logits, wanted, config.train.loss, config.train.label_smoothing)
                    if not idle:
                        shared[0] += loss.detach()
                    if number == rounds - 1:  # a bad loss gets a gradient that is not applied, unseen by the host
                        summed(shared)
                        loss = loss * permission(shared[0] / micro_batches_a_step, guard.limit)
                    engine.backward(scale * loss)
                    engine.step()
                mark("a micro batch")
            applied = engine.was_step_applied()

            # The verdict on the step, the same on all ranks.
            loss_sum, broken, failed_reads, stops, overtaken = shared.tolist()
            mean_loss, stop = loss_sum / micro_batches_a_step, stops > 0
            verdict, why, guard = judge(guard, done, mean_loss, applied)
            assert applied == (verdict is Verdict.GO_ON), f"step {done} was applied, and yet {why}"
            if overtaken:
                on_rank_zero(lambda: check_newest(run, attempt))

            # Batch-norm statistics and their average move with an applied step, never with a skipped one.
            group_statistics = summed(take_statistics(model))
            if applied:
                applied_steps += 1
                apply_statistics(model, group_statistics)
                if average is not None and decay is not None:
                    ema.follow(average, model, decay)

            # From here on the step is done.
            mark_step(done)
            if samples is not None:
                samples.write(done, micro_batches, global_batch, plan.train.samples)
            epochs.add(micro_batches, applied)
            if broken:
                most = config.data.max_bad_fraction
                record_replaced(events, done, micro_batches, epochs.replaced(), plan.train.samples, most)
            if failed_reads:
                record_read_faults(events, done, read_faults)
            if not applied:
                record_skipped(events, done, micro_batches, mean_loss, why)
                report.say(f"step {done:,}/{plan.steps:,}  not applied: {why}")
            if verdict is Verdict.GO_BACK and not (last or stop):
                report.say(f"{guard.bad} bad steps in a row: not on from here")
                rest()
                writer.wait()
                return on_rank_zero(partial(go_back, run, writer, events, history, guard.first_bad, done, why))
            for line in epochs.completed(done, events):
                report.say(line)
            if row := metrics.step(done, mean_loss, rate, float(engine.get_global_grad_norm()), waited_seconds, last):
                report.show(row)

            if plan.val is not None and (last or (config.evaluate.every and done % config.evaluate.every == 0)):
                evaluated = average if config.evaluate.weights == "ema" else None
                with evaluation_mode(engine, evaluated):
                    figures = evaluate(engine, plan.val, config.evaluate.crop_fraction, config.train.loss, share)
                metrics.evaluation(done, figures, "model" if evaluated is None else "ema")
                report.say(f"step {done:,}/{plan.steps:,}  top-1 {percent(figures.top1, 2)}  loss {figures.loss:.4f}")

            writer.check()
            if last or stop or done % config.checkpoint.every == 0:
                state = {
                    "step": done,
                    "samples": done * global_batch,
                    "applied_steps": applied_steps,
                    "epochs": epochs.state(),
                    "guard": asdict(guard),
                    "gone_back": [asdict(each) for each in history],
                    "classes": plan.train.classes,
                    "train_fingerprint": plan.train.fingerprint,
                    "config": config.model_dump(mode="json"),
                    "ancestry": lineage,
                }
                writer.save(engine, average, state)

            if stop and not last:
                rest()
                writer.wait()
                events.write("stop", step=done, reason=gathered(list(filter(None, [stopping.reason()])))[0])
                on_rank_zero(writer.close)
                raise RunStopped(f"stopped after step {done} of {plan.steps}; the same command goes on from there")

    return None
