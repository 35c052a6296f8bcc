"""The most bytes of tensors that real ranks hold in a step: `python -m` this, as a rank.

The JSON file is a list of `[arguments of a configuration, file]`; each rank writes its peak beside the model's to the
file with its rank added. ZeRO's buckets are made small, so that they don't hide the rest.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.profiler import profile

from pipeline.commands.pretrain import import_training
from pipeline.config.parsing import read_config
from pipeline.config.schema import Config
from pipeline.distributed.environment import rank_and_world_size
from pipeline.distributed.launcher import die_with_parent, launch
from pipeline.memory import estimate
from pipeline.memory.activations import ActivationTracker
from pipeline.training import engine as engines
from tests import forked
from tests.pipeline.runs import PATIENCE_SECONDS

MODULE = "tests.pipeline.peaks"
BUCKET, CLASSES = 50_000, 10


def measured(world_size: int, cases: list[list[str]], folder: Path) -> list[tuple[int, int]]:
    """For each configuration the largest peak of a rank, measured and by the model."""
    file = folder / "cases.json"
    file.write_text(json.dumps([[case, str(folder / f"case-{number}")] for number, case in enumerate(cases)]))
    done = forked.run(MODULE, world_size, file, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = range(world_size)
    found = [
        [json.loads(Path(f"{folder}/case-{number}-{rank}").read_text()) for rank in ranks]
        for number in range(len(cases))
    ]
    return [(max(peak for peak, _ in each), each[0][1]) for each in found]


def allocator_peak(profiled: profile) -> int:
    """The most bytes that the allocator had given out since the profile began, temporary ones of kernels too."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # pyrefly: ignore
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes))


def peak_of_two_steps(config: Config) -> int:
    from pipeline.training.losses import loss_fn
    from pipeline.training.model import build_model, init_weights, normalize

    device = torch.device("cpu")
    with ActivationTracker() as live:
        shard = engines.zero3_init(config.train, config.optim, config.zero)
        network = build_model(config.model, config.train, CLASSES, device, init_weights(0), shard)
        engine = engines.build_engine(network, config.train, config.optim, config.zero)
        engines.set_schedule(engine, 1e-3, config.train.ema)
        live.peak.clear()
        for _ in range(2):
            for _ in range(engine.gradient_accumulation_steps()):
                n, side = config.train.micro_batch, config.model.resolution
                images = torch.zeros(n, side, side, 3, dtype=torch.uint8)
                wanted = torch.zeros(n, 1, dtype=torch.int64)
                drop_path_mask = torch.ones(n, network.branches)
                engine.backward(loss_fn(engine(normalize(images), drop_path_mask), wanted, "softmax", 0.1))
                engine.step()
    return sum(live.peak.values())


def measure(cases: list[tuple[list[str], str]]) -> None:
    die_with_parent()
    from pipeline.memory.activations import estimates

    engines.start_process_group()
    rank, world_size = rank_and_world_size()
    for arguments, file in cases:
        config = read_config(arguments[0], arguments[1:])
        found = peak_of_two_steps(config)
        model = estimates(config, CLASSES, "cpu")((config.train, config.zero, world_size))[0].total if rank == 0 else 0
        Path(f"{file}-{rank}").write_text(json.dumps([found, model]))


def main() -> None:
    if len(sys.argv) == 3:
        jobs = Path(sys.argv[2])
        sys.exit(launch([str(jobs)], int(sys.argv[1]), jobs.parent / "logs", import_training, MODULE))
    with mock.patch.object(engines, "BUCKET_ELEMENTS", BUCKET), mock.patch.object(estimate, "BUCKET_ELEMENTS", BUCKET):
        measure(json.loads(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    main()
