"""Stage 7: from the scaled inputs of one image to class probabilities. Used by all modes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semseg.data.convention import InputConvention
from semseg.nets.normalise import normalise


@torch.no_grad()
def predict_probabilities(
    net: nn.Module,
    scales: Sequence[Tensor],
    out_size: tuple[int, int],
    convention: InputConvention,
    *,
    flip: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """Mean over scales of the softmax of the upsampled logits.

    Args:
        net: a Segmenter in eval mode.
        scales: uint8 RGB images (3, H, W), one per scale.
        out_size: (height, width) of the answer.
        flip: average over each input and its mirror image too.
        device: where `net` is; default: where the inputs are.

    Returns:
        (K, height, width) float32, summing to 1 over K.
    """
    total: Tensor | None = None
    weights = next(net.parameters(), torch.empty(0))  # their type is float32 but for trainer.precision=*-true
    for scale in scales:
        image = normalise(scale.to(device, non_blocking=True).unsqueeze(0), convention).to(
            weights.dtype
        )  # (1, 3, H, W)
        probabilities = upsampled_softmax(net(image).main, out_size)
        if flip:
            mirrored = upsampled_softmax(net(image.flip(-1)).main, out_size)
            probabilities = (probabilities + mirrored.flip(-1)) / 2
        total = probabilities if total is None else total.add_(probabilities)
    assert total is not None, "an image comes in at least one scale"
    return total.div_(len(scales))[0]


def upsampled_softmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, K, h, w) logits -> (N, K, *size) probabilities: upsample first, then softmax, as published."""
    # float32 at least: 150 half-precision probabilities do not sum to 1.
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=False).softmax(1)
