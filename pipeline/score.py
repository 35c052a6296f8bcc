"""`coatnet evaluate`: the figures of a run's newest checkpoint, or of an exported file, on any packed set.

At the resolution and crop that it was trained with, or at others.

Next: evaluate.py.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from data.cache import with_cache
from data.shards import Manifest, read_manifest
from data.storage import PLAIN
from pipeline.config import Config
from pipeline.errors import BadRequest
from pipeline.launch import is_rank, processor_share, rank_and_world_size, run_ranks
from pipeline.trained import opened
from pipeline.weights_file import Weights, WeightsFile

if TYPE_CHECKING:
    from pipeline.evaluate import Figures


def score(
    source: str, data: str, weights: str | None, resolution: int | None, crop: str | None, procs: int, as_json: bool
) -> int:
    """Evaluates and prints; returns the exit status."""
    reader, kind, config = opened(source, weights, resolution, crop)
    manifest, state = read_manifest(data), reader.state()
    if list(manifest.classes) != state["classes"]:
        raise BadRequest(
            f"--data={data} has {len(manifest.classes)} classes ({manifest.classes[0]}, ...) and {source} was trained"
            f" on {len(state['classes'])} ({state['classes'][0]}, ...); evaluate on a set of the same classes"
        )
    if not is_rank():
        return _launch(reader, procs)
    manifest = with_cache(manifest, PLAIN, config.data.cache.dir, config.data.cache.max_bytes)
    figures = _figures(reader, kind, config, manifest)
    if rank_and_world_size()[0] == 0:
        row = {**asdict(figures), "broken": len(figures.broken), "weights": "ema" if kind == "ema" else "model"}
        for sample in figures.broken:
            print(f"left out: {sample['key']} in {sample['shard']}: {sample['reason']}", file=sys.stderr)
        print(json.dumps(row) if as_json else _sentence(source, reader.step, config, row))
    return 0


def _launch(reader: Weights, procs: int) -> int:
    """Runs the ranks, whose logs are a run's, or, for a file, are kept only where something failed."""
    if not isinstance(reader, WeightsFile):
        return run_ranks(sys.argv[1:], procs, reader.folder.parent.parent / "logs")
    logs = Path(tempfile.mkdtemp(prefix="coatnet-"))
    status = run_ranks(sys.argv[1:], procs, logs)
    if status == 0:
        shutil.rmtree(logs)
    return status


def _figures(reader: Weights, kind: str, config: Config, manifest: Manifest) -> Figures:
    import torch

    from data.loader import Share
    from pipeline.engine import start_process_group
    from pipeline.evaluate import evaluate
    from pipeline.trained import trained_network

    device = start_process_group()
    model = trained_network(reader, kind, config, device)
    rank, world_size = rank_and_world_size()
    share = Share(rank, world_size, config.train.micro_batch, config.model.resolution, device, processor_share())
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
        return evaluate(model, manifest, config.evaluate.crop_fraction, config.train.loss, share)


def _sentence(source: str, step: int, config: Config, row: dict) -> str:
    """The figures in a line; what the paper calls precision@1 is top-1 of a loss that asks of each class alone."""
    top1, side = "precision@1" if config.train.loss == "sigmoid" else "top-1", config.model.resolution
    return (
        f"{source} at step {step} ({row['weights']}, {side} x {side}): {top1} {100 * row['top1']:.2f} %,"
        f" top-5 {100 * row['top5']:.2f} %, loss {row['loss']:.4f} over {row['samples']} samples,"
        f" {row['broken']} broken"
    )
