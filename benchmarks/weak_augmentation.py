"""Weak, not off: what fine-tuning with RandAugment makes of pretraining without it, with a weak one, a strong one.

    coatnet bench weak_augmentation --train cifar10-train.tar --val cifar10-val.tar --out runs/weak   # a night or two
    ... --tenth    # some hours

The small CoAtNet of configs/cifar10_cpu.yaml is pretrained on CIFAR-10 at 32 x 32 in three ways, for each of three
seeds, and each is fine-tuned at 48 x 48 with RandAugment on. `--control` fine-tunes each also with what it was
pretrained with, which tells what the change did. `--tenth` takes the first tenth of each class (of those to evaluate on
half) for as many epochs. Several runs go side by side, a core each; started again, they resume, and what is done is
not done again. Everything is computed in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from data.packing.pack import pack
from pipeline.distributed.launcher import COATNET

ARMS = {"off": "{layers: 0, magnitude: 0}", "weak": "{layers: 1, magnitude: 1}", "strong": "{layers: 2, magnitude: 10}"}
"""RandAugment in pretraining."""
ON = "{layers: 2, magnitude: 5}"
"""RandAugment in fine-tuning."""


@dataclass(frozen=True)
class Recipe:
    """Which presets are run, from side to side, on what, with what else set in each of the two stages."""

    data: Path
    pretraining: str = "configs/cifar10_cpu.yaml"
    finetuning: str = "configs/cifar10_cpu_finetune.yaml"
    side: int = 32
    tuned_side: int = 48
    more_pretraining: tuple[str, ...] = ()
    more_finetuning: tuple[str, ...] = ()
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: int = 3
    control: bool = False


@dataclass(frozen=True)
class Run:
    """One training as a command, and what is measured of it: weights, `ema` or `model`, and side."""

    name: str
    command: list[str]
    measured: list[tuple[str, int]]


Accuracies = dict[tuple[str, str, int], float]
"""Top-1 by run, weights and side."""
Start = Callable[..., subprocess.CompletedProcess[str]]


def chain(recipe: Recipe, runs: Path, arm: str, seed: int) -> list[Run]:
    """A pretraining and its fine-tunings, in order."""
    common = [f"data.train={recipe.data}/train", "data.val=null", f"run.seed={seed}", "train.precision=fp32"]
    common += ["checkpoint.every=100", "checkpoint.keep_last=1", "log.every=10"]

    def run(command: str, preset: str, name: str, *settings: str) -> list[str]:
        return [command, preset, *common, f"run.dir={runs / name}", *settings]

    first, side, tuned_side = f"pretrain-{arm}-{seed}", recipe.side, recipe.tuned_side
    command = run("pretrain", recipe.pretraining, first, f"augment.randaugment={ARMS[arm]}", *recipe.more_pretraining)
    made = [Run(first, command, [("ema", side), ("model", side)])]
    for how, randaugment in {"on": ON, **({"same": ARMS[arm]} if recipe.control else {})}.items():
        name = f"finetune-{arm}-{how}-{seed}"
        settings = [f"augment.randaugment={randaugment}", "augment.allow_new=true", f"model.resolution={tuned_side}"]
        command = run("finetune", recipe.finetuning, name, *settings, *recipe.more_finetuning)
        measured = [("ema", tuned_side), ("model", tuned_side)]
        made.append(Run(name, [*command, "--from", str(runs / first)], measured))
    return made


def measure(recipe: Recipe, out: Path, workers: int, start: Start | None = None) -> Accuracies:
    """Does what is not done yet, several chains side by side, and returns all accuracies.

    `start` runs a command in place of an interpreter of its own.
    """
    chains = [chain(recipe, out / "runs", arm, seed) for seed, arm in product(range(recipe.seeds), recipe.arms)]
    with ThreadPoolExecutor(workers) as pool:
        of_chain = partial(_of_chain, recipe, out, start or _new_process)
        done = list(pool.map(of_chain, chains))
    return {key: value for each in done for found in each for key, value in found.items()}


def _of_chain(recipe: Recipe, out: Path, start: Start, runs: list[Run]) -> list[Accuracies]:
    return [_accuracies(recipe, out, run, start) for run in runs]


def _accuracies(recipe: Recipe, out: Path, run: Run, start: Start) -> Accuracies:
    """Trains, or resumes, or finds it done; then evaluates what is not on record."""
    print(run.name, file=sys.stderr, flush=True)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    log = out / "logs" / f"{run.name}.log"
    _coatnet(run.command, log, start)
    found: Accuracies = {}
    for weights, side in run.measured:
        record = out / "figures" / f"{run.name}-{weights}-{side}.json"
        if not record.exists():
            command = ["evaluate", str(out / "runs" / run.name), "--data", f"{recipe.data}/val", "--weights", weights]
            output = _coatnet([*command, "--resolution", str(side), "--json"], log, start)
            record.parent.mkdir(exist_ok=True)
            record.write_text(output)
        found[run.name, weights, side] = json.loads(record.read_text())["top1"]
    return found


def _new_process(*command: str) -> subprocess.CompletedProcess[str]:
    """One thread each, so that as many run as there are cores."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*COATNET, *command], env=environment, capture_output=True, text=True)


def _coatnet(command: list[str], log: Path, start: Start) -> str:
    """A command's standard output; RuntimeError if it fails."""
    done = start(*command)
    with log.open("a") as output:
        output.write(done.stderr + done.stdout)
    if done.returncode:
        raise RuntimeError(f"coatnet {' '.join(command)} ended with status {done.returncode}; {log} says why")
    return done.stdout


# ---------------------------------------------------------------------------------------------------------- the table


def table(recipe: Recipe, found: Accuracies) -> Iterator[str]:
    """All accuracies and their spread as Markdown, then what follows from them."""
    side, tuned = recipe.side, recipe.tuned_side
    titles = ["RandAugment in pretraining", "seed", f"pretrained at {side}", f"tuned at {tuned}, it on"]
    titles += [f"tuned at {tuned}, it as before"] * recipe.control
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for arm in recipe.arms:
        columns = _columns(arm, recipe)
        rows = [[_cell(found, name, size, seed) for name, size in columns] for seed in range(recipe.seeds)]
        for seed, row in enumerate(rows):
            yield f"| {arm} | {seed} | {' | '.join(_both(each) for each in row)} |"
        if recipe.seeds > 1:
            yield f"| **{arm}** | **all** | {' | '.join(_spread(column) for column in zip(*rows, strict=True))} |"
    yield ""
    yield from verdicts(recipe, found)


def verdicts(recipe: Recipe, found: Accuracies) -> Iterator[str]:
    """Computed from the accuracies, by default those of the moving average."""

    def of(name: str, weights: str = "ema") -> list[float]:
        side = recipe.side if name.startswith("pretrain") else recipe.tuned_side
        return [100 * found[f"{name}-{seed}", weights, side] for seed in range(recipe.seeds)]

    hows = {"on": "RandAugment on", **({"same": "RandAugment as before"} if recipe.control else {})}
    for (how, tuned), (weights, which) in product(
        hows.items(), (("ema", "moving average"), ("model", "plain weights"))
    ):
        pairs = [(of(f"finetune-{arm}-{how}", weights), of(f"pretrain-{arm}", weights)) for arm in recipe.arms]
        gains = [gain for after, before in pairs for gain in _differences(after, before)]
        better = f"{sum(gain > 0 for gain in gains)} of {len(gains)} runs, {statistics.fmean(gains):+.1f} points"
        yield f"- Tuned with {tuned}: better than pretrained in {better} on average ({which})."
    if recipe.control:
        switched = {arm: _differences(of(f"finetune-{arm}-on"), of(f"finetune-{arm}-same")) for arm in recipe.arms}
        for arm, changes in switched.items():
            so = f", {agreement(changes, -1)}" if arm == "off" else ""
            yield f"- RandAugment on in tuning against as before, pretrained with it {arm}: {_in_words(changes)}{so}."
        softened = _differences(switched["weak"], switched["off"])
        yield f"- That after a weak one against after none: {_in_words(softened)}, {agreement(softened, 1)}."
    for arm in (arm for arm in recipe.arms if arm != "off"):
        gained = _differences(of(f"finetune-{arm}-on"), of("finetune-off-on"))
        so = f", {agreement(gained, 1)}" if arm == "weak" else ""  # of a strong one the paper says nothing here
        yield f"- Tuned with RandAugment, pretrained with a {arm} one against without: {_in_words(gained)}{so}."


def agreement(differences: Sequence[float], sign: int) -> str:
    """Whether the differences all have the sign that the paper's observation gives them."""
    if all(sign * each > 0 for each in differences):
        return "agrees with the paper's observation in every seed"
    if all(sign * each < 0 for each in differences):
        return "disagrees with the paper's observation in every seed"
    return "undecided, the seeds disagree"


def _columns(arm: str, recipe: Recipe) -> list[tuple[str, int]]:
    """The runs and sides of a row, without their seed."""
    side, tuned = recipe.side, recipe.tuned_side
    columns = [(f"pretrain-{arm}", side), (f"finetune-{arm}-on", tuned)]
    return columns + [(f"finetune-{arm}-same", tuned)] * recipe.control


def _cell(found: Accuracies, name: str, side: int, seed: int) -> tuple[float, float]:
    """Of the moving average and of the plain weights, in percent."""
    return 100 * found[f"{name}-{seed}", "ema", side], 100 * found[f"{name}-{seed}", "model", side]


def _both(cell: tuple[float, float]) -> str:
    return " / ".join(f"{each:.1f}" for each in cell)


def _spread(column: Sequence[tuple[float, float]]) -> str:
    """Mean and standard deviation over the seeds, of both kinds of weights."""
    kinds = zip(*column, strict=True)
    return " / ".join(f"{statistics.fmean(kind):.1f} ± {statistics.stdev(kind):.1f}" for kind in kinds)


def _differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def _in_words(differences: Sequence[float]) -> str:
    by_seed = ", ".join(f"{each:+.1f}" for each in differences)
    return f"{statistics.fmean(differences):+.1f} points ({by_seed} by seed)"


# ------------------------------------------------------------------------------------------------------------- images


def pack_share(archive: Path, folder: Path, each: int | None) -> None:
    """Packs the first images of each class of a tar of class folders, by name; None: all. What is packed stays."""
    if (folder / "manifest.json").exists():
        return
    images = folder.with_name(f"{folder.name}-images")
    with tarfile.open(archive) as tar:
        of_class = defaultdict(list)
        for member in tar:
            if member.isfile():
                of_class[Path(member.name).parts[-2]].append(member)
        for name, members in of_class.items():
            for member in sorted(members, key=lambda member: member.name)[:each]:
                content = tar.extractfile(member)
                assert content is not None
                (images / name).mkdir(parents=True, exist_ok=True)
                (images / name / Path(member.name).name).write_bytes(content.read())
    request: dict[str, Any] = {"samples_per_shard": 10_000, "bytes_per_shard": 256 << 20, "seed": 0, "workers": 2}
    pack(str(images), str(folder), **request, overwrite=False, progress=lambda *_: None)


def cifar10(train: Path, val: Path, out: Path, tenth: bool, control: bool) -> Recipe:
    """The experiment on CIFAR-10, whole or a tenth, whose images are packed below OUT."""
    pack_share(train, out / "train", 500 if tenth else None)
    pack_share(val, out / "val", 250 if tenth else None)
    # A tenth of the steps: the average is as much younger, and warm-up a sixth of the run and not two thirds.
    shorter = (("optim.warmup_steps=100", "train.ema=0.99"), ("train.ema=0.98",)) if tenth else ((), ())
    return Recipe(out, more_pretraining=shorter[0], more_finetuning=shorter[1], control=control)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="tar of CIFAR-10's training images, a folder a class")
    parser.add_argument("--val", type=Path, required=True, help="tar of its test images")
    parser.add_argument("--out", type=Path, required=True, help="folder for images, runs and figures")
    parser.add_argument("--tenth", action="store_true", help="a tenth of the images")
    parser.add_argument("--control", action="store_true", help="tuned as pretrained, too")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="runs side by side")
    options = parser.parse_args()
    recipe = cifar10(options.train, options.val, options.out, options.tenth, options.control)
    print(*table(recipe, measure(recipe, options.out, options.workers)), sep="\n")
    print(f"\n{machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
