"""Batch normalisation over groups of samples, whose running statistics move once per step and not once per forward.

A group is a fixed set of consecutive samples, so what a sample is normalised by does not depend on the number of ranks,
nor on how many groups a forward holds; where a group lies on several ranks, they synchronise (`across_ranks`). Each
training forward adds up its groups' statistics; the training loop takes the sums (`pop_statistics`), adds them
over the ranks, and applies them (`apply_statistics`), or drops them with the step. A forward that repeats another
(activation checkpointing), or that only takes part in collectives, is run under `frozen_statistics` and adds none.
Layer normalisation, of rows and of maps, is here too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

_adds_statistics = True  # plain, for the compiler to see: forwards run one at a time


@contextmanager
def frozen_statistics() -> Iterator[None]:
    """Inside, forwards count for nothing in the running statistics."""
    global _adds_statistics
    before, _adds_statistics = _adds_statistics, False
    try:
        yield
    finally:
        _adds_statistics = before


class BatchNorm2d(nn.Module):
    """Maps [n, width, h, w], normalised per group of `group` consecutive samples in training (None: all n are one).

    In evaluation by the running statistics, as `nn.BatchNorm2d`, whose parameter and buffer names it has. `momentum`
    is the weight of the new statistics. `ranks` is set by `across_ranks`. ValueError where n is not a multiple of the
    group, or not each rank's equal part of it.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    mean_sum: Tensor
    variance_sum: Tensor
    group_count: Tensor

    def __init__(self, width: int, eps: float = 1e-3, momentum: float = 0.01, group: int | None = None) -> None:
        super().__init__()
        self.eps, self.momentum, self.group = eps, momentum, group
        self.ranks: dist.ProcessGroup | None = None
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.empty(width))
        self.register_buffer("running_var", torch.empty(width))
        self.register_buffer("mean_sum", torch.empty(width), persistent=False)
        self.register_buffer("variance_sum", torch.empty(width), persistent=False)
        self.register_buffer("group_count", torch.empty(1), persistent=False)
        self.reset_statistics()

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """The running statistics of a new network: mean 0, variance 1, nothing added up."""
        self.running_var.fill_(1)
        for zero in (self.running_mean, self.mean_sum, self.variance_sum, self.group_count):
            zero.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if self.ranks is not None:
            return self._normalize_across_ranks(x, self.ranks)
        group = self.group or len(x)
        if len(x) % group:
            raise ValueError(f"{len(x)} samples do not split into groups of {group}; make the micro batch a multiple")
        if group == len(x):  # without a split, whose backward would copy
            return self._normalize(x)
        return torch.cat([self._normalize(part) for part in x.split(group)])

    def _normalize(self, part: Tensor) -> Tensor:
        # With momentum 1 the kernel leaves exactly this group's mean and unbiased variance in the running statistics
        # it is given. They must start finite: the kernel computes 0 x old + new.
        mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y = F.batch_norm(part, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        self._add(mean, variance)
        return y

    def _normalize_across_ranks(self, x: Tensor, ranks: dist.ProcessGroup) -> Tensor:
        if self.group is None or len(x) * ranks.size() != self.group:
            raise ValueError(f"{len(x)} samples on each of {ranks.size()} ranks do not make a group of {self.group}")
        with torch.autocast(x.device.type, enabled=False):
            y, mean, variance = _AcrossRanks.apply(x, self.weight, self.bias, self.eps, ranks)
        if ranks.rank() == 0:  # the group counts once
            self._add(mean, variance)
        return y

    def _add(self, mean: Tensor, variance: Tensor) -> None:
        if _adds_statistics:
            self.mean_sum.add_(mean)
            self.variance_sum.add_(variance)
            self.group_count.add_(1)

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}, eps={self.eps}, momentum={self.momentum}, group={self.group}"


class _AcrossRanks(torch.autograd.Function):
    """One group whose samples lie in equal parts on several ranks; also gives its mean and unbiased variance.

    Variances are put together from deviations (Chan et al. 1983), since E[x^2] - E[x]^2 cancels. torch's local
    SyncBatchNorm takes CUDA tensors only.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, ranks: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = x if x.dtype == torch.float64 else x.float()
        local = wide.numel() // wide.shape[1]
        parts = _all_gather(torch.stack(torch.var_mean(wide, (0, 2, 3), correction=0)), ranks)
        variances, means = parts[:, 0], parts[:, 1]
        mean = means.mean(0)
        variance = (variances + (means - mean) ** 2).mean(0)
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.ranks, ctx.elements = ranks, local * ranks.size()
        factor = scale * weight.to(scale.dtype)
        y = torch.addcmul(_by_channel(bias.to(scale.dtype) - mean * factor), wide, _by_channel(factor)).to(x.dtype)
        unbiased = variance * (ctx.elements / max(1, ctx.elements - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        wide, gradient = x.to(scale.dtype), gradients[0].to(scale.dtype)
        normalized = (wide - _by_channel(mean)) * _by_channel(scale)
        local = torch.stack([gradient.sum((0, 2, 3)), (gradient * normalized).sum((0, 2, 3))])
        of_bias, of_weight = _all_gather(local, ctx.ranks).sum(0) / ctx.elements  # means over the group
        of_x = gradient - _by_channel(of_bias) - normalized * _by_channel(of_weight)
        of_x *= _by_channel(scale * weight.to(scale.dtype))
        return of_x.to(x.dtype), local[1].to(weight.dtype), local[0].to(weight.dtype), None, None


def _all_gather(local: Tensor, ranks: dist.ProcessGroup) -> Tensor:
    """Every rank's tensor, by rank, on all of them: sums of it have the same order, and so the same bits, on each."""
    parts = [torch.empty_like(local) for _ in range(ranks.size())]
    dist.all_gather(parts, local, group=ranks)
    return torch.stack(parts)


def _by_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def across_ranks(model: nn.Module, ranks: dist.ProcessGroup) -> None:
    """From now on the model's batch-norm groups lie on all of these ranks, an equal part of consecutive samples each.

    A training forward holds one part and is collective among the ranks, its backward and recomputations too.
    """
    for norm in _batch_norms(model):
        norm.ranks = ranks


class LayerNorm(nn.LayerNorm):
    """As `nn.LayerNorm`, but under autocast in the type of its input, with statistics in float32: CUDA's autocast would
    cast input, output and both their gradients from and to float32."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.weight.dtype:
            return super().forward(input)
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)  # CUDA's kernel wants one type
        with torch.autocast(input.device.type, enabled=False):
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class LayerNorm2d(LayerNorm):
    """Maps [n, width, h, w] in channels-last memory, each place normalised over its channels, without a copy."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _batch_norms(model: nn.Module) -> Iterator[BatchNorm2d]:
    return (module for module in model.modules() if isinstance(module, BatchNorm2d))


@torch.no_grad()
def pop_statistics(model: nn.Module) -> Tensor:
    """What was seen since the last call, float32 [3, channels of all layers]: sums of means and of variances, and the
    number of groups; zeroes them. Those of several ranks may be added before `apply_statistics`."""
    norms = list(_batch_norms(model))
    if not norms:
        return torch.zeros(3, 0, device=next(model.parameters()).device)
    sums = [[norm.mean_sum for norm in norms], [norm.variance_sum for norm in norms]]
    counts = [norm.group_count.expand_as(norm.mean_sum) for norm in norms]
    seen = torch.cat([*sums[0], *sums[1], *counts]).float().view(3, -1)
    torch._foreach_zero_([*sums[0], *sums[1], *(norm.group_count for norm in norms)])
    return seen


@torch.no_grad()
def apply_statistics(model: nn.Module, seen: Tensor) -> None:
    """Moves the running statistics by `momentum`, once, towards the mean over groups; a count of 0 moves nothing."""
    norms = list(_batch_norms(model))
    if not norms:
        return
    widths = [len(norm.running_mean) for norm in norms]  # a weight may be in parts, on other ranks
    sums, count = seen.to(norms[0].running_mean).split([2, 1])
    targets = (sums / count.clamp(min=1)).view(-1).split(2 * widths)
    weights = (count > 0).to(count).view(-1).split(widths)
    weights = torch._foreach_mul(weights, [norm.momentum for norm in norms])
    running = [*(norm.running_mean for norm in norms), *(norm.running_var for norm in norms)]
    torch._foreach_lerp_(running, targets, 2 * weights)
