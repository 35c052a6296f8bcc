"""What one step does inside the network, sample by sample and layer by layer, without changing anything.

A plain copy of the engine's network, whole on each rank at every ZeRO stage, takes the step's micro batches with the
weights and draws that the step takes them with. Hooks note the largest value of each sample at the input and output of
every layer, and at every output's gradient. A value that is not finite is seen there before batch normalisation
spreads it over the samples that are normalised together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.loader import Batch
from models.coatnet import CoAtNet
from models.norm import across_ranks, frozen_statistics
from pipeline.config.batch_size import ranks_of_group
from pipeline.config.schema import Config
from pipeline.distributed.collectives import all_gather
from pipeline.distributed.environment import rank_and_world_size
from pipeline.formatting import pluralize
from pipeline.training import ema, zero
from pipeline.training.mixup import drawn_partners
from pipeline.training.model import load_values, meta_model

WORST = 4
"""Samples whose own gradient is computed."""
Row = dict[str, Any]
Losses = Callable[["Probe", Batch], Tensor]
"""Each sample's loss [n] of a micro batch, by a network in the engine's place."""


@dataclass
class Trace:
    """Of a micro batch the largest absolute values [n] by place, in the order of forward and of backward."""

    activations: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


class Probe:
    """A network in the engine's place in a forward pass; it keeps the last logits, and while it has a trace that.

    `group` are the ranks that a batch-norm group lies on, if several.
    """

    def __init__(self, module: CoAtNet, device: torch.device, bf16: bool, group: dist.ProcessGroup | None) -> None:
        self.module, self.device, self.group, self._bf16 = module, device, group, bf16
        self.trace: Trace | None = None
        self.logits = torch.empty(0)
        names = {layer: name for name, layer in module.named_modules()}
        self.blocks = ["stem", *(names[block] for block in module.blocks()), "head"]
        for name, layer in module.named_modules():
            if name in self.blocks or not list(layer.children()):
                layer.register_forward_hook(self._observe(name))

    def __call__(self, images: Tensor, drop_path_mask: Tensor | None) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            self.logits = self.module(images, drop_path_mask)
        return self.logits

    def _observe(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if (trace := self.trace) is None:  # or computed again in the backward
                return
            if name not in self.blocks:
                trace.activations[f"{name}, input"] = _largest(inputs[0])
            trace.activations[name] = _largest(output)
            output.register_hook(lambda gradient: trace.gradients.update({name: _largest(gradient)}))

        return hook


def _largest(values: Tensor) -> Tensor:
    return values.detach().abs().flatten(1).amax(1).float()


def probe_of(engine: Any, config: Config, classes: int, device: torch.device) -> Probe:
    """A copy of the engine's network with its weights and statistics, without DeepSpeed. Collective."""
    parameters = dict(engine.module.named_parameters())
    network = meta_model(config.model, config.train, classes)
    load_values(network, device, lambda name, _: zero.whole_value(engine, parameters[name]))
    ema.load(network, ema.statistics(engine.module))
    together = ranks_of_group(config.train)
    group = cast("dist.ProcessGroup | None", dist.new_subgroups(together)[0] if together > 1 else None)
    if group is not None:
        across_ranks(network, group)
    return Probe(network, device, config.train.precision == "bf16", group)


@dataclass(frozen=True)
class Examination:
    """Of a step, on every rank: its samples in the stream's order, its blocks in the forward's, and `first`, where in
    each micro batch that has one the first value that is not finite is."""

    samples: list[Row]
    layers: list[Row]
    first: list[Row]

    def worst(self, number: int) -> list[Row]:
        """So many samples, the worst first."""
        return sorted(self.samples, key=_badness)[:number]


def examine(probe: Probe, batches: Sequence[Batch], losses_of: Losses, config: Config) -> Examination:
    """Of a step of which this rank has these micro batches. Collective."""
    parameters, rank = list(probe.module.named_parameters()), rank_and_world_size()[0]
    samples, layers, first = [], [], []
    for number, batch in enumerate(batches):
        trace = probe.trace = Trace()
        with frozen_statistics():
            losses = losses_of(probe, batch)
        probe.trace = None
        gradients = torch.autograd.grad(losses.mean(), [each for _, each in parameters], allow_unused=True)
        bad = [name for (name, _), each in zip(parameters, gradients, strict=True) if not _is_finite(each)]
        rows = _sample_rows(batch, losses, probe.logits, trace, config)
        samples += [{**row, "rank": rank, "pass": number} for row in rows]
        for layer in probe.blocks:
            rows = trace.activations[layer], trace.gradients[layer]
            layers.append({"layer": layer, **_peak("activation", rows[0], batch), **_peak("gradient", rows[1], batch)})
        first += _first_not_finite(trace, batch, bad)
    samples = sorted(all_gather(samples), key=lambda row: row["position"])
    worst = sorted(samples, key=_badness)[:WORST]
    norms = dict(all_gather([each for row in worst for each in _own_gradient(probe, batches, losses_of, config, row)]))
    samples = [{**row, "own_gradient_norm": norms.get(row["position"])} for row in samples]
    everywhere = all_gather(layers)
    merged = [_merged(layer, everywhere) for layer in probe.blocks]
    return Examination(samples, merged, all_gather(first))


def _badness(row: Row) -> tuple[float, float, float]:
    """Sorts samples: first what was not finite earliest, with the largest values before; then by loss."""
    at = math.inf if row["not_finite_at"] is None else row["not_finite_at"]
    return at, -row["before"], -math.inf if math.isnan(row["loss"]) else -row["loss"]


def _sample_rows(batch: Batch, losses: Tensor, logits: Tensor, trace: Trace, config: Config) -> list[Row]:
    values = torch.stack(list(trace.activations.values())).cpu().numpy()  # [places, n]
    low, high = (part.float().tolist() for part in logits.detach().aminmax(dim=1))
    weight, partners = 1.0, np.arange(len(batch.keys))
    if config.augment.mixup:
        weight, partners = drawn_partners(config.augment.mixup, config.run.seed, batch.positions)
    rows = []
    for i, (key, loss) in enumerate(zip(batch.keys, losses.tolist(), strict=True)):
        bad = np.flatnonzero(~np.isfinite(values[:, i]))
        at = int(bad[0]) if len(bad) else None
        rows.append({
            "position": int(batch.positions[i]), "key": key, "replaced": bool(batch.replaced[i]),
            "mixed_with": batch.keys[partners[i]] if partners[i] != i else None, "own_share": weight,
            "loss": loss, "lowest_logit": low[i], "highest_logit": high[i],
            "not_finite_at": at, "place": None if at is None else list(trace.activations)[at],
            "before": float(values[at - 1, i]) if at else 0.0,
        })  # fmt: skip
    return rows


def _first_not_finite(trace: Trace, batch: Batch, parameters: list[str]) -> list[Row]:
    """Where a micro batch's first value that is not finite is: in the forward, or else in the backward."""
    for direction, places in (("forward", trace.activations), ("backward", trace.gradients)):
        before = torch.zeros(len(batch.keys))  # [n], at the place before
        for place, values in places.items():
            if len(bad := (~values.isfinite()).nonzero()[:, 0]):
                by_size = sorted(bad.tolist(), key=lambda i: -before[i].item())
                return [{"direction": direction, "place": place, "keys": [batch.keys[i] for i in by_size]}]
            before = values
    last = parameters[-1:]  # the first in the backward
    return [{"direction": "backward", "place": f"the gradient of {name}", "keys": batch.keys} for name in last]


def _peak(kind: str, values: Tensor, batch: Batch) -> Row:
    """The largest of samples' values, and its sample; of values that are not finite their number."""
    bad = int((~values.isfinite()).sum())
    of = pluralize(bad, "sample") if bad else batch.keys[int(values.argmax())]
    return {kind: math.inf if bad else values.max().item(), f"{kind}_of": of}


def _merged(layer: str, rows: list[Row]) -> Row:
    """A layer's rows of all micro batches as one."""
    found = [row for row in rows if row["layer"] == layer]
    largest = {kind: max(found, key=itemgetter(kind)) for kind in ("activation", "gradient")}
    return {"layer": layer, **{name: row[name] for kind, row in largest.items() for name in (kind, f"{kind}_of")}}


def _own_gradient(
    probe: Probe, batches: Sequence[Batch], losses_of: Losses, config: Config, row: Row
) -> list[tuple[int, float]]:
    """A sample's position, and the norm of its own loss's gradient, through the statistics of its batch-norm group.

    Nothing on other ranks than the sample's. Collective among the ranks that a batch-norm group lies on.
    """
    together, mine = ranks_of_group(config.train), rank_and_world_size()[0]
    if row["rank"] // together != mine // together:
        return []
    batch = batches[row["pass"]]
    with frozen_statistics():
        losses = losses_of(probe, batch)
    place = int(row["position"] - batch.positions[0])
    own = losses[place] if row["rank"] == mine else 0 * losses.sum()
    gradients = torch.autograd.grad(own, list(probe.module.parameters()), allow_unused=True)
    total = 0.0
    for gradient in gradients:
        if gradient is None:
            continue
        if probe.group is not None:
            dist.all_reduce(gradient, group=probe.group)
        total += gradient.double().square().sum().item()
    return [(row["position"], math.sqrt(total))] if row["rank"] == mine else []


def _is_finite(gradient: Tensor | None) -> bool:
    return gradient is None or bool(gradient.isfinite().all())
