"""The memory model: its arithmetic, its counted activations beside a real network's, and whole ranks beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from models.coatnet import CoAtNet
from pipeline.config.parsing import read_config
from pipeline.config.schema import Config, Train, Zero
from pipeline.memory.activations import count_activations, estimates
from pipeline.memory.estimate import BUCKET_ELEMENTS, WIDTH, Activations, Memory, Settings, memory_of
from pipeline.memory.suggest import fits, suggest_settings
from pipeline.training.losses import loss_fn
from pipeline.training.model import build_model, init_weights
from tests.pipeline.peaks import allocator_peak, measured
from tests.pipeline.runs import ROOT

CLASSES = 10


def tiny(*overrides: str) -> Config:
    preset = str(ROOT / "configs" / "tiny.yaml")
    return read_config(preset, ["train.micro_batch=8", "train.global_batch=16", *overrides])


# ------------------------------------------------------------------------------------------------------- arithmetic

BATCH = 1 << 10
stages = st.sampled_from((1, 2, 3))
micro_batches = st.integers(0, 8).map(lambda power: 1 << power)
ranks = st.sampled_from((1, 2, 4))
parameters = st.integers(1, 400_000_000).map(lambda count: 8 * count)  # so that shares are even


def train_of(micro_batch: int, recomputed: Any = "none") -> Train:
    return Train(steps=1, global_batch=BATCH, micro_batch=micro_batch, activation_checkpointing=recomputed)


def components(count: int, stage: int, micro_batch: int, world_size: int, activations: int) -> dict[str, int]:
    alive = Activations({"stage 1": activations}, activations)
    settings = (train_of(micro_batch), Zero.model_validate({"stage": stage}), world_size)
    return memory_of(count, alive, settings, 224, on_gpu=True).components


@given(parameters, stages, micro_batches, ranks, st.integers(0, 1 << 40))
def test_optimizer_states_and_ema_are_sharded_at_every_stage_weights_at_the_third(
    count: int, stage: int, micro_batch: int, world_size: int, activations: int
) -> None:
    found = components(count, stage, micro_batch, world_size, activations)
    share = -(-count // world_size)
    assert (found["optimizer states"], found["moving average"]) == (3 * WIDTH * share, WIDTH * share)
    assert found["weights"] >= WIDTH * (count if stage < 3 else share)
    assert all(size >= 0 for size in found.values())


of_several_buckets = st.integers(BUCKET_ELEMENTS // 4, 400_000_000).map(lambda count: 8 * count)
"""Parameters; the gradients of fewer may all wait for their bucket, beside those of earlier passes."""


@given(of_several_buckets, micro_batches, ranks, st.integers(0, 1 << 40))
def test_neither_a_higher_stage_nor_twice_the_ranks_needs_more_memory(
    count: int, micro_batch: int, world_size: int, activations: int
) -> None:
    first, second = (components(count, stage, micro_batch, world_size, activations) for stage in (1, 2))
    assume(BATCH // micro_batch > world_size > 1)  # with one pass the first stage's are among the activations
    assert sum(second.values()) <= sum(first.values())
    wider = components(count, 2, micro_batch, 2 * world_size, activations)
    assert sum(wider.values()) <= sum(second.values())


def test_dali_counts_on_a_gpu_twice_where_a_set_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.memory.activations.count_activations", lambda *_: Activations({}, 0))

    def decoding(device: str, *overrides: str) -> int:
        config = tiny(*overrides)
        return estimates(config, CLASSES, device)((config.train, config.zero, 1))[0].components["decoding"]

    once = decoding("cuda", "data.val=null")
    assert decoding("cpu") == 0 < once and decoding("cuda", "data.val=set") == 2 * once
    assert decoding("cuda", "data.val=null", "model.resolution=64") > once


def linear(per_sample: int, fixed: int, of_stages: tuple[int, ...]) -> Callable[[Settings], tuple[Memory, Activations]]:
    """The estimate of a network whose stages take these shares of a sample, and a tenth where recomputed."""

    def estimate(settings: Settings) -> tuple[Memory, Activations]:
        train, zero, world_size = settings
        done = train.activation_checkpointing
        recomputed = range(1, 5) if done == "all" else () if done == "none" else done
        shares = sum(share // 10 if stage in recomputed else share for stage, share in enumerate(of_stages, 1))
        needed = fixed // (world_size if zero.stage == 3 else 1) + per_sample * train.micro_batch * shares
        return Memory({"all": needed}), Activations({f"stage {n}": size for n, size in enumerate(of_stages, 1)}, 0)

    return estimate


@given(
    st.integers(1, 1000), st.integers(0, 10**7), st.tuples(*[st.integers(1, 100)] * 4), micro_batches, ranks,
    st.integers(1, 10**8),
)  # fmt: skip
def test_a_suggestion_fits_and_the_next_larger_or_less_recomputed_does_not(
    per_sample: int, fixed: int, of_stages: tuple[int, ...], micro_batch: int, world_size: int, usable: int
) -> None:
    estimate, by_size = linear(per_sample, fixed, of_stages), sorted(range(1, 5), key=lambda s: -of_stages[s - 1])
    zero = Zero(stage=1)

    def fitting(**change: Any) -> bool:
        changed = train_of(micro_batch).model_copy(update=change)
        return fits(estimate((changed, zero, world_size))[0].total, usable)

    suggestions = suggest_settings((train_of(micro_batch), zero, world_size), estimate, usable)
    assert all(fits(suggestion.bytes, usable) for suggestion in suggestions)
    found = {key: value for suggestion in suggestions for key, value in suggestion.changes.items()}
    if "zero.stage" in found:
        assert not fitting(micro_batch=1) or micro_batch == 1
        assert not fitting(activation_checkpointing="all")
        return
    smaller = [1 << power for power in range(9) if 1 << power < micro_batch]
    assert found.get("train.micro_batch") == max((n for n in smaller if fitting(micro_batch=n)), default=None)
    lists = [tuple(sorted(by_size[:count])) for count in (1, 2, 3)] + ["all"]
    first = next((each for each in lists if fitting(activation_checkpointing=each)), None)
    assert found.get("train.activation_checkpointing") == first


def test_where_states_alone_do_not_fit_a_higher_stage_is_suggested_else_more_ranks() -> None:
    settings = (train_of(1), Zero(stage=1), 2)
    fixed = linear(1, 1000, (1, 1, 1, 1))
    assert [str(suggestion) for suggestion in suggest_settings(settings, fixed, 600)] == ["zero.stage=3"]
    (more_ranks,) = suggest_settings(settings, fixed, 300)
    assert more_ranks.changes == {"ranks": 4, "zero.stage": 3, "train.activation_checkpointing": "all"}
    assert suggest_settings(settings, linear(1, 1000, (1000,) * 4), 300) == []


# --------------------------------------------------------------------------------------- activations of real networks

KINDS = {
    "plain": ["train.precision=fp32"],
    "half recomputed in bf16": ["train.activation_checkpointing=[1,3]", "train.precision=bf16"],
    "bf16, norm by groups, sdpa": ["train.precision=bf16", "train.batch_norm_group=4", "model.attention=sdpa"],
    "more blocks than are counted, half recomputed": [
        "model.stages=[{kind: mbconv, blocks: 6, width: 24}, {kind: transformer, blocks: 7, width: 64}]",
        "train.activation_checkpointing=[2]", "train.precision=bf16",
    ],
    "recomputed, layer norm, sigmoid, no drops": [
        "train.activation_checkpointing=all", "model.norm=layer", "train.loss=sigmoid", "train.stochastic_depth=0",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_counted_activations_are_those_of_a_real_networks_autograd_and_allocator(kind: str) -> None:
    config = tiny(*KINDS[kind])
    counted = count_activations(config.model, config.train, config.augment, CLASSES, "cpu", gradients_stay=True)
    network = build_model(config.model, config.train, CLASSES, torch.device("cpu"), init_weights(0))
    one_pass(network, config)  # what is allocated once for all
    saved, own = Storages(), {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    for parameter in network.parameters():
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        one_pass(network, config, saved)
    kept = sum(size for place, size in saved.found.items() if place not in own)
    assert counted.kept == pytest.approx(kept, rel=0.05)
    assert sum(counted.peak.values()) == pytest.approx(allocator_peak(profiled), rel=0.05)


class Storages:
    """The storages that autograd saves, by address; they live until the backward."""

    def __init__(self) -> None:
        self.found: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.found[storage.data_ptr()] = storage.nbytes()
        return tensor


DEEP = "model.stages=[{kind: mbconv, blocks: 6, width: 24}, {kind: transformer, blocks: 7, width: 64}]"


@pytest.mark.parametrize(("recomputed", "device"), [("all", "cpu"), ("[1]", "cuda")])
def test_a_block_that_stands_for_many_counts_as_all_of_them_do(
    recomputed: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(DEEP, f"train.activation_checkpointing={recomputed}", "train.precision=bf16")

    def counted(gradients_stay: bool) -> Activations:
        return count_activations(config.model, config.train, config.augment, CLASSES, device, gradients_stay)

    short = [counted(stay) for stay in (True, False)]
    monkeypatch.setattr("pipeline.memory.activations.DISTINCT_BLOCKS", 100)
    for few, all_blocks in zip(short, [counted(stay) for stay in (True, False)], strict=True):
        assert sum(few.peak.values()) == pytest.approx(sum(all_blocks.peak.values()), rel=0.01)
        assert few.kept == pytest.approx(all_blocks.kept, rel=1e-3)
        assert few.work.operations == all_blocks.work.operations and few.work.calls == all_blocks.work.calls


def test_a_gpus_attention_keeps_no_weights_and_bf16_half_of_fp32() -> None:
    """No GPU is needed."""
    network = ["model.stages=[{kind: transformer, blocks: 2, width: 64, stride: 1}]", "train.precision=bf16"]

    def kept(device: str, *more: str) -> int:
        config = tiny(*network, *more)
        return count_activations(config.model, config.train, config.augment, CLASSES, device, False).kept

    tokens, samples, blocks = 32 * 32, 8, 2
    weights = blocks * samples * 4 * tokens**2
    assert kept("cpu", "model.attention=reference") > 2 * weights
    assert kept("cuda") < 2 * weights
    assert kept("cuda") < 0.6 * kept("cuda", "train.precision=fp32")  # layer norms too


def one_pass(network: CoAtNet, config: Config, saved: Storages | None = None) -> None:
    n, side, bf16 = config.train.micro_batch, config.model.resolution, config.train.precision == "bf16"
    images = torch.zeros(n, 3, side, side).contiguous(memory_format=torch.channels_last)
    factors = torch.ones(n, network.branches) if config.train.stochastic_depth else None
    hooks = torch.autograd.graph.saved_tensors_hooks((saved or Storages()).pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = network(images, factors)
    loss_fn(logits, torch.zeros(n, 1, dtype=torch.int64), config.train.loss, 0.1).backward()


# ------------------------------------------------------------------------------------------------------- whole ranks

WIDE = ["model.stages=[{kind: mbconv, blocks: 1, width: 64}, {kind: transformer, blocks: 2, width: 512}]"]
"""A network whose states count for more than its activations."""


def case(stage: int, micro_batch: int, rounds: int, *more: str) -> list[str]:
    batches = [f"train.micro_batch={micro_batch}", f"train.global_batch={2 * rounds * micro_batch}"]
    return [str(ROOT / "configs" / "tiny.yaml"), f"zero.stage={stage}", *batches, *more]


@pytest.mark.parametrize(
    "cases",
    [
        [case(1, 8, 2), case(2, 8, 2), case(2, 2, 2, *WIDE), case(3, 8, 2, "train.precision=bf16")],
        pytest.param(
            [
                each
                for stage in (1, 2, 3)
                for each in (
                    case(stage, 8, 1),
                    case(stage, 8, 2, "train.activation_checkpointing=all"),
                    case(stage, 2, 2, *WIDE),
                    case(stage, 2, 1, *WIDE),
                )
            ],
            marks=pytest.mark.torture,
        ),
    ],
    ids=["few", "many"],
)
def test_the_peak_of_two_ranks_is_the_estimate_to_five_percent(cases: list[list[str]], tmp_path: Path) -> None:
    for arguments, (peak, estimate) in zip(cases, measured(2, cases, tmp_path), strict=True):
        assert estimate == pytest.approx(peak, rel=0.05), arguments
