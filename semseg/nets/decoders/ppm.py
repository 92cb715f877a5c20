"""Stage 5: the pyramid pooling module of PSPNet (Zhao et al. 2017, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from semseg.nets.blocks import GridPool, conv_norm_relu, init_decoder
from semseg.nets.interfaces import Decoder, Logits
from semseg.nets.upsampled_conv import UpsampledConcatConv

GRIDS = (1, 2, 3, 6)
BRANCH_WIDTH = 512


class PPM(Decoder):
    """Pools the deepest map over four grids, convolves each, and concatenates them with the map.

    Args:
        channels: numbers of channels of the encoder's maps.
        num_classes: number of classes of the logits.
        deep_supervision: add an auxiliary head on the second deepest map, for training.
    """

    feature_level = -1

    def __init__(self, channels: Sequence[int], num_classes: int, deep_supervision: bool = False) -> None:
        super().__init__()
        deepest = channels[-1]
        self.ppm = nn.ModuleList(
            nn.Sequential(GridPool(bins), *conv_norm_relu(deepest, BRANCH_WIDTH, 1)) for bins in GRIDS
        )
        if deep_supervision:
            self.cbr_deepsup = conv_norm_relu(channels[-2], deepest // 4, 3)
        self.conv_last = UpsampledConcatConv(
            *conv_norm_relu(deepest + len(GRIDS) * BRANCH_WIDTH, BRANCH_WIDTH, 3),
            nn.Dropout2d(0.1),
            nn.Conv2d(BRANCH_WIDTH, num_classes, 1),
        )
        if deep_supervision:
            self.conv_last_deepsup = nn.Conv2d(deepest // 4, num_classes, 1)
            self.dropout_deepsup = nn.Dropout2d(0.1)
        self.deep_supervision = deep_supervision
        init_decoder(self)

    def forward(self, maps: Sequence[Tensor]) -> Logits:
        deepest = maps[-1]  # (N, C, h, w)
        branches = [branch(deepest) for branch in self.ppm]  # (N, 512, bins, bins)
        main = self.conv_last([deepest, *branches])
        if not (self.deep_supervision and self.training):
            return Logits(main, None)
        features = self.dropout_deepsup(self.cbr_deepsup(maps[-2]))
        return Logits(main, self.conv_last_deepsup(features))
