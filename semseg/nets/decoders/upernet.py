"""Stage 5: UPerNet (Xiao et al. 2018, section 3.2): pyramid pooling on top of a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from semseg.errors import ConfigError
from semseg.nets.blocks import GridPool, conv_norm_relu, init_decoder, resize
from semseg.nets.decoders.ppm import BRANCH_WIDTH, GRIDS
from semseg.nets.interfaces import Decoder, Logits
from semseg.nets.upsampled_conv import UpsampledConcatConv


class UPerNet(Decoder):
    """Merges all maps of the encoder at the resolution of the finest.

    Args:
        channels: numbers of channels of the encoder's maps.
        num_classes: number of classes of the logits.
        width: number of channels of the feature pyramid: 512 for upernet, 256 for upernet_lite.

    Raises:
        ConfigError: for a width below 1.
    """

    feature_level = 0
    reads_pyramid = True

    def __init__(self, channels: Sequence[int], num_classes: int, width: int = 512) -> None:
        super().__init__()
        if width < 1:
            raise ConfigError(
                f"model.decoder.width={width}: must be at least 1. UPerNet has 512 channels, UPerNet lite 256."
            )
        *finer, deepest = channels
        self.ppm_pooling = nn.ModuleList(GridPool(bins) for bins in GRIDS)
        self.ppm_conv = nn.ModuleList(conv_norm_relu(deepest, BRANCH_WIDTH, 1) for _ in GRIDS)
        self.ppm_last_conv = conv_norm_relu(deepest + len(GRIDS) * BRANCH_WIDTH, width, 3)
        self.fpn_in = nn.ModuleList(conv_norm_relu(count, width, 1) for count in finer)
        self.fpn_out = nn.ModuleList(nn.Sequential(conv_norm_relu(width, width, 3)) for _ in finer)
        self.conv_last = nn.Sequential(
            UpsampledConcatConv(*conv_norm_relu(len(channels) * width, width, 3)),
            nn.Conv2d(width, num_classes, 1),
        )
        init_decoder(self)

    def forward(self, maps: Sequence[Tensor]) -> Logits:
        *finer, deepest = maps
        top = self.pyramid_pooling(deepest)  # (N, width, h, w)
        pyramid = [top]
        # From coarse to fine: each level is its own map plus the level above, upsampled.
        for index in reversed(range(len(finer))):
            lateral = self.fpn_in[index](finer[index])
            top = lateral + resize(top, lateral)
            pyramid.append(self.fpn_out[index](top))
        pyramid.reverse()  # fine to coarse
        return Logits(self.conv_last(pyramid), None)  # at the size of the finest

    def pyramid_pooling(self, deepest: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, width, h, w). Pools, upsamples, then convolves (PPM convolves first)."""
        branches = [
            conv(resize(pool(deepest), deepest)) for pool, conv in zip(self.ppm_pooling, self.ppm_conv, strict=True)
        ]
        return self.ppm_last_conv(torch.cat([deepest, *branches], 1))
