"""Removing checkpoints that are superseded or abandoned, and what was left over.

None of it may stop a run: what cannot be removed (another user's, `.nfs` files of a file that is still open, a failing
device) is returned with the reason, and tried again.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.checkpoint.reader import checkpoints, prunable, step_of

Unremoved = dict[Path, str]
"""What could not be removed, and why."""
_LEFTOVER = re.compile(r"\.step-(\d{8,})\.(attempt-\d+\.\d+(\.failed)?|pruned|mirrored|replaced(\.replaced)*)")
"""The names that we give to what is half-written or half-removed; others' files stay."""


def prune(root: Path, keep_last: int, keep_every: int | None, step: int, spared: Iterable[Path] = ()) -> Unremoved:
    """Removes what the checkpoint of this step supersedes, except the spared and the write-protected ones."""
    unremoved = remove_leftovers(root, before=step)
    folders = {step_of(folder): folder for folder in checkpoints(root)}
    for folder in (folders[old] for old in prunable(folders, step, keep_last, keep_every)):
        if folder in spared:
            continue
        if not os.access(folder, os.W_OK):  # somebody wants to keep it, whole
            unremoved[folder] = "it is write-protected"
            continue
        hidden = root / f".{folder.name}.pruned"  # renamed first: what has a checkpoint's name is complete
        try:
            folder.rename(hidden)
        except OSError as error:
            unremoved[folder] = _reason(error)
        else:
            unremoved |= _remove(hidden)
    return unremoved


def remove_leftovers(root: Path, before: int | None = None) -> Unremoved:
    """Removes what is half-written or half-removed, of steps before this one, or all; only for the run's holder."""
    unremoved: Unremoved = {}
    for hidden in root.iterdir() if root.is_dir() else ():
        match = _LEFTOVER.fullmatch(hidden.name)
        if match and (before is None or int(match[1]) < before) and hidden.is_dir():
            unremoved |= _remove(hidden)
    return unremoved


def abandon(root: Path, after: int) -> Unremoved:
    """Moves the checkpoints of later steps to `abandoned`, in the place of those that are there."""
    abandoned = root / "abandoned"
    unremoved = _remove(abandoned) if abandoned.exists() else {}
    for folder in checkpoints(root):
        if step_of(folder) > after:
            try:
                abandoned.mkdir(exist_ok=True)
                folder.rename(abandoned / folder.name)
            except OSError as error:  # no attempt from now on will trust it
                unremoved[folder] = _reason(error)
    return unremoved


def _remove(folder: Path) -> Unremoved:
    """Removes all of a folder that can be removed."""
    errors: list[Any] = []
    shutil.rmtree(folder, onerror=lambda function, path, info: errors.append(info[1]))
    return {folder: _reason(errors[0])} if errors and folder.exists() else {}


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
