"""Which GPU a rank has, however its launcher shows it the GPUs of its machine; no GPU is needed."""

from __future__ import annotations

import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pipeline.distributed.gpu import check_not_shared, gpu_index, join_over_nccl
from pipeline.errors import UsageError


@given(st.integers(1, 16), st.integers(1, 16), st.data())
def test_a_rank_has_the_gpu_of_its_own_or_that_of_its_number(ranks: int, visible: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, ranks - 1))
    if ranks <= visible or visible == 1:
        assert gpu_index(rank, ranks, visible) == (0 if visible == 1 else rank)
    else:
        with pytest.raises(UsageError, match=f"{ranks} ranks on this machine see {visible} GPUs"):
            gpu_index(rank, ranks, visible)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8))
def test_ranks_are_refused_where_two_have_the_same_gpu(uuids: list[str]) -> None:
    if len(set(uuids)) == len(uuids):
        check_not_shared(uuids)
    else:
        with pytest.raises(UsageError, match="have the same GPU"):
            check_not_shared(uuids)


@pytest.mark.parametrize("others", ["GPU-b", "GPU-a"])
def test_a_rank_bound_to_one_gpu_joins_on_it_and_deepspeed_takes_it(
    monkeypatch: pytest.MonkeyPatch, others: str
) -> None:
    """Local rank 1 of two, whose only visible GPU is GPU-a."""
    store = dist.HashStore()
    store.set("gpu/0", others)
    current, joined = Mock(), Mock()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", current)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-a"))
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", joined)
    if others == "GPU-a":
        with pytest.raises(UsageError, match="ranks 0-1 have the same GPU"):
            join_over_nccl(timedelta(seconds=5))
        return joined.assert_not_called()
    device: Any = join_over_nccl(timedelta(seconds=5))
    assert device == torch.device("cuda", 0)
    current.assert_called_once_with(device)
    assert joined.call_args.kwargs["device_id"] == device
    assert os.environ["LOCAL_RANK"] == "0"
