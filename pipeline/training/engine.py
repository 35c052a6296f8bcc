"""All that DeepSpeed is asked for: the process group, and an engine that accumulates, clips, shards and steps.

Nothing here needs a compiler: torch's own fused AdamW replaces DeepSpeed's operators, and its shared-memory collective
for CPUs, which it would compile at start-up, is switched off.
"""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from data.order import accumulation_steps
from models.coatnet import CoAtNet
from models.compiled import compile_blocks
from models.norm import across_ranks, frozen_statistics
from pipeline.config.batch_size import micro_batches_of, ranks_of_group
from pipeline.config.schema import Config, Optim, Train, Zero
from pipeline.distributed.environment import rank_and_world_size
from pipeline.distributed.gpu import join_over_nccl, sum_in_fixed_order
from pipeline.plan import Plan
from pipeline.training import zero
from pipeline.training.ema import Statistics, swapped
from pipeline.training.model import (
    InitialWeights,
    ShardLayer,
    check_attention,
    empty_weights,
    init_weights,
    load_values,
    meta_model,
)
from pipeline.training.optimizer import AdamWWithEma, parameter_groups

TIMEOUT_SECONDS = 1800.0
BUCKET_ELEMENTS = 50_000_000
"""Elements that travel in one collective: 200 MB, enough for any network, and little beside a model that is sharded."""
LIVE_ELEMENTS = 200_000_000
"""Elements of gathered parameters that stage 3 keeps at a time, a large layer and what is fetched ahead."""

STAY_GATHERED = 100_000
"""Elements of the largest parameters that stage 3 keeps whole on every rank, once gathered: DeepSpeed's default."""


def start_process_group(timeout_seconds: float = TIMEOUT_SECONDS) -> torch.device:
    """Joins the process group that RANK, WORLD_SIZE, MASTER_ADDR ... describe, once; returns this rank's device.

    A collective fails after twice that many seconds: before, the rank that it waits for is named (watchdog.py).
    """
    on_gpu, timeout = torch.cuda.is_available(), datetime.timedelta(seconds=2 * timeout_seconds)
    deepspeed = import_deepspeed()
    zero.check_version(deepspeed.__version__)
    if on_gpu and dist.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = join_over_nccl(timeout) if on_gpu else torch.device("cpu")
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", timeout=timeout, verbose=False)
    return device


def import_deepspeed() -> Any:
    """DeepSpeed, without the compilers that it would load or look for, and without its log lines."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|deepspeed")
    import deepspeed
    import deepspeed.ops

    with mock.patch("torch.compile", lambda function: function):  # its import would load a compiler: a second or two
        import deepspeed.runtime.zero.muon.original_muon  # which we never use, and initialize imports
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its import sets a level of its own
    vars(deepspeed.ops)["__compatible_ops__"] = {}  # none; to find out which it could build takes a compiler
    return deepspeed


def zero3_init(train: Train, optim: Optim, zero: Zero) -> ShardLayer | None:
    """What takes a layer's parameters apart while a network is built, where the stage asks for it; collective."""
    if zero.stage < 3:
        return None
    import deepspeed

    settings = _settings(train, optim, zero)

    def shard(layer: nn.Module) -> None:
        deepspeed.zero.Init(module=layer, config_dict_or_path=settings)

    return shard


def build_initial_model(
    config: Config, plan: Plan, device: torch.device, initial_weights: InitialWeights | None
) -> CoAtNet:
    """The network, its parameters sharded at ZeRO-3, with its initial weights; zeros where a checkpoint's follow."""
    check_attention(config.model, device)
    if config.train.deterministic and device.type == "cuda":
        sum_in_fixed_order()
    network = meta_model(config.model, config.train, len(plan.train.classes))
    shard = zero3_init(config.train, config.optim, config.zero)
    if not plan.is_new_run:
        return load_values(network, device, empty_weights, shard)
    if initial_weights is not None:
        return initial_weights(network, device, shard)
    return load_values(network, device, init_weights(config.run.seed), shard)


def zero3_leaves(model: CoAtNet) -> list[nn.Module]:
    """What ZeRO-3 gathers, and whose gradients it takes, as a whole: one hook for each, and not for every layer.

    Not the stem, whose input needs no gradient: DeepSpeed would take the stem's before they are made.
    """
    return [*model.blocks(), model.head]


def build_engine(model: CoAtNet, train: Train, optim: Optim, sharding: Zero) -> Any:
    """A DeepSpeed engine around the model: ZeRO, accumulation over a global batch, clipping, bf16 autocast."""
    import deepspeed

    if (together := ranks_of_group(train)) > 1:
        neighbours: Any = dist.new_subgroups(together)[0]
        across_ranks(model, neighbours)
    if sharding.stage == 3:
        for leaf in zero3_leaves(model):
            deepspeed.utils.set_z3_leaf_module(leaf, True)
    groups = parameter_groups(model, optim.weight_decay)
    optimizer = AdamWWithEma(groups, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_settings(train, optim, sharding))
    zero.flatten_gradients(engine)
    if train.compile:
        compile_blocks(model, stem=sharding.stage < 3)  # after initialize, whose hooks are around the blocks
    return engine


def _settings(train: Train, optim: Optim, zero: Zero) -> dict[str, Any]:
    """DeepSpeed's configuration; its defaults are spelled out where ours differ."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(micro_batches_of(train), rank_and_world_size()[1]),
        "gradient_clipping": optim.grad_clip_norm,
        "zero_optimization": {
            "stage": zero.stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "contiguous_gradients": False,  # no copy of a gradient for its bucket alone
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": STAY_GATHERED,
            "stage3_max_live_parameters": LIVE_ELEMENTS,
            "stage3_max_reuse_distance": LIVE_ELEMENTS,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro batch, to print nothing
    }
    if zero.offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW runs there too, and needs no compiler
    if train.precision == "bf16":
        # No module's gradients travel in bf16: sums over ranks and passes stay fp32.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return settings


def set_schedule(engine: Any, learning_rate: float, ema_decay: float | None) -> None:
    """Sets what the next optimizer step uses."""
    optimizer = engine.optimizer.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.decay = ema_decay


def gradient_scale(train: Train) -> float:
    """What makes DeepSpeed's mean of gradients, over all passes of all ranks, one over the micro batches alone."""
    micro_batches, world_size = micro_batches_of(train), rank_and_world_size()[1]
    return accumulation_steps(micro_batches, world_size) * world_size / micro_batches


@contextmanager
def padding_pass(engine: Any) -> Iterator[None]:
    """Inside, a rank that has no micro batch left runs a pass like any other, of which nothing counts.

    Its gradients are replaced by zeros; times 0 they could still be NaN.
    """
    hooks = [parameter.register_hook(torch.zeros_like) for parameter in engine.module.parameters()]
    with frozen_statistics():
        yield
    for hook in hooks:
        hook.remove()


@contextmanager
def evaluation_mode(engine: Any, average: Statistics | None) -> Iterator[None]:
    """Inside, the engine's forward has no gradients and evaluation's behaviour; with an average, its weights too."""
    engine.eval()
    with torch.no_grad(), ExitStack() as averaged:
        if average is not None:
            averaged.enter_context(zero.ema_weights(engine))
            averaged.enter_context(swapped(engine.module, average))
        yield
    engine.train()
