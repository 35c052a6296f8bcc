"""The only module that touches DeepSpeed's internals: what ZeRO-1 shards, seen by parameter name.

ZeRO flattens the parameters of a group, cuts the flat fp32 master into one part per rank, and keeps the moments and
the average (optim.AveragingAdamW) in the same flat shape. A *stretch* is what one rank owns of one named parameter:
`start` and the number of elements in the flattened parameter.

Written against the version in SUPPORTED_DEEPSPEED and refused with any other, because these attributes are private.

Next: engine.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

SUPPORTED_DEEPSPEED = "0.19.8"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Stretch:
    """A rank's part of one parameter: `values[kind]` are flat fp32 views of the live state, kind as in a checkpoint."""

    name: str
    start: int
    values: dict[str, torch.Tensor]


def check_version(version: str) -> None:
    """Raises RuntimeError where the installed DeepSpeed is not the one whose internals this module knows."""
    if version.split("+")[0] != SUPPORTED_DEEPSPEED:
        raise RuntimeError(
            f"DeepSpeed is {version}; checkpoints are written for {SUPPORTED_DEEPSPEED}:"
            f" pip install deepspeed=={SUPPORTED_DEEPSPEED}"
        )


def stretches(engine: Any, with_ema: bool) -> list[Stretch]:
    """What this rank owns, in a fixed order; missing optimizer states are created as zeros (the average as weights)."""
    _create_states(engine, with_ema)
    optimizer, states = engine.optimizer, engine.optimizer.optimizer.state
    found = []
    for group, parameters in enumerate(optimizer.bit16_groups):
        master = optimizer.single_partition_of_fp32_groups[group]
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:  # this rank owns nothing of it
                continue
            flat, own = mapping.hp_fragment_address, mapping.lp_fragment_address
            kinds = {"weight": master.data, **{kind: states[master][kind] for kind in _kinds(with_ema)}}
            values = {kind: tensor.narrow(0, flat.start, flat.numel) for kind, tensor in kinds.items()}
            found.append(Stretch(optimizer.param_names[parameter], own.start, values))
    return found


def finish_loading(engine: Any, applied_steps: int) -> None:
    """Makes the engine train on from states that were written through `stretches`."""
    optimizer = engine.optimizer
    for master in optimizer.single_partition_of_fp32_groups:
        state = optimizer.optimizer.state[master]
        state["step"] = torch.tensor(float(applied_steps), dtype=torch.float32, device=master.device)
    # 0.19.8 links the states of the first group only, once; link all again.
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()
    _refresh(engine, [master.data for master in optimizer.single_partition_of_fp32_groups])


@contextlib.contextmanager
def averaged_weights(engine: Any) -> Iterator[None]:
    """Inside, forward passes use the moving average in place of the weights; the masters are not touched."""
    optimizer = engine.optimizer
    masters = optimizer.single_partition_of_fp32_groups
    _refresh(engine, [optimizer.optimizer.state[master]["ema"] for master in masters])
    try:
        yield
    finally:
        _refresh(engine, [master.data for master in masters])


def _kinds(with_ema: bool) -> tuple[str, ...]:
    return (*MOMENTS, "ema") if with_ema else MOMENTS


def _create_states(engine: Any, with_ema: bool) -> None:
    for master in engine.optimizer.single_partition_of_fp32_groups:
        state = engine.optimizer.optimizer.state[master]
        # AdamW initialises only an empty state: all of its keys, or none.
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        for kind in MOMENTS:
            if kind not in state:
                state[kind] = torch.zeros_like(master.data)
        if with_ema and "ema" not in state:
            state["ema"] = master.data.clone()


@torch.no_grad()
def _refresh(engine: Any, flat_parts: list[torch.Tensor]) -> None:
    """Rewrites the forward weights of all ranks from flat fp32 parts, one for each group; collective."""
    from deepspeed.runtime.utils import all_gather_dp_groups

    optimizer = engine.optimizer
    for group, parts in enumerate(optimizer.parallel_partitioned_bit16_groups):
        own = dist.get_rank(optimizer.real_dp_process_group[group])
        parts[own].data.copy_(flat_parts[group])
    all_gather_dp_groups(
        groups_flat=optimizer.bit16_groups_flat,
        partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
        dp_process_group=optimizer.real_dp_process_group,
        start_alignment_factor=optimizer.nccl_start_alignment_factor,
        allgather_bucket_size=optimizer.allgather_bucket_size,
    )
