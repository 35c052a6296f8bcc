"""DALI's decoder: images a second alone and beside training, the device's memory that it takes, and odd samples."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.gpu_checks import Place, Row
from benchmarks.gpu_checks.images import photos

LARGE = (4000, 3000)


def rates(place: Place) -> Iterator[Row]:
    """Through the whole loader, from packed JPEGs, RandAugment on."""
    from data.memory import DECODED_AT_ONCE

    warnings.simplefilter("ignore")  # of DALI
    seconds, micro_batch, side = (2.0, 8, 64) if place.small else (8.0, 64, 224)
    step = training(place, micro_batch, side)
    fixed = torch.zeros(micro_batch, side, side, 3, dtype=torch.uint8, device=place.device)
    alone = micro_batch * _rate(lambda: step(fixed), seconds, place.device)
    yield {"images": "none: training on one batch", "images/s beside training": alone}
    said = []
    for width, height in ((500, 375),) if place.small else ((500, 375), LARGE):
        url = photos(place.folder / f"{width}", 2 * DECODED_AT_ONCE if width < 1000 else 64, width, height)
        before = _used(place)
        with batches(url, place, micro_batch, side) as taken:
            next(taken)
            decoded = micro_batch * _rate(lambda taken=taken: next(taken), seconds, place.device)
            both = micro_batch * _rate(lambda taken=taken: step(next(taken)), seconds, place.device)
            memory = _used(place) - before
        said.append(f"{width} x {height}: {decoded:,.0f} images/s, training keeps {both / alone:.0%} of its rate")
        yield {
            "images": f"{width} x {height}", "images/s": decoded, "images/s beside training": both,
            "of training alone": both / alone, "MiB of the device": None if place.small else memory / 2**20,
        }  # fmt: skip
    if place.small:
        yield {"not here": f"{LARGE[0]} x {LARGE[1]}: a run of DALI takes minutes on a CPU"}
    yield {"said": "; ".join(said)}


def training(place: Place, micro_batch: int, side: int) -> Callable[[torch.Tensor], object]:
    """Forward and backward of coatnet_0 on uint8 images, as training has them."""
    from models import coatnet
    from pipeline.training.model import normalize

    network = coatnet("coatnet_0", resolution=side).to(place.device).train()
    labels = torch.arange(micro_batch, device=place.device)

    def step(images: torch.Tensor) -> None:
        network.zero_grad()
        with torch.autocast(place.device, torch.bfloat16, enabled=not place.small):
            logits = network(normalize(images))
        F.cross_entropy(logits, labels).backward()

    return step


@contextmanager
def batches(url: str, place: Place, micro_batch: int, side: int) -> Iterator[Iterator[torch.Tensor]]:
    """The loader's images, a micro batch at a time, without end."""
    from data.augment import Augmentation
    from data.loader import LoaderSpec, training_batches
    from data.order import Order
    from data.shards.manifest import read_manifest
    from pipeline.distributed.environment import cpus_per_rank

    manifest = read_manifest(url)
    order = Order(0, manifest.shards.samples, micro_batch, 16)
    drawn = Augmentation(crop="random_resized", flip=True, layers=2, magnitude=5.0)
    spec = LoaderSpec(0, 1, micro_batch, side, torch.device(place.device, 0), cpus_per_rank())
    with training_batches(manifest, order, drawn, spec, 0, 0, 10**9) as steps:
        yield (batch.images for batch in itertools.chain.from_iterable(steps))


def _rate(work: Callable[[], object], seconds: float, device: str) -> float:
    """Times a second; a whole run of DALI, which is ready at once, does not count."""
    for _ in range(2):
        work()
    start, times = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        times += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return times / (time.perf_counter() - start)


def _used(place: Place) -> int:
    """Bytes of the device that are taken, those of torch's allocator apart."""
    if place.small:
        return 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def odd_samples(place: Place) -> Iterator[Row]:
    """The table of docs/howto/data.md, from a tar of all kinds: used and how near to Pillow's pixels, or replaced."""
    from data.shards.manifest import BadSample
    from tests.data import test_odd_samples as table

    warnings.simplefilter("ignore")
    _, url = table.indexed(place.folder, decode=False)
    trained, evaluated = table.loaded(url, place.device)
    broken = {each.key: each.reason for each in trained if isinstance(each, BadSample)}
    seen: dict[str, Any] = {each[0]: each[2] for each in evaluated if not isinstance(each, BadSample)}
    wrong: list[str] = []
    for name, encoded in table.GOOD.items():
        key = name.partition(".")[0]
        used = key in seen and key not in broken
        off = float(np.abs(table.reference(encoded).astype(int) - seen[key]).mean()) if used else None
        if off is None or off > (1 if place.small else 25):
            wrong.append(name)
        yield {"sample": name, "is": "used" if used else f"replaced: {broken.get(key)}", "levels off Pillow's": off}
    for name in table.UNDECODABLE:
        reason = broken.get(name.partition(".")[0])
        if reason is None:
            wrong.append(name)
        yield {"sample": name, "is": f"replaced: {reason}" if reason else "used, although it is broken"}
    if wrong:
        yield {"error": f"these are wrong: {', '.join(wrong)}"}
    count = len(table.GOOD) + len(table.UNDECODABLE)
    yield {"said": f"{count - len(wrong)} of {count} kinds are right"}
