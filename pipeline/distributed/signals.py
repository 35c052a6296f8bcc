"""A request to stop: at once while there is nothing to save, then a flag that the training loop reads.

Until the loop asks for the flag for the first time, just before its first step can be applied, a signal ends the
process with status 3: whatever it waits for (imports, other ranks, a checkpoint, the first batch), no step is lost.
A command that trains nothing gets KeyboardInterrupt, whichever signal it is, and a few seconds to clean up.

Python runs a handler in the main thread only, between two of its instructions, which may not come for minutes while
that thread waits in C for another rank. So a rank listens in a thread of its own, too; a launcher, which is forked and
may have one thread, does without.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from pipeline.distributed.heartbeat import last_beat

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Signals that request a stop. Slurm sends SIGUSR2 some time before a job's time limit, or what --signal names."""
STOPPED = 3
"""The exit status."""
FIRST_STEP_SECONDS = 5.0
"""How long after a signal a rank waits for its first step to be done: another rank may have ended before it."""
PEER_SECONDS = 2.0
"""How much later than another rank, which it ended, a signal may arrive here."""
CLEANUP_SECONDS = 5.0
"""How long what is under way may take to end after KeyboardInterrupt."""

_reason: str | None = None
_count = 0
_at_once, _listening, _interrupts = True, False, False
_advice = "run the same command again"
_ending = threading.Lock()
_before_end: list[Callable[[str], None]] = []


def stopping() -> list[signal.Signals]:
    """The signals that request a stop of this process: not SIGHUP where nohup has it ignored."""
    return [n for n in STOPPING if n is not signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


def install_handlers() -> None:
    """From now on signals request a stop; a second SIGINT ends the process."""
    for number in stopping():
        signal.signal(number, _record)


def serve(advice: str, interrupts: bool, before_end: Callable[[str], None]) -> None:
    """How this process ends where a signal stops it: with what line, and whether by KeyboardInterrupt.

    `before_end` is called with the signal's name where that ends the process at once.
    """
    global _advice, _interrupts
    _advice, _interrupts, _before_end[:] = advice, interrupts, [before_end]


def _record(number: int, _frame: object) -> None:
    global _reason, _count
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _reason, _count = _reason or signal.Signals(number).name, _count + 1
    if _listening or not _at_once or _ending.locked():
        return
    if not _interrupts or _count > 1:
        end_now()
    timer = threading.Timer(CLEANUP_SECONDS, end_now)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def listen() -> None:
    """Has a thread hear of signals, too, so that one ends this process at once even where its main thread can't."""
    global _listening
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reading,), name="signals", daemon=True).start()
    _listening = True
    if _reason is not None:  # before the thread could hear of it
        end_now()


def _listen(reading: int) -> None:
    global _reason
    while True:
        number = os.read(reading, 1)[0]
        if number not in STOPPING:
            continue
        _reason = _reason or signal.Signals(number).name
        deadline = time.monotonic() + FIRST_STEP_SECONDS
        while not _at_once and _is_first_step() and time.monotonic() < deadline:
            time.sleep(0.05)
        if _is_first_step():
            end_now()


def _is_first_step() -> bool:
    """Whether no step was done since this process began, or rolled back."""
    return _at_once or last_beat().step is None


def before_end(work: Callable[[str], None]) -> None:
    """Calls `work` with the signal's name where that ends the process at once."""
    _before_end.append(work)


def serve_at_once() -> None:
    """Until the flag is asked for again, a signal, and one that has come before, ends the process."""
    global _at_once
    _at_once = True
    if _reason is not None:
        end_now()


def requested() -> str | None:
    """The signal that requested a stop, if any: from now on this is how it is served."""
    global _at_once
    _at_once = False
    return _reason


def costs_steps() -> bool:
    """Whether a stop was requested that would lose steps if it ended this process at once."""
    return _reason is not None and not _is_first_step()


def count() -> int:
    """How many requests to stop have come."""
    return _count


def end_if_requested() -> None:
    """Where another rank is gone before the first step: ends the process if a signal is why, which may still come."""
    deadline = time.monotonic() + PEER_SECONDS
    while _listening and _is_first_step() and time.monotonic() < deadline:
        if _reason is not None:
            end_now()
        time.sleep(0.05)


def finish(status: int) -> None:
    """The work is done, with this status, which no signal changes: one only ends the wait for threads that hang."""
    _ending.acquire(blocking=False)
    for number in stopping():
        signal.signal(number, lambda *_: os._exit(status))
    atexit.register(ignore)  # the interpreter restores the default action before its last second
    if status == STOPPED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ignore() -> None:
    """From now on signals do nothing."""
    for number in stopping():
        signal.signal(number, signal.SIG_IGN)


def end_now() -> NoReturn:
    """Ends the process with status 3, however it is."""
    _ending.acquire()  # for good: another thread that comes here waits for the end
    try:
        line = f"stopped by {_reason}; {_advice}"
        show_cursor = "\r\x1b[K\x1b[?25h" if sys.stderr is not None and sys.stderr.isatty() else ""
        os.write(2, f"{show_cursor}coatnet: {line}\n".encode())  # the stream may be in the main thread's hands
        for work in _before_end:
            work(str(_reason))
    finally:
        os._exit(STOPPED)
    raise AssertionError
