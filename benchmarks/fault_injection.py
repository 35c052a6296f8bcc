"""Trainings with one fault after another, compared with trainings without: what is lost, and whether they agree.

    coatnet bench fault_injection                          # a hundred faults: half an hour on two cores
    coatnet bench fault_injection --faults 12 --out /tmp/x # a short campaign, whose runs are kept

Ranks are killed at random moments, while they save, read, or wait for each other; frozen; asked to stop; checkpoints
are torn and bytes in them flipped; the disk is full, for good or for a while; a shard is missing; throughout, two
samples of the training set are damaged. A *steady* run resumes each time on as many ranks, and must end bit-equal to an
undisturbed one. A *changing* run resumes on another number of ranks at another ZeRO stage each time. It must take the
same samples, each once; its ten steps after a change must equal those of the old ranks resuming from there, and its
curve that of the undisturbed run, within TOLERANCES. Ends with status 1 where any of this fails.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import machine
from pipeline.checkpoint.reader import checkpoints
from tests.forked import Process
from tests.pipeline.batch_runs import on_ranks
from tests.pipeline.runs import (
    PATIENCE_SECONDS,
    alive,
    coatnet,
    consumed,
    curve,
    events,
    last_state,
    pack_digits,
    ranks_of,
    rows,
    started,
    wait_until,
)

TOLERANCES = {"ten steps, loss": 1e-5, "ten steps, gradient norm": 1e-3, "whole curve, loss": 1e-3}
"""Relative, in fp32. Training amplifies rounding, through small gradients where optim.eps is below 1e-3, and through
maxima that jump; so here eps is 1e-3 and pooling averages."""
CHECKPOINT_EVERY, MICRO_BATCHES, DAMAGED_SAMPLES = 4, 4, 2
STEPS_COMPARED, STEPS_WITH_AN_EPOCH = 10, 24
MAX_EXTRA_STEPS = 12
"""Beyond those requested, between two faults."""
FULL_BYTES = 200_000
"""Largest file while the disk is full: less than a rank's shard of a checkpoint, more than any other."""


class Place(NamedTuple):
    """Where a run runs."""

    ranks: int
    stage: int


class Setting(NamedTuple):
    """What all runs of a campaign share."""

    folder: Path
    steps: int


@dataclass
class Fault:
    """The last step before it, the step resumed from, and the seconds until the next new step."""

    kind: str
    at: int
    place: Place
    resumed: int = -1
    seconds: float = 0.0


@dataclass
class Outcome:
    """A run, its faults, and the differences found in the end."""

    run: Path
    faults: list[Fault] = field(default_factory=list)
    changes: list[tuple[int, Place]] = field(default_factory=list)
    """For each change the step resumed from, and the old place."""
    wrong: list[str] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------- the trainings


def arguments(setting: Setting, run: Path, place: Place) -> list[str]:
    """Of a command: some micro batches a step, every step logged, a checkpoint every few steps."""
    data = [f"data.train={setting.folder}/train", "data.val=null", "data.max_bad_fraction=0.01", f"run.dir={run}"]
    batch = ["train.global_batch=64", f"train.micro_batch={64 // MICRO_BATCHES}", f"train.steps={setting.steps}"]
    exact = ["train.precision=fp32", "optim.eps=1e-3", "model.pool=average"]
    rate = ["optim.learning_rate=5e-4", "optim.decay=none", "evaluate.every=null"]
    kept = [f"checkpoint.every={CHECKPOINT_EVERY}", "checkpoint.keep_last=1000"]
    logs = ["log.every=1", "log.samples=pixels", "run.hang_timeout=15", f"zero.stage={place.stage}"]
    return ["configs/tiny.yaml", *data, *batch, *exact, *rate, *kept, *logs]


def start(setting: Setting, run: Path, place: Place) -> Process:
    return started("pretrain", *arguments(setting, run, place), "--procs", place.ranks)


def train_to_the_end(setting: Setting, run: Path, place: Place) -> None:
    done = coatnet("pretrain", *arguments(setting, run, place), "--procs", place.ranks)
    assert done.returncode == 0, done.stderr


def damage_samples(packed: Path) -> None:
    """Flips a byte in the middle of a few images, in shards that no other fault touches."""
    for shard in sorted(packed.glob("*.tar"))[:DAMAGED_SAMPLES]:
        table = [line.split() for line in shard.with_suffix(".idx").read_text().splitlines()[1:]]
        flip(shard, int(table[5][1]) + int(table[5][2]) // 2)


# ---------------------------------------------------------------------------------------------------------- the faults


def kill(targets: list[int]) -> None:
    for pid in targets:
        os.kill(pid, signal.SIGKILL)


def kill_one_rank(process: Process, run: Path, chance: random.Random) -> None:
    time.sleep(0.3 * chance.random())
    kill([chance.choice(ranks_of(process))])


def kill_the_launcher(process: Process, run: Path, chance: random.Random) -> None:
    time.sleep(0.3 * chance.random())
    kill([process.pid])


def kill_while_saving(process: Process, run: Path, chance: random.Random) -> None:
    wait_until(lambda: any((run / "checkpoints").glob(".step-*")), process, seconds_between=0.001)
    time.sleep(0.02 * chance.random())
    kill([chance.choice([process.pid, *ranks_of(process)])])


def kill_in_a_collective(process: Process, run: Path, chance: random.Random) -> None:
    """One rank hangs, so that the others wait for it; then one of those is killed."""
    stopped, *waiting = chance.sample(ranks_of(process), len(ranks_of(process)))
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(0.5)
    kill(waiting[:1] or [stopped])


def freeze(process: Process, run: Path, chance: random.Random) -> None:
    frozen = chance.choice(ranks_of(process))
    rank = ranks_of(process).index(frozen)
    os.kill(frozen, signal.SIGSTOP)
    process.wait(PATIENCE_SECONDS)
    assert process.stderr is not None
    stderr = process.stderr.read()
    assert f"rank {rank} (process {frozen} on " in stderr and "frozen" in stderr, stderr
    event = events(run, "heartbeat_lost")[-1]
    assert [each["process"] for each in event["ranks"]] == [frozen]
    assert f"rank {rank}: NO ANSWER" in Path(event["stacks"]).read_text()


def stop(process: Process, run: Path, chance: random.Random) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_SECONDS) == 3


def fill_the_disk(process: Process, run: Path, chance: random.Random) -> None:
    """Until the run gives up."""
    limit_files(process, FULL_BYTES)
    assert process.wait(PATIENCE_SECONDS) == 1
    assert process.stderr is not None
    stderr = process.stderr.read()
    assert "cannot be written: File too large" in stderr and "the same command resumes from step" in stderr, stderr


def fill_the_disk_for_a_while(process: Process, run: Path, chance: random.Random) -> None:
    """Until a save has failed; then the run saves again by itself, and is killed."""
    failed, saved = len(events(run, "checkpoint_failed")), len(events(run, "checkpoint"))
    limit_files(process, FULL_BYTES)
    wait_until(lambda: len(events(run, "checkpoint_failed")) > failed, process)
    limit_files(process, resource.RLIM_INFINITY)
    wait_until(lambda: len(events(run, "checkpoint")) > saved or process.poll() is not None)
    kill([process.pid])


def limit_files(process: Process, size: int) -> None:
    """No file of the ranks may grow beyond this size: what a write meets on a full disk."""
    for pid in ranks_of(process):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def tear_the_checkpoint(process: Process, run: Path, chance: random.Random) -> None:
    kill([process.pid])
    process.wait()
    file = some_file(run, chance)
    with file.open("r+b") as opened:
        opened.truncate(chance.randrange(file.stat().st_size))


def flip_a_byte(process: Process, run: Path, chance: random.Random) -> None:
    kill([process.pid])
    process.wait()
    file = some_file(run, chance)
    flip(file, chance.randrange(file.stat().st_size))


FAULTS: dict[str, Callable[[Process, Path, random.Random], None]] = {
    "a rank killed": kill_one_rank,
    "launcher killed": kill_the_launcher,
    "killed while saving": kill_while_saving,
    "killed in a collective": kill_in_a_collective,
    "killed while reading": kill_one_rank,  # as soon as it has begun
    "a rank frozen": freeze,
    "told to stop": stop,
    "checkpoint torn": tear_the_checkpoint,
    "byte flipped": flip_a_byte,
    "disk full": fill_the_disk,
    "disk full for a while": fill_the_disk_for_a_while,
    "shard gone": kill_the_launcher,  # and then the shard, for the next start
}


def some_file(run: Path, chance: random.Random) -> Path:
    """A random one of the newest checkpoint."""
    return chance.choice(sorted(checkpoints(run / "checkpoints")[-1].iterdir()))


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << place % 8
    file.write_bytes(content)


@contextmanager
def gone(shard: Path) -> Iterator[None]:
    hidden = shard.with_suffix(".gone")
    shard.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(shard)


# -------------------------------------------------------------------------------------------------------- the campaign


def disturbed(
    setting: Setting, run: Path, places: list[Place], kinds: list[str], steps_apart: int, seed: int
) -> Outcome:
    """A run with these faults, each some steps after it resumed, which resumes at the next of the places."""
    chance, outcome = random.Random(seed), Outcome(run)
    for number, kind in enumerate([*kinds, None]):
        place, began, attempt = places[number % len(places)], time.monotonic(), len(events(run, "attempt_started"))
        process = start(setting, run, place)
        first = first_step_of(run, attempt, process)
        if kind != "killed while reading":
            wait_until(lambda attempt=attempt: last_step_of(run, attempt) > 0, process)
        if outcome.faults:
            before = outcome.faults[-1]
            before.resumed, before.seconds = first, time.monotonic() - began
            if place != before.place:
                outcome.changes.append((first, before.place))
        if kind is None:
            _, stderr = process.communicate(timeout=2 * PATIENCE_SECONDS)
            assert process.returncode == 0, stderr
            return outcome
        if kind == "a rank frozen" and place.ranks == 1:
            kind = "a rank killed"  # no other rank would notice
        if kind != "killed while reading":
            at = first + steps_apart + chance.randrange(CHECKPOINT_EVERY + 1)
            wait_until(lambda at=at, attempt=attempt: last_step_of(run, attempt) >= at, process)
            wait_until(lambda: bool(checkpoints(run / "checkpoints")[1:]), process)  # one to lose, one to roll back to
        inject(kind, process, run, chance)
        outcome.faults.append(Fault(kind, max(first, last_step_of(run, attempt)), place))
        where = f"at step {outcome.faults[-1].at} on {place.ranks} ranks at ZeRO {place.stage}"
        print(f"{run.name}: {kind} {where}", file=sys.stderr, flush=True)
        if kind == "shard gone":
            start_without_a_shard(setting, run, place)
    raise AssertionError("the last start has no fault")


def inject(kind: str, process: Process, run: Path, chance: random.Random) -> None:
    """Injects a fault, and returns once all processes of the run have ended."""
    ranks = ranks_of(process)
    FAULTS[kind](process, run, chance)
    assert process.wait(PATIENCE_SECONDS) != 0, f"{kind}: the run ended without an error"
    assert process.stderr is not None
    process.stderr.close()
    wait_until(lambda: not any(map(alive, ranks)))


def first_step_of(run: Path, attempt: int, process: Process) -> int:
    """Waits until an attempt has begun to train; the step it resumed from."""

    def begun() -> list[int]:
        found = [*events(run, "training_started"), *events(run, "training_resumed")]
        return [event["step"] for event in found if event["attempt"] == attempt]

    wait_until(lambda: bool(begun()), process)
    return begun()[0]


def last_step_of(run: Path, attempt: int) -> int:
    """The last step of rank 0 in an attempt; metrics.jsonl may still have rows of the one before."""
    return max((row["step"] for row in rows(run / "samples" / "rank-0.jsonl") if row["attempt"] == attempt), default=0)


def start_without_a_shard(setting: Setting, run: Path, place: Place) -> None:
    """A start without one of the shards must name it, and leave the run unchanged."""
    shard = sorted((setting.folder / "train").glob("*.tar"))[-1]
    with gone(shard):
        failed = coatnet("pretrain", *arguments(setting, run, place), "--procs", place.ranks)
    assert failed.returncode == 1 and shard.name in failed.stderr, failed.stderr


# --------------------------------------------------------------------------------------------------------- comparisons


def check_steady(outcome: Outcome, whole: Path) -> None:
    """Every logged figure, all weights and moments, all samples with their pixels: bit-equal."""
    for what, of in (("curve", curve), ("last state", last_state), ("samples", consumed)):
        if of(outcome.run) != of(whole):
            outcome.wrong.append(f"{what} differs from the undisturbed run's")
    check_epochs(outcome)


def check_changing(outcome: Outcome, whole: Path, setting: Setting) -> None:
    """The same samples; after each change the ten steps of the old place; the whole curve."""
    if consumed(outcome.run) != consumed(whole):
        outcome.wrong.append("samples differ from the undisturbed run's")
    check_epochs(outcome)
    ours, theirs = losses_and_norms(outcome.run), losses_and_norms(whole)
    record_difference(
        outcome, "whole curve, loss", [relative_difference(ours[step][0], theirs[step][0]) for step in theirs]
    )
    for (step, _), (following, _), on in zip(
        outcome.changes,
        [*outcome.changes[1:], (setting.steps, None)],
        resume_at_old_places(outcome, setting),
        strict=True,
    ):
        old = losses_and_norms(on)
        compared = [each for each in old if step < each <= min(step + STEPS_COMPARED, following)]
        record_difference(
            outcome, "ten steps, loss", [relative_difference(ours[each][0], old[each][0]) for each in compared]
        )
        record_difference(
            outcome, "ten steps, gradient norm", [relative_difference(ours[each][1], old[each][1]) for each in compared]
        )


def check_epochs(outcome: Outcome) -> None:
    """Of each complete epoch: each sample once, and the damaged ones replaced."""
    complete = events(outcome.run, "epoch_finished")
    if not complete:
        outcome.wrong.append("no epoch was completed")
    for event in complete:
        if not event["each_once"] or event["samples"] != event["of"] or event["replaced"] != DAMAGED_SAMPLES:
            outcome.wrong.append(f"epoch {event['epoch']}: {event}")


def resume_at_old_places(outcome: Outcome, setting: Setting) -> list[Path]:
    """For each change a run of ten steps at the old place, from the same checkpoint."""
    runs = [outcome.run.parent / f"{outcome.run.name}-change-{n}" for n in range(len(outcome.changes))]
    jobs: dict[int, list[dict[str, Any]]] = {}
    for run, (step, place) in zip(runs, outcome.changes, strict=True):
        words = [*arguments(setting, run, place), f"train.steps={min(step + STEPS_COMPARED, setting.steps)}"]
        jobs.setdefault(place.ranks, []).append({"arguments": words, "source": str(outcome.run), "step": step})
    for ranks, of_ranks in jobs.items():
        on_ranks(ranks, of_ranks, outcome.run.parent)
    return runs


def losses_and_norms(run: Path) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows(run / "metrics.jsonl")}


def relative_difference(one: float, other: float) -> float:
    return abs(one - other) / abs(other)


def record_difference(outcome: Outcome, what: str, differences: list[float]) -> None:
    """Records the worst difference, and an error where it is beyond its tolerance."""
    worst = max(differences, default=0.0)
    outcome.worst[what] = max(worst, outcome.worst.get(what, 0.0))
    if worst > TOLERANCES[what]:
        outcome.wrong.append(f"{what}: {worst:.1e} apart, {TOLERANCES[what]:.0e} is allowed")


# ---------------------------------------------------------------------------------------------------------------- plan


STEADY = [Place(2, 1), Place(1, 1), Place(3, 2), Place(2, 3), Place(4, 1)]
CHANGING = [
    [Place(2, 1), Place(1, 1), Place(3, 2), Place(4, 3), Place(1, 2), Place(2, 3), Place(4, 1), Place(3, 3)],
    [Place(4, 2), Place(3, 1), Place(2, 2), Place(1, 3)],
]


def draw_faults(count: int, seed: int, kinds: Iterable[str] = FAULTS) -> list[str]:
    """`count` of these kinds, each as often as any other, in random order."""
    each = list(kinds)
    chance, rounds = random.Random(seed), -(-count // len(each))
    return [kind for _ in range(rounds) for kind in chance.sample(each, len(each))][:count]


def campaign(folder: Path, faults: list[str], seed: int) -> list[Outcome]:
    """Meets these faults, every other one in steady runs, the rest in changing ones."""
    pack_digits(folder)
    damage_samples(folder / "train")
    outcomes = []
    for number, (places, kinds) in enumerate(runs_of(faults)):
        steady = len(places) == 1
        few = 2 if steady else STEPS_COMPARED
        setting = Setting(folder, max(STEPS_WITH_AN_EPOCH, len(kinds) * (few + MAX_EXTRA_STEPS)))
        whole = folder / f"whole-{places[0].ranks}-{places[0].stage}-{setting.steps}"
        if not whole.exists():
            train_to_the_end(setting, whole, places[0])
        outcome = disturbed(setting, folder / f"disturbed-{number}", places, kinds, few, seed + number)
        if steady:
            check_steady(outcome, whole)
        else:
            check_changing(outcome, whole, setting)
        outcomes.append(outcome)
    return outcomes


def runs_of(kinds: list[str]) -> Iterator[tuple[list[Place], list[str]]]:
    """The places of each run, and its faults."""
    for every_other, most, of in ((kinds[::2], 10, [[place] for place in STEADY]), (kinds[1::2], 20, CHANGING)):
        for number, first in enumerate(range(0, len(every_other), most)):
            yield of[number % len(of)], every_other[first : first + most]


def table(outcomes: list[Outcome]) -> Iterator[str]:
    """What a person reads."""
    faults = [fault for outcome in outcomes for fault in outcome.faults]
    survived = sum(len(outcome.faults) for outcome in outcomes if not outcome.wrong)
    yield f"{survived} of {len(faults)} faults survived; a checkpoint every {CHECKPOINT_EVERY} steps"
    yield f"\n{'fault':24}{'count':>6}{'steps lost: mean':>18}{'most':>6}{'seconds to the next new step':>30}"
    for kind in FAULTS:
        of_kind = [fault for fault in faults if fault.kind == kind]
        if of_kind:
            lost = [fault.at - fault.resumed for fault in of_kind]
            seconds = sum(fault.seconds for fault in of_kind) / len(of_kind)
            yield f"{kind:24}{len(of_kind):6}{sum(lost) / len(lost):18.1f}{max(lost):6}{seconds:30.1f}"
    yield f"\n{'run':14}{'faults':>7}  ranks and stages, compared with the undisturbed run"
    for outcome in outcomes:
        places = ", ".join(f"{p.ranks}/{p.stage}" for p in dict.fromkeys(fault.place for fault in outcome.faults))
        worst = "; ".join(f"{what} {value:.1e}" for what, value in outcome.worst.items()) or "equal to the bit"
        yield f"{outcome.run.name:14}{len(outcome.faults):7}  {places}: {'; '.join(outcome.wrong) or worst}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="an empty folder to keep the runs in; default: they are deleted")
    options = parser.parse_args()
    folder = options.out or Path(tempfile.mkdtemp(prefix="coatnet-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = campaign(folder, draw_faults(options.faults, options.seed), options.seed)
    print(machine(), *table(outcomes), sep="\n")
    if options.out is None:
        shutil.rmtree(folder)
    return 1 if any(outcome.wrong for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
