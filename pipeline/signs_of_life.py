"""A rank that is frozen (SIGSTOP, a machine that stands still) is named, and the run ends, so that it can go on.

The others would wait for it in a collective. So a thread of each rank shows every few seconds that its process runs,
in a store that rank 0 serves; rank 0 looks at all of them, and the others at rank 0. Whoever finds one silent for
`patience` seconds says so, and all end at once, without anything that could wait.

Next: ../data/loader.py.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pipeline.engine import on_rank_zero
from pipeline.launch import rank_and_world_size
from pipeline.record import Events

_VERDICT = "verdict"
_LEFT = "left"


def watch_ranks(patience: float, events: Events) -> AbstractContextManager[None]:
    """From now on until the context ends, the process ends with status 1 where a rank has given no sign of life for so
    many seconds. Collective."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return nullcontext()
    host = os.environ["MASTER_ADDR"]
    served = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = on_rank_zero(lambda: served.port if served is not None else 0)
    store = served or dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=patience))
    watch = _Watch(store, rank, world_size, patience, events)
    watch.show()
    dist.barrier()  # so that each finds what the others show
    for work in (watch.talk, watch.judge):
        threading.Thread(target=work, daemon=True).start()
    return watch


class _Watch(AbstractContextManager[None]):
    """What a rank knows of the others. Talking may block, where rank 0 is frozen, so another thread judges."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, patience: float, events: Events) -> None:
        self._store, self._rank, self._patience, self._events = store, rank, patience, events
        self._interval = min(5.0, patience / 10)
        self._others = list(range(1, world_size)) if rank == 0 else [0]
        self._shown: dict[int, str] = {}
        self._heard = dict.fromkeys(self._others, time.monotonic())
        self._signs, self._left = 0, threading.Event()

    def show(self, left: bool = False) -> None:
        """Shows that this process runs, or that it leaves."""
        self._signs += 1
        facts = {"sign": _LEFT if left else self._signs, "process": os.getpid(), "host": os.uname().nodename}
        self._store.set(f"{self._rank}", json.dumps(facts))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._left.set()
        with suppress(dist.DistError):  # rank 0 may have left before
            self.show(left=True)

    def talk(self) -> None:
        while not self._left.wait(self._interval):
            try:
                self.show()
                shown = self._store.multi_get([str(other) for other in self._others])
                verdict = self._store.get(_VERDICT) if self._store.check([_VERDICT]) else None
            except dist.DistError:  # rank 0 is gone, and whoever started the ranks sees that
                return self._left.set()
            if verdict is not None:
                self._end(verdict.decode())
            for other, sign in zip(self._others, map(bytes.decode, shown), strict=True):
                if sign != self._shown.get(other) or json.loads(sign)["sign"] == _LEFT:
                    self._shown[other], self._heard[other] = sign, time.monotonic()

    def judge(self) -> None:
        before = time.monotonic()
        while not self._left.wait(self._interval):
            now = time.monotonic()
            if now - before > self._patience / 2:  # it was this process that stood still
                self._heard = dict.fromkeys(self._others, now)
            before = now
            silent = [other for other, heard in self._heard.items() if now - heard > self._patience]
            if silent:
                self._accuse(silent)

    def _accuse(self, silent: list[int]) -> None:
        named = {other: self._who(other) for other in silent}
        who = ", ".join(f"rank {other} (process {f['process']} on {f['host']})" for other, f in named.items())
        verdict = (
            f"{who}: no sign of life for {self._patience:g} s (run.hang_timeout), so it is frozen, or its machine is;"
            " this run ends, and the same command goes on from the last checkpoint"
        )
        frozen = [{"rank": other, **facts} for other, facts in named.items()]
        self._events.write("frozen", by=1 if 0 in named else 0, ranks=frozen)
        if self._rank == 0:
            self._store.set(_VERDICT, verdict)
            time.sleep(2 * self._interval)  # for the others to read it
        self._end(verdict)

    def _who(self, other: int) -> dict[str, Any]:
        facts = json.loads(self._shown.get(other, '{"process": "?", "host": "?"}'))
        return {"process": facts["process"], "host": facts["host"]}

    def _end(self, verdict: str) -> None:
        print(f"coatnet: {verdict}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread waits in a collective, and would for ever
