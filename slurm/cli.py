"""The console script: pipeline's commands, and those that know Slurm. No logic."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import cli
from pipeline.cli import AsJson, ConfigFile, Overrides, Restart, Source, Weights, app, main, path_argument, path_option

submit_app = typer.Typer(
    help="Submit a run to Slurm as a job that requeues itself until the run ends, or work on data in parts.",
    no_args_is_help=True,
)
app.add_typer(submit_app, name="submit")

Then = Annotated[
    str | None, typer.Option(metavar="'CONFIG [KEY=VALUE]...'", help="fine-tune and evaluate once this succeeds")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the batch script and exit")]
Cluster = Annotated[str, typer.Option(metavar="slurm|local", help="local: run detached on this machine")]
Run = Annotated[Path, path_argument(metavar="RUN", help="the run's folder")]


@submit_app.command("pretrain", epilog="Example: coatnet submit pretrain tiny.yaml run.dir=runs/a slurm.nodes=2")
def submit_pretrain(
    config: ConfigFile,
    overrides: Overrides = None,
    then: Then = None,
    cluster: Cluster = "slurm",
    dry_run: DryRun = False,
    restart: Restart = False,
) -> None:
    """Pretrain, or resume, in a job of slurm.nodes nodes."""
    from slurm.submit import submit

    raise typer.Exit(submit("pretrain", config, overrides or [], None, None, then, cluster, dry_run, restart))


@submit_app.command("finetune", epilog="Example: coatnet submit finetune fine.yaml --from runs/a run.dir=runs/b")
def submit_finetune(
    config: ConfigFile,
    source: Source = None,
    overrides: Overrides = None,
    weights: Weights = None,
    then: Then = None,
    cluster: Cluster = "slurm",
    dry_run: DryRun = False,
    restart: Restart = False,
) -> None:
    """Fine-tune, or resume, in a job of slurm.nodes nodes."""
    from slurm.submit import submit

    raise typer.Exit(submit("finetune", config, overrides or [], source, weights, then, cluster, dry_run, restart))


@submit_app.command("doctor", epilog="Example: coatnet submit doctor tiny.yaml run.dir=runs/a slurm.nodes=2")
def submit_doctor(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Check all nodes of an allocation such as the run would get, and print the report."""
    from slurm.doctor import submit_doctor

    raise typer.Exit(submit_doctor(config, overrides or [], dry_run))


def _submits(command: Callable[..., None]) -> Callable[..., None]:
    """The submission of a command of `coatnet data`, whose arguments and options it has beside its own."""
    theirs = {name: it for name, it in inspect.signature(command, eval_str=True).parameters.items() if name != "part"}

    def submit(
        context: typer.Context,
        overrides: Annotated[
            list[str] | None, typer.Argument(metavar="[slurm.KEY=VALUE]...", help="resources of each part")
        ] = None,
        *,
        parts: Annotated[int, typer.Option("--parts", min=1, help="number of parts, each an element of a job array")],
        logs: Annotated[
            str | None, path_option("--logs", metavar="FOLDER", help="where the jobs' files go; default: DST/.slurm")
        ] = None,
        dry_run: DryRun = False,
        **options: Any,
    ) -> None:
        from slurm.parts import submit_parts

        words = _as_typed(context, theirs)
        raise typer.Exit(submit_parts(command.__name__, words, options, overrides or [], parts, logs, dry_run))

    own = list(inspect.signature(submit, eval_str=True).parameters.values())[:-1]
    both = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*theirs.values(), *own)]
    submit.__signature__ = inspect.Signature(both)  # type: ignore[attr-defined]
    submit.__annotations__ = {each.name: each.annotation for each in both}
    submit.__doc__ = f"Run `coatnet data {command.__name__}` in parts: a planning job, then an array of one-task jobs."
    return submit


def _as_typed(context: typer.Context, names: Collection[str]) -> list[str]:
    """Those of a command's options and arguments that were given, as words of a command line."""
    options, arguments = [], []
    for parameter in context.command.params:
        value = context.params[parameter.name]
        if parameter.name in names and value != parameter.default:
            if parameter.param_type_name == "argument":
                arguments.append(str(value))
            else:
                options.append(parameter.opts[0] + ("" if value is True else f"={value}"))
    return [*options, "--", *arguments]


for each in cli.data_app.registered_commands:
    if each.callback is not None:
        example = str(each.epilog).replace("coatnet data", "coatnet submit") + " --parts 32"
        submit_app.command(each.name, epilog=example)(_submits(each.callback))


@app.command(epilog="Example: coatnet status runs/")
def status(
    places: Annotated[
        list[str], path_argument(metavar="RUN...", help="runs, a folder of runs, or DST of work in parts")
    ],
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="repeat every few seconds, until Ctrl-C")] = False,
) -> None:
    """Show the state of runs: job, step, loss, speed, time left, restarts; or of work on data in parts."""
    from slurm.status_view import status

    raise typer.Exit(status(places, as_json, watch))


@app.command(epilog="Example: coatnet logs runs/a --rank 3 --follow")
def logs(
    run: Run,
    rank: Annotated[int | None, typer.Option(min=0, help="rank whose log is shown; default: 0")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="print new lines as they come")] = False,
    lines: Annotated[int, typer.Option(min=1, help="number of lines")] = 40,
) -> None:
    """Print the last lines of a run's log."""
    from slurm.logs import logs

    raise typer.Exit(logs(run, rank, follow, lines))


@app.command(epilog="Example: coatnet cancel runs/a")
def cancel(place: Annotated[str, path_argument(metavar="RUN", help="a run, or DST of work in parts")]) -> None:
    """Cancel the jobs of a run, or of work in parts; submitted again, it continues where it stopped."""
    from slurm.cancel import cancel

    raise typer.Exit(cancel(place))


if __name__ == "__main__":
    main()
