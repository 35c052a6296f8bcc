"""`python -m pipeline.doctor`: the doctor without the command line's packages, or with a name one of its probes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from pipeline.doctor.environment import (
    diagnose,
    probe_all_reduce,
    probe_codec,
    probe_dali,
    probe_deepspeed,
    probe_packages,
    probe_torch,
)
from pipeline.doctor.findings import Check, exit_status, rows


def probe_run_folder(path: str) -> list[Check]:
    """As check_run_folder finds it, which is imported where it is tried."""
    from pipeline.doctor.storage import check_run_folder

    return [check_run_folder(Path(path))]


def probe_dataset(key: str, url: str) -> list[Check]:
    """As check_dataset finds it, which is imported where it is tried."""
    from pipeline.doctor.storage import check_dataset

    return [check_dataset(key, url)]


def probe_group() -> list[Check]:
    """What this rank finds together with all others, which needs torch."""
    from pipeline.doctor.collectives import check_all_reduce

    return check_all_reduce()


PROBES: dict[str, Callable[..., list[Check]]] = {
    "torch": probe_torch,
    "packages": probe_packages,
    "nvImageCodec": probe_codec,
    "DALI": probe_dali,
    "DeepSpeed": probe_deepspeed,
    "gloo": probe_all_reduce,
    "collectives": probe_group,
    "run.dir": probe_run_folder,
    "data.train": partial(probe_dataset, "data.train"),
    "data.val": partial(probe_dataset, "data.val"),
}

if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps([asdict(finding) for finding in PROBES[sys.argv[1]](*sys.argv[2:])]))
    else:
        findings = diagnose()
        for mark, what, detail, advice in rows(findings):
            print(f"{mark:8}{what:14}{detail}{f'  ->  {advice}' if advice else ''}")
        sys.exit(exit_status(findings))
