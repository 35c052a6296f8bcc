"""Weights & Biases, where log.wandb names a project: the rows of metrics.jsonl there, all starts of a run as one curve.

A thread speaks with it, so that it can neither slow nor stop the training: rows wait in memory until it takes them.
Where it can't be reached, or nobody is logged in, an attempt's rows are kept in RUN/wandb for `wandb sync`. The x axis
is our step: W&B's own counter may only rise, and would drop repeated steps, which have two points there.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from pipeline.errors import UsageError, first_line
from pipeline.run.events import Events
from pipeline.run.identity import identify

INIT_SECONDS, FINISH_SECONDS = 30, 10
"""How long its server may take to answer, and, when a run ends, to take what is left."""


def check_wandb(project: str | None) -> None:
    """UsageError where a project is named and the package is not installed."""
    if project is None:
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder of that name, as it makes itself, is no package
        raise UsageError(
            f"log.wandb is {project}, but the package wandb is not installed: pip install 'wandb>=0.31', or set"
            " log.wandb=null"
        )


class WeightsAndBiases:
    """The run's page in a project, under its id and resolved configuration, and nothing else of it."""

    def __init__(self, run: Path, project: str, config: dict[str, Any], events: Events) -> None:
        self._run, self._project, self._config, self._events = run, project, config, events
        self._rows: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._done = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def write(self, row: dict[str, Any]) -> None:
        if self._thread.is_alive():
            self._rows.put(row)

    def close(self, done: bool) -> None:
        """Returns once all rows are there, or after some seconds."""
        self._done = done
        self._rows.put(None)
        self._thread.join(1.5 * FINISH_SECONDS)
        if self._thread.is_alive():
            _say("did not take all rows of this start in time; metrics.jsonl has them")

    def _work(self) -> None:
        try:
            page = self._begin()
            page.define_metric("*", step_metric="step")
            for row in iter(self._rows.get, None):
                page.log(row)
            page.finish(exit_code=0 if self._done else 1)
        except Exception as error:  # whatever it is, training continues
            problem = f"gets no more rows of this start: {first_line(error)}; metrics.jsonl has them all"
            self._events.warn("wandb_failed", f"Weights & Biases {problem}", reason=first_line(error))

    def _begin(self) -> Any:
        """Its run, or, where it can't be reached, one that is kept here."""
        import wandb

        identity = identify(self._run).id

        def begin(mode: Literal["offline"] | None = None) -> Any:
            where = {"project": self._project, "id": identity, "name": self._run.name, "dir": str(self._run)}
            return wandb.init(**where, resume="allow", config=self._config, mode=mode)

        settings = wandb.Settings(
            silent=True,
            host="",
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            x_save_requirements=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_transaction_log_flush_interval=1,  # seconds of rows that a kill may lose
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
        )
        online = wandb.setup(settings).settings.mode == "online"  # the environment may say otherwise
        try:
            if online and not wandb.login(prompt=False, verify=False):
                raise RuntimeError("not logged in (`wandb login`, or WANDB_API_KEY)")
            page = begin()
        except Exception as error:
            _say(f"{first_line(error)}; rows are kept, and `wandb sync {self._run}/wandb/offline-run-*` sends them")
            wandb.teardown()  # else the first try would still have the id
            wandb.setup(settings)
            page = begin("offline")
        if online and not page.offline:
            _say(page.url)
        return page


def _say(what: str) -> None:
    print(f"Weights & Biases: {what}", file=sys.stderr)
