"""Stage 5, the contracts: what an encoder gives and what a decoder makes of it.

Worked shapes for an image of 3 x 480 x 608 (both multiples of the largest stride):

| | channels | strides | maps (height x width) |
|---|---|---|---|
| ResNet-50 | 256, 512, 1024, 2048 | 4, 8, 16, 32 | 120 x 152, 60 x 76, 30 x 38, 15 x 19 |
| ResNet-50, output stride 8 | 256, 512, 1024, 2048 | 4, 8, 8, 8 | 120 x 152, 60 x 76, 60 x 76, 60 x 76 |
| MobileNetV2, output stride 8 | 24, 32, 64, 160, 320 | 4, 8, 8, 8, 8 | 120 x 152, then 60 x 76 |
| HRNetV2-W48, joined | 720 | 4 | 120 x 152 |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from semseg.config.preprocessing import PREPROCESSING, Preprocessing

CLASSIFIERS = ("fc.", "classifier.", "head.")  # ImageNet heads, which no encoder keeps


class Logits(NamedTuple):
    """Class scores before the softmax, at the resolution of the features they were made from."""

    main: Tensor  # (N, num_classes, h, w)
    aux: Tensor | None  # (N, num_classes, h', w') of the auxiliary head; None without one, and in eval mode


class WeightsFile(NamedTuple):
    """Where the ImageNet weights of an encoder are published."""

    url: str
    digest: str = ""  # "sha256:<hex>", where a prefix of the hex digits will do; empty: none is known


class Encoder(nn.Module, ABC):
    """Turns an image into feature maps, fine to coarse: four of them in most encoders.

    Attributes:
        channels: of the maps.
        strides: of the maps, in pixels of the image.
        convention: how pixel values enter it, by the weights it was trained with.
        weights_file: its ImageNet weights; None if they have to come from a file of the user's.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    convention: Preprocessing = PREPROCESSING["rgb_mean_std"]
    weights_file: WeightsFile | None = None

    @property
    def size_divisor(self) -> int:
        """Height and width of an image must be multiples of it: the deepest map has whole pixels."""
        return max(self.strides)

    @abstractmethod
    def forward(self, image: Tensor) -> list[Tensor]:
        """(N, 3, H, W) normalised -> the maps (N, channels[i], ceil(H / strides[i]), ceil(W / strides[i]))."""

    def state_from(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """The entries of its published weights under the names of its own state dict, classifier left out.

        The default is for files that have our names.
        """
        return {name: value for name, value in published.items() if not name.startswith(CLASSIFIERS)}


class Decoder(nn.Module, ABC):
    """Turns an encoder's maps into logits. Built with the encoder's channels and the number of classes.

    Attributes:
        feature_level: index of the map whose resolution the main logits have.
        wants_pyramid: whether it reads maps of several resolutions.
    """

    feature_level: int
    wants_pyramid: bool = False

    @abstractmethod
    def forward(self, maps: Sequence[Tensor]) -> Logits:
        """The encoder's maps, fine to coarse -> logits at the resolution of `maps[feature_level]`."""
