"""Stage 5: the interfaces of encoders and decoders.

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

CLASSIFIER_PREFIXES = ("fc.", "classifier.", "head.")  # weights of ImageNet heads, which no encoder keeps


class Logits(NamedTuple):
    """Class scores before the softmax, at the resolution of the features that they come from."""

    main: Tensor  # (N, num_classes, h, w)
    aux: Tensor | None  # (N, num_classes, h', w') of the auxiliary head; None without a head and in eval mode


class WeightsFile(NamedTuple):
    """The published file of an encoder's ImageNet weights."""

    url: str
    digest: str = ""  # "sha256:<hex>", possibly only the first hex digits; empty: unknown


class Encoder(nn.Module, ABC):
    """Turns an image into feature maps, fine to coarse: four of them in most encoders.

    Attributes:
        channels: numbers of channels of the maps.
        strides: strides of the maps, in pixels of the image.
        convention: preprocessing of the pixel values, as in the training of its weights.
        weights_file: its ImageNet weights; None if the user has to provide a file.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    convention: Preprocessing = PREPROCESSING["rgb_mean_std"]
    weights_file: WeightsFile | None = None

    @property
    def size_divisor(self) -> int:
        """Height and width of an image must be multiples of it, so that the deepest map has whole pixels."""
        return max(self.strides)

    @abstractmethod
    def forward(self, image: Tensor) -> list[Tensor]:
        """(N, 3, H, W) normalised -> the maps (N, channels[i], ceil(H / strides[i]), ceil(W / strides[i]))."""

    def convert_weights(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename published weights to the names of the own state dict, without those of the classifier.

        The default is for files that have our names.
        """
        return {name: value for name, value in published.items() if not name.startswith(CLASSIFIER_PREFIXES)}


class Decoder(nn.Module, ABC):
    """Turns an encoder's maps into logits. Built with the encoder's channels and the number of classes.

    Attributes:
        feature_level: index of the map whose resolution the main logits have.
        reads_pyramid: whether it reads maps of several resolutions.
    """

    feature_level: int
    reads_pyramid: bool = False

    @abstractmethod
    def forward(self, maps: Sequence[Tensor]) -> Logits:
        """The encoder's maps, fine to coarse -> logits at the resolution of `maps[feature_level]`."""
