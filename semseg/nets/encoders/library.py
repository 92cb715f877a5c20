"""Stage 5: what encoders from other libraries share. The library's network is inside, maps of our contract come out."""

from __future__ import annotations

import math
import re
from abc import abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from semseg.config.preprocessing import PREPROCESSING, Preprocessing
from semseg.nets.blocks import BatchNorm2d
from semseg.nets.interfaces import Encoder, WeightsFile

FINEST_STRIDE = 4  # maps of stride 1 and 2 are left out


class LibraryEncoder(Encoder):
    """A network of another library, without its classifier, as an encoder.

    Weights start as the library starts them, and stochastic depth is at the library's default.

    A network without batch normalisation (ConvNeXt, Swin, ViT) ends its stages in sums whose magnitude grows with
    depth. Segmentation networks of these papers put a LayerNorm on each map, and so does this one. It has no scale and
    shift: the convolution that reads the map has them, the state dict stays the library's own, and no weight idles
    under a decoder that reads the deepest map alone.

    nn.BatchNorm2d layers become ours, for which one value per channel is enough. Subclasses of it that do more (timm's
    BatchNormAct2d) stay as they are: there, a single image whose deepest map is 1 x 1 does not train unsynced.

    Args:
        model: the library's network. Its state dict is ours with the prefix `model.`.
        channels_last: whether it gives (N, H, W, C).
    """

    def __init__(self, model: nn.Module, channels_last: bool) -> None:
        super().__init__()
        for layer in model.modules():
            if type(layer) is nn.BatchNorm2d:
                layer.__class__ = BatchNorm2d
        self.model = model
        self.channels_last = channels_last
        self.normalises_maps = not any(isinstance(layer, _BatchNorm) for layer in model.modules())

    @abstractmethod
    def library_maps(self, image: Tensor) -> list[Tensor]:
        """(N, 3, H, W), multiples of size_divisor -> one map per stride, in the library's order of dimensions."""

    def forward(self, image: Tensor) -> list[Tensor]:
        """As Encoder.forward. An image of another size is padded with 0 to a multiple of size_divisor first."""
        height, width = image.shape[-2:]
        below, right = -height % self.size_divisor, -width % self.size_divisor
        if below or right:
            image = F.pad(image, (0, right, 0, below))
        maps = [self.as_our_map(features) for features in self.library_maps(image)]
        return [
            features[..., : math.ceil(height / stride), : math.ceil(width / stride)]
            for features, stride in zip(maps, self.strides, strict=True)
        ]

    def as_our_map(self, features: Tensor) -> Tensor:
        """One map of the library -> (N, C, h, w), normalised over C if the network leaves that to us."""
        if not self.channels_last:
            features = features.permute(0, 2, 3, 1)  # (N, h, w, C)
        if self.normalises_maps:
            features = F.layer_norm(features, features.shape[-1:])
        return features.permute(0, 3, 1, 2)


def rgb_convention(mean: list[float], std: list[float]) -> Preprocessing:
    """Normalisation as libraries write it: of RGB pixels in 0..1."""
    red_mean, green_mean, blue_mean = mean
    red_std, green_std, blue_std = std
    return PREPROCESSING["rgb_mean_std"]._replace(
        mean=(red_mean, green_mean, blue_mean), std=(red_std, green_std, blue_std)
    )


def weights_file(url: str) -> WeightsFile:
    """A file whose name ends in the first digits of its SHA-256, as those of torch.hub do, or not.

    >>> weights_file("https://download.pytorch.org/models/resnet50-11ad3fa6.pth").digest
    'sha256:11ad3fa6'
    """
    digits = re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
    return WeightsFile(url, f"sha256:{digits[1]}" if digits else "")
