"""One report of a whole allocation, by rank 0, of what every rank finds on its node and together with the others.

The ranks say what they found in files of a hidden folder in the run's storage: that works where torch is broken on a
node, and shows whether the run's folder is the same storage everywhere. Rank 0 makes the folder and takes it away; who
does not find it makes none, so nothing is left on a node that does not share it.
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
from pipeline.doctor.environment import check_node
from pipeline.doctor.findings import Check, checks_of
from pipeline.doctor.merge import Report, abbreviate, merge
from pipeline.doctor.storage import check_storage, nearest_folder
from pipeline.doctor.subprocess_probe import run_isolated
from pipeline.errors import UsageError
from pipeline.formatting import format_ranges

PATIENCE_SECONDS = 60.0
"""How long a rank that has its findings waits for the others': NFS may hide a new file for half a minute."""
COLLECTIVE_SECONDS = 180.0
"""What the process that meets the others may take; torch itself waits shorter."""
START = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "MASTER_PORT")
"""The launchers' variables that together tell one start from another, and are the same on all of its ranks."""


def diagnose_ranks(config: Config) -> list[Check] | None:
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
    advice = "see whether torch and its NCCL fit this node's driver and network"
    findings = run_isolated("collectives", seconds=COLLECTIVE_SECONDS, advice=advice)
    if os.environ["LOCAL_RANK"] == "0":
        findings += [*check_node(), *check_storage(config)]
    return findings


def rendezvous_dir(run: Path, environment: Mapping[str, str]) -> Path:
    """Where the ranks of one start leave their findings: in the run's folder, or in the nearest above it."""
    start = "-".join(environment[name] for name in START if name in environment)
    return nearest_folder(run) / f".doctor-{re.sub(r'[^A-Za-z0-9.-]', '_', start)}"


def report(folder: Path, rank: int, findings: Sequence[Check], patience: float = PATIENCE_SECONDS) -> None:
    """Leaves a rank's findings for rank 0; where that cannot be, a line on standard error says so."""
    deadline = time.monotonic() + patience
    while not folder.is_dir() and time.monotonic() < deadline:
        time.sleep(0.2)
    report = Report(host_name(), tuple(findings))
    try:
        write_atomically(folder / f"rank-{rank}.json", json.dumps(asdict(report)))
    except OSError as error:
        print(f"rank {rank} on {report.host} cannot tell rank 0: {folder}: {error.strerror}", file=sys.stderr)


def collect(folder: Path, ranks: int, patience: float = PATIENCE_SECONDS) -> dict[int, Report]:
    """What the ranks have said, in their order, once all have or the patience is at its end."""
    deadline = time.monotonic() + patience
    while len(files := list(folder.glob("rank-*.json"))) < ranks and time.monotonic() < deadline:
        time.sleep(0.2)
    reports = {}
    for file in sorted(files, key=_rank_of):
        said = json.loads(file.read_text())
        reports[_rank_of(file)] = Report(said["host"], tuple(checks_of(said["findings"])))
    return reports


def missing_ranks(reports: Mapping[int, Report], ranks: int, expected_hosts: Sequence[str]) -> Check:
    """Whether every rank has said its findings, and if not, which ranks and hosts are missing."""
    hosts = dict.fromkeys(report.host for report in reports.values())
    silent = [rank for rank in range(ranks) if rank not in reports]
    if not silent:
        return Check("ranks", "ok", f"{ranks} on {abbreviate(hosts)}")
    lost = [host for host in expected_hosts if host not in hosts]
    nothing = f"; nothing from {abbreviate(lost)}" if lost else ""
    detail = f"{len(silent)} of {ranks} never came: {abbreviate(format_ranges(silent))}{nothing}"
    advice = "the node did not start them, or run.dir is not the same storage there: see their logs, and the mounts"
    return Check("ranks", "broken", detail, advice)


def _rank_of(file: Path) -> int:
    return int(file.stem.removeprefix("rank-"))


def _expected_hosts() -> list[str]:
    """srun's nodes, where it started the ranks and Slurm's programs are within reach."""
    try:
        return nodes_of_step()
    except (KeyError, OSError, subprocess.SubprocessError):
        return []
