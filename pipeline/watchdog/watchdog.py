"""A run that hangs ends, so that it can be resumed, and says why: a rank is frozen, or none makes progress.

A rank that is frozen (SIGSTOP, a machine that hangs), or sleeps or waits forever, makes the others wait for it in a
collective. So a thread of each rank publishes heartbeats every few seconds, with how far it has come, in a store that
rank 0 serves; rank 0 monitors all others, and they monitor rank 0. Where heartbeats of one are missing, or all hang,
for `timeout` seconds, the ranks are asked for their stacks, and all end at once, without anything that could block.
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

from data.storage.durable import write_atomically
from pipeline.distributed.collectives import all_gather, from_rank_zero
from pipeline.distributed.environment import host_name, rank_and_world_size
from pipeline.distributed.heartbeat import HeartbeatMonitor, is_expected, last_beat
from pipeline.errors import Interrupted
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
"""For collecting and writing the stacks; what hangs may be the file system."""
MOST_NAMED = 4
_ASKED, _VERDICT = "asked", "verdict"
_LEFT = "left"


def start_watchdog(timeout: float, events: Events, stacks: Path) -> Watchdog:
    """Until the context ends, the process ends with status 1 where a rank sends no heartbeat, or, once progress is
    expected (heartbeat.py), no rank makes any, for `timeout` seconds. Collective.

    The ranks' stacks are then in the file `stacks`.
    """
    rank, world_size = rank_and_world_size()
    host = os.environ["MASTER_ADDR"]
    served = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = from_rank_zero(lambda: served.port if served is not None else 0)
    store = served or dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout))
    watchdog = Watchdog(store, rank, world_size, timeout, events, stacks)
    watchdog.publish()
    watchdog.gather_processes()  # a collective, so that each then finds what the others published
    for work in (watchdog.exchange, watchdog.monitor):
        threading.Thread(target=work, name=WATCHING, daemon=True).start()
    return watchdog


class Watchdog(AbstractContextManager["Watchdog"]):
    """What a rank knows of the others. The store may block, where rank 0 is frozen, so a second thread monitors."""

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, timeout: float, events: Events, stacks: Path
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._timeout, self._interval = timeout, min(5.0, timeout / 10)
        self._events, self._stacks = events, stacks
        self._others = list(range(1, world_size)) if rank == 0 else [0]
        self._processes: list[dict[str, Any]] = []
        self._published: dict[int, str] = {}
        self._monitor = HeartbeatMonitor(timeout, self._interval, self._others, time.monotonic())
        self._heartbeats, self._left, self._answered = 0, threading.Event(), False

    def publish(self, left: bool = False) -> None:
        """Publishes a heartbeat with the number of the last beat, or that this process leaves."""
        self._heartbeats += 1
        facts = {"heartbeat": _LEFT if left else self._heartbeats, "beat": last_beat().number}
        self._store.set(f"{self._rank}", json.dumps(facts))

    def gather_processes(self) -> None:
        """Tells all ranks the others' processes, which one that is frozen could not do any more."""
        self._processes = all_gather([{"process": os.getpid(), "host": host_name()}])

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind not in (None, Interrupted):  # a rank that fails is watched to its end
            return
        self._left.set()
        with suppress(dist.DistError):  # rank 0 may have left before
            self.publish(left=True)

    # ---------------------------------------------------------------------------------------------------- two threads

    def exchange(self) -> None:
        while not self._left.wait(self._interval):
            try:
                self.publish()
                published = self._store.multi_get([str(other) for other in self._others]) if self._others else []
                if self._store.check([_ASKED]):
                    self._answer()
            except dist.DistError:  # rank 0 is gone, and the launcher sees that
                return self._left.set()
            for other, text in zip(self._others, map(bytes.decode, published), strict=True):
                facts = json.loads(text)
                if text != self._published.get(other) or facts["heartbeat"] == _LEFT:
                    self._published[other] = text
                    self._monitor.observe(other, facts["beat"], time.monotonic())

    def _answer(self) -> None:
        """Publishes this rank's stacks, once; ends the process where rank 0 has published its verdict."""
        if not self._answered:
            self._store.set(f"stacks {self._rank}", capture().to_json())
            self._answered = True
        if self._rank > 0 and self._store.check([_VERDICT]):
            _print(self._store.get(_VERDICT).decode())
            self._store.set(f"read {self._rank}", "")
            time.sleep(2 * self._interval)  # rank 0 ends first: it has the terminal, and its launcher adds nothing
            os._exit(1)

    def monitor(self) -> None:
        while not self._left.wait(self._interval):
            expected = is_expected()  # before the beat that it came with is read
            self._monitor.tick(time.monotonic())
            self._monitor.observe(self._rank, last_beat().number, time.monotonic())
            if lost := self._monitor.lost_ranks():
                self._abort(lost)
            elif self._rank == 0 and expected and self._monitor.is_hung():
                self._abort([])

    # ----------------------------------------------------------------------------------------------------- conclusions

    def _abort(self, lost: list[int]) -> None:
        """Records what was found, prints it, and ends, even where the writing hangs."""
        recorded: list[str] = []
        writing = threading.Thread(target=lambda: recorded.append(self._record(lost)), name=WATCHING, daemon=True)
        writing.start()
        writing.join(RECORDING_SECONDS)
        found = recorded or [self._found(lost), f"{self._stacks} could not be written"]
        verdict = "; ".join([*found, "this run ends, and the same command resumes from the last checkpoint"])
        _print(verdict)
        if self._rank == 0:
            self._store.set(_VERDICT, verdict)
            self._wait_for("read", [rank for rank in self._others if rank not in lost], 2 * self._interval)
        os._exit(1)  # the main thread waits in a collective, and would forever

    def _record(self, lost: list[int]) -> str:
        """Writes the event and the page of stacks, one rank for all; returns a line that sums them up."""
        found, writer = self._found(lost), 1 if 0 in lost else 0
        if self._rank != writer:
            return found
        answers = self._ask(lost)
        suspects, why = suspect_ranks({rank: each.threads if each else None for rank, each in answers.items()})
        facts = [{"rank": rank, **self._processes[rank]} for rank in suspects]
        self._events.write("heartbeat_lost" if lost else "hang", by=writer, ranks=facts, stacks=str(self._stacks))
        title = f"{datetime.now():%Y-%m-%d %H:%M:%S}, attempt {self._stacks.stem.rpartition('-')[2]}: {found}\n"
        title += f"suspect: {format_ranks(suspects)}, {why}" if suspects else "no rank is suspect"
        if 0 in lost and self._world_size > 2:
            title += "; the other ranks could not be asked, since only rank 0 can ask"
        try:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._stacks, render(title, answers, suspects))
            page = f"stacks in {self._stacks}"
        except OSError as error:
            page = f"{self._stacks} could not be written: {error.strerror}"
        return f"{found if lost else f'{found}: {self._describe(suspects, why, answers)}'}; {page}"

    def _ask(self, lost: list[int]) -> dict[int, StackSnapshot | None]:
        """Each rank's stacks, once all have answered that can, or the time for it is over."""
        nothing = dict.fromkeys(lost, None)
        if self._rank > 0:  # rank 0 is lost, and with it the store
            return nothing | {self._rank: capture()}
        self._store.set(_ASKED, "")
        asked = [rank for rank in range(self._world_size) if rank not in lost]
        answered = self._wait_for("stacks", asked, max(3.0, 3 * self._interval))
        nothing |= dict.fromkeys(asked, None)
        return nothing | {rank: StackSnapshot.from_json(self._store.get(f"stacks {rank}")) for rank in answered}

    def _wait_for(self, what: str, ranks: list[int], seconds: float) -> list[int]:
        """The ranks that publish something within so many seconds."""
        deadline, missing = time.monotonic() + seconds, set(ranks)
        while missing and time.monotonic() < deadline:
            time.sleep(self._interval / 10)
            missing = {rank for rank in missing if not self._store.check([f"{what} {rank}"])}
        return [rank for rank in ranks if rank not in missing]

    def _found(self, lost: list[int]) -> str:
        if not lost:
            return f"no progress for {self._timeout:g} s (run.hang_timeout)"
        who = ", ".join(map(self._who, lost))
        return f"{who}: no heartbeat for {self._timeout:g} s (run.hang_timeout), so it is frozen, or its machine is"

    def _describe(self, suspects: list[int], why: str, answers: dict[int, StackSnapshot | None]) -> str:
        if not suspects:
            return f"no rank is suspect, {self._at(0, answers[0])}"
        named = ", ".join(self._at(rank, answers[rank]) for rank in suspects[:MOST_NAMED])
        return f"{named}{f' and {len(suspects) - MOST_NAMED} more' if len(suspects) > MOST_NAMED else ''}, {why}"

    def _at(self, rank: int, answer: StackSnapshot | None) -> str:
        return f"{self._who(rank)} is in {top_frame(answer.threads)}" if answer else self._who(rank)

    def _who(self, rank: int) -> str:
        return "rank {} (process {process} on {host})".format(rank, **self._processes[rank])


def _print(verdict: str) -> None:
    print(f"coatnet: {verdict}", file=sys.stderr, flush=True)
