"""What a step leaves in the run's records: samples replaced, reads retried, steps skipped, epochs finished."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import SupportsFloat

from data.loader import Batch
from data.storage.remote import ReadError
from pipeline.config.schema import Config
from pipeline.distributed.collectives import all_gather
from pipeline.errors import RunFailed
from pipeline.plan import Plan
from pipeline.run.events import Events
from pipeline.training.state import TrainState
from pipeline.training.step import StepReport

Log = Callable[[str], None]


def record_step(
    events: Events,
    log: Log,
    plan: Plan,
    config: Config,
    state: TrainState,
    report: StepReport,
    reason: str,
    grad_norm: SupportsFloat,
) -> None:
    """Counts the samples of the step just done, and records what went wrong in it; `reason` says why it was skipped.

    Collective. RunFailed where more than data.max_bad_fraction of an epoch's samples were replaced.
    """
    totals = report.totals
    state.audit.add(report.micro_batches, applied=not reason)
    if totals.bad_samples:
        replaced = state.audit.replaced()
        samples, most = plan.train.samples, config.data.max_bad_fraction
        _record_replaced(events, state.step, report.micro_batches, replaced, samples, most)
    if totals.read_retries:
        _record_read_retries(events, state.step, report.read_errors)
    if reason:
        keys = all_gather([key for batch in report.micro_batches for key in batch.keys])
        values = {"loss": totals.mean_loss, "grad_norm": float(grad_norm)}  # exact, for `coatnet replay`
        events.write("step_skipped", step=state.step, reason=reason, **values, keys=keys)
        replay = f"`coatnet replay {config.run.dir} --step {state.step}` finds the sample and the layer"
        log(f"step {state.step:,}/{plan.steps:,}  not applied: {reason}; {replay}")


def record_epochs(events: Events, log: Log, state: TrainState) -> None:
    """Records the epochs that the step just done completed. Collective; RunFailed unless each sample came once."""
    for line in state.audit.completed(state.step, events):
        log(line)


def _record_replaced(
    events: Events, step: int, batches: list[Batch], replaced: dict[int, int], samples: int, max_bad_fraction: float
) -> None:
    for bad in all_gather([bad for batch in batches for bad in batch.broken]):
        events.write("sample_replaced", step=step, **asdict(bad))
    for epoch, count in replaced.items():
        if count > max_bad_fraction * samples:
            raise RunFailed(
                f"{count} of {samples} samples of epoch {epoch} are broken, more than"
                f" data.max_bad_fraction={max_bad_fraction}; events.jsonl lists them:"
                " fix or pack the data again, or raise the fraction"
            )


def _record_read_retries(events: Events, step: int, errors: list[ReadError]) -> None:
    """One event for each kind of error: how often it came on all ranks, and the first one as an example."""
    first = {_kind(error): error for error in reversed(errors)}
    counts: Counter[str] = Counter()
    examples: dict[str, ReadError] = {}
    for kind, count, error in all_gather([(kind, n, first[kind]) for kind, n in Counter(map(_kind, errors)).items()]):
        counts[kind] += count
        examples.setdefault(kind, error)
    for kind, error in examples.items():
        where = {"url": error.url, "begin": error.begin, "end": error.end}
        events.write("read_retry", step=step, count=counts[kind], reason=error.reason, **where)


def _kind(error: ReadError) -> str:
    """The reason without its numbers of bytes, so that like ones count together."""
    return re.sub(r"\d{4,}", "N", error.reason)
