"""`coatnet report`: what happened in a run, or in several side by side, on one page that can be mailed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.shards.manifest import read_manifest
from data.storage.durable import write_atomically
from pipeline.checkpoint.pretrained import load_model, load_weights
from pipeline.errors import DataError, RunFailed, UsageError, first_line
from pipeline.report.record import RunRecord, read_record

if TYPE_CHECKING:
    from pipeline.report.mistakes import Verdicts

PAGE, SAMPLES, MISTAKES = "report.html", 12, 24


def report(runs: Sequence[Path], data: str | None, out: Path | None) -> int:
    """Writes the page of a run, or of several; returns the exit status."""
    if data is not None and len(runs) > 1:
        raise UsageError("--data is for the page of one run: name one run, or leave it out")
    records = [read_record(run) for run in dict.fromkeys(runs)]
    from pipeline.report.page import comparison_page, run_page

    if len(records) == 1:
        verdicts = judge_run(records[0], data) if data is not None else None
        sheet, missing = _sheet(records[0])
        if data is None:
            missing.append("confusions, calibration and mistakes: give the evaluation set with --data")
        page, place = run_page(records[0], sheet, verdicts, missing), runs[0] / PAGE
    else:
        page, place = comparison_page(records), Path(PAGE)
    _write(out or place, page)
    print(f"{out or place}: {', '.join(f'{each.run} ({each.end})' for each in records)}")
    return 0


def report_when_done(run: Path) -> None:
    """Writes the page of a run that has just finished, of what its folder has; a failure of that is a warning."""
    try:
        from pipeline.report.page import run_page

        missing = [f"training samples, confusions and mistakes: `coatnet report {run} --data URL` reads the data"]
        _write(run / PAGE, run_page(read_record(run), [], None, missing))
    except Exception as error:  # whatever it is, the run is done
        print(f"warning: {run / PAGE} could not be written: {first_line(error)}", file=sys.stderr)


def judge_run(record: RunRecord, data: str) -> Verdicts:
    """What the run's newest weights make of a packed set."""
    manifest = read_manifest(data)
    reader, kind, config = load_weights(str(record.run), None, None, None)
    classes = reader.state()["classes"]
    if list(manifest.classes) != classes:
        raise UsageError(
            f"--data={data} has {len(manifest.classes)} classes ({manifest.classes[0]}, ...), but {record.run} was"
            f" trained on {len(classes)} ({classes[0]}, ...); give a set with the same classes"
        )
    import torch

    from data.loader import LoaderSpec
    from pipeline.report.mistakes import judge

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = load_model(reader, kind, config, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
        spec = LoaderSpec(0, 1, config.train.micro_batch, config.model.resolution, device, len(os.sched_getaffinity(0)))
        return judge(model, manifest, config.evaluate.crop_fraction, config.train.loss, spec, MISTAKES)


def _sheet(record: RunRecord) -> tuple[list[Any], list[str]]:
    """The first training samples as the model saw them, or why they cannot be shown."""
    from pipeline.commands.preview import sheet_items

    try:
        return (sheet_items(record.config, SAMPLES, epoch=0), []) if record.config else ([], [])
    except (UsageError, DataError, RunFailed, OSError) as error:
        return [], [f"training samples: {first_line(error)}"]


def _write(place: Path, page: str) -> None:
    try:
        write_atomically(place, page)
    except OSError as error:
        raise UsageError(f"{place} cannot be written: {error.strerror}; name another file with --out") from None
