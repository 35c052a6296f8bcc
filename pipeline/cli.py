"""The command line: commands, their options and examples, and exit statuses. No logic.

Exit status: 0 done; 1 the work failed; 2 the request was wrong; 3 stopped before the end and can be resumed. What is
heavy to import is imported by the command that needs it, so that help comes at once.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperOption

from data.paths import expand
from pipeline import __version__
from pipeline.distributed import signals
from pipeline.distributed.environment import ignore_launcher, is_rank, join_launcher, rank_and_world_size
from pipeline.distributed.launcher import die_with_parent
from pipeline.errors import Interrupted, UsageError, explain
from pipeline.output import prepare_output
from pipeline.run.failures import record_failure

app = typer.Typer(
    name="coatnet",
    help="Pretrain CoAtNet vision models: pack images, train, resume after any crash, fine-tune, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Pack images into WebDataset shards, index shards, check them.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"coatnet {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


def _expanded(parameter: typer.CallbackParam, value: Any) -> Any:
    """A path that was typed, or several, with `~` and variables expanded; read_config does it for a preset."""
    if value is None or isinstance(value, list | tuple):
        return value and [_expanded(parameter, each) for each in value]
    name = parameter.opts[0] if parameter.opts[0].startswith("-") else str(parameter.metavar).rstrip(".")
    return type(value)(expand(str(value), name))


path_argument = partial(typer.Argument, callback=_expanded)
path_option = partial(typer.Option, callback=_expanded)

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML preset, e.g. configs/tiny.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. optim.learning_rate=5e-4")]
Ranks = Annotated[int | None, typer.Option("--procs", min=1, help="ranks to run on this machine; default: 1")]
Check = Annotated[bool, typer.Option("--check", help="check the configuration and stop; needs no images")]
Restart = Annotated[
    bool, typer.Option("--restart", help="start over from step 1; what run.dir holds moves to run.dir/restarted-N")
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document to standard output")]
Source = Annotated[
    str | None,
    path_option("--from", metavar="RUN", help="a run, a checkpoint or an exported file; with --check also a preset"),
]
Trained = Annotated[
    str, path_argument(metavar="RUN", help="a run (its newest checkpoint), one checkpoint, or an exported file")
]
EvaluationSet = Annotated[str, path_option("--data", metavar="URL", help="packed evaluation set")]
Weights = Annotated[str | None, typer.Option(metavar="ema|model", help="default: ema if there is one")]
Resolution = Annotated[int | None, typer.Option(min=1, help="pixels per side; default: as trained")]
Crop = Annotated[
    str | None,
    typer.Option(metavar="FRACTION|none", help="centre crop, as a share of the short side; none: the whole image"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what an earlier export wrote at OUT")]
Part = Annotated[
    str | None,
    typer.Option(
        metavar="i/N", help="do part i of N (from 1) on any machine; 0/N plans; the last to end completes the set"
    ),
]
SamplesPerShard = Annotated[int, typer.Option(min=1, help="maximum samples per shard")]
MegabytesPerShard = Annotated[int, typer.Option(min=1, help="approximate maximum size of a shard in MiB")]


TRAINS = {"pretrain", "finetune"}
RANKS = {*TRAINS, "evaluate", "replay", "doctor"}
"""The commands that a launcher may start as ranks."""
PEER_SECONDS = 1.0
"""How much later than the rank that it has lost a rank ends: launchers report the first one that fails."""
RESUME = "run the same command to resume"
AFTER_A_STOP = {
    "pretrain": f"there was no step to save; {RESUME}",
    "finetune": f"there was no step to save; {RESUME}",
    "data pack": f"finished shards are kept; {RESUME}",
    "data index": f"what was found in tars already read is kept; {RESUME}",
}
"""What remains, and how to continue, where a signal ended a command."""
INTERRUPTED = 130
"""The exit status that typer gives a KeyboardInterrupt."""


def _as_rank(procs: int | None = None) -> int:
    """Makes this process the rank that its launcher wants it to be, if it has one; else returns how many to start.

    A rank then hears of signals even where its main thread can't.
    """
    ranks = join_launcher(procs)
    die_with_parent()
    if is_rank():
        signals.listen()
    return ranks


@app.command(epilog="Example: coatnet pretrain configs/tiny.yaml --procs 2 run.dir=runs/tiny data.train=digits/train")
def pretrain(
    config: ConfigFile, overrides: Overrides = None, procs: Ranks = None, check: Check = False, restart: Restart = False
) -> None:
    """Train, or resume from the newest good checkpoint in run.dir. `coatnet keys` lists what can be set."""
    ranks = procs or 1 if check else _as_rank(procs)
    from pipeline.commands.pretrain import pretrain

    raise typer.Exit(pretrain(config, overrides or [], ranks, check, restart))


@app.command(epilog="Example: coatnet finetune configs/tiny_finetune.yaml --from runs/tiny run.dir=runs/tiny-40")
def finetune(
    config: ConfigFile,
    source: Source = None,
    overrides: Overrides = None,
    weights: Weights = None,
    procs: Ranks = None,
    check: Check = False,
    restart: Restart = False,
) -> None:
    """Start from another run's weights (its moving average, if it has one), usually at another resolution."""
    ranks = procs or 1 if check else _as_rank(procs)
    from pipeline.commands.finetune import finetune

    raise typer.Exit(finetune(config, overrides or [], source, weights, ranks, check, restart))


@app.command(epilog="Example: coatnet preview configs/tiny.yaml digits.png data.train=digits/train")
def preview(
    config: ConfigFile,
    out: Annotated[str, path_argument(metavar="OUT.png", help="the image to write, or to replace")],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, max=1000, help="maximum number of samples shown")] = 32,
    epoch: Annotated[int, typer.Option(min=0, help="epoch whose first samples are shown")] = 0,
) -> None:
    """Show training samples exactly as the model will see them, with the augmentations drawn for each."""
    from pipeline.commands.preview import preview

    raise typer.Exit(preview(config, out, overrides or [], samples, epoch))


@app.command(epilog="Example: coatnet plan configs/imagenet1k/coatnet0.yaml --gpus 8 --gpu h100 --price 2.5")
def plan(
    config: ConfigFile,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs on all nodes together")],
    gpu: Annotated[str, typer.Option("--gpu", metavar="NAME", help="h100, a100, ..., or cpu with --calibrate")],
    overrides: Overrides = None,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1, help="GPUs per node")] = 8,
    calibrate: Annotated[
        list[str] | None,
        path_option("--calibrate", metavar="FILE", help="metrics.jsonl of a run on such GPUs, or results of bench gpu"),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, max=1e9, help="price of a GPU-hour")] = None,
    failure_days: Annotated[
        float | None, typer.Option(min=1e-3, max=1e9, help="GPU-days between failures; default: 2000")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate what a training takes and costs before it is paid for; needs no GPU.

    GPU memory, whether it suffices and what would fit (`changes`), time per step (`step_terms`), days, `cost`, the best
    checkpoint interval and `goodput`, reads; what was `measured` and what is `assumed`. Keys:
    docs/reference/formats.md.
    """
    from pipeline.commands.plan_costs import plan_costs

    raise typer.Exit(
        plan_costs(config, overrides or [], gpu, gpus, gpus_per_node, calibrate or [], price, failure_days, as_json)
    )


@app.command(epilog="Example: coatnet replay runs/tiny --step 1234 --procs 2 --out step-1234")
def replay(
    run: Annotated[str, path_argument(metavar="RUN", help="the run; nothing in its folder changes")],
    step: Annotated[int, typer.Option(min=1, help="step to repeat")],
    out: Annotated[
        str | None, path_option(metavar="FOLDER", help="new folder for all samples and layers, and a sheet of images")
    ] = None,
    attempt: Annotated[int | None, typer.Option(min=0, help="if several did the step; default: the last")] = None,
    from_start: Annotated[
        bool, typer.Option("--from-start", help="train from step 1 if no checkpoint is left")
    ] = False,
    procs: Ranks = None,
) -> None:
    """Repeat a step in memory, and say which samples and which layer explain its result."""
    ranks = _as_rank(procs)
    from pipeline.commands.replay import replay

    raise typer.Exit(replay(run, step, out, attempt, from_start, ranks))


@app.command(epilog="Example: coatnet evaluate runs/tiny --data digits/val")
def evaluate(
    run: Trained,
    data: EvaluationSet,
    weights: Weights = None,
    resolution: Resolution = None,
    crop: Crop = None,
    procs: Ranks = None,
    as_json: AsJson = False,
) -> None:
    """Compute top-1, top-5 and loss over every sample exactly once, the same on any number of ranks."""
    ranks = _as_rank(procs)
    from pipeline.commands.evaluate import evaluate_command

    raise typer.Exit(evaluate_command(run, data, weights, resolution, crop, ranks, as_json))


@app.command(epilog="Example: coatnet predict runs/tiny photos/ cat.jpg")
def predict(
    run: Trained,
    images: Annotated[list[str], path_argument(metavar="IMAGE...", help="image files, or folders of them")],
    weights: Weights = None,
    resolution: Resolution = None,
    crop: Crop = None,
    top: Annotated[int, typer.Option(min=1, help="number of classes per image")] = 5,
    as_json: AsJson = False,
) -> None:
    """Predict the likeliest classes of image files."""
    from pipeline.commands.predict import predict

    raise typer.Exit(predict(run, images, weights, resolution, crop, top, as_json))


@app.command(epilog="Example: coatnet export runs/tiny tiny.safetensors")
def export(
    run: Trained,
    out: Annotated[str, path_argument(metavar="OUT", help="a .safetensors file; with --layout timm, a folder")],
    layout: Annotated[str | None, typer.Option(metavar="timm", help="write a folder that timm opens")] = None,
    weights: Weights = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a run's weights, and how they were trained, as one file, or as a folder for timm."""
    from pipeline.commands.export import export

    raise typer.Exit(export(run, out, layout, weights, overwrite))


@app.command("import", epilog="Example: coatnet import coatnet_0_224/ coatnet_0.safetensors")
def import_(
    source: Annotated[str, path_argument(metavar="SRC", help="timm's folder: config.json and weights")],
    out: Annotated[str, path_argument(metavar="OUT", help="a .safetensors file")],
    overwrite: Overwrite = False,
) -> None:
    """Convert one of timm's coatnet_0_224 to coatnet_5_224 into a file to evaluate or fine-tune from."""
    from pipeline.commands.export import import_from_timm

    raise typer.Exit(import_from_timm(source, out, overwrite))


@app.command(epilog="Example: coatnet report runs/tiny --data digits/val")
def report(
    runs: Annotated[list[Path], path_argument(metavar="RUN...", help="a run's folder; several are compared")],
    data: Annotated[
        str | None, path_option(metavar="URL", help="packed evaluation set, for confusions, calibration and mistakes")
    ] = None,
    out: Annotated[
        Path | None, path_option(metavar="FILE", help="default: RUN/report.html; for several runs, ./report.html")
    ] = None,
) -> None:
    """Write one page about a run: curves, where the time went, attempts, mistakes; or compare several."""
    from pipeline.commands.report import report

    raise typer.Exit(report(runs, data, out))


@app.command(epilog="Example: coatnet models --json")
def models(as_json: AsJson = False) -> None:
    """List the family and its variants: counted parameters and multiply-adds beside the published ones."""
    from pipeline.commands.models import models

    raise typer.Exit(models(as_json))


@app.command()
def keys() -> None:
    """List every key of a configuration with its default and meaning."""
    from pipeline.commands.keys import keys_table

    print(keys_table())


@app.command(epilog="Example: srun -N 2 --ntasks-per-node 8 coatnet doctor configs/tiny.yaml run.dir=/scratch/tiny")
def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="also check its storage; required when run as ranks")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine or, run as ranks, the whole allocation: what works, what is missing, what to do."""
    _as_rank()
    from pipeline.doctor.report import doctor_report

    raise typer.Exit(doctor_report(config, overrides or [], as_json))


@app.command(
    epilog="Example: coatnet bench model --size coatnet_1",
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
)
def bench(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="default: list them all")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGUMENT]...", help="its arguments")] = None,
) -> None:
    """Run one of the benchmarks of benchmarks/ on this machine."""
    from pipeline.commands.bench import bench

    bench(name, arguments or [])


@data_app.command("pack", epilog="Example: coatnet data pack photos shards --holdout 0.1")
def pack(
    source: Annotated[str, path_argument(metavar="SRC", help="folder, tar or zip of classes, or .csv or .jsonl list")],
    destination: Annotated[str, path_argument(metavar="DST", help="folder, or any fsspec URL")],
    labels: Annotated[str | None, path_option(metavar="FILE", help="labels of a flat SRC: `name label` lines")] = None,
    classes: Annotated[
        str | None, path_option(metavar="FILE|URL", help="classes in order: one per line, or as packed at URL")
    ] = None,
    resize: Annotated[int | None, typer.Option(min=1, help="downscale the shorter side to this, as JPEG")] = None,
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="JPEG quality of --resize; default: 92")] = None,
    holdout: Annotated[
        float | None, typer.Option(metavar="FRACTION", help="share of each class for DST/val; the rest: DST/train")
    ] = None,
    samples_per_shard: SamplesPerShard = 10_000,
    mib_per_shard: MegabytesPerShard = 256,
    seed: Annotated[int, typer.Option(min=0, help="seed of the shuffle and the holdout")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="threads; default: one per processor")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is packed at DST")] = False,
    part: Part = None,
    as_json: AsJson = False,
) -> None:
    """Pack images into shuffled WebDataset shards; broken images are listed and left out. Started again, it resumes."""
    from pipeline.commands.data import pack_and_report

    raise typer.Exit(
        pack_and_report(
            source,
            destination,
            part,
            workers,
            as_json,
            samples_per_shard=samples_per_shard,
            bytes_per_shard=mib_per_shard << 20,
            seed=seed,
            overwrite=overwrite,
            labels=labels,
            classes=classes,
            resize=resize,
            quality=quality,
            holdout=holdout,
        )
    )


@data_app.command("index", epilog="Example: coatnet data index 's3://ours/train-{000000..001023}.tar' --out train")
def index(
    url: Annotated[
        str, path_argument(metavar="URL", help="folder of tars, glob or {000..123} pattern, at any fsspec URL")
    ],
    out: Annotated[
        str | None, path_option(metavar="DST", help="where manifest and indexes go; default: beside the tars")
    ] = None,
    decode: Annotated[bool, typer.Option("--decode", help="read everything and decode every image once")] = False,
    classes: Annotated[
        str | None, path_option(metavar="FILE|URL", help="classes in order: one per line, or as packed at URL")
    ] = None,
    label_field: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="labels: a .json field, e.g. meta.label, or a member, .txt; default: .cls"),
    ] = None,
    part: Part = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="threads, one per tar; default: 16; with --decode, one per processor")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Index existing WebDataset shards for training, and list what is broken."""
    from pipeline.commands.data import index_and_report

    raise typer.Exit(index_and_report(url, out, decode, classes, label_field, part, workers, as_json))


@data_app.command("verify", epilog="Example: coatnet data verify shards/train")
def verify(
    url: Annotated[str, path_argument(metavar="URL", help="folder that holds manifest.json")],
    sample: Annotated[
        float | None,
        typer.Option(metavar="FRACTION", help="read only this random share of the samples, and not the tars' headers"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of what --sample draws")] = 0,
    part: Part = None,
    out: Annotated[
        str | None, path_option(metavar="FOLDER", help="with --part: where notes and verified.json go; default: URL")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="threads; default: one per processor")] = None,
    as_json: AsJson = False,
) -> None:
    """Read everything, decode every image; list what is broken, and exit with 1 if anything is."""
    from pipeline.commands.data import verify_and_report

    raise typer.Exit(verify_and_report(url, part, workers, as_json, sample=sample, seed=seed, out=out))


def main() -> None:
    """The console script: runs the command and turns how it ended into lines and an exit status."""
    # OpenBLAS, which nothing here uses, would start a thread a core, and a process with threads can't be forked.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    remains = AFTER_A_STOP.get(" ".join(sys.argv[1:3]), AFTER_A_STOP.get(command, "run the same command again"))
    interrupts = command not in RANKS - {"doctor"}
    signals.serve(remains, interrupts, lambda reason: record_failure(signals.STOPPED, f"stopped by {reason}"))
    signals.install_handlers()
    prepare_output(needed=command not in TRAINS)
    if command not in RANKS:
        ignore_launcher()
    try:
        status = _run()
        signals.finish(status if isinstance(status, int) else int(status is not None))
    except KeyboardInterrupt:  # even while an error is reported
        signals.end_now()
    gc.freeze()  # else the interpreter's exit visits every object of torch again: a second
    sys.exit(status)


def _run() -> int | str | None:
    """Runs the command; returns its exit status, or what stands for it in SystemExit."""
    try:
        try:
            _check_folder()
            command = typer.main.get_command(app)
            for option in command.params[-2:]:  # --install-completion and --show-completion: help stays short
                assert isinstance(option, TyperOption)
                option.hidden = True
            command()
        except SystemExit:
            sys.stdout.flush()
            raise
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            signals.end_now()
        _leave_process_group()
        return ended.code
    except BrokenPipeError:  # nobody reads what it prints
        return 1
    except Exception as error:
        return _end(error)
    return 0


def _end(error: Exception) -> int:
    """Reports an error; a rank among others ends then, as NCCL's shutdown would wait for them. Returns the status."""
    status = 1
    try:
        status = _report(error)
        if status == signals.STOPPED:  # as all ranks are
            _leave_process_group()
    finally:  # whatever else fails, which does not hide the error
        with suppress(Exception):
            sys.stdout.flush()
        if _in_process_group():
            os._exit(status)
    return status


def _check_folder() -> None:
    """UsageError where the current folder was removed: libraries would fail in ways of their own."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the current folder no longer exists: cd into another one") from None


def _leave_process_group() -> None:
    """Ends the threads of torch's collectives, if there are any: left to the interpreter's end, they can abort it."""
    if _in_process_group():
        sys.modules["torch.distributed"].destroy_process_group()


def _in_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _report(error: Exception) -> int:
    """Prints why a command ended: a line where a person can act on it, else a traceback; returns the exit status."""
    if (message := explain(error)) is not None:
        print(f"coatnet: {message}", file=sys.stderr)
        if isinstance(error, Interrupted):
            return signals.STOPPED
        status = 2 if isinstance(error, UsageError) else 1
        record_failure(status, message)
        return status
    if is_rank() and isinstance(error, RuntimeError):
        from torch.distributed import DistError

        from pipeline.distributed.collectives import lost_rank

        meaning = lost_rank(error)
        if meaning or isinstance(error, DistError):
            signals.end_if_requested()
        if meaning:
            print(f"coatnet: rank {rank_and_world_size()[0]} {meaning}", file=sys.stderr)
            time.sleep(PEER_SECONDS)
            return 1
    record_failure(1, f"{type(error).__name__}: {error}")
    traceback.print_exception(error)
    return 1


if __name__ == "__main__":
    main()
