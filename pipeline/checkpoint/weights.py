"""The weights of a network, from a checkpoint or from an exported safetensors file, without torch.

An exported file has weights and batch-norm statistics by name. One entry of its metadata, JSON, has what made them, as
in a checkpoint's state.json (docs/reference/formats.md).
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
"""The entry of the metadata, and the key for the same in a timm folder's config.json."""
STATISTICS = ("running_mean", "running_var")


class WeightsFile:
    """Reads an exported file, with the part of CheckpointReader's interface that needs no optimizer state."""

    def __init__(self, path: Path) -> None:
        self.folder = path
        try:
            with safetensors.safe_open(path, "numpy") as file:
                metadata = json.loads((file.metadata() or {}).get(KEY, "null"))
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise UsageError(f"{path} is not a complete safetensors file ({error}); export it again") from None
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise UsageError(f"{path} was not made by this version of coatnet export or import; make it again")
        self._metadata = metadata
        self.digest = hashlib.sha256(json.dumps(metadata["sha256"], sort_keys=True).encode()).hexdigest()
        self.step: int = metadata["step"]
        self.shapes = {name: shape for name, shape in shapes.items() if not name.endswith(STATISTICS)}

    def state(self) -> dict[str, Any]:
        """As of a checkpoint, what state.json has on these weights; `ancestry` is None where it is unknown."""
        return self._metadata

    def has_kind(self, kind: str) -> bool:
        return kind == ("ema" if self._metadata["weights"] == "ema" else "weight")

    def tensors(self, kind: str) -> Iterator[tuple[str, np.ndarray]]:
        """Every parameter of this kind: `weight` or `ema`."""
        return ((name, self.tensor(name, kind)) for name in self.shapes)

    def tensor(self, name: str, kind: str) -> np.ndarray:
        """One parameter or statistic of the file's kind; UsageError where its bytes are damaged."""
        if not self.has_kind(kind):
            raise UsageError(f"{self.folder} has no {kind} of {name}")
        with safetensors.safe_open(self.folder, "numpy") as file:
            values = file.get_tensor(name)
        if _digest(values) != self._metadata["sha256"].get(name):
            raise UsageError(f"{self.folder}: {name} has a wrong checksum; export it again")
        return values

    def buffers(self) -> dict[str, np.ndarray]:
        """The statistics, named as in a checkpoint: `weight:NAME` or `ema:NAME`."""
        kind = "ema" if self.has_kind("ema") else "weight"
        statistics = (name for name in self._metadata["sha256"] if name.endswith(STATISTICS))
        return {f"{kind}:{name}": self.tensor(name, kind) for name in statistics}


Weights = CheckpointReader | WeightsFile


def latest_checkpoint(source: Path) -> CheckpointReader:
    """A path's checkpoint: itself, or the newest one of a run whose weights are good.

    UsageError where there is no checkpoint, RunFailed where none is good.
    """
    if (source / "manifest.json").exists():
        return CheckpointReader(source)
    folders = trusted_checkpoints(source)
    if not folders:
        problem = "has no checkpoint yet" if (source / "config.yaml").exists() else "is not a run"
        raise UsageError(
            f"{source} {problem}; pass a run's folder, one of its checkpoints, or a file that coatnet export or"
            " coatnet import wrote"
        )

    def verified(folder: Path) -> CheckpointReader:
        reader = CheckpointReader(folder)
        reader.verify_weights()
        return reader

    def warn(_: Path, error: DamagedCheckpoint) -> None:
        if is_first_process():
            print(f"warning: {error}; trying the checkpoint before", file=sys.stderr)

    return newest_good(source, folders, verified, warn, "restore one from a copy")


def open_weights(source: Path) -> Weights:
    """A path's weights: an exported file, a checkpoint, or a run's newest one; UsageError where there are none."""
    return WeightsFile(source) if source.is_file() else latest_checkpoint(source)


def select_weights(weights: Weights, choice: str | None) -> str:
    """The kind, `ema` or `weight`, for --weights: `ema`, `model`, or None for the average where there is one."""
    if choice not in (None, "ema", "model"):
        raise UsageError(f"--weights is {choice}; it must be ema or model")
    kind = "ema" if choice != "model" and (choice or weights.has_kind("ema")) else "weight"
    if not weights.has_kind(kind):
        what, other = ("no moving average", "model") if kind == "ema" else ("only the moving average", "ema")
        raise UsageError(f"{weights.folder} has {what}; use --weights {other}")
    return kind


def all_tensors(weights: Weights, kind: str) -> dict[str, np.ndarray]:
    """Parameters and statistics of one kind, by their names in the network's state_dict."""
    prefix = f"{kind}:"
    statistics = {name.removeprefix(prefix): v for name, v in weights.buffers().items() if name.startswith(prefix)}
    return dict(weights.tensors(kind)) | statistics


def provenance(weights: Weights, kind: str) -> dict[str, Any]:
    """The metadata for a file with the weights of this kind."""
    state = weights.state()
    kept = {name: state[name] for name in ("step", "classes", "train_fingerprint", "config", "ancestry")}
    return {"format": FORMAT, "weights": "ema" if kind == "ema" else "model", **kept}


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Writes an exported file; `metadata` is its `provenance`."""
    with_digests = {**metadata, "sha256": {name: _digest(values) for name, values in tensors.items()}}
    safetensors.numpy.save_file(dict(tensors), path, {KEY: json.dumps(with_digests)})


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).view(np.uint8).data).hexdigest()
