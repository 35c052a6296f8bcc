"""Laws of the losses: those of slow formulas in float64, for one label or several; and evaluation's figures by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.evaluation import per_sample
from pipeline.training.losses import loss_fn, one_hot

CLASSES = 7
Labels = list[list[int]]

label_sets = st.lists(
    st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=4, unique=True), min_size=1, max_size=6
)
smoothings = st.sampled_from([0.0, 1e-4, 0.1])
seeds = st.integers(0, 2**31)


def filled(labels: Labels) -> torch.Tensor:
    """int64 [n, most]: filled up with -1."""
    most = max(map(len, labels))
    return torch.tensor([each + [-1] * (most - len(each)) for each in labels])


def logits_of(seed: int, samples: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(samples, CLASSES, generator=torch.Generator().manual_seed(seed))


def softmax_by_hand(logits: list[float], labels: list[int], smoothing: float) -> float:
    total = math.fsum(math.exp(x) for x in logits)
    wanted = [(1 - smoothing) * (c in labels) / len(labels) + smoothing / CLASSES for c in range(CLASSES)]
    return -math.fsum(t * (x - math.log(total)) for t, x in zip(wanted, logits, strict=True))


def sigmoid_by_hand(logits: list[float], labels: list[int], smoothing: float) -> float:
    wanted = [(1 - smoothing) * (c in labels) + smoothing / 2 for c in range(CLASSES)]
    yes = [1 / (1 + math.exp(-x)) for x in logits]
    return -math.fsum(t * math.log(p) + (1 - t) * math.log(1 - p) for t, p in zip(wanted, yes, strict=True))


BY_HAND = {"softmax": softmax_by_hand, "sigmoid": sigmoid_by_hand}
kinds = st.sampled_from(["softmax", "sigmoid"])


@given(label_sets, smoothings, seeds, kinds)
def test_each_samples_loss_is_that_of_the_slow_formula_and_a_batch_has_their_mean(labels, smoothing, seed, kind):
    logits = logits_of(seed, len(labels))
    by_hand = [BY_HAND[kind](x, each, smoothing) for x, each in zip(logits.tolist(), labels, strict=True)]
    found = loss_fn(logits, filled(labels), kind, smoothing, reduction="none")
    torch.testing.assert_close(found.double(), torch.tensor(by_hand, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    mean = loss_fn(logits, filled(labels), kind, smoothing)
    assert mean.item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5, abs=1e-5)


@given(label_sets, smoothings, seeds, kinds)
def test_labels_and_the_targets_made_of_them_are_the_same_request(labels, smoothing, seed, kind):
    logits, answers = logits_of(seed, len(labels)), one_hot(filled(labels), CLASSES, kind)
    assert answers.sum(1).tolist() == pytest.approx([1 if kind == "softmax" else len(each) for each in labels])
    assert [set(row.nonzero().flatten().tolist()) for row in answers] == [set(each) for each in labels]
    torch.testing.assert_close(
        loss_fn(logits, answers, kind, smoothing), loss_fn(logits, filled(labels), kind, smoothing)
    )


@given(st.integers(1, 8), smoothings, seeds)
def test_softmax_of_single_labels_is_torchs_own_to_the_bit_with_its_gradient(samples, smoothing, seed):
    """What runs trained by before there were other losses: they resume to the bit."""
    labels = torch.randint(CLASSES, (samples,), generator=torch.Generator().manual_seed(seed))
    ours, theirs = (logits_of(seed, samples).to(torch.bfloat16).requires_grad_() for _ in range(2))
    loss = loss_fn(ours, labels[:, None], "softmax", smoothing)
    oracle = F.cross_entropy(theirs.float(), labels, label_smoothing=smoothing)
    (loss * 3).backward(), (oracle * 3).backward()
    assert torch.equal(loss, oracle) and ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_the_loss_of_bf16_logits_is_float32_and_its_gradients_are_finite(kind, scale):
    logits = logits_of(0, 3, scale).to(torch.bfloat16).requires_grad_()
    loss = loss_fn(logits, filled([[0], [1, 2], [3, 4, 5]]), kind, 1e-4)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad.any()


def test_evaluation_counts_any_of_a_samples_labels():
    """Six classes, ranked 0, 1, 2, 3, 4, 5 by the first three samples and 5, 4, 3, 2, 1, 0 by the last."""
    falling = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    logits = torch.tensor([falling, falling, falling, falling[::-1]])
    labels = torch.tensor([[3, 0], [4, 5], [5, -1], [0, -1]])
    loss, first, in_five, used = per_sample(logits, labels, "softmax")
    assert (first.tolist(), in_five.tolist(), used.tolist()) == ([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1])
    total = math.log(sum(map(math.exp, falling)))
    assert loss.tolist() == pytest.approx([total - 3.5, total - 0.5, total, total])
    yes_or_no = per_sample(logits, labels, "sigmoid")
    every = sum(math.log(1 + math.exp(x)) for x in falling)
    assert yes_or_no[0].tolist() == pytest.approx([every - 7, every - 1, every, every])
    assert torch.equal(yes_or_no[1:], torch.stack([first, in_five, used]))


def test_evaluation_of_fewer_than_five_classes_has_all_of_them_among_the_first_five():
    _, first, in_five, _ = per_sample(torch.tensor([[0.0, 1.0]]), torch.tensor([[0]]), "softmax")
    assert (first.item(), in_five.item()) == (0, 1)
