"""A night on a cluster in half an hour: a training that is preempted, killed, frozen and loses nodes again and again.

    coatnet bench preemptions                               # twenty disturbances: half an hour on two cores
    coatnet bench preemptions --disturbances 6 --out /tmp/x # a few, and the run is kept

On a throw-away Slurm of two virtual nodes (Debian's packages slurm-wlm and munge, root) with two ranks each. The run
must end bit-equal to an undisturbed one without Slurm. Reported are the steps that each disturbance cost, and what a
restart took beyond those: from the disturbance to the end of the start, and from the next start to its first step;
between the two Slurm waits, some ten seconds here. Ends with status 1 where the runs differ.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from benchmarks.fault_injection import draw_faults, last_step_of
from benchmarks.machine import machine
from slurm.history import starts, submissions
from tests.cluster.slurm import Cluster, missing, running_cluster
from tests.pipeline.runs import coatnet, curve, events, last_state, last_step, pack_digits, rows, wait_until
from tests.slurm.jobs import JOB, command, keys, ranks, status

STEPS_APART = 20, 60
"""Least and most steps from the first of a start to the next disturbance."""
CHECKPOINT_EVERY = 20
EXTRA_STEPS, STEPS_UNTIL_NOTICED = 12, 150
"""Done beyond those between two disturbances; and before Slurm notices that a daemon is dead."""
BOOT_SECONDS = 10
WHOLE_CLUSTER = ("--partition=high", "--nodes=2", "--ntasks-per-node=2", "--exclusive")


@dataclass
class Disturbance:
    """Its step and time, its cause as recorded, the steps that had to be done again, and how long it took."""

    kind: str
    step: int
    at: float
    cause: str = ""
    steps_lost: int = 0
    to_the_end: float = 0.0
    waited: float = 0.0
    to_the_first_step: float = 0.0


@dataclass
class Campaign:
    disturbances: list[Disturbance]
    goodput: float
    steps: int
    step_seconds: float
    extra_restarts: int
    """As when a signal meant for one start reaches the next, which is the same job to Slurm."""
    wrong: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------- disturbances


def requeue(cluster: Cluster, job: str, run: Path, chance: random.Random) -> None:
    cluster.run("scontrol", "requeue", job)


def preempt(cluster: Cluster, job: str, run: Path, chance: random.Random) -> None:
    """A job of a higher priority takes all nodes for a moment."""
    other = cluster.run("sbatch", "--parsable", "--mem=100", *WHOLE_CLUSTER, "--output=/dev/null", "--wrap=sleep 1")
    cluster.wait(other, "COMPLETED")


def kill_a_rank(cluster: Cluster, job: str, run: Path, chance: random.Random) -> None:
    time.sleep(0.3 * chance.random())
    os.kill(chance.choice(ranks(run)), signal.SIGKILL)


def freeze_a_rank(cluster: Cluster, job: str, run: Path, chance: random.Random) -> None:
    os.kill(chance.choice(ranks(run)), signal.SIGSTOP)


def kill_a_daemon(cluster: Cluster, job: str, run: Path, chance: random.Random) -> None:
    node = chance.choice(cluster.nodes)
    cluster.kill_slurmd(node)
    boot_again(cluster, job, node)


def power_off(cluster: Cluster, job: str, run: Path, chance: random.Random) -> None:
    node = chance.choice(cluster.nodes)
    cluster.power_off(node)
    boot_again(cluster, job, node)


def boot_again(cluster: Cluster, job: str, node: str) -> None:
    """Once Slurm has requeued the job, and after the time of a boot."""
    cluster.wait(job, "PENDING")
    time.sleep(BOOT_SECONDS)
    cluster.start_node(node)


KINDS: dict[str, Callable[[Cluster, str, Path, random.Random], None]] = {
    "preempted": preempt,
    "requeued": requeue,
    "a rank killed": kill_a_rank,
    "a rank frozen": freeze_a_rank,
    "slurmd killed": kill_a_daemon,
    "node powered off": power_off,
}


# --------------------------------------------------------------------------------------------------------- the campaign


def campaign(folder: Path, kinds: list[str], seed: int) -> Campaign:
    """A training with these disturbances, compared with one without."""
    chance = random.Random(seed)
    apart = [chance.randint(*STEPS_APART) for _ in kinds]
    steps = sum(apart) + EXTRA_STEPS * len(kinds) + STEPS_UNTIL_NOTICED * kinds.count("slurmd killed")
    packed, run, undisturbed = pack_digits(folder), folder / "run", folder / "whole"
    length = [f"train.steps={steps}", f"checkpoint.every={CHECKPOINT_EVERY}", "train.precision=fp32"]
    done = coatnet("pretrain", "configs/tiny.yaml", "--procs", 4, *keys(packed, undisturbed, *length), patience=steps)
    assert done.returncode == 0, done.stderr
    (folder / "slurm").mkdir()
    with running_cluster(folder / "slurm", nodes=2, cpus=4) as cluster:
        done = command(cluster, "submit", "pretrain", "configs/tiny.yaml", *keys(packed, run, *length), *JOB)
        assert done.returncode == 0, done.stderr
        job = submissions(run)[0]["job"]
        met = []
        for kind, few in zip(kinds, apart, strict=True):
            wait_until(lambda few=few: steps_of_this_start(run) >= few)
            number = len(starts(run)) - 1
            met.append(Disturbance(kind, last_step(run), time.time()))
            print(f"{kind} at step {met[-1].step} of {steps}", file=sys.stderr, flush=True)
            KINDS[kind](cluster, job, run, chance)
            wait_until(lambda number=number: len(starts(run)) > number + 1 and steps_of_this_start(run) > 1)
            measure(run, met[-1], number)
        wait_until(lambda: bool(events(run, "finished")))
        ended = cluster.wait(job, "COMPLETED", "FAILED")
        goodput = status(cluster, run)["goodput"]
    seconds = sorted(row["step_seconds"] for row in rows(undisturbed / "metrics.jsonl") if "step_seconds" in row)
    result = Campaign(met, goodput, steps, seconds[len(seconds) // 2], len(starts(run)) - 1 - len(met))
    if ended["JobState"] != "COMPLETED":
        result.wrong.append(f"the job ended as {ended['JobState']}")
    if len(events(run, "requeued")) != len(starts(run)) - 1:
        result.wrong.append(f"{len(starts(run))} starts, but {len(events(run, 'requeued'))} requeues are recorded")
    if curve(run) != curve(undisturbed):
        result.wrong.append("the curve differs from the undisturbed run's")
    if last_state(run) != last_state(undisturbed):
        result.wrong.append("weights, moments or buffers differ from the undisturbed run's")
    return result


def steps_of_this_start(run: Path) -> int:
    """Steps done by the running start; 0 where none runs."""
    now, begun = starts(run)[-1:], [*events(run, "training_started"), *events(run, "training_resumed")][-1:]
    if not now or now[0].ended is not None or not begun or begun[0]["time"] < now[0].began:
        return 0
    return last_step_of(run, begun[0]["attempt"]) - begun[0]["step"]


def measure(run: Path, met: Disturbance, number: int) -> None:
    """Fills in a disturbance that is over from the run's records."""
    before, after = starts(run)[number : number + 2]
    resumed = next(row for row in events(run, "training_resumed") if row["time"] > after.began)
    first = next(row for row in rows(run / "metrics.jsonl") if row["step"] > resumed["step"] and "loss" in row)
    ended = before.ended or met.at
    met.cause = str(before.cause)
    met.steps_lost = next(row["steps_lost"] for row in events(run, "requeued") if row["start"] == before.name)
    met.to_the_end, met.waited = max(0.0, ended - met.at), after.began - max(ended, met.at)
    met.to_the_first_step = resumed["time"] + first["step_seconds"] - after.began


def table(result: Campaign) -> Iterator[str]:
    """What a person reads."""
    met = result.disturbances
    survived = 0 if result.wrong else len(met)
    yield f"{survived} of {len(met)} disturbances survived; {'; '.join(result.wrong) or 'equal to the bit'} to the run"
    yield f"without any; {result.steps} steps of {result.step_seconds:.2f} s, a checkpoint every {CHECKPOINT_EVERY}"
    titles = f"{'steps lost':>12}{'to the end':>12}{'Slurm waits':>13}{'to the first step':>19}{'a restart':>11}"
    yield f"\n{'disturbance':18}{'count':>6}{titles}"
    for kind in [*KINDS, "all"]:
        of_kind = [each for each in met if kind in (each.kind, "all")]
        if of_kind:
            lost = fmean([each.steps_lost for each in of_kind])
            ends, waits = fmean([each.to_the_end for each in of_kind]), fmean([each.waited for each in of_kind])
            begins = fmean([each.to_the_first_step for each in of_kind])
            figures = f"{lost:12.1f}{ends:10.1f} s{waits:11.1f} s{begins:17.1f} s{ends + begins:9.1f} s"
            yield f"{kind:18}{len(of_kind):6}{figures}"
    yield f"\ngoodput {100 * result.goodput:.0f} %: the share of the allocated time that went into steps that count"
    yield f"restarts beyond those: {result.extra_restarts}"
    yield f"causes, as recorded: {', '.join(each.cause for each in met)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disturbances", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="an empty folder with a short path to keep the run in; default: it is deleted"
    )
    options = parser.parse_args()
    if reason := missing():
        sys.exit(f"Slurm cannot run here: {reason}")
    folder = options.out or Path(tempfile.mkdtemp(prefix="coatnet-night-"))
    folder.mkdir(parents=True, exist_ok=True)
    result = campaign(folder, draw_faults(options.disturbances, options.seed, KINDS), options.seed)
    print(machine(), *table(result), sep="\n")
    if options.out is None:
        shutil.rmtree(folder)
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
