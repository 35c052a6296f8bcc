"""`coatnet doctor`: the checks of this machine or of an allocation, as text or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from pipeline.distributed.environment import is_rank, rank_and_world_size
from pipeline.doctor.checks import Check, exit_status, render
from pipeline.doctor.environment import check_machine
from pipeline.errors import UsageError


def doctor_report(preset: str | None, overrides: list[str], as_json: bool) -> int:
    """Prints what this machine, or the allocation that this is a rank of, has and lacks; returns the exit status."""
    checks = _checks(preset, overrides)
    if checks is None:
        return 0
    print(json.dumps([asdict(check) for check in checks]) if as_json else render(checks))
    return exit_status(checks)


def _checks(preset: str | None, overrides: list[str]) -> list[Check] | None:
    """Those of this machine, or on rank 0 those of its whole allocation and None on the other ranks."""
    ranks = rank_and_world_size()[1] if is_rank() else 1
    if preset is None:
        if ranks > 1:
            raise UsageError("ranks exchange their checks in the run's storage: coatnet doctor CONFIG run.dir=...")
        return check_machine()
    from pipeline.config.parsing import read_config
    from pipeline.doctor.ranks import check_allocation
    from pipeline.doctor.storage import check_storage

    config = read_config(preset, overrides)
    return check_allocation(config) if ranks > 1 else [*check_machine(), *check_storage(config)]
