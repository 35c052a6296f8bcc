"""torch.compile by block: equal blocks share one compilation, and hooks of blocks, as ZeRO's, stay outside."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .coatnet import CoAtNet

WAYS = 3
"""A part is compiled for training, for passes that add no statistics, and for evaluation."""


def compile_blocks(model: CoAtNet, stem: bool = True) -> None:
    """From now on the blocks, the head and the stem run compiled, each kind of them by what its first forward sees.

    Recomputed blocks have that in their compiled backward, and their hooks run once. Nothing falls back to eager: torch
    raises where a part can't be compiled whole, or would be compiled more often than there are parts and ways.
    """
    compiled: Any = partial(torch.compile, fullgraph=True, dynamic=False)
    recomputed = {block for number in model.recomputed for block in model.stages[number - 1].children()}
    parts: list[nn.Module] = [*([model.stem] if stem else []), *model.blocks(), model.head]
    for part in parts:
        forward = part.forward
        if part in recomputed:
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        part.forward = compiled(forward, recompile_limit=WAYS * len(parts))
    model.recomputed = set()
