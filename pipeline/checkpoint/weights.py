"""A network as one safetensors file: weights and batch-norm statistics by name, and in its header what made them.

The header's metadata has one entry, JSON, with what a checkpoint's state.json says and which weights they are
(docs/export.md). `coatnet evaluate` and `coatnet finetune --from` read such a file as they read a checkpoint. Without
torch.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from pipeline.checkpoint.attempts import trusted_checkpoints
from pipeline.checkpoint.reader import CheckpointReader, DamagedCheckpoint, newest_good
from pipeline.distributed.environment import is_first_process
from pipeline.errors import UsageError

FORMAT = 1
KEY = "coatnet"
"""The metadata's entry, and the key of a timm folder's config.json that has the same."""
STATISTICS = ("running_mean", "running_var")


class WeightsFile:
    """Reads such a file, with the part of CheckpointReader's interface that weights without an optimizer have."""

    def __init__(self, path: Path) -> None:
        self.folder = path
        try:
            with safetensors.safe_open(path, "numpy") as file:
                said = json.loads((file.metadata() or {}).get(KEY, "null"))
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            _refuse_timm(path)
            raise UsageError(f"{path} is no whole safetensors file ({error}); export it again") from None
        if not isinstance(said, dict) or said.get("format") != FORMAT:
            _refuse_timm(path)
            raise UsageError(f"{path} was not made by this version of coatnet export or coatnet import; make it again")
        self._said = said
        self.step: int = said["step"]
        self.shapes = {name: shape for name, shape in shapes.items() if not name.endswith(STATISTICS)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint's state.json says of these weights; `ancestry` is None where nobody knows it."""
        return self._said

    def has(self, kind: str) -> bool:
        return kind == ("ema" if self._said["weights"] == "ema" else "weight")

    def tensors(self, kind: str) -> Iterator[tuple[str, np.ndarray]]:
        """Every parameter, if the file has this kind: `weight` or `ema`."""
        return ((name, self.tensor(name, kind)) for name in self.shapes if self.has(kind))

    def tensor(self, name: str, kind: str) -> np.ndarray:
        """One parameter or statistic, of the kind that the file has; UsageError where its bytes are damaged."""
        if not self.has(kind):
            raise UsageError(f"{self.folder} has no {kind} of {name}")
        with safetensors.safe_open(self.folder, "numpy") as file:
            values = file.get_tensor(name)
        if _digest(values) != self._said["sha256"].get(name):
            raise UsageError(f"{self.folder}: the bytes of {name} are not those that were written; export it again")
        return values

    def buffers(self) -> dict[str, np.ndarray]:
        """The statistics, named as a checkpoint's: `weight:NAME` or `ema:NAME`."""
        kind = "ema" if self.has("ema") else "weight"
        statistics = (name for name in self._said["sha256"] if name.endswith(STATISTICS))
        return {f"{kind}:{name}": self.tensor(name, kind) for name in statistics}


Weights = CheckpointReader | WeightsFile


def latest_checkpoint(source: Path) -> CheckpointReader:
    """The checkpoint that a path names: itself, or a run's newest whose weights are good.

    UsageError where there is no checkpoint, RunFailed where none is good.
    """
    if (source / "manifest.json").exists():
        return CheckpointReader(source)
    folders = trusted_checkpoints(source)
    if not folders:
        _refuse_timm(source)
        what = "has no checkpoint yet" if (source / "config.yaml").exists() else "is no run"
        raise UsageError(f"{source} {what}; give a run's folder, one of its checkpoints/step-..., or an exported file")

    def verified(folder: Path) -> CheckpointReader:
        reader = CheckpointReader(folder)
        reader.verify_network()
        return reader

    def warn(_: Path, error: DamagedCheckpoint) -> None:
        if is_first_process():
            print(f"warning: {error}; trying the checkpoint before", file=sys.stderr)

    return newest_good(source, folders, verified, warn, "restore one from a copy")


def open_weights(source: Path) -> Weights:
    """What a path names: an exported file, a checkpoint, or a run's newest; UsageError where there is none."""
    return WeightsFile(source) if source.is_file() else latest_checkpoint(source)


def _refuse_timm(path: Path) -> None:
    """UsageError where this is timm's folder or a file in it: what it is, or how it becomes a file of ours."""
    folder = path if path.is_dir() else path.parent
    try:
        name = json.loads((folder / "config.json").read_text())["architecture"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    from models.convert import check_known

    try:
        check_known(name)
    except ValueError as error:
        raise UsageError(f"{folder} is timm's: {error}") from None
    raise UsageError(
        f"{folder} is timm's: coatnet import {folder} {name}.safetensors makes a file of it; give that instead"
    )


def select_weights(weights: Weights, wanted: str | None) -> str:
    """The kind, `ema` or `weight`, for what a person asked for: `ema`, `model`, or the average where there is one."""
    if wanted not in (None, "ema", "model"):
        raise UsageError(f"--weights is {wanted}; it must be ema or model")
    kind = "ema" if wanted != "model" and (wanted or weights.has("ema")) else "weight"
    if not weights.has(kind):
        missing, other = ("moving average", "model") if kind == "ema" else ("weights but their moving average", "ema")
        raise UsageError(f"{weights.folder} has no {missing}; take --weights {other}")
    return kind


def all_tensors(weights: Weights, kind: str) -> dict[str, np.ndarray]:
    """Parameters and statistics of one kind, by their names in the network's state."""
    prefix = f"{kind}:"
    statistics = {name.removeprefix(prefix): v for name, v in weights.buffers().items() if name.startswith(prefix)}
    return dict(weights.tensors(kind)) | statistics


def provenance(weights: Weights, kind: str) -> dict[str, Any]:
    """What a file says of weights of this kind."""
    state = weights.state()
    kept = {name: state[name] for name in ("step", "classes", "train_fingerprint", "config", "ancestry")}
    return {"format": FORMAT, "weights": "ema" if kind == "ema" else "model", **kept}


def write(path: Path, tensors: Mapping[str, np.ndarray], said: Mapping[str, Any]) -> None:
    """Writes the file; `said` is the `provenance`."""
    with_digests = {**said, "sha256": {name: _digest(values) for name, values in tensors.items()}}
    safetensors.numpy.save_file(dict(tensors), path, {KEY: json.dumps(with_digests)})


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).view(np.uint8).data).hexdigest()
