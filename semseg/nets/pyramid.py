"""Stage 5: a pyramid of the maps of one stride that a plain vision transformer gives."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from semseg.errors import ConfigError
from semseg.nets.interfaces import Decoder, Logits

FINEST = 4  # pixels of a map of the encoder per pixel of the finest map of the pyramid, along each side
NUM_LEVELS = 4


class Pyramid(nn.Module):
    """Four maps of stride s to maps of strides s/4, s/2, s and 2s: two transposed convolutions, one, none, a pooling.

    As in BEiT (Bao et al. 2021) and ViTDet (Li et al. 2022), with a normalisation that does not depend on the other
    images of the sub-batch. Encoders of patches of 16 pixels give the strides 4, 8, 16 and 32 of UPerNet.

    Args:
        channels: numbers of channels of the maps; of one map, every level is made of it.
        strides: strides of the maps, all the same and a multiple of 4.

    Attributes:
        channels, strides: those of the pyramid.

    Raises:
        ConfigError: for another number of maps.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        if len(channels) not in (1, NUM_LEVELS):
            raise ConfigError(
                f"model.encoder.blocks gives {len(channels)} maps, but a pyramid is made of one map or of "
                f"{NUM_LEVELS}. Choose as many blocks, or set model.encoder.pyramid=false."
            )
        stride = strides[0]
        assert set(strides) == {stride} and stride % FINEST == 0, "an encoder of one stride"
        self.channels = tuple(channels) if len(channels) > 1 else tuple(channels) * NUM_LEVELS
        self.strides = (stride // 4, stride // 2, stride, 2 * stride)
        first, second, _, _ = self.channels
        self.quarter = nn.Sequential(upsample_twice(first), nn.GroupNorm(1, first), nn.GELU(), upsample_twice(first))
        self.halved = upsample_twice(second)
        self.same = nn.Identity()
        self.doubled = nn.MaxPool2d(2, 2, ceil_mode=True)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (N, C, h, w) -> (N, C, 4h, 4w), (N, C, 2h, 2w), (N, C, h, w), (N, C, ceil(h / 2), ceil(w / 2))."""
        levels = (self.quarter, self.halved, self.same, self.doubled)
        sources = maps if len(maps) > 1 else [maps[0]] * NUM_LEVELS
        return [level(features) for level, features in zip(levels, sources, strict=True)]


def upsample_twice(channels: int) -> nn.ConvTranspose2d:
    """(N, C, h, w) -> (N, C, 2h, 2w), learnt."""
    return nn.ConvTranspose2d(channels, channels, 2, 2)


class PyramidDecoder(Decoder):
    """A decoder that reads a pyramid, on an encoder whose maps all have one stride.

    The pyramid belongs to the decoder, so that it is trained with its rate, also on a frozen encoder.

    Args:
        pyramid: of the encoder's maps.
        head: built with the channels of the pyramid.
    """

    reads_pyramid = True

    def __init__(self, pyramid: Pyramid, head: Decoder) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.head = head
        self.feature_level = head.feature_level

    def list_strides(self, strides: Sequence[int]) -> Sequence[int]:
        return self.pyramid.strides

    def forward(self, maps: Sequence[Tensor]) -> Logits:
        """The encoder's maps, all of one size -> logits at the resolution of a level of the pyramid."""
        return self.head(self.pyramid(maps))
