"""The console script: pipeline's commands, and those that know Slurm. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import AsJson, ConfigFile, Overrides, Restart, Source, Weights, app, main, path_argument

submit_app = typer.Typer(
    help="Submit a run to Slurm; its job requeues itself until the run ends.", no_args_is_help=True
)
app.add_typer(submit_app, name="submit")

Then = Annotated[
    str | None, typer.Option(metavar="'CONFIG [KEY=VALUE]...'", help="fine-tune and evaluate after this succeeds")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the batch script and exit")]
Cluster = Annotated[str, typer.Option(metavar="slurm|local", help="local: this machine, detached")]
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
    """Examine all nodes of an allocation as a run would get it, and print the report."""
    from slurm.doctor import submit_doctor

    raise typer.Exit(submit_doctor(config, overrides or [], dry_run))


@app.command(epilog="Example: coatnet status runs/")
def status(
    runs: Annotated[list[Path], path_argument(metavar="RUN...", help="runs, or a folder of runs")],
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="repeat every few seconds, until Ctrl-C")] = False,
) -> None:
    """The state of runs: job, step, loss, speed, time left, restarts."""
    from slurm.status_view import status

    raise typer.Exit(status(runs, as_json, watch))


@app.command(epilog="Example: coatnet logs runs/a --rank 3 --follow")
def logs(
    run: Run,
    rank: Annotated[int | None, typer.Option(min=0, help="default: rank 0")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="print new lines as they come")] = False,
    lines: Annotated[int, typer.Option(min=1, help="number of lines")] = 40,
) -> None:
    """The last lines of a run's log."""
    from slurm.logs import logs

    raise typer.Exit(logs(run, rank, follow, lines))


@app.command(epilog="Example: coatnet cancel runs/a")
def cancel(run: Run) -> None:
    """End a run's jobs; it resumes when it is submitted again."""
    from slurm.cancel import cancel

    raise typer.Exit(cancel(run))


if __name__ == "__main__":
    main()
