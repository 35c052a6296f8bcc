"""One report of a whole allocation, by rank 0, of what every rank finds on its node and together with the others.

The ranks write their checks to files of a hidden folder in the run's storage: that works where torch is broken on a
node, and shows whether the run's folder is the same storage everywhere. Rank 0 makes the folder and removes it; a rank
that does not find it makes none, so nothing is left on a node that does not share it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from data.storage.durable import write_atomically
from pipeline.config.schema import Config
from pipeline.distributed.environment import host_name, nodes_of_step, rank_and_world_size
from pipeline.doctor.checks import Check
from pipeline.doctor.environment import check_node
from pipeline.doctor.merge import Report, abbreviate, merge
from pipeline.doctor.storage import check_storage, nearest_folder
from pipeline.doctor.subprocess_probe import run_isolated
from pipeline.errors import UsageError
from pipeline.formatting import format_ranges

TIMEOUT_SECONDS = 60.0
"""How long a rank that has its checks waits for the others': NFS may hide a new file for half a minute."""
COLLECTIVES_SECONDS = 180.0
"""For the process that checks the collectives; torch itself waits shorter."""
START = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "MASTER_PORT")
"""The launchers' variables that together tell one start from another, and are the same on all of its ranks."""


def check_allocation(config: Config) -> list[Check] | None:
    """What the whole allocation can do, on rank 0; None on the others, which have reported to rank 0."""
    rank, ranks = rank_and_world_size()
    folder = rendezvous_dir(Path(config.run.dir), os.environ)
    if rank > 0:
        report(folder, rank, check_rank(config))
        return None
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed
        folder.mkdir()
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}; choose a run.dir=... that all nodes can write") from None
    try:
        report(folder, rank, check_rank(config))
        reports = collect(folder, ranks)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [missing_ranks(reports, ranks, _expected_hosts()), *merge(list(reports.values()))]


def check_rank(config: Config) -> list[Check]:
    """What this rank finds together with the others and, if it is its node's first, what the node has."""
    advice = "check whether torch and its NCCL fit this node's driver and network"
    checks = run_isolated("collectives", "collectives.check_collectives", seconds=COLLECTIVES_SECONDS, advice=advice)
    if os.environ["LOCAL_RANK"] == "0":
        checks += [*check_node(), *check_storage(config)]
    return checks


def rendezvous_dir(run: Path, environment: Mapping[str, str]) -> Path:
    """Where the ranks of one start leave their checks: in the run's folder, or in the nearest above it."""
    start = "-".join(environment[name] for name in START if name in environment)
    return nearest_folder(run) / f".doctor-{re.sub(r'[^A-Za-z0-9.-]', '_', start)}"


def report(folder: Path, rank: int, checks: Sequence[Check], timeout: float = TIMEOUT_SECONDS) -> None:
    """Leaves a rank's checks for rank 0; where that is impossible, a line on standard error says so."""
    deadline = time.monotonic() + timeout
    while not folder.is_dir() and time.monotonic() < deadline:
        time.sleep(0.2)
    own = Report(host_name(), tuple(checks))
    try:
        write_atomically(folder / f"rank-{rank}.json", json.dumps(asdict(own)))
    except OSError as error:
        print(f"rank {rank} on {own.host} cannot report to rank 0: {folder}: {error.strerror}", file=sys.stderr)


def collect(folder: Path, ranks: int, timeout: float = TIMEOUT_SECONDS) -> dict[int, Report]:
    """The reports by rank, once all are there or the time is over."""
    deadline = time.monotonic() + timeout
    while len(files := list(folder.glob("rank-*.json"))) < ranks and time.monotonic() < deadline:
        time.sleep(0.2)
    reports = {}
    for rank, file in sorted((int(file.stem.removeprefix("rank-")), file) for file in files):
        facts = json.loads(file.read_text())
        reports[rank] = Report(facts["host"], tuple(Check(**check) for check in facts["checks"]))
    return reports


def missing_ranks(reports: Mapping[int, Report], ranks: int, expected_hosts: Sequence[str]) -> Check:
    """Whether every rank has reported, and if not, which ranks and hosts are missing."""
    hosts = dict.fromkeys(report.host for report in reports.values())
    missing = [rank for rank in range(ranks) if rank not in reports]
    if not missing:
        return Check("ranks", "ok", f"{ranks} on {abbreviate(hosts)}")
    lost = [host for host in expected_hosts if host not in hosts]
    nothing = f"; nothing from {abbreviate(lost)}" if lost else ""
    detail = f"{len(missing)} of {ranks} never reported: {abbreviate(format_ranges(missing))}{nothing}"
    advice = "the node did not start them, or run.dir is not the same storage there: check their logs, and the mounts"
    return Check("ranks", "broken", detail, advice)


def _expected_hosts() -> list[str]:
    """srun's nodes, where it started the ranks and Slurm's programs are within reach."""
    try:
        return nodes_of_step()
    except (KeyError, OSError, subprocess.SubprocessError):
        return []
