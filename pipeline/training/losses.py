"""The two losses of the paper's recipes, of samples with one label or several.

Labels are int64 [n, most]: a sample's classes, padded with -1. Softmax cross entropy takes them as one distribution,
1 / k at each of k labels. The sigmoid loss asks of each class whether it is there; it is summed over the classes, so
that its size does not shrink with their number, and is then the mean over samples, as in big_vision (`sigmoid_xent`).

Label smoothing e moves e of the answer to the even one: t (1 - e) + e / classes for softmax (Szegedy et al. 2016,
section 7), t (1 - e) + e / 2 for sigmoid, where every class is a question of its own. No CoAtNet code is public; the
latter, and 1 / k, are as in EfficientNetV2, which shares two authors with it (google/automl, efficientnetv2/main.py).
Over 21,843 classes the paper's e = 1e-4 then adds up to an answer of 1.1, and 0.1 would drown the labels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Kind = Literal["softmax", "sigmoid"]
Reduction = Literal["mean", "none"]


def one_hot(labels: torch.Tensor, classes: int, kind: Kind) -> torch.Tensor:
    """The targets of a loss of this kind, without smoothing: float32 [n, classes] from labels [n, most]."""
    padding = labels < 0
    targets = torch.zeros(len(labels), classes + 1, device=labels.device)  # the last column takes the padding
    targets = targets.scatter_(1, labels.masked_fill(padding, classes), 1.0)[:, :classes]
    return targets / targets.sum(1, keepdim=True) if kind == "softmax" else targets


def loss_fn(
    logits: torch.Tensor,
    targets: torch.Tensor,
    kind: Kind,
    smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """float32, the mean over samples or [n], of logits [n, classes] against labels [n, most] or targets [n, classes].

    It is computed in float32 whatever the logits are.
    """
    logits = logits.float()
    if not targets.is_floating_point():
        if kind == "softmax" and targets.shape[1] == 1:  # the same without [n, classes] of memory
            return F.cross_entropy(logits, targets[:, 0], reduction=reduction, label_smoothing=smoothing)
        targets = one_hot(targets, logits.shape[1], kind)
    if kind == "softmax":
        return F.cross_entropy(logits, targets, reduction=reduction, label_smoothing=smoothing)
    smooth = targets * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none").sum(1)
    return losses.mean() if reduction == "mean" else losses
