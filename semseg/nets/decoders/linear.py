"""Stage 5: a linear layer on one map, the decoder with which pretrained encoders are compared."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from semseg.nets.blocks import BatchNorm2d
from semseg.nets.interfaces import Decoder, Logits


class Linear(Decoder):
    """Batch normalisation, dropout and a 1 x 1 convolution on the last map.

    The linear evaluation of DINOv2 and DINOv3 on a frozen encoder (Simeoni et al. 2025, section 6.1), with its
    dropout of whole channels and its initialisation.

    Args:
        channels: numbers of channels of the encoder's maps.
        num_classes: number of classes of the logits.
    """

    feature_level = -1

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.norm = BatchNorm2d(channels[-1])
        self.dropout = nn.Dropout2d(0.1)
        self.conv_last = nn.Conv2d(channels[-1], num_classes, 1)
        nn.init.normal_(self.conv_last.weight, std=0.01)
        nn.init.zeros_(self.conv_last.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, maps: Sequence[Tensor]) -> Logits:
        return Logits(self.conv_last(self.dropout(self.norm(maps[-1]))), None)
