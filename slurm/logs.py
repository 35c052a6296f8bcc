"""`coatnet logs`: the last lines of a rank's or the batch script's log, and what is added to it."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.run.lock import lock_holder
from slurm import history, scheduler
from slurm.requeue import srun_error

POLL_SECONDS = 0.5
SLURM_POLL_SECONDS = 5.0
SAME_TIME_SECONDS = 10.0
_BLOCK = 1 << 16


def logs(run: Path, rank: int | None, follow: bool, lines: int) -> int:
    """Prints the last lines of a log, and with `follow` what is added until the run is over; returns the status."""
    history.check_run(run)
    path = newest_log(run, rank)
    if path is None and (not follow or _is_over(run)):
        whose = "any rank or job" if rank is None else f"rank {rank}"
        raise UsageError(f"{run}: there is no log of {whose} yet; coatnet status {run} shows what it waits for")
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
    """A rank's log: under Slurm JOB-RANK.log, elsewhere rank-N.log; None: rank 0's, or the batch script's.

    With `--procs` and with `--cluster local` rank 0 prints to its launcher, so the latter's batch log is its log.
    """
    number, rank_logs = rank or 0, run / "logs"
    under_slurm = [file for file in all_logs(run) if re.fullmatch(rf"\d+-{number}\.log", file.name)]
    under_slurm += [file for file in [history.folder(run) / "local.log"] if number == 0 and file.is_file()]
    newest = max(under_slurm, key=_changed, default=None)
    plain = rank_logs / f"rank-{number}.log"
    if not plain.is_file():
        return newest or (batch_log(run) if rank is None else None)
    if newest is not None and _changed(plain) < _changed(newest) + SAME_TIME_SECONDS:
        return newest  # contains what rank-N.log contains, and how the rank ended
    return plain


def batch_log(run: Path) -> Path | None:
    """The newest batch script's log."""
    return max((file for file in all_logs(run) if file.parent.name == "slurm"), key=_changed, default=None)


def exit_reason(run: Path) -> str | None:
    """The last error in the batch script's log, else its last line; of a rank that only exited, its log's last line."""
    batch = batch_log(run)
    lines = tail(batch, 200)[1].decode(errors="replace").splitlines() if batch else []
    telling = [line for line in lines if line.startswith(("coatnet: ", "srun: error: ")) or srun_error([line])]
    errors = [line for line in telling if "Terminated" not in line]
    reason = (errors or [line for line in lines if line.strip()] or [None])[-1]
    exited = re.match(r"srun: error: \S+ tasks? (\d+)\S*: Exited", reason or "")
    if exited and (rank_log := newest_log(run, int(exited[1]))):
        said = [line for line in tail(rank_log, 20)[1].decode(errors="replace").splitlines() if line.strip()]
        return f"rank {exited[1]}: {said[-1]}" if said else reason
    return reason


def all_logs(run: Path) -> list[Path]:
    batch = [file for file in history.folder(run).glob("*") if re.search(r"(\.log|_log\.out)$", file.name)]
    return [file for file in [*(run / "logs").glob("*.log"), *batch] if file.is_file()]


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
    ends_with_newline = parts[-1] == b""
    return size, b"\n".join(parts[-lines - ends_with_newline :])


def _follow(run: Path, rank: int | None, path: Path | None, offsets: dict[Path, int]) -> None:
    """Prints what is added; where the run is submitted again it goes over to the new log."""
    next_question, over = 0.0, False
    while True:
        if not over and time.monotonic() >= next_question:
            over = _is_over(run)
            next_question = time.monotonic() + SLURM_POLL_SECONDS
        for file in dict.fromkeys(filter(None, (path, newest_log(run, rank)))):
            if file != path:
                print(f"==> {file} <==", flush=True)
                path = file
            offsets[file] = _write_from(file, offsets.get(file, 0))
        if over:
            return
        time.sleep(POLL_SECONDS)


def _write_from(path: Path, offset: int) -> int:
    """Prints a file from an offset, and returns the new one. A file that is shorter has been rewritten."""
    with path.open("rb") as file:
        file.seek(offset if offset <= file.seek(0, 2) else 0)
        _write(file.read())
        return file.tell()


def _write(text: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def _is_over(run: Path) -> bool:
    """Whether neither a process nor a job of the run is alive; False where Slurm does not answer."""
    try:
        return lock_holder(run) is None and not scheduler.active_jobs(run)
    except scheduler.ERRORS as error:
        print(f"coatnet: {error}", file=sys.stderr)
        return False


def _changed(path: Path) -> float:
    return path.stat().st_mtime
