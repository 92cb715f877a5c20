"""Stage 5, the contracts: what an encoder gives and what a decoder makes of it.

Worked shapes for an image of 3 x 480 x 608 (both multiples of the largest stride):

| | channels | strides | maps (height x width) |
|---|---|---|---|
| ResNet-50 | 256, 512, 1024, 2048 | 4, 8, 16, 32 | 120 x 152, 60 x 76, 30 x 38, 15 x 19 |
| ResNet-50, output stride 8 | 256, 512, 1024, 2048 | 4, 8, 8, 8 | 120 x 152, 60 x 76, 60 x 76, 60 x 76 |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Logits(NamedTuple):
    """Class scores before the softmax, at the resolution of the features they were made from."""

    main: Tensor  # (N, num_classes, h, w)
    aux: Tensor | None  # (N, num_classes, h', w') of the auxiliary head; None without one, and in eval mode


class Encoder(nn.Module, ABC):
    """Turns an image into four feature maps, fine to coarse.

    Attributes:
        channels: of the four maps.
        strides: of the four maps, in pixels of the image.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    @abstractmethod
    def forward(self, image: Tensor) -> list[Tensor]:
        """(N, 3, H, W) normalised -> four maps (N, channels[i], ceil(H / strides[i]), ceil(W / strides[i]))."""


class Decoder(nn.Module, ABC):
    """Turns an encoder's maps into logits. Built with the encoder's channels and the number of classes.

    Attributes:
        feature_level: index of the map whose resolution the main logits have.
    """

    feature_level: int

    @abstractmethod
    def forward(self, maps: Sequence[Tensor]) -> Logits:
        """Four maps, fine to coarse -> logits at the resolution of `maps[feature_level]`."""
