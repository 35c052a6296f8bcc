"""Top-1, top-5 and loss over exactly every sample once, the same figures on any number of ranks.

The set is cut into fixed micro batches that are dealt to the ranks; each is padded to its full size, so that what is
computed for a sample does not depend on the rank that computes it. Results per sample are gathered in sample order
and summed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain, islice, repeat

import torch

from data.loader import LoaderSpec, evaluation_batches
from data.pinned import to_device
from data.shards.manifest import BadSample, Manifest
from pipeline.distributed.collectives import all_gather, all_reduce_sum, any_rank
from pipeline.distributed.heartbeat import beat
from pipeline.training.losses import Kind, loss_fn
from pipeline.training.model import normalize


@dataclass(frozen=True)
class EvalMetrics:
    """Fractions are 0 to 1; `broken` samples were left out and are not among `samples`.

    A sample with several labels counts in top-1 where the best class is one of them, in top-5 where any is among the
    first five.
    """

    samples: int
    top1: float
    top5: float
    loss: float
    broken: list[dict[str, str | None]]


def evaluate(
    forward: Callable[[torch.Tensor], torch.Tensor],
    manifest: Manifest,
    crop_fraction: float | None,
    kind: Kind,
    spec: LoaderSpec,
    is_stop_requested: Callable[[], bool] = lambda: False,
) -> EvalMetrics | None:
    """Metrics of `forward` (images [n, 3, h, w] -> logits [n, classes]) over the whole set; collective.

    `kind` is the loss that it was trained with, here without label smoothing. None where a stop is requested on any
    rank: that is asked before each batch and answered before the next, so that no device waits for the host.
    """
    results = torch.zeros(4, manifest.samples, dtype=torch.float64, device=spec.device)  # loss, top1, top5, used
    broken: list[BadSample] = []
    shape = spec.micro_batch, spec.resolution, spec.resolution, 3
    padding = torch.zeros(shape, dtype=torch.uint8, device=spec.device)
    # All ranks run as many forwards: under ZeRO-3 they are collective.
    passes = -(-manifest.samples // (spec.micro_batch * spec.world_size))
    stops: Callable[[], bool] | None = None
    with evaluation_batches(manifest, crop_fraction, spec) as batches:
        for batch in islice(chain(batches, repeat(None)), passes):
            if stops is not None and stops():
                return None
            stops = any_rank(is_stop_requested(), spec.device)
            images = padding if batch is None else torch.cat([batch.images, padding[len(batch.images) :]])
            logits = forward(normalize(images))
            beat("an evaluation batch")
            if batch is not None:
                broken += batch.broken
                numbers = to_device(batch.positions, spec.device)
                results[:, numbers] = per_sample(logits[: len(numbers)].float(), batch.labels, kind)
    loss, top1, top5, used = all_reduce_sum(results).sum(1).tolist()  # every sample is one rank's, so x + 0 is exact
    listed = sorted((asdict(sample) for sample in all_gather(broken)), key=lambda row: (row["shard"], row["key"]))
    counted = max(used, 1.0)
    return EvalMetrics(int(used), top1 / counted, top5 / counted, loss / counted, listed)


def per_sample(logits: torch.Tensor, labels: torch.Tensor, kind: Kind) -> torch.Tensor:
    """float64 [4, n] of logits [n, classes] and labels [n, most]: loss, top-1, top-5, 1."""
    losses = loss_fn(logits, labels, kind, reduction="none").double()
    first = logits.topk(min(5, logits.shape[1]), dim=1).indices
    best = (first[:, :, None] == labels[:, None, :]).any(2)
    return torch.stack([losses, best[:, 0].double(), best.any(1).double(), torch.ones_like(losses)])
