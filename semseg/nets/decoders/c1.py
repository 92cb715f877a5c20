"""Stage 5: C1, the simplest decoder: one 3x3 convolution and a classifier."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from semseg.nets.blocks import conv_norm_relu, init_decoder
from semseg.nets.interfaces import Decoder, Logits


class C1(Decoder):
    """One convolution on the deepest map.

    Args:
        channels: numbers of channels of the encoder's maps.
        num_classes: number of classes of the logits.
        deep_supervision: add an auxiliary head on the second deepest map, for training.
    """

    feature_level = -1

    def __init__(self, channels: Sequence[int], num_classes: int, deep_supervision: bool = False) -> None:
        super().__init__()
        width = channels[-1] // 4
        self.cbr = conv_norm_relu(channels[-1], width, 3)
        if deep_supervision:
            self.cbr_deepsup = conv_norm_relu(channels[-2], width, 3)
        self.conv_last = nn.Conv2d(width, num_classes, 1)
        if deep_supervision:
            self.conv_last_deepsup = nn.Conv2d(width, num_classes, 1)
        self.deep_supervision = deep_supervision
        init_decoder(self)

    def forward(self, maps: Sequence[Tensor]) -> Logits:
        main = self.conv_last(self.cbr(maps[-1]))
        if not (self.deep_supervision and self.training):
            return Logits(main, None)
        return Logits(main, self.conv_last_deepsup(self.cbr_deepsup(maps[-2])))
