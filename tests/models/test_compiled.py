"""Networks compiled by block, without Inductor's C++, which tests/pipeline/test_zero.py has."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from models import coatnet
from models.coatnet import CoAtNet
from models.compiled import compile_blocks
from models.norm import frozen_statistics, pop_statistics
from models.variants import Layout, Stage, Stem


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def values(network: CoAtNet, images: Tensor) -> list[Tensor]:
    """Logits, all gradients, and batch norm's sums."""
    network.zero_grad()
    logits = network(images, torch.full((len(images), network.branches), 0.5))
    F.cross_entropy(logits, torch.arange(len(images))).backward()
    gradients = [each.grad.clone() for each in network.parameters() if each.grad is not None]
    return [logits, *gradients, pop_statistics(network)]


@pytest.mark.parametrize("recomputed", [[1], pytest.param([], marks=pytest.mark.torture)])
def test_equal_blocks_share_a_compilation_and_none_falls_back(recomputed: list[int], no_inductor: None) -> None:
    torch.manual_seed(0)
    stages = (Stage("mbconv", 2, 8, 1), Stage("transformer", 2, 8, 1))
    layout = Layout(Stem(2, 8, 2, 3), stages, head_size=8)
    network = coatnet(layout, 4, 16, batch_norm_group=2, activation_checkpointing=recomputed)
    images = torch.randn(4, 3, 16, 16)
    plain = values(network, images)
    compile_blocks(network)
    for _ in range(2):
        for ours, theirs in zip(values(network, images), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    kinds, with_statistics = 4, 2  # stem, both blocks of a stage, head
    assert counters["stats"]["unique_graphs"] == kinds
    with frozen_statistics():
        assert values(network, images)[-1].count_nonzero() == 0
    with torch.no_grad():
        network.eval()(images)
    assert counters["stats"]["unique_graphs"] == 2 * kinds + with_statistics
    with pytest.raises(FailOnRecompileLimitHit):
        for n in range(1, 100):
            network.head(torch.zeros(n, 8, 8, 8))
