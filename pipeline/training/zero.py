"""The only module that touches DeepSpeed's internals: what ZeRO shards, seen by parameter name.

ZeRO keeps a rank's fp32 masters as a few flat tensors, and the moments and the average (optimizer.AdamWWithEma) in the
same flat shapes. Stages 1 and 2 flatten the parameters of a group and cut the whole into one part per rank; stage 3
cuts every parameter by itself. A *slice* is what one rank owns of one named parameter: `start` and the number of
elements in the flattened parameter.

A step's gradients are made flat too (`flatten_gradients`), so that what follows the last backward costs some operations
a group, where DeepSpeed's own costs several a parameter.

Written against the version in SUPPORTED_DEEPSPEED and refused with any other, because these attributes are private.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.distributed.collectives import all_reduce_sum

SUPPORTED_DEEPSPEED = "0.19.8"
MOMENTS = ("exp_avg", "exp_avg_sq")
ROW = 1 << 14
"""Elements whose squares are added in fp32; their sums in fp64, so that millions of them lose no digits."""


@dataclass(frozen=True)
class ParamSlice:
    """A rank's part of one parameter: `values[kind]` are flat fp32 views of the live state, kind as in a checkpoint."""

    name: str
    start: int
    values: dict[str, torch.Tensor]


def check_version(version: str) -> None:
    """Raises RuntimeError where the installed DeepSpeed is not the one whose internals this module knows."""
    if version.split("+")[0] != SUPPORTED_DEEPSPEED:
        raise RuntimeError(
            f"DeepSpeed is {version}, but checkpoints rely on the internals of {SUPPORTED_DEEPSPEED}:"
            f" pip install deepspeed=={SUPPORTED_DEEPSPEED}"
        )


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, whose own is [0] where stage 3 keeps it in parts."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """The whole shapes of all parameters, by name."""
    return {name: whole_shape(parameter) for name, parameter in engine.module.named_parameters()}


def whole_value(engine: Any, parameter: nn.Parameter) -> torch.Tensor:
    """A copy of a parameter's whole value, on every rank; collective where stage 3 keeps it in parts."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], enabled=_in_parts(engine)):
        return parameter.detach().clone()


def owned_slices(engine: Any, with_ema: bool) -> list[ParamSlice]:
    """What this rank owns, in a fixed order; missing optimizer states are created as zeros (the average as weights)."""
    states = engine.optimizer.optimizer.state
    for master in _masters(engine):
        _create_states(states[master], master, with_ema)
    slices = []
    for master, name, offset, start, count in _owned(engine):
        kinds = {"weight": master.data, **{kind: states[master][kind] for kind in _kinds(with_ema)}}
        values = {kind: tensor.narrow(0, offset, count) for kind, tensor in kinds.items()}
        slices.append(ParamSlice(name, start, values))
    return slices


def finish_loading(engine: Any, applied_steps: int) -> None:
    """Makes the engine train on from states that were written through `owned_slices`."""
    optimizer = engine.optimizer
    for master in _masters(engine):
        state = optimizer.optimizer.state[master]
        state["step"] = torch.tensor(float(applied_steps), dtype=torch.float32, device=master.device)
    if not _in_parts(engine):
        # 0.19.8 links the states of the first group only, once; link all again.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    _set_weights(engine, [master.data for master in _masters(engine)])


@contextlib.contextmanager
def ema_weights(engine: Any) -> Iterator[None]:
    """Inside, forward passes use the moving average instead of the weights; afterwards the masters again."""
    masters = _masters(engine)
    # Stage 3 may take the masters themselves for the forward's weights, where both are fp32.
    kept = [master.data.clone() if _is_forward_weight(engine, master) else master.data for master in masters]
    _set_weights(engine, [engine.optimizer.optimizer.state[master]["ema"] for master in masters])
    try:
        yield
    finally:
        _set_weights(engine, kept)


def flatten_gradients(engine: Any) -> None:
    """From now on a rank's gradients are added up where the optimizer takes them: one flat tensor for each master.

    In place of DeepSpeed's own, which copies each parameter's gradient twice more, has a norm for each, and makes every
    weight a view of its flat tensor again after each step. With zero.offload they stay as DeepSpeed has them.
    """
    optimizer = engine.optimizer
    if _in_parts(engine) and not optimizer.offload_optimizer:
        optimizer.__class__ = _with(type(optimizer), _PartsOfGradients)
        optimizer.flat_gradients = optimizer.grad_partitions_flat_buffer.split([len(m) for m in _masters(engine)])
        flat_of = dict(zip(_masters(engine), optimizer.flat_gradients, strict=True))
        optimizer.gradient_of = {
            name: flat_of[master].narrow(0, offset, count) for master, name, offset, _, count in _owned(engine)
        }
    elif not _in_parts(engine) and not optimizer.cpu_offload:
        optimizer.__class__ = _with(type(optimizer), _SharesOfGradients)


def _with(deepspeeds: type, ours: type) -> type:
    """A DeepSpeed optimizer's class with methods of ours before its own."""
    return type(ours.__name__, (ours, deepspeeds), {})


class _FlatGradients:
    """Methods of DeepSpeed's optimizers for all stages."""

    def should_refresh_expected_hook_count(self) -> bool:
        return False  # it needn't count the gradients to come: autograd says when a backward is over


class _SharesOfGradients(_FlatGradients):
    """Methods of DeepSpeed's optimizer for stages 1 and 2."""

    def _use_compact_grad_partition_buffer(self: Any, group: int) -> bool:
        return True  # `averaged_gradients` have a `flat_partition`, which step() takes as it is

    def _buffered_reduce_fallback_preserving_fp32(
        self: Any, gradients: list[torch.Tensor], places: list[tuple[int, int, int]], *_: Any, **__: Any
    ) -> None:
        """Averages a bucket's gradients over the ranks, and adds what this rank owns to its flat gradients."""
        order = sorted(range(len(places)), key=places.__getitem__)
        parameters = [(places[n][0], self.bit16_groups[places[n][0]][places[n][1]]) for n in order]
        flat = self.flatten([gradients[n] for n in order])
        gradients.clear()
        for _group, parameter in parameters:
            parameter.grad = None
        all_reduce_sum(flat)
        runs: list[list[int]] = []  # group, place in the flat gradients, place in the bucket, count
        start = 0
        for group, parameter in parameters:
            if (mapping := parameter._hp_mapping) is not None:
                in_master, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
                run = [group, in_master.start, start + in_parameter.start, in_master.numel]
                last = runs[-1] if runs else [-1, 0, 0, 0]
                if run[:3] == [last[0], last[1] + last[3], last[2] + last[3]]:
                    last[3] += run[3]
                else:
                    runs.append(run)
            start += parameter.numel()
        for group, place, source, count in runs:
            if self.averaged_gradients.get(group) is None:
                zeros = torch.zeros_like(self.single_partition_of_fp32_groups[group].data)
                self.averaged_gradients[group] = SimpleNamespace(flat_partition=zeros)
            own = self.averaged_gradients[group].flat_partition.narrow(0, place, count)
            own.add_(flat.narrow(0, source, count), alpha=1 / dist.get_world_size())

    def scaled_global_norm(self: Any, norm_type: int = 2) -> torch.Tensor:
        return _norm([self.averaged_gradients[group].flat_partition for group in range(len(self.bit16_groups))])

    def unscale_and_clip_grads(self: Any, gradients: list[torch.Tensor], norm: torch.Tensor) -> None:
        """Does not ask whether the norm is finite, for which the host would wait: step() has."""
        if self.clip_grad:
            torch._foreach_mul_(gradients, (self.clip_grad / (norm + 1e-6)).clamp(max=1))

    def _update_model_bit16_weights(self: Any, group: int) -> None:
        """Nothing: the weights are views of their flat tensor already."""


class _PartsOfGradients(_FlatGradients):
    """Methods of DeepSpeed's optimizer for stage 3."""

    def partition_grads(self: Any, parameters: list[nn.Parameter], gradients: list[torch.Tensor]) -> None:
        """Adds a bucket's averaged gradients, of which a rank may own nothing, to its flat gradients."""
        own = [self.gradient_of[self.param_names[p]] for p, g in zip(parameters, gradients, strict=True) if len(g)]
        first = self.micro_step_id == 0
        (torch._foreach_copy_ if first else torch._foreach_add_)(own, [g for g in gradients if len(g)])
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.is_cuda:  # read by the stream of reductions, not its own
                parameter.grad.record_stream(torch.cuda.current_stream())
            parameter.grad = None

    def _get_norm_groups(self: Any) -> list[torch.Tensor]:
        return [_norm(self.flat_gradients)]

    def _prepare_fp32_grad_for_sub_group(self: Any, group: int) -> None:
        self.fp32_partitioned_groups_flat[group].grad = self.flat_gradients[group]

    def _unflatten_partitioned_parameters(self: Any, group: int) -> None:
        """Nothing: the parts are views of their flat tensor already."""


def _norm(flat_gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """The norm over all ranks of what they own."""
    norms = []
    for flat in flat_gradients:
        rows, rest = flat[: len(flat) // ROW * ROW].view(-1, ROW), flat[len(flat) // ROW * ROW :]
        norms += [torch.linalg.vector_norm(rows, dim=1), torch.linalg.vector_norm(rest).view(1)]
    return all_reduce_sum(torch.cat(norms).double().square().sum()).sqrt().float()


def _in_parts(engine: Any) -> bool:
    """Whether the parameters themselves are sharded."""
    return engine.zero_optimization_stage() == 3


def _masters(engine: Any) -> list[torch.Tensor]:
    """This rank's fp32 weights: one flat tensor for each group, or each part of one."""
    optimizer = engine.optimizer
    return optimizer.fp32_partitioned_groups_flat if _in_parts(engine) else optimizer.single_partition_of_fp32_groups


def _owned(engine: Any) -> Iterator[tuple[torch.Tensor, str, int, int, int]]:
    """For each parameter that this rank owns something of: the master it lies in, its name, its place in the master,
    and which elements of the flattened parameter it is, by start and count."""
    optimizer = engine.optimizer
    groups = optimizer.fp16_groups if _in_parts(engine) else optimizer.bit16_groups
    for master, parameters in zip(_masters(engine), groups, strict=True):
        offset = 0
        for parameter in parameters:
            name = optimizer.param_names[parameter]
            if _in_parts(engine):
                size = parameter.ds_tensor.ds_numel  # of every rank's part, the last ones' filling included
                start = dist.get_rank(parameter.ds_process_group) * size
                count = min(size, parameter.ds_numel - start)
                if count > 0:
                    yield master, name, offset, start, count
                offset += size
            elif (mapping := parameter._hp_mapping) is not None:
                in_master, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield master, name, in_master.start, in_parameter.start, in_master.numel


def _kinds(with_ema: bool) -> tuple[str, ...]:
    return (*MOMENTS, "ema") if with_ema else MOMENTS


def _create_states(state: dict[str, torch.Tensor], master: torch.Tensor, with_ema: bool) -> None:
    # AdamW initialises only an empty state: all of its keys, or none.
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
    for kind in MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(master.data)
    if with_ema and "ema" not in state:
        state["ema"] = master.data.clone()


def _is_forward_weight(engine: Any, master: torch.Tensor) -> bool:
    flat = engine.optimizer.fp16_partitioned_groups_flat if _in_parts(engine) else []
    return any(part.data_ptr() == master.data_ptr() for part in flat)


@torch.no_grad()
def _set_weights(engine: Any, flat_parts: list[torch.Tensor]) -> None:
    """Rewrites the forward weights of all ranks from flat fp32 parts, one for each master; collective."""
    if _in_parts(engine):
        _set_parts(engine, flat_parts)
    else:
        _set_whole(engine, flat_parts)


def _set_parts(engine: Any, flat_parts: list[torch.Tensor]) -> None:
    optimizer = engine.optimizer
    engine.empty_partition_cache()  # what is gathered, or kept whole, would stay as it was
    for flat, part in zip(optimizer.fp16_partitioned_groups_flat, flat_parts, strict=True):
        flat.data.copy_(part)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _set_whole(engine: Any, flat_parts: list[torch.Tensor]) -> None:
    from deepspeed.runtime.utils import all_gather_dp_groups

    optimizer = engine.optimizer
    for group, parts in enumerate(optimizer.parallel_partitioned_bit16_groups):
        rank = dist.get_rank(optimizer.real_dp_process_group[group])
        parts[rank].data.copy_(flat_parts[group])
    all_gather_dp_groups(
        groups_flat=optimizer.bit16_groups_flat,
        partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
        dp_process_group=optimizer.real_dp_process_group,
        start_alignment_factor=optimizer.nccl_start_alignment_factor,
        allgather_bucket_size=optimizer.allgather_bucket_size,
    )
