"""Whether `coatnet plan` is right: memory beside the peak of real ranks, step time beside real runs on this CPU.

    coatnet bench plan --rounds 3 > benchmarks/results/plan.txt

Memory is that of tensors, of the rank that holds most, in two steps of the engine. Of the times two runs calibrate, and
the others are predicted; a run's time is its median step's, in the fastest of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from benchmarks.gpu_checks.rank import be_the_only_rank
from benchmarks.machine import machine
from pipeline.config.parsing import read_config
from pipeline.costs.calibration import calibrated
from pipeline.costs.run_costs import Request, run_costs
from pipeline.costs.step_time import CPU
from pipeline.plan import make_plan
from pipeline.run.jsonl import read_metrics
from tests.pipeline.peaks import CLASSES, measured
from tests.pipeline.runs import pack_digits

ROOT = Path(__file__).resolve().parents[1]
TINY, SIZED = str(ROOT / "configs/tiny.yaml"), str(ROOT / "configs/imagenet1k/coatnet0.yaml")
STEPS = 10


def network(name: str, side: int, micro_batch: int, *more: str) -> list[str]:
    """The arguments of a configuration; two micro batches a step."""
    batches = [f"train.micro_batch={micro_batch}", f"train.global_batch={2 * micro_batch}"]
    sized = [] if name == "tiny" else [f"model.name={name}", "model.classes=null", "data.train_samples=null"]
    fp32 = [] if any("precision" in each for each in more) else ["train.precision=fp32"]
    return [TINY if name == "tiny" else SIZED, *sized, f"model.resolution={side}", *batches, *fp32, *more]


RECOMPUTED, BF16 = "train.activation_checkpointing=all", "train.precision=bf16"
MEMORY = {
    1: [
        network("tiny", 32, 16),
        network("tiny", 64, 8, RECOMPUTED, BF16),
        network("coatnet_0", 64, 8),
        network("coatnet_0", 96, 8, BF16),
        network("coatnet_1", 64, 8, "zero.stage=2"),
        network("coatnet_1", 96, 8, "zero.stage=3", "train.activation_checkpointing=[1,2]"),
        network("coatnet_2", 64, 8, RECOMPUTED),
    ],
    2: [
        network("tiny", 32, 16, "zero.stage=2"),
        network("tiny", 32, 16, "zero.stage=3", BF16),
        network("coatnet_0", 96, 8),
        network("coatnet_0", 64, 8, "zero.stage=2", BF16),
        network("coatnet_1", 64, 8, "zero.stage=3"),
        network("coatnet_1", 96, 8, RECOMPUTED),
        network("coatnet_2", 64, 8, "zero.stage=3", RECOMPUTED),
    ],
}
CALIBRATION = [network("tiny", 32, 32), network("coatnet_0", 96, 4)]
PREDICTED = [
    network("tiny", 64, 16),
    network("tiny", 32, 32, RECOMPUTED),
    network("coatnet_0", 64, 8),
    network("coatnet_0", 128, 4, "train.activation_checkpointing=[1,2]"),
    network("coatnet_1", 96, 4),
    network("c_t_t_t", 96, 4),
]


def planned_seconds(arguments: list[str], calibrations: list[Path]) -> float:
    """Of a step on one rank, as `coatnet plan --gpu cpu` has them."""
    request = Request("cpu", CPU, 1, 1, CLASSES, None, None, None, None)
    return run_costs(read_config(arguments[0], arguments[1:]), request, *calibrated(calibrations, CPU, 1))[
        "step_seconds"
    ]


def written(arguments: list[str]) -> str:
    """A configuration in few words; fp32 and stage 1 where nothing is said."""
    left_out = ("model.classes", "data.", "train.global_batch", "train.precision=fp32")
    words = [word.removeprefix("model.name=") for word in arguments[1:] if not word.startswith(left_out)]
    named = [*(["tiny"] if arguments[0] == TINY else []), *words]
    return " ".join(word.rpartition(".")[2].replace("activation_checkpointing", "recomputed") for word in named)


def row(name: str, measured: float, planned: float) -> str:
    return f"  {name:68} {measured:9.1f} {planned:9.1f} {100 * (planned / measured - 1):+7.1f} %"


def memory_rows(folder: Path) -> list[str]:
    """MiB of the rank that holds most."""
    rows = []
    for ranks, cases in MEMORY.items():
        place = folder / f"{ranks}"
        place.mkdir()
        for case, (peak, estimate) in zip(cases, measured(ranks, cases, place), strict=True):
            rows.append(row(f"{ranks} x {written(case)}", peak / 2**20, estimate / 2**20))
            print(rows[-1], file=sys.stderr)
    return rows


def train_all(clock: str, cases: list[list[str]]) -> None:
    """Trainings as the only rank. By the CPU's clock a step's seconds are those of all threads of this process, and it
    waits for nothing: sound where other work uses the processors."""
    be_the_only_rank()
    from pipeline.monitoring import metrics
    from pipeline.train import train

    by_cpu = mock.patch.object(metrics, "time", SimpleNamespace(perf_counter=time.process_time))
    for arguments in cases:
        config = read_config(arguments[0], arguments[1:])
        with by_cpu if clock == "cpu" else nullcontext():
            train(config, make_plan(config, "pretrain", 1, 1), [])
        run = Path(config.run.dir)
        shutil.rmtree(run / "checkpoints")
        if clock == "cpu":
            rows = [json.dumps({**row, "data_wait": 0.0}) for row in read_metrics(run)]
            (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")


def time_rows(folder: Path, rounds: int, clock: str) -> list[str]:
    """Milliseconds of a step on one rank; each round is a process of its own."""
    pack_digits(folder)
    cases = [*CALIBRATION, *PREDICTED]
    found: list[list[tuple[float, Path]]] = [[] for _ in cases]
    more = [f"train.steps={STEPS}", f"data.train={folder}/train", "data.val=null", "log.every=1", "log.samples=false"]
    for turn in range(rounds):
        runs = [folder / f"run-{number}-{turn}" for number in range(len(cases))]
        jobs = [[*case, *more, f"run.dir={run}"] for case, run in zip(cases, runs, strict=True)]
        entry = [sys.executable, "-P", str(ROOT / "coatnet_main.py"), "benchmarks.plan"]
        asked = ["--clock", clock, "--train", json.dumps(jobs)]
        subprocess.run([*entry, *asked], check=True, stdout=subprocess.DEVNULL)
        for run, times in zip(runs, found, strict=True):
            rows = read_metrics(run, step_seconds=float)[1:]
            times.append((statistics.median(each["step_seconds"] for each in rows), run))
    best = [min(each) for each in found]
    calibrations = [run for _, run in best[: len(CALIBRATION)]]
    return [
        row(
            f"{'calibrates: ' * (number < len(CALIBRATION))}{written(case)}",
            1e3 * seconds,
            1e3 * planned_seconds(case, calibrations),
        )
        for number, (case, (seconds, _)) in enumerate(zip(cases, best, strict=True))
    ]


def main() -> None:
    """Measures, and prints both tables."""
    parser = argparse.ArgumentParser("coatnet bench plan", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing; default: 3")
    parser.add_argument("--only", choices=("memory", "time"), help="default: both")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="clock for timing; default: wall")
    parser.add_argument("--train", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        return train_all(options.clock, options.train)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="coatnet-plan-") as name:
        print(f"{machine()}\n\n  {'':68}  measured   planned")
        if options.only != "time":
            print("MiB of tensors on a rank", *memory_rows(Path(name)), sep="\n")
        if options.only != "memory":
            threads = os.environ.get("OMP_NUM_THREADS", "all")
            print(
                f"ms of a step on a rank, OMP_NUM_THREADS {threads}, by the {options.clock} clock",
                *time_rows(Path(name), options.rounds, options.clock),
                sep="\n",
            )


if __name__ == "__main__":
    main()
