"""Going on: the newest checkpoint that all ranks find good is loaded, each rank reading just what it owns.

Whether a checkpoint is good is one verdict of all ranks, given before any state is touched. A damaged one is named in
events.jsonl and the one before is taken; where none is good the run stops rather than begin again in silence.

Next: ema.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import zero_state
from pipeline.checkpoint import CheckpointReader, DamagedCheckpoint, checkpoints
from pipeline.ema import Statistics, assign
from pipeline.engine import gathered, on_rank_zero
from pipeline.errors import BadRequest, RunFailed
from pipeline.record import Events
from pipeline.zero_state import Stretch

State = dict[str, Any]


def restore(engine: Any, run: Path, average: Statistics | None, train_fingerprint: str, events: Events) -> State | None:
    """Loads the newest good checkpoint into the engine and `average`; returns its state, None where there is none.

    Collective. RunFailed where checkpoints exist and none is good, BadRequest where the training set is another one.
    """
    folders = on_rank_zero(lambda: checkpoints(run / "checkpoints"))
    owned = zero_state.stretches(engine, average is not None) if folders else []
    for folder in reversed(folders):
        found, problem = _read(folder, owned)
        problems = gathered([problem] if problem else [])
        if not problems and found is not None:
            if found[2]["train_fingerprint"] != train_fingerprint:
                raise BadRequest(
                    f"data.train holds another training set than the one {folder} was trained on;"
                    " put it back, or begin another run with run.dir=..."
                )
            return _apply(engine, owned, average, *found)
        events.write("damaged_checkpoint", checkpoint=folder.name, reason=problems[0])
    if folders:
        raise RunFailed(
            f"{run}/checkpoints: none of {', '.join(f.name for f in folders)} is good (see events.jsonl);"
            " restore one from a copy, or remove them to begin again"
        )
    return None


Found = tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray], State]


def _read(folder: Path, owned: list[Stretch]) -> tuple[Found | None, str | None]:
    try:
        reader = CheckpointReader(folder)
        values = [
            {kind: reader.stretch(s.name, kind, s.start, own.numel()) for kind, own in s.values.items()} for s in owned
        ]
        return (values, reader.buffers(), reader.state()), None
    except DamagedCheckpoint as error:
        return None, str(error)


def _apply(
    engine: Any, owned: list[Stretch], average: Statistics | None, values: list[dict[str, np.ndarray]],
    buffers: dict[str, np.ndarray], state: State,
) -> State:  # fmt: skip
    for stretch, found in zip(owned, values, strict=True):
        for kind, own in stretch.values.items():
            own.copy_(torch.from_numpy(found[kind]))
    zero_state.finish_loading(engine, state["applied_steps"])
    assign(engine.module, of_kind(buffers, "weight"))
    if average is not None:
        average.update({name: values.to(average[name].device) for name, values in of_kind(buffers, "ema").items()})
    return state


def of_kind(buffers: dict[str, np.ndarray], kind: str) -> Statistics:
    """A checkpoint's batch-norm statistics of one kind, `weight` or `ema`, by name."""
    prefix = f"{kind}:"
    return {name[len(prefix) :]: torch.from_numpy(v.copy()) for name, v in buffers.items() if name.startswith(prefix)}
