"""`coatnet logs`: the end of what a rank, or the batch script, said, and what it reports next."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.run.lock import lock_holder
from slurm import history, scheduler

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_QUESTIONS = 5.0
"""To Slurm, whether the run is over."""
SAME_TIME_SECONDS = 10.0
_BLOCK = 1 << 16


def logs(run: Path, rank: int | None, follow: bool, lines: int) -> int:
    """Prints the last lines of a log, and with `follow` all that comes until the run is over; returns the status."""
    scheduler.check_run(run)
    path = newest_log(run, rank)
    if path is None and (not follow or _is_over(run)):
        whose = "any rank or job" if rank is None else f"rank {rank}"
        raise UsageError(f"{run}: there is no log of {whose} yet; coatnet status {run} says where the run stands")
    offsets = {file: file.stat().st_size for file in all_logs(run)}
    if path is not None:
        offsets[path], text = tail(path, lines)
        _write(text)
    try:
        if follow:
            _follow(run, rank, path, offsets)
    except KeyboardInterrupt:
        pass
    return 0


def newest_log(run: Path, rank: int | None) -> Path | None:
    """Where a rank says most: under Slurm its JOB-RANK.log, elsewhere rank-N.log; by default rank 0, or the batch log.

    With `--procs` and with `--cluster local` rank 0 talks to whoever started it, so the latter's batch log is its log.
    """
    wanted = rank or 0
    own = [file for file in (run / "logs").glob(f"*-{wanted}.log") if not file.name.startswith("rank-")]
    own += [file for file in [history.folder(run) / "local.log"] if wanted == 0 and file.exists()]
    kept = [file for file in [run / "logs" / f"rank-{wanted}.log"] if file.exists()]
    newest, plain = max(own, key=_changed, default=None), max(kept, key=_changed, default=None)
    if newest is not None and (plain is None or _changed(plain) < _changed(newest) + SAME_TIME_SECONDS):
        return newest  # has what rank-N.log has, and what a rank says as it ends
    return plain or (batch_log(run) if rank is None else None)


def batch_log(run: Path) -> Path | None:
    """What the newest batch script said."""
    return max((file for file in all_logs(run) if file.parent.name == "slurm"), key=_changed, default=None)


def last_words(run: Path) -> str | None:
    """The last line of rank 0 or the batch script that says why a command ended, else the batch script's last line."""
    found = [tail(path, 200)[1].decode(errors="replace").splitlines() for path in (newest_log(run, 0),) if path]
    batch = batch_log(run)
    found += [tail(batch, 200)[1].decode(errors="replace").splitlines()] if batch else []
    ours = [line for lines in found for line in lines if line.startswith("coatnet: ")]
    last = [line for line in (found[-1] if batch else []) if line.strip()]
    return (ours or last or [None])[-1]


def all_logs(run: Path) -> list[Path]:
    batch = [file for file in history.folder(run).glob("*") if re.search(r"(\.log|_log\.out)$", file.name)]
    return [*(run / "logs").glob("*.log"), *batch]


def tail(path: Path, lines: int) -> tuple[int, bytes]:
    """The size of a file and its last lines, without reading the rest."""
    with path.open("rb") as file:
        size, block = file.seek(0, 2), _BLOCK
        while True:
            begin = file.seek(max(0, size - block))
            content = file.read(size - begin)
            if begin == 0 or content.count(b"\n") > lines:
                break
            block *= 4
    parts = content.split(b"\n")
    ended = parts[-1] == b""
    return size, b"\n".join(parts[-lines - ended :])


def _follow(run: Path, rank: int | None, path: Path | None, offsets: dict[Path, int]) -> None:
    """Writes what is added; a log that takes over (the run was submitted again) is written from where it stood."""
    next_question, over = 0.0, False
    while True:
        if not over and time.monotonic() >= next_question:
            over = _is_over(run)
            next_question = time.monotonic() + SECONDS_BETWEEN_QUESTIONS
        newest = newest_log(run, rank)
        for file in dict.fromkeys(each for each in (path, newest) if each is not None):
            if file != path:
                print(f"==> {file} <==", flush=True)
                path = file
            offsets[file] = _write_from(file, offsets.get(file, 0))
        if over:
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _write_from(path: Path, offset: int) -> int:
    """Writes what stands behind an offset; returns the new one. A file that was begun anew is written whole."""
    with path.open("rb") as file:
        file.seek(offset if offset <= file.seek(0, 2) else 0)
        _write(file.read())
        return file.tell()


def _write(text: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def _is_over(run: Path) -> bool:
    """Whether nothing of the run is alive, as far as Slurm answers."""
    try:
        return lock_holder(run) is None and not scheduler.active_jobs(run)
    except scheduler.ERRORS as error:
        print(f"coatnet: {error}", file=sys.stderr)
        return False


def _changed(path: Path) -> float:
    return path.stat().st_mtime
