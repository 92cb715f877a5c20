"""Stage 5: the decoder of SegFormer (Xie et al. 2021, section 3.2): linear layers on the maps of all resolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from semseg.errors import ConfigError
from semseg.nets.blocks import conv_norm_relu, init_decoder
from semseg.nets.interfaces import Decoder, Logits
from semseg.nets.upsampled_conv import UpsampledConcatConv


class SegFormer(Decoder):
    """Brings all maps to the same number of channels, upsamples them to the finest, and mixes them pixel by pixel.

    Args:
        channels: numbers of channels of the encoder's maps.
        num_classes: number of classes of the logits.
        width: number of channels of each map: 256 in SegFormer B0 and B1, 768 in B2 to B5.

    Raises:
        ConfigError: for a width below 1.
    """

    feature_level = 0
    reads_pyramid = True

    def __init__(self, channels: Sequence[int], num_classes: int, width: int = 256) -> None:
        super().__init__()
        if width < 1:
            raise ConfigError(
                f"model.decoder.width={width}: must be at least 1. SegFormer B0 and B1 have 256 channels, B2 to B5 768."
            )
        self.linear = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.fuse = UpsampledConcatConv(*conv_norm_relu(len(channels) * width, width, 1), finest_last=True)
        self.dropout = nn.Dropout(0.1)
        self.conv_last = nn.Conv2d(width, num_classes, 1)
        init_decoder(self)

    def forward(self, maps: Sequence[Tensor]) -> Logits:
        projected = [linear(features) for linear, features in zip(self.linear, maps, strict=True)]
        return Logits(self.conv_last(self.dropout(self.fuse(projected))), None)
