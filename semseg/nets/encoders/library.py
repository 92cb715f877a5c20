"""Stage 5: the base of encoders that wrap networks of other libraries."""

from __future__ import annotations

import re
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from semseg.config.preprocessing import PREPROCESSING, Preprocessing
from semseg.nets.blocks import BatchNorm2d
from semseg.nets.interfaces import Encoder, WeightsFile
from semseg.nets.padding import pad_image

MIN_STRIDE = 4  # maps of stride 1 and 2 are dropped


class LibraryEncoder(Encoder):
    """A network of another library, without its classifier, as an encoder.

    Weights are initialised by the library, and stochastic depth has the library's default.

    A network without batch normalisation (ConvNeXt, Swin, ViT) ends its stages in sums whose magnitude grows with
    depth. The segmentation networks of these papers put a LayerNorm on each map, and so does this class. The LayerNorm
    has no scale and shift, because the convolution that reads the map has them: the state dict stays the library's own,
    and no weight is unused under a decoder that reads only the deepest map.

    nn.BatchNorm2d layers are replaced by ours, which can train on one value per channel. Subclasses that do more
    (timm's BatchNormAct2d) are kept: with them, a single image whose deepest map is 1 x 1 cannot train unless
    normalisation is synchronised.

    Args:
        model: the library's network. The keys of the encoder's state dict are those of `model` with the prefix
            `model.`.
        channels_last: whether it gives (N, H, W, C).
    """

    def __init__(self, model: nn.Module, channels_last: bool) -> None:
        super().__init__()
        replace_batch_norms(model)
        self.model = model
        self.channels_last = channels_last
        self.normalises_maps = not any(isinstance(layer, _BatchNorm) for layer in model.modules())

    @abstractmethod
    def compute_library_maps(self, image: Tensor) -> list[Tensor]:
        """(N, 3, H, W), multiples of size_divisor -> one map per stride, in the library's order of dimensions."""

    def forward(self, image: Tensor) -> list[Tensor]:
        """As Encoder.forward. Images of other sizes are padded with 0 to a multiple of size_divisor first."""
        height, width = image.shape[-2:]
        padded = pad_image(image, self.size_divisor)
        maps = [self.convert_map(features) for features in self.compute_library_maps(padded)]
        return [
            features[..., : -(-height // stride), : -(-width // stride)]
            for features, stride in zip(maps, self.strides, strict=True)
        ]

    def convert_map(self, features: Tensor) -> Tensor:
        """One map of the library -> (N, C, h, w), normalised over C if the network has no batch normalisation."""
        if not self.channels_last:
            features = features.permute(0, 2, 3, 1)  # (N, h, w, C)
        if self.normalises_maps:
            features = F.layer_norm(features, features.shape[-1:])
        return features.permute(0, 3, 1, 2)


@torch.no_grad()
def replace_batch_norms(model: nn.Module) -> None:
    """Replace every nn.BatchNorm2d in `model` (subclasses excepted) by our BatchNorm2d with the same values."""
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if type(norm) is not nn.BatchNorm2d:
                continue
            ours = BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats).train(
                norm.training
            )
            ours.load_state_dict(norm.state_dict())
            setattr(module, name, ours)


def rgb_preprocessing(mean: list[float], std: list[float]) -> Preprocessing:
    """Preprocessing as libraries define it: mean and standard deviation of RGB pixels in 0..1."""
    red_mean, green_mean, blue_mean = mean
    red_std, green_std, blue_std = std
    return PREPROCESSING["rgb_mean_std"]._replace(
        mean=(red_mean, green_mean, blue_mean), std=(red_std, green_std, blue_std)
    )


def weights_file_at(url: str) -> WeightsFile:
    """A file at a URL; files of torch.hub have the first digits of their SHA-256 at the end of their name.

    >>> weights_file_at("https://download.pytorch.org/models/resnet50-11ad3fa6.pth").digest
    'sha256:11ad3fa6'
    """
    match = re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
    return WeightsFile(url, f"sha256:{match[1]}" if match else "")
