"""`coatnet evaluate`: top-1, top-5 and loss of a run's newest checkpoint, or of an exported file, on any packed set.

At the resolution and crop of its training, or at others.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from data.shards.manifest import Manifest, with_cache
from data.storage.remote import DEFAULT
from pipeline.checkpoint.pretrained import load_weights
from pipeline.checkpoint.weights import Weights, WeightsFile
from pipeline.commands.pretrain import import_training, manifest_reader
from pipeline.config.schema import Config
from pipeline.distributed.environment import is_rank, rank_and_world_size
from pipeline.distributed.launcher import launch
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.training.evaluation import EvalMetrics


def evaluate_command(
    source: str, data: str, weights: str | None, resolution: int | None, crop: str | None, procs: int, as_json: bool
) -> int:
    """Evaluates and prints; returns the exit status."""
    reader, kind, config = load_weights(source, weights, resolution, crop)
    manifest, state = manifest_reader(config.run.hang_timeout)(data, DEFAULT), reader.state()
    if list(manifest.classes) != state["classes"]:
        raise UsageError(
            f"--data={data} has {len(manifest.classes)} classes ({manifest.classes[0]}, ...), but {source} was trained"
            f" on {len(state['classes'])} ({state['classes'][0]}, ...); evaluate on a set with the same classes"
        )
    if not is_rank():
        if isinstance(reader, WeightsFile):
            return launch_apart(procs)
        return launch(sys.argv[1:], procs, reader.folder.parent.parent / "logs", import_training)
    manifest = with_cache(manifest, DEFAULT, config.data.cache.dir, config.data.cache.max_bytes)
    metrics = _evaluate(reader, kind, config, manifest)
    if rank_and_world_size()[0] == 0:
        row = {**asdict(metrics), "broken": len(metrics.broken), "weights": "ema" if kind == "ema" else "model"}
        for sample in metrics.broken:
            print(f"left out: {sample['key']} in {sample['shard']}: {sample['reason']}", file=sys.stderr)
        print(json.dumps(row) if as_json else _format_metrics(source, reader.step, config, row))
    return 0


def launch_apart(procs: int) -> int:
    """Launches the ranks, whose logs go to a folder of their own that is kept on failure; returns the exit status."""
    logs = Path(tempfile.mkdtemp(prefix="coatnet-"))
    status = launch(sys.argv[1:], procs, logs, import_training)
    if status == 0:
        shutil.rmtree(logs)
    return status


def _evaluate(reader: Weights, kind: str, config: Config, manifest: Manifest) -> EvalMetrics:
    import torch

    from pipeline.checkpoint.pretrained import load_model
    from pipeline.training.batches import loader_spec
    from pipeline.training.engine import start_process_group
    from pipeline.training.evaluation import evaluate

    device = start_process_group()
    model = load_model(reader, kind, config, device)
    spec = loader_spec(config, device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
        metrics = evaluate(model, manifest, config.evaluate.crop_fraction, config.train.loss, spec)
    assert metrics is not None  # no stop is asked for
    return metrics


def _format_metrics(source: str, step: int, config: Config, row: dict) -> str:
    """The metrics in a line; with the sigmoid loss, top-1 is what the paper calls precision@1."""
    top1, side = "precision@1" if config.train.loss == "sigmoid" else "top-1", config.model.resolution
    return (
        f"{source} at step {step} ({row['weights']}, {side} x {side}): {top1} {100 * row['top1']:.2f} %,"
        f" top-5 {100 * row['top5']:.2f} %, loss {row['loss']:.4f} over {row['samples']} samples,"
        f" {row['broken']} broken"
    )
