"""How fast the variants of a study are: forward and backward on one CPU core, in turns."""

from __future__ import annotations

import statistics
import time

import torch
from torch.nn.functional import cross_entropy

from benchmarks.study import Plan
from pipeline.training.model import build_model, init_weights


def images_per_second(plan: Plan, rounds: int = 7) -> dict[str, float]:
    """Images in a second of this process, by variant: medians of rounds, so that other work counts little."""
    torch.set_num_threads(1)
    configs = {variant: next(iter(rates.values())).config for (variant, _), rates in plan.sweep().items()}
    models = {
        variant: build_model(config.model, config.train, 10, torch.device("cpu"), init_weights(0))
        for variant, config in configs.items()
    }
    seconds: dict[str, list[float]] = {variant: [] for variant in configs}
    for each in range(-1, rounds):  # the first is not counted
        for variant, config in configs.items():
            images = torch.randn(config.train.micro_batch, 3, config.model.resolution, config.model.resolution)
            start = time.process_time()
            for _ in range(5):
                cross_entropy(models[variant](images), torch.zeros(len(images), dtype=torch.int64)).backward()
            if each >= 0:
                seconds[variant].append((time.process_time() - start) / 5 / len(images))
    return {variant: 1 / statistics.median(measured) for variant, measured in seconds.items()}
