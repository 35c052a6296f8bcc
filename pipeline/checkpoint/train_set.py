"""Whether the training set is the one that a checkpoint was trained on, by its content, wherever it lies."""

from __future__ import annotations

from typing import Any

from data.shards.manifest import Manifest
from data.urls import without_secrets
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.errors import UsageError


def check_train_set(train: Manifest, reader: CheckpointReader) -> None:
    """UsageError, naming both places, where it is another; the ranks but 0 may not have what an old manifest lacks."""
    state: dict[str, Any] = reader.state()
    recorded = state["train_fingerprint"], state.get("train_header_fingerprint")
    if train.header_fingerprint is None or train.is_set_of(*recorded):
        return
    before = state["config"]["data"]["train"]
    raise UsageError(
        f"data.train={without_secrets(train.url)} holds a different training set from the one {reader.folder} was"
        f" trained on, which was at {without_secrets(before)}; set data.train to where that is now, or start another"
        " run with run.dir=..."
    )
