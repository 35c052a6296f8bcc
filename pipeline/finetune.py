"""`coatnet finetune`: another run's weights, at another resolution or for other classes, with a fresh optimizer.

The source is pinned at the first start (RUN/source.json): a run that goes on never begins from a newer checkpoint.
Weights are the source's moving average if it has one. Bias tables are interpolated to the new grid; the classifier is
kept where the classes are the same and new where they are not. The augmentation of the source's whole ancestry is
compared first (ancestry.py).

Next: train.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import ancestry
from pipeline.checkpoint import CheckpointReader, checkpoint_of
from pipeline.config import Config
from pipeline.errors import BadRequest
from pipeline.launch import is_rank, rank_and_world_size
from pipeline.overrides import read_config
from pipeline.prepare import Plan
from pipeline.start import check_config, run

if TYPE_CHECKING:
    from models.coatnet import CoAtNet

CLASSIFIER = "head.classifier."


def finetune(preset: str, overrides: list[str], source: str, procs: int, check: bool) -> int:
    """Fine-tunes, or goes on; returns the exit status."""
    config = read_config(preset, overrides)
    reader = _pinned(Path(config.run.dir), Path(source), pin=not check and not is_rank())
    ancestors = reader.state()["ancestry"]
    ancestry.check(config, ancestors)
    if not is_rank() and (warning := ancestry.stochastic_depth_warning(config, ancestors)):
        print(f"warning: {warning}")
    if check:
        return check_config(config, procs)

    def work(plan: Plan) -> None:
        from pipeline.train import train

        kind = "ema" if reader.has("ema") else "weight"
        train(config, plan, ancestors, lambda model: take_weights(model, reader, plan.train.classes, kind))

    return run(config, "finetune", procs, work)


def take_weights(model: CoAtNet, reader: CheckpointReader, classes: tuple[str, ...], kind: str) -> None:
    """Gives a new network a checkpoint's weights (kind `ema` or `weight`), as far as they fit; BadRequest where they are another network's."""
    import torch

    from models.attention import resize_bias_table
    from pipeline.ema import assign
    from pipeline.restore import of_kind

    same_classes = list(classes) == reader.state()["classes"]
    found = {name: torch.from_numpy(values) for name, values in reader.tensors(kind)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(CLASSIFIER) and not same_classes:
                continue
            if name not in found:
                raise BadRequest(f"{reader.folder} has no {name}: its network is another one than this configuration's")
            values = found[name]
            if name.endswith("bias_table") and values.shape != parameter.shape:
                values = resize_bias_table(values, tuple((side + 1) // 2 for side in parameter.shape[-2:]))
            if values.shape != parameter.shape:
                raise BadRequest(
                    f"{reader.folder}: {name} is {list(values.shape)} there and {list(parameter.shape)} here;"
                    " take the model section of the run that it comes from"
                )
            parameter.copy_(values)
    assign(model, of_kind(reader.buffers(), kind))


def _pinned(run_folder: Path, source: Path, pin: bool) -> CheckpointReader:
    """The checkpoint that this run started from, or the source's newest good one, which is pinned if asked."""
    note = run_folder / "source.json"
    if note.exists():
        pinned: dict[str, Any] = json.loads(note.read_text())
        if Path(pinned["run"]) != source.resolve():
            raise BadRequest(
                f"run.dir={run_folder} was started from {pinned['run']}, and --from is {source.resolve()};"
                " go on with the first, or fine-tune into another folder with run.dir=..."
            )
        return CheckpointReader(Path(pinned["checkpoint"]))
    reader = checkpoint_of(source)
    if pin or (is_rank() and rank_and_world_size()[0] == 0):
        run_folder.mkdir(parents=True, exist_ok=True)
        hidden = run_folder / ".source.json"
        hidden.write_text(json.dumps({"run": str(source.resolve()), "checkpoint": str(reader.folder.resolve())}) + "\n")
        os.replace(hidden, note)
    return reader
