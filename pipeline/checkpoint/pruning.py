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

from pipeline.checkpoint.reader import checkpoints, prunable, step_name, step_of

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
        try:
            hidden = _hide(folder)
        except OSError as error:
            unremoved[folder] = _reason(error)
        else:
            unremoved |= _remove(hidden)
    return unremoved


def _hide(folder: Path) -> Path:
    """Takes a checkpoint's name away, since what has it is complete; OSError where a file of it cannot be removed,
    as one that is immutable or another user's: the checkpoint is then as it was.
    """
    hidden = folder.with_name(f".{folder.name}.pruned")
    folder.rename(hidden)
    renamed: list[tuple[Path, Path]] = []
    try:
        for file in sorted(hidden.iterdir()):  # a rename is refused where a removal is
            renamed.append((file.rename(hidden / f".{file.name}"), file))
    except OSError:
        for new, old in renamed:
            new.rename(old)
        hidden.rename(folder)
        raise
    return hidden


def remove_leftovers(root: Path, before: int | None = None) -> Unremoved:
    """Removes what is half-written or half-removed, of steps before this one, or all; only for the run's holder."""
    unremoved: Unremoved = {}
    for hidden in root.iterdir() if root.is_dir() else ():
        match = _LEFTOVER.fullmatch(hidden.name)
        if match and (before is None or int(match[1]) < before) and hidden.is_dir():
            unremoved |= _remove(hidden)
    return unremoved


def remove_failed(root: Path, step: int) -> Unremoved:
    """Removes the marks of this step's saves that failed, once no rank is at work on one."""
    unremoved: Unremoved = {}
    for hidden in root.glob(f".{step_name(step)}.attempt-*.failed"):
        unremoved |= _remove(hidden)
    return unremoved


def attempts_of_leftovers(root: Path) -> list[int]:
    """The attempts whose half-written checkpoints are there."""
    names = (re.match(r"\.step-\d{8,}\.attempt-(\d+)\.", path.name) for path in root.glob(".step-*"))
    return [int(name[1]) for name in names if name]


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
