"""A probe of the doctor in a process of its own, so that a library that crashes is a finding and not the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

from pipeline.doctor.findings import Check, checks_of
from pipeline.doctor.install import ROOT, driver_cuda

PROBE_SECONDS = 120
REINSTALL = "make clean install"


def run_isolated(
    probe: str,
    *arguments: str,
    environment: dict[str, str] | None = None,
    seconds: float = PROBE_SECONDS,
    advice: str = REINSTALL,
) -> list[Check]:
    """A probe's findings; if its process dies or hangs, a finding that says how."""
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    settings = os.environ | {"PYTHONPATH": paths, "DS_ACCELERATOR": _accelerator()} | (environment or {})
    # -P: a folder that happens to be called torch in the current directory is not torch
    command = [sys.executable, "-P", "-m", "pipeline.doctor", probe, *arguments]
    try:
        answer = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [Check(probe, "broken", f"no answer in {seconds:.0f} s", advice)]
    if answer.returncode < 0:
        return [Check(probe, "broken", f"trying it crashed: {signal.Signals(-answer.returncode).name}", advice)]
    if answer.returncode > 0:
        return [Check(probe, "broken", _one_line(answer.stderr.strip().rpartition("\n")[2]), advice)]
    return checks_of(json.loads(answer.stdout.strip().rpartition("\n")[2]))


def has_gpu() -> bool:
    """Whether this machine has a GPU, even one whose driver does not say what it supports."""
    try:
        return driver_cuda() is not None
    except RuntimeError:
        return True


def _accelerator() -> str:
    """What DeepSpeed is asked to use, as the training tells it: without this it looks around, and says so."""
    return "cuda" if has_gpu() else "cpu"


def _one_line(text: str) -> str:
    return " ".join(text.split())
