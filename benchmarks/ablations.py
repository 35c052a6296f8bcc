"""The paper's ablations on CIFAR-10: small networks, several seeds, beside the paper's figures (benchmarks/studies).

    coatnet bench ablations --train cifar10-train.tar --val cifar10-val.tar --out runs/ablations   # hours, all studies
    ... --study table_8    # of it; what several studies share is trained once
    ... --study table_8 --steps 20    # a short form that says nothing about the paper
    ... --again 0123456789ab    # trains what is on record again: the same losses?

Prints a table in Markdown, and draws OUT/STUDY.png. A training that has a record is not done again, whichever code and
machine made it; the table's foot says which did. The records are benchmarks/results/ablations/trainings.jsonl;
those made here are added to OUT/trainings.jsonl. Trainings go side by side, a core each; started again, they resume.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.study import ROOT, STUDIES, Images, Plan, Record, Training, read_study
from benchmarks.study_picture import draw
from benchmarks.study_speed import images_per_second
from benchmarks.study_table import table
from data.packing.pack import pack
from pipeline.distributed.launcher import COATNET
from pipeline.errors import UsageError
from pipeline.run.jsonl import append_row, read_lines, read_metrics
from pipeline.training.model import count_model

COMMITTED = ROOT / "benchmarks" / "results" / "ablations" / "trainings.jsonl"
ORDER = ("figure_1", "table_6", "table_8", "table_9", "table_7", "weak")
SHARES = {1: None, 10: 500}
"""Images of each class of CIFAR-10's training set by share; None: all."""

Start = Callable[..., subprocess.CompletedProcess[str]]


@dataclass
class Bench:
    """Trains in a folder, and knows what is on record. `start` runs a command of ours to its end."""

    out: Path
    start: Start
    workers: int = 2
    records: dict[str, Record] = field(default_factory=dict)
    _busy: defaultdict[Path, Any] = field(default_factory=lambda: defaultdict(Lock))
    _ended: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        for file in (COMMITTED, self.out / "trainings.jsonl"):
            self.records |= {row["id"]: row for row in read_lines(file, id=str)}

    def complete(self, plan: Plan) -> dict[tuple[str, str, int], Training]:
        """Trains what has no record: the sweeps, then the trainings that are reported, which it returns."""
        self._record(plan.swept())
        trainings = plan.trainings(self.records)
        self._record(trainings.values())
        return trainings

    def _record(self, trainings: Iterable[Training]) -> None:
        missing = {each.id: each for each in trainings if each.id not in self.records}
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for number, row in enumerate(pool.map(self._trained, missing.values()), 1):
                    self.records[row["id"]] = row
                    print(f"{number} of {len(missing)} on record", file=sys.stderr, flush=True)
            except BaseException:  # Ctrl-C too: what has not begun is left
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _trained(self, training: Training) -> Record:
        row = record(training, self.train(training))
        append_row(self.out / "trainings.jsonl", row)
        return row

    def train(self, training: Training, place: str = "runs") -> Path:
        """The folder of a training that is done, or has diverged; RuntimeError where it fails otherwise."""
        command = ["pretrain", training.preset]
        if training.source is not None:
            command = ["finetune", training.preset, "--from", str(self.train(training.source, place))]
        folder = next((self.out / place).glob(f"*-{training.id}"), self.out / place / f"{training.name}-{training.id}")
        with self._busy[folder]:
            if folder not in self._ended:
                print(folder.name, file=sys.stderr, flush=True)
                self._run([*command, *training.overrides, f"run.dir={folder}"], folder)
                self._ended.add(folder)
        return folder

    def _run(self, command: Sequence[str], folder: Path) -> None:
        done = self.start(*command)
        diverged = done.returncode == 1 and skipped_steps(folder)
        if done.returncode and not diverged:  # the machine's doing: it may go well the next time
            raise RuntimeError(f"coatnet {' '.join(command)}: status {done.returncode}\n{done.stderr}")


def record(training: Training, run: Path) -> Record:
    """What is kept of a training: its figures, and what made them. None where a training has diverged."""
    rows, counts = read_metrics(run), count_model(training.config.model, training.config.train, 10)
    steps = [row for row in rows if "loss" in row]
    evaluation = next((row for row in reversed(rows) if "eval_loss" in row), {})
    last, seconds = steps[-max(1, len(steps) // 10) :], sum(row["step_seconds"] for row in steps)
    return {
        "id": training.id,
        "name": training.name,
        "seed": training.seed,
        "train_loss": _rounded(statistics.fmean(float(row["loss"]) for row in last)),
        **{name: _rounded(evaluation.get(name)) for name in ("eval_loss", "top1", "top5")},
        "losses": losses_hash(run),
        "skipped_steps": len(skipped_steps(run)),
        "parameters": counts.parameters,
        "multiply_adds": counts.multiply_adds,
        "hours": _rounded(seconds / 3600),
        "source": training.source and training.source.id,
        "keys": training.decisive_keys,
        "train": training.images.fingerprint(training.images.train[training.share])[:12],
        "val": training.images.fingerprint(training.images.val)[:12],
        "code": code_hash(),
        "machine": f"{machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def losses_hash(run: Path) -> str:
    """A hash of the loss of every step, to the bit."""
    losses = [[row["step"], row["loss"]] for row in read_metrics(run) if "loss" in row]
    return hashlib.sha256(json.dumps(losses).encode()).hexdigest()[:16]


def skipped_steps(run: Path) -> set[int]:
    """The steps that a run did not apply, since their loss was bad."""
    events = read_lines(run / "events.jsonl", event=str, step=int)
    return {row["step"] for row in events if row["event"] == "step_skipped"}


def code_hash() -> str:
    """A hash of all modules that decide a training's numbers, and of some that don't."""
    files = sorted(file for package in ("models", "data", "pipeline") for file in (ROOT / package).rglob("*.py"))
    content = b"".join(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest()[:12]


def _rounded(value: float | None) -> float | None:
    """None of what is not there or not finite, which metrics.jsonl has as text."""
    return None if value is None or not math.isfinite(float(value)) else round(float(value), 5)


def train_again(bench: Bench, plans: Sequence[Plan], ids: Sequence[str]) -> bool:
    """Trains what is on record again, and prints whether each has the same losses to the bit; whether all have."""
    known = {each.id: each for plan in plans for each in plan.on_record(bench.records)}
    if unknown := set(ids) - known.keys():
        raise UsageError(
            f"--again {' '.join(sorted(unknown))}: the record has no such training of these studies, images and seeds"
        )
    same = {each: losses_hash(bench.train(known[each], "again")) == bench.records[each]["losses"] for each in ids}
    for each, is_same in same.items():
        print(f"{known[each].name}: {'the same losses to the bit as' if is_same else 'OTHER losses than'} on record")
    return all(same.values())


# ------------------------------------------------------------------------------------------------------------- images


def cifar10(train: Path, val: Path, folder: Path) -> Images:
    """CIFAR-10 in its shares, packed below a folder, other tars apart."""
    digests = [hashlib.sha256(archive.read_bytes()).hexdigest()[:6] for archive in (train, val)]
    folder = folder / "-".join(digests)
    for share, each in SHARES.items():
        pack_share(train, folder / f"train-{share}", each)
    pack_share(val, folder / "val", None)
    return Images({share: folder / f"train-{share}" for share in SHARES}, folder / "val")


def pack_share(archive: Path, folder: Path, each: int | None) -> None:
    """Packs the first images of each class of a tar of class folders, by name; None: all. What is packed stays."""
    if (folder / "manifest.json").exists():
        return
    images = folder.with_name(f"{folder.name}-images")
    if not tarfile.is_tarfile(archive):
        raise UsageError(f"{archive} is not a tar; benchmarks/README.md says how to make it")
    with tarfile.open(archive) as tar:
        of_class = defaultdict(list)
        for member in tar:
            if member.isfile():
                of_class[Path(member.name).parent.name].append(member)
        if not of_class or "" in of_class:
            raise UsageError(f"{archive} has no class folders of images; benchmarks/README.md says how to make it")
        for name, members in of_class.items():
            for member in sorted(members, key=lambda member: member.name)[:each]:
                content = tar.extractfile(member)
                assert content is not None
                (images / name).mkdir(parents=True, exist_ok=True)
                (images / name / Path(member.name).name).write_bytes(content.read())
    request: dict[str, Any] = {"samples_per_shard": 10_000, "bytes_per_shard": 256 << 20, "seed": 0, "workers": 2}
    pack(str(images), str(folder), **request, overwrite=False, progress=lambda *_: None)
    shutil.rmtree(images)


def new_process(*command: str) -> subprocess.CompletedProcess[str]:
    """One CPU thread each, so that as many run as there are cores, and so that the same bits come on each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*COATNET, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="tar of CIFAR-10's training set, a folder per class")
    parser.add_argument("--val", type=Path, required=True, help="tar of its test images")
    parser.add_argument("--out", type=Path, required=True, help="folder for images, runs and records")
    parser.add_argument("--study", nargs="+", choices=ORDER, default=ORDER, help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, which count from 0")
    parser.add_argument("--steps", type=int, help="a short form: only this many steps each")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="trainings to run at once")
    parser.add_argument("--again", nargs="+", metavar="ID", help="train these lines of the record again, and compare")
    options = parser.parse_args()
    for name in ("seeds", "steps", "workers"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    out = options.out.resolve()
    images, bench = cifar10(options.train, options.val, out / "images"), Bench(out, new_process, options.workers)
    more = {"train.steps": options.steps, "optim.warmup_steps": 1} if options.steps else {}
    plans = [
        Plan(name, read_study(STUDIES / f"{name}.yaml"), images, range(options.seeds), more=more)
        for name in options.study
    ]
    if options.again:
        return 0 if train_again(bench, plans, options.again) else 1
    for plan in plans:
        trainings = bench.complete(plan)
        draw(plan, trainings, bench.records, out / f"{plan.name}.png")
        speeds = images_per_second(plan) if plan.study.speed else {}
        print(*table(plan, trainings, bench.records, speeds), "", sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
