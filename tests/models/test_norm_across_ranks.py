"""A batch-norm group on several ranks is the group on one: against one process that has all of its samples.

The oracle is torch's own batch norm in float64 on the whole group. Real ranks, real collectives.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.coatnet import coatnet
from models.norm import BatchNorm2d, across_ranks, apply_statistics, pop_statistics
from models.variants import Layout, Stage, Stem
from tests.forked import forkserver

RANKS, PART, SIDE = 4, 3, 32
GROUPS = (2, 4)
"""How many ranks a group lies on; of two, 0 and 1 are the first group, 2 and 3 the second."""
TINY = Layout(Stem(2, 8, 2), (Stage("mbconv", 2, 8), Stage("transformer", 1, 16)), head_size=8)


def network(group: int, recomputed: Literal["none", "all"], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    made = coatnet(TINY, 5, SIDE, batch_norm_group=group, activation_checkpointing=recomputed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)) if "weight" in name else parameter + 0.1)
    return made.to(dtype)


def samples() -> Tensor:
    """Those of all ranks, with means and deviations that differ from sample to sample."""
    drawn = torch.randn(RANKS * PART, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return drawn * torch.arange(1, RANKS * PART + 1).view(-1, 1, 1, 1) + 3


def learnt(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """What a forward and backward give: logits, gradients by image and parameter, statistics."""
    x = x.clone().requires_grad_()
    logits = model(x)
    (logits * torch.linspace(-1, 1, 5, dtype=x.dtype)).sum().backward()
    parameters = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits.detach(), "x": x.grad, "parameters": parameters, "statistics": pop_statistics(model)}


def as_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(minutes=2))
    x = samples()[rank * PART : (rank + 1) * PART]
    found: dict[Any, Any] = {}
    recomputations: tuple[Literal["none", "all"], ...] = ("none", "all")
    for size in GROUPS:
        blocks = [dist.new_group(list(range(first, first + size))) for first in range(0, RANKS, size)]
        mine = blocks[rank // size]
        assert isinstance(mine, dist.ProcessGroup)
        for recomputed in recomputations:
            model = network(size * PART, recomputed)
            across_ranks(model, mine)
            found[size, recomputed] = learnt(model, x)
        single = network(size * PART, "none", torch.float32)
        across_ranks(single, mine)
        with torch.autocast("cpu", torch.bfloat16):
            found[size, "bf16"] = single(x.float()).float().detach()
        lone = BatchNorm2d(3, group=size * PART)
        across_ranks(lone, mine)
        with pytest.raises(ValueError, match=f"2 samples on each of {size} ranks do not make a group of {size * PART}"):
            lone(x[:2].float())
    torch.save(found, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [forkserver.Process(target=as_rank, args=(rank, str(folder))) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * RANKS
    return [torch.load(Path(folder, f"rank-{rank}.pt"), weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module", params=GROUPS)
def size(request: pytest.FixtureRequest) -> int:
    return request.param


def alone(size: int) -> nn.Module:
    """The network on one rank, normalised by torch's batch norm, a group at a time."""
    model = network(size * PART, "none")
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, BatchNorm2d):
                theirs = nn.BatchNorm2d(len(child.weight), child.eps).double()
                theirs.load_state_dict(child.state_dict(), strict=False)
                setattr(module, name, theirs)
    return model


@pytest.mark.parametrize("recomputed", ["none", "all"])
def test_values_and_gradients_are_those_of_the_whole_group_on_one_rank(
    by_rank: list[dict[Any, Any]], size: int, recomputed: str
) -> None:
    model, x = alone(size), samples().requires_grad_()
    logits = torch.cat([model(group) for group in x.split(size * PART)])
    (logits * torch.linspace(-1, 1, 5, dtype=x.dtype)).sum().backward()
    found = [rank[size, recomputed] for rank in by_rank]
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(torch.cat([each["logits"] for each in found]), logits.detach(), **close)
    torch.testing.assert_close(torch.cat([each["x"] for each in found]), x.grad, **close)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sum(each["parameters"][name] for each in found), parameter.grad, **close)


@pytest.mark.parametrize("recomputed", ["none", "all"])
def test_statistics_of_all_ranks_are_those_of_one_that_had_all_groups(
    by_rank: list[dict[Any, Any]], size: int, recomputed: str
) -> None:
    one = network(size * PART, "none")
    one(samples())
    torch.testing.assert_close(sum(rank[size, recomputed]["statistics"] for rank in by_rank), pop_statistics(one))


def test_a_group_moves_the_running_statistics_once(by_rank: list[dict[Any, Any]]) -> None:
    """Of one layer: mean and unbiased variance over all of the group's samples, counted as one group."""
    x, whole = samples(), network(RANKS * PART, "none")
    first = next(module for module in whole.modules() if isinstance(module, BatchNorm2d))
    seen = whole.get_submodule("stem.first")(x)
    apply_statistics(whole, torch.stack([rank[4, "none"]["statistics"] for rank in by_rank]).sum(0))
    share = first.momentum
    torch.testing.assert_close(first.running_mean, share * seen.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    variance = seen.var((0, 2, 3), correction=1)
    torch.testing.assert_close(first.running_var, (1 - share) + share * variance, rtol=1e-5, atol=1e-6)


def test_under_autocast_statistics_stay_float32(by_rank: list[dict[Any, Any]], size: int) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(size * PART, "none", torch.float32)(samples().float()).float()
    found = torch.cat([rank[size, "bf16"] for rank in by_rank])
    torch.testing.assert_close(found, logits.detach(), rtol=0.05, atol=0.05)
