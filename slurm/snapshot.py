"""The program as it was when a job was submitted: a copy in the run's folder, which the job starts from.

Editing the checkout while a job is queued, or between its restarts, so changes nothing in it. Next: submit.py.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pipeline

PACKAGES = ("pipeline", "models", "data", "slurm")


def snapshot(folder: Path) -> Path:
    """FOLDER/code-HASH with all modules; one that is there already has the same bytes."""
    source = Path(pipeline.__file__).resolve().parent.parent
    files = sorted(file for package in PACKAGES for file in (source / package).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(source)}\n".encode() + file.read_bytes())
    code = folder / f"code-{digest.hexdigest()[:12]}"
    if not code.exists():
        hidden = folder / f".{code.name}.{os.getpid()}"
        for file in files:
            (hidden / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, hidden / file.relative_to(source))
        os.replace(hidden, code)
    return code
