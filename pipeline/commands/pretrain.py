"""`coatnet pretrain`: trains from initial weights, or resumes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from data.shards.manifest import read_manifest
from data.urls import without_secrets
from pipeline.checkpoint.attempts import latest_step
from pipeline.checkpoint.mirror import check_mirror, list_copies, restore_from_mirror
from pipeline.compiler import find_compiler
from pipeline.config.batch_size import known_steps, padding_share
from pipeline.config.contradictions import check_job, cpu_flags, warnings
from pipeline.config.parsing import read_config
from pipeline.config.schema import Config
from pipeline.distributed.environment import is_first_process, is_rank, local_world_size, rank_and_world_size
from pipeline.distributed.launcher import launch
from pipeline.errors import UsageError
from pipeline.monitoring.wandb import check_wandb
from pipeline.plan import Plan, ReadManifest, check_ranks, check_stated, make_plan, readable_manifest
from pipeline.run.lock import check_folder, wait_for_holder
from pipeline.run.restart import next_place, set_aside


def pretrain(preset: str, overrides: list[str], procs: int, check: bool, restart: bool = False) -> int:
    """Trains, resumes, or begins anew with `restart`; returns the exit status."""
    config = read_config(preset, overrides)
    if check:
        return check_config(config, procs)
    check_folder(Path(config.run.dir))
    if restart:
        begin_anew(config, "pretrain", procs)

    def work(plan: Plan) -> None:
        from pipeline.train import train

        train(config, plan, ancestors=[])

    return run(config, "pretrain", procs, work)


def set_aside_config(config: Config) -> Config:
    """The configuration with the folder that a run's files would be set aside in: one of a run that has not begun."""
    place = next_place(Path(config.run.dir))
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(place)})})


def begin_anew(config: Config, command: str, procs: int) -> None:
    """Sets a run's files aside, so that it begins anew, once that is known to be possible."""
    if is_rank():
        raise UsageError(
            "--restart sets a run's files aside once, before its ranks start: under torchrun or srun move them"
            " yourself, or choose another folder with run.dir=..."
        )
    make_plan(set_aside_config(config), command, procs, procs)
    _check_installed(config)
    set_files_aside(config)


def set_files_aside(config: Config) -> Path | None:
    """Moves what is in a run's folder into a folder in it, and returns that, or None where there is nothing.

    UsageError where its mirror would bring it back.
    """
    run, mirror = Path(config.run.dir), config.checkpoint.mirror
    check_mirror(run, mirror)
    if mirror is not None and list_copies(mirror):
        raise UsageError(
            f"checkpoint.mirror={without_secrets(mirror)} has checkpoints that the run would resume from: with"
            " --restart, set another place or null"
        )
    newest = latest_step(run)
    if (place := set_aside(run)) is not None:
        had = "no checkpoint" if newest is None else f"checkpoints up to step {newest}"
        print(f"{run} starts over: its old files, with {had}, are in {place}")
    return place


def run(config: Config, command: str, procs: int, work: Callable[[Plan], None]) -> int:
    """Calls `work` with the plan on every rank of a training run; returns the exit status."""
    if not is_rank():
        wait_for_holder(Path(config.run.dir))  # before seconds of imports
    restore_from_mirror(config)
    world_size = rank_and_world_size()[1] if is_rank() else procs
    plan = make_plan(config, command, world_size, local_world_size(procs), manifest_reader(config.run.hang_timeout))
    if plan.finished:
        more = f", at step {plan.newest}" if plan.newest != plan.steps else ""
        print(f"{config.run.dir}: already done, {plan.steps} of {plan.steps} steps{more}")
        if is_rank():
            leave_process_group()
        return 0
    _check_installed(config)
    if is_first_process() and (wasted := padding_share(config.train, world_size)):
        print(f"warning: {wasted}", file=sys.stderr)
    if not is_rank():
        check_folder(Path(config.run.dir), to_write=True)
        arguments = [word for word in sys.argv[1:] if word != "--restart"]  # that is done
        return launch(arguments, procs, Path(config.run.dir) / "logs", import_training)
    from pipeline.commands.report import report_when_done
    from pipeline.ending import record_exit_reason  # they import torch
    from pipeline.memory.oom import explain_oom

    with record_exit_reason(Path(config.run.dir)), explain_oom(config, len(plan.train.classes)):
        work(plan)
    leave_process_group()  # no rank waits while rank 0 writes the page
    if rank_and_world_size()[0] == 0:
        report_when_done(Path(config.run.dir))
    return 0


def leave_process_group() -> None:
    from torch.distributed import destroy_process_group

    destroy_process_group()


def manifest_reader(timeout_seconds: float) -> ReadManifest:
    """How this process reads manifests; a rank joins the process group for it, in which rank 0 reads for all."""
    if not is_rank():
        return read_manifest
    from pipeline.distributed.collectives import manifest_from_rank_zero
    from pipeline.training.engine import start_process_group

    start_process_group(timeout_seconds)
    return manifest_from_rank_zero


def import_training() -> None:
    """Imports torch, DALI, the training loop and, without a GPU, DeepSpeed, whose import else initializes CUDA."""
    import torch

    import pipeline.train  # noqa: F401
    from pipeline.training.engine import import_deepspeed

    if not torch.cuda.is_available():
        import_deepspeed()


def check_config(config: Config, procs: int, quiet: bool = False, likely_classes: int | None = None) -> int:
    """Checks what can be checked without images, and, unless `quiet`, prints what would be trained; returns 0.

    `likely_classes` is assumed where model.classes is null and there is no manifest.
    """
    import torch

    from pipeline.monitoring.summary import training_summary
    from pipeline.training.model import count_model

    check_ranks(config, procs)
    check_job(config.slurm)
    check_mirror(Path(config.run.dir), config.checkpoint.mirror)
    check_wandb(config.log.wandb)
    train = None if quiet else readable_manifest(config.data.train)
    if train:
        check_stated(config, train)
    known_classes = config.model.classes or (len(train.classes) if train else None)
    classes = known_classes or likely_classes or 1000
    counts = count_model(config.model, config.train, classes)
    if quiet:
        return 0
    samples = config.data.train_samples or (train.samples if train else None)
    lines = training_summary(config.model, config.train, config.zero, classes, counts, procs, samples)
    print("valid:", "\n".join(lines))
    if known_classes is None:
        print(f"model.classes is null: {classes:,} classes are assumed until the data is read")
    on_gpu = config.slurm.gpus_per_node or torch.cuda.is_available()
    found = warnings(config, known_steps(config.train, samples), known_classes, None if on_gpu else cpu_flags())
    for warning in filter(None, (*found, padding_share(config.train, procs), _compiler_problem(config, bool(on_gpu)))):
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _check_installed(config: Config) -> None:
    """UsageError where what log.wandb, train.compile or model.attention=flex need is not on this machine; torch is
    imported only for the last two."""
    check_wandb(config.log.wandb)
    if not config.train.compile and config.model.attention != "flex":
        return
    import torch

    from models.attention import check_backend

    on_gpu = torch.cuda.is_available()
    try:
        check_backend(config.model.attention, "cuda" if on_gpu else "cpu")
    except ValueError as error:
        raise UsageError(f"model.{error}") from None
    if problem := _compiler_problem(config, on_gpu):
        raise UsageError(problem)


def _compiler_problem(config: Config, on_gpu: bool) -> str | None:
    """Why this machine could not compile what the configuration compiles, if it could not."""
    wanted = {"train.compile=true": config.train.compile, "model.attention=flex": config.model.attention == "flex"}
    if not any(wanted.values()):
        return None
    try:
        find_compiler(on_gpu)
    except ValueError as error:
        return f"{' and '.join(filter(wanted.get, wanted))} must compile, but {error}, or change the setting"
    return None
