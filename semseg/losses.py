"""Stage 6: how far the logits are from the labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from semseg.data.classes import IGNORED
from semseg.nets.features import Logits


class Loss(NamedTuple):
    """Scalars of one sub-batch. `total` carries the gradient; the others are detached."""

    total: Tensor  # main + deepsup_weight * aux
    correct: Tensor  # int64: scored pixels whose class is right
    scored: Tensor  # int64: pixels with a label


def segmentation_loss(logits: Logits, label: Tensor, deepsup_weight: float = 0.4, average: str = "ranks") -> Loss:
    """Cross entropy of the main and the auxiliary logits.

    Args:
        logits: main (N, K, h, w), aux (N, K, h', w') or None; any float type.
        label: (N, h, w) int64, -1 = not scored.
        deepsup_weight: factor of the auxiliary cross entropy.
        average: over the processes of a distributed run: "ranks", the mean of each rank's mean over
            its own scored pixels (as published), or "pixels", the mean over the scored pixels of all
            ranks. With one process both are the same.

    A sub-batch with nothing to score has the loss 0 and zero gradients, never NaN.
    """
    scored = (label != IGNORED).sum()
    main = _fitted(logits.main, label)
    total = _cross_entropy_sum(main, label)
    if logits.aux is not None and deepsup_weight:
        total = total + deepsup_weight * _cross_entropy_sum(_fitted(logits.aux, label), label)
    # (N, h, w) -> int64 counts, exact whatever the precision of the logits.
    correct = (main.detach().argmax(1) == label).sum()
    return Loss(total / _denominator(scored.to(total.dtype), average), correct, scored)


def _fitted(logits: Tensor, label: Tensor) -> Tensor:
    """`logits` in float32 or wider, at the resolution of `label`.

    The two differ for the auxiliary head of an undilated encoder, which is finer than the main one,
    and where model.label_stride is set by hand.
    """
    # Sums over thousands of pixels lose digits in half precision.
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if wide.shape[-2:] == label.shape[-2:]:
        return wide
    return F.interpolate(wide, size=label.shape[-2:], mode="bilinear", align_corners=False)


def _cross_entropy_sum(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits, label, ignore_index=IGNORED, reduction="sum")


def _denominator(scored: Tensor, average: str) -> Tensor:
    """What the sum over this rank's pixels is divided by; DDP then takes the mean over ranks."""
    if average == "pixels" and dist.is_available() and dist.is_initialized():
        everywhere = scored.clone()
        dist.all_reduce(everywhere)
        return everywhere.clamp(min=1) / dist.get_world_size()
    return scored.clamp(min=1)
