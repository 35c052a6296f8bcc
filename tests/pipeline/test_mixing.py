"""Laws of mixup: what is drawn, what is mixed, and that neither ranks nor a kill change a run that mixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.order import positions_of_step, rank_micro_batches
from data.rng import SEEDS, Stream, permutation
from pipeline.training.losses import one_hot
from pipeline.training.mixup import mixup, mixup_lambda
from tests.pipeline.batch_runs import on_ranks
from tests.pipeline.runs import coatnet, curve, last_state, rows

seeds = st.integers(0, SEEDS - 1)
alphas = st.sampled_from([1e-3, 0.2, 0.8, 1.0, 5.0, 1e6])


def mixed_by_a_loop(
    images: np.ndarray, wanted: np.ndarray, weight: float, partners: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    for_images, for_wanted = np.empty_like(images), np.empty_like(wanted)
    for i, partner in enumerate(partners):
        for_images[i] = weight * images[i] + (1 - weight) * images[partner]
        for_wanted[i] = weight * wanted[i] + (1 - weight) * wanted[partner]
    return for_images, for_wanted


@given(seeds, alphas, st.integers(1, 6), st.integers(0, 10**12))
def test_images_and_targets_are_mixed_as_a_slow_loop_mixes_them(seed, alpha, n, number):
    images = np.random.default_rng(0).normal(size=(n, 4, 5, 3)).astype(np.float32)
    wanted = one_hot(torch.arange(n)[:, None] % 3, 3, "softmax")
    positions = number * n + np.arange(n)
    found = mixup(torch.from_numpy(images).permute(0, 3, 1, 2), wanted, alpha, seed, positions)
    partners = permutation(seed, Stream.MIXUP_PARTNERS, number, n)
    expected = mixed_by_a_loop(
        images.transpose(0, 3, 1, 2), wanted.numpy(), mixup_lambda(seed, alpha, number), partners
    )
    for ours, slow in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, slow, rtol=1e-5, atol=1e-6)
    assert found[0].dtype == torch.float32 and found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[1].sum(1).tolist() == pytest.approx([1] * n)


@given(seeds, st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_a_steps_samples_are_mixed_alike_on_any_number_of_ranks(seed, step, micro_batch, world_size):
    """Each image holds its own position, so a mixed one tells who went into it and with what weight."""
    global_batch = 12 * micro_batch
    stream = positions_of_step(step, global_batch).reshape(12, micro_batch)

    def mix(number: int) -> torch.Tensor:
        values = torch.from_numpy(stream[number] % global_batch).float()
        images = values[:, None, None, None].expand(-1, 3, 2, 2)
        return mixup(images, torch.eye(micro_batch), 0.8, seed, stream[number])[0]

    alone = torch.stack([mix(number) for number in range(12)])
    together = torch.empty_like(alone)
    for rank in range(world_size):
        for number in rank_micro_batches(12, rank, world_size):
            together[number] = mix(number)
    assert torch.equal(alone, together)
    weights = {mixup_lambda(seed, 0.8, step * 12 + number) for number in range(12)}
    assert len(weights) == 12  # each of its own


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 5.0])
def test_the_strength_is_distributed_as_beta(alpha):
    """Moments by formula, and the Kolmogorov-Smirnov distance to numpy's own draws (1.95 is passed once in 1000)."""
    found = np.array([mixup_lambda(3, alpha, number) for number in range(6000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert found.mean() == pytest.approx(0.5, abs=4 * np.sqrt(variance / len(found)))
    assert found.var() == pytest.approx(variance, rel=0.07)
    oracle = np.sort(np.random.default_rng(0).beta(alpha, alpha, 10**6))
    bounds = np.linspace(0.0005, 0.9995, 1000)
    ours, theirs = (np.searchsorted(np.sort(values), bounds) / len(values) for values in (found, oracle))
    assert abs(ours - theirs).max() * np.sqrt(len(found)) < 1.95


@given(seeds, alphas, st.integers(0, 2**60))
def test_the_strength_is_a_number_from_0_to_1_for_every_alpha(seed, alpha, number):
    assert 0 <= mixup_lambda(seed, alpha, number) <= 1


def test_golden_strengths_that_existing_runs_depend_on():
    """The machine's logarithm and cosine may differ in the last bit."""
    golden = [0.8086442109235787, 0.9565379050963845, 0.3947912126660935]
    assert [mixup_lambda(0, 0.8, number) for number in range(3)] == pytest.approx(golden, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------- whole runs

STEPS = 8


def job(digits: Path, name: str) -> dict[str, Any]:
    """The tiny configuration, shortened, with mixup and the sigmoid loss, into the digits' folder."""
    data = [f"data.train={digits}/train", f"data.val={digits}/val", f"run.dir={digits}/{name}", "run.seed=7"]
    length = [f"train.steps={STEPS}", "checkpoint.every=4", "checkpoint.keep_last=9", "log.every=1"]
    recipe = ["augment.mixup=0.8", "train.loss=sigmoid", "train.label_smoothing=1e-4", "evaluate.weights=model"]
    precise = ["train.precision=fp32", "optim.eps=1e-3"]
    return {"arguments": ["configs/tiny.yaml", *data, *length, *recipe, *precise]}


def test_mixup_with_the_sigmoid_loss_resumes_alike_on_one_rank_and_on_two(
    digits: Path,
) -> None:
    whole, again, shared = (digits / name for name in ("whole", "again", "shared"))
    on_ranks(1, [job(digits, "whole"), {**job(digits, "again"), "source": str(whole), "step": 4}], digits)
    on_ranks(2, [job(digits, "shared")], digits)
    assert curve(again) == curve(whole)[-len(curve(again)) :] and len(curve(again)) >= STEPS - 4
    assert last_state(again) == last_state(whole)
    one, two = (np.array([row[3] for row in curve(run) if row[3] is not None][:6]) for run in (whole, shared))
    np.testing.assert_allclose(one, two, rtol=1e-5)

    answer = coatnet("evaluate", whole, "--data", f"{digits}/val", "--weights", "model", "--json")
    logged = [row for row in rows(whole / "metrics.jsonl") if "top1" in row][-1]
    assert json.loads(answer.stdout)["loss"] == pytest.approx(logged["eval_loss"], rel=1e-5), answer.stderr
