"""A run that hangs ends, so that it can be resumed, and says why: a rank is frozen, or none makes progress.

A rank that is frozen (SIGSTOP, a machine that hangs), or sleeps or waits forever, makes the others wait for it
in a collective. So a thread of each rank shows every few seconds that its process runs and how far it has come, in a
store that rank 0 serves; rank 0 looks at all of them, and the others at rank 0. Where one is silent, or all stand
still, for `patience` seconds, the ranks are asked for their stacks, and all end at once, without anything that could
wait.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import AbstractContextManager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.distributed.collectives import all_gather, from_rank_zero
from pipeline.distributed.environment import host_name, rank_and_world_size
from pipeline.distributed.heartbeat import HeartbeatMonitor, is_expected, last_beat
from pipeline.run.events import Events
from pipeline.watchdog.stack_dump import (
    WATCHING,
    StackSnapshot,
    capture,
    format_ranks,
    render,
    suspect_ranks,
    top_frame,
)

RECORDING_SECONDS = 60.0
"""For asking and writing; what hangs may be the file system."""
MOST_NAMED = 4
_ASKED, _VERDICT = "asked", "verdict"
_LEFT = "left"


def start_watchdog(patience: float, events: Events, stacks: Path) -> Watchdog:
    """From now on until the context ends, the process ends with status 1 where a rank has given no heartbeat for so
    many seconds, and inside the context also where no rank has made progress. Collective.

    Where the ranks stood is then in the file `stacks`.
    """
    rank, world_size = rank_and_world_size()
    host = os.environ["MASTER_ADDR"]
    served = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = from_rank_zero(lambda: served.port if served is not None else 0)
    store = served or dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=patience))
    watch = Watchdog(store, rank, world_size, patience, events, stacks)
    watch.publish()
    watch.meet()  # a collective, so that each then finds what the others show
    for work in (watch.exchange, watch.monitor):
        threading.Thread(target=work, name=WATCHING, daemon=True).start()
    return watch


class Watchdog(AbstractContextManager["Watchdog"]):
    """What a rank knows of the others. Talking may block, where rank 0 is frozen, so another thread judges."""

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, patience: float, events: Events, stacks: Path
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._patience, self._interval = patience, min(5.0, patience / 10)
        self._events, self._stacks = events, stacks
        self._others = list(range(1, world_size)) if rank == 0 else [0]
        self._places: list[dict[str, Any]] = []
        self._shown: dict[int, str] = {}
        self._heartbeats = HeartbeatMonitor(patience, self._interval, self._others, time.monotonic())
        self._signs, self._left, self._answered = 0, threading.Event(), False

    def publish(self, left: bool = False) -> None:
        """Shows that this process runs and its last mark, or that it leaves."""
        self._signs += 1
        facts = {"sign": _LEFT if left else self._signs, "mark": last_beat().number}
        self._store.set(f"{self._rank}", json.dumps(facts))

    def meet(self) -> None:
        """Has all ranks know the others' processes, which one that is frozen could not tell any more."""
        self._places = all_gather([{"process": os.getpid(), "host": host_name()}])

    def __exit__(self, *_: object) -> None:
        self._left.set()
        with suppress(dist.DistError):  # rank 0 may have left before
            self.publish(left=True)

    # ---------------------------------------------------------------------------------------------------- two threads

    def exchange(self) -> None:
        while not self._left.wait(self._interval):
            try:
                self.publish()
                shown = self._store.multi_get([str(other) for other in self._others]) if self._others else []
                if self._store.check([_ASKED]):
                    self._answer_and_obey()
            except dist.DistError:  # rank 0 is gone, and whoever started the ranks sees that
                return self._left.set()
            for other, sign in zip(self._others, map(bytes.decode, shown), strict=True):
                facts = json.loads(sign)
                if sign != self._shown.get(other) or facts["sign"] == _LEFT:
                    self._shown[other] = sign
                    self._heartbeats.observe(other, facts["mark"], time.monotonic())

    def _answer_and_obey(self) -> None:
        if not self._answered:
            self._store.set(f"stacks {self._rank}", capture().to_json())
            self._answered = True
        if self._rank > 0 and self._store.check([_VERDICT]):
            _say(self._store.get(_VERDICT).decode())
            self._store.set(f"read {self._rank}", "")
            time.sleep(2 * self._interval)  # rank 0 is to end first: it has the terminal, and its launcher adds nothing
            os._exit(1)

    def monitor(self) -> None:
        while not self._left.wait(self._interval):
            due = is_expected()  # before the mark that it came with is looked at
            self._heartbeats.tick(time.monotonic())
            self._heartbeats.observe(self._rank, last_beat().number, time.monotonic())
            if silent := self._heartbeats.lost_ranks():
                self._abort(silent)
            elif self._rank == 0 and due and self._heartbeats.is_hung():
                self._abort([])

    # ----------------------------------------------------------------------------------------------------- conclusions

    def _abort(self, silent: list[int]) -> None:
        """Writes down what was found, says it, and ends, even where the writing hangs."""
        recorded: list[str] = []
        writing = threading.Thread(target=lambda: recorded.append(self._record(silent)), name=WATCHING, daemon=True)
        writing.start()
        writing.join(RECORDING_SECONDS)
        words = recorded or [self._found(silent), f"{self._stacks} could not be written"]
        verdict = "; ".join([*words, "this run ends, and the same command resumes from the last checkpoint"])
        _say(verdict)
        if self._rank == 0:
            self._store.set(_VERDICT, verdict)
            self._wait_for("read", [rank for rank in self._others if rank not in silent], 2 * self._interval)
        os._exit(1)  # the main thread waits in a collective, and would forever

    def _record(self, silent: list[int]) -> str:
        """Writes the event and the page of stacks, one rank for all; returns a line that says what they say."""
        found, writer = self._found(silent), 1 if 0 in silent else 0
        if self._rank != writer:
            return found
        answers = self._asked(silent)
        odd, why = suspect_ranks({rank: each.threads if each else None for rank, each in answers.items()})
        facts = [{"rank": rank, **self._places[rank]} for rank in odd]
        self._events.write("heartbeat_lost" if silent else "hang", by=writer, ranks=facts, stacks=str(self._stacks))
        title = f"{datetime.now():%Y-%m-%d %H:%M:%S}, attempt {self._stacks.stem.rpartition('-')[2]}: {found}\n"
        title += f"standing out: {format_ranks(odd)}, {why}" if odd else "no rank stands out"
        if 0 in silent and self._world_size > 2:
            title += "; the other ranks could not be asked, since it is rank 0 that asks"
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        self._stacks.write_text(render(title, answers, odd))
        return f"{found if silent else f'{found}: {self._stands(odd, why, answers)}'}; stacks in {self._stacks}"

    def _asked(self, silent: list[int]) -> dict[int, StackSnapshot | None]:
        """Where each rank says that it stands, once all have answered that can, or had time to."""
        nothing = dict.fromkeys(silent, None)
        if self._rank > 0:  # it is rank 0 that is silent, and with it the store
            return nothing | {self._rank: capture()}
        self._store.set(_ASKED, "")
        asked = [rank for rank in range(self._world_size) if rank not in silent]
        answered = self._wait_for("stacks", asked, max(3.0, 3 * self._interval))
        nothing |= dict.fromkeys(asked, None)
        return nothing | {rank: StackSnapshot.from_json(self._store.get(f"stacks {rank}")) for rank in answered}

    def _wait_for(self, what: str, ranks: list[int], seconds: float) -> list[int]:
        """The ranks that show something within so many seconds."""
        deadline, missing = time.monotonic() + seconds, set(ranks)
        while missing and time.monotonic() < deadline:
            time.sleep(self._interval / 10)
            missing = {rank for rank in missing if not self._store.check([f"{what} {rank}"])}
        return [rank for rank in ranks if rank not in missing]

    def _found(self, silent: list[int]) -> str:
        if not silent:
            return f"no progress for {self._patience:g} s (run.hang_timeout)"
        who = ", ".join(map(self._who, silent))
        return f"{who}: no heartbeat for {self._patience:g} s (run.hang_timeout), so it is frozen, or its machine is"

    def _stands(self, odd: list[int], why: str, answers: dict[int, StackSnapshot | None]) -> str:
        if not odd:
            return f"no rank stands out, {self._at(0, answers[0])}"
        words = ", ".join(self._at(rank, answers[rank]) for rank in odd[:MOST_NAMED])
        return f"{words}{f' and {len(odd) - MOST_NAMED} more' if len(odd) > MOST_NAMED else ''}, {why}"

    def _at(self, rank: int, answer: StackSnapshot | None) -> str:
        return f"{self._who(rank)} is in {top_frame(answer.threads)}" if answer else self._who(rank)

    def _who(self, rank: int) -> str:
        return "rank {} (process {process} on {host})".format(rank, **self._places[rank])


def _say(verdict: str) -> None:
    print(f"coatnet: {verdict}", file=sys.stderr, flush=True)
