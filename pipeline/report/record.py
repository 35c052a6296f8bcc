"""What a run's folder tells of the run, in whatever state it is: alive, done, crashed, copied without its data."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.checkpoint.attempts import newest_state
from pipeline.config.batch_size import known_steps
from pipeline.config.parsing import changes, read_config, read_resolved
from pipeline.config.schema import Config
from pipeline.errors import RunFailed, UsageError, first_line
from pipeline.lineage import lineage_of_run, noted_ancestors
from pipeline.report.accounting import Accounts, Attempt, Start, account
from pipeline.run.events import BEGIN_EVENTS, read_events
from pipeline.run.jsonl import read_lines, read_metrics
from pipeline.run.lock import lock_holder
from pipeline.run.small_files import NUMBER, has


@dataclass(frozen=True)
class RunRecord:
    """A run's files, read."""

    run: Path
    config: Config | None
    events: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    state: Mapping[str, Any]
    """state.json of the newest checkpoint; {} where there is none."""
    accounts: Accounts
    is_alive: bool
    missing: list[str]
    """What cannot be shown, and why."""

    def of(self, *names: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] in names]

    @property
    def step(self) -> int:
        return self.accounts.attempts[-1].last if self.accounts.attempts else 0

    @cached_property
    def samples(self) -> int | None:
        """Of an epoch."""
        if self.config is not None and self.config.data.train_samples:
            return self.config.data.train_samples
        last = self.rows[-1] if self.rows else {}
        return round(last["samples"] / last["epoch"]) if has(last, {"samples": int, "epoch": float}) else None

    @property
    def steps(self) -> int | None:
        return known_steps(self.config.train, self.samples) if self.config else None

    @property
    def end(self) -> str:
        attempts = self.accounts.attempts
        return describe_end(attempts[-1], self.is_alive) if attempts else "not started yet"

    @cached_property
    def lineage(self) -> list[dict[str, Any]]:
        """The entries of its ancestors and its own, or [] where they cannot be read."""
        if self.config is None or (ancestors := noted_ancestors(self.run)) is None:
            return []
        new = next((event.get("new_augmentations", []) for event in self.of(*BEGIN_EVENTS)), [])
        return lineage_of_run(ancestors, self.config.model_dump(mode="json"), self.steps, new)

    def against_preset(self) -> tuple[str, dict[str, tuple[Any, Any]]] | None:
        """The preset of its last start, and what differs from it: name -> (preset's, run's); None where it is gone."""
        command = next((each["command"] for each in reversed(self.of("attempt_started")) if each.get("command")), [])
        preset = next((word for word in command if str(word).endswith((".yaml", ".yml"))), None)
        if self.config is None or preset is None:
            return None
        if Path(preset).resolve().is_relative_to(self.run.resolve()):  # of a job, which has the whole configuration
            submitted = [row["preset"] for row in read_lines(self.run / "slurm" / "jobs.jsonl", preset=str)]
            preset = submitted[-1] if submitted else preset
        try:
            found = changes(read_config(preset, []), self.config)
        except UsageError:
            return None
        return preset, {name: (old, new) for name, (_, old, new) in found.items()}


def read_record(run: Path) -> RunRecord:
    """Reads a run's folder. UsageError where it is none."""
    if not (run / "events.jsonl").is_file():
        raise UsageError(f"{run} is not a run that has started: it has no events.jsonl; pass a run's folder")
    missing: list[str] = []
    config, state = None, None
    try:
        config = read_resolved(run / "config.yaml")
    except UsageError as error:
        missing.append(f"its configuration: {first_line(error)}")
    try:
        state = newest_state(run)
    except (RunFailed, UsageError, OSError) as error:
        missing.append(f"its newest checkpoint: {first_line(error)}")
    events = read_events(run)
    rows = [{name: _number(value) for name, value in row.items()} for row in read_metrics(run, step=int)]
    rows = [row for row in rows if not any(isinstance(row.get(name), str) for name in ("loss", "top1", "time"))]
    is_alive = lock_holder(run) is not None
    accounts = account(
        events,
        rows,
        _starts(run),
        [row["time"] for row in read_lines(run / "slurm" / "jobs.jsonl", time=NUMBER)],
        config.run.hang_timeout if config is not None else 0.0,
        time.time() if is_alive else None,
    )
    steps, evaluations = ([row for row in rows if ("eval_loss" in row) == wanted] for wanted in (False, True))
    if not steps:
        missing.append("curves: metrics.jsonl has no rows yet")
    return RunRecord(run, config, events, steps, evaluations, state or {}, accounts, is_alive, missing)


def describe_end(attempt: Attempt, is_alive: bool) -> str:
    """How an attempt ended, or that it is alive."""
    end = attempt.end
    if end is None:
        return "running" if is_alive else attempt.cause or "killed"
    match end["event"]:
        case "finished":
            return "done"
        case "interrupted":
            return f"stopped by {end.get('reason') or 'request'}"
        case "failed":
            return f"failed: {end['message']}"
        case "out_of_memory":
            return f"rank {end['rank']} ran out of memory: {end['error']}"
        case "rollback":
            return (
                f"rolled back to step {end['to']}, to skip steps {end['first']} to {end['last']}: {end.get('reason')}"
            )
        case "hang":
            return "hung"
    return "a rank was lost"


def differences(records: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The keys that are not the same in all configurations that can be read, with each run's value."""
    known = [record.config for record in records if record.config is not None]
    names = dict.fromkeys(name for each in known[1:] for name in changes(known[0], each) if name != "run.dir")
    trees = [each.config.model_dump(mode="json") if each.config is not None else {} for each in records]
    return {name: [_value(tree, name) for tree in trees] for name in names}


def _value(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _starts(run: Path) -> list[Start]:
    """Of its Slurm jobs; slurm/history.py writes them."""
    found: dict[str, Start] = {}
    for row in read_lines(run / "slurm" / "starts.jsonl", start=str, event=str, time=NUMBER):
        if row["event"] == "start":
            found[row["start"]] = Start(row["time"])
        elif row["start"] in found and has(row, {"cause": str, "again": bool}):
            began = found[row["start"]].began
            found[row["start"]] = Start(began, max(began, row["time"]), row["cause"], row["again"])
    return list(found.values())


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
