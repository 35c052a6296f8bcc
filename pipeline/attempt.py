"""Taking a run's folder for this start of it: rank 0 claims, compares, records; every rank learns the attempt's number.

Next: run_folder.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

import torch

from pipeline.config import Config
from pipeline.engine import on_rank_zero
from pipeline.launch import rank_and_world_size
from pipeline.prepare import Plan
from pipeline.record import Events
from pipeline.run_folder import claim, write_config
from pipeline.save import remove_leftovers

_held: list[TextIO] = []  # the lock lives as long as the process


def begin_attempt(run: Path, config: Config, plan: Plan) -> tuple[int, Events]:
    """The attempt's number (how often the run was started before) and its events. Collective; BadRequest if alive."""

    def take() -> int:
        claimed = claim(run)
        _held.append(claimed.lock)
        remove_leftovers(run / "checkpoints")
        return claimed.attempt

    rank, world_size = rank_and_world_size()
    attempt = on_rank_zero(take)
    events = Events(run, attempt, rank)
    events.write("start", world_size=world_size, torch=torch.__version__, changed=plan.changed)
    if rank == 0:
        write_config(run, config)
    return attempt, events
