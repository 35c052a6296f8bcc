"""`coatnet pretrain`: train a network from its initial weights, or go on.

Next: train.py.
"""

from __future__ import annotations

from pipeline.overrides import read_config
from pipeline.prepare import Plan
from pipeline.start import check_config, run


def pretrain(preset: str, overrides: list[str], procs: int, check: bool) -> int:
    """Trains, or goes on; returns the exit status."""
    config = read_config(preset, overrides)
    if check:
        return check_config(config, procs)

    def work(plan: Plan) -> None:
        from pipeline.train import train

        train(config, plan, ancestors=[])

    return run(config, "pretrain", procs, work)
