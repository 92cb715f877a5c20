"""Stage 5: the pieces that encoders and decoders are made of."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, but one value per channel can be trained on.

    A 1 x 1 map of one image (the coarsest grid of pyramid pooling, one image per device) has no
    variance. It is normalised by the running statistics, which it leaves alone, where nn.BatchNorm2d
    raises an error.
    """

    def forward(self, input: Tensor) -> Tensor:
        one_value = input.shape[0] * input.shape[2] * input.shape[3] == 1
        if self.training and one_value and self.running_mean is not None:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(input)


def conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, batch normalisation, ReLU; "same" padding."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def resize(features: Tensor, like: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, C, height and width of `like`), bilinear, align_corners=False."""
    if features.shape[-2:] == like.shape[-2:]:
        return features
    return F.interpolate(features, size=like.shape[-2:], mode="bilinear", align_corners=False)


class GridPool(nn.Module):
    """Average over a `bins` x `bins` grid of cells: F.adaptive_avg_pool2d as two matrix products.

    The matrices are built from the shape of the input, so that torch.compile and exporters need no
    new graph for every image size, and the backward pass is deterministic on CUDA.

    Both products are made in float32 at least, whatever the type of the input and the autocast: weights
    rounded to bfloat16 would shift every mean of a cell by up to half a percent.
    """

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, bins, bins), of the type of `features`."""
        device = features.device.type
        if not torch.is_autocast_enabled(device):
            return grid_means(features, self.bins)
        with torch.autocast(device, enabled=False):
            return grid_means(features, self.bins)

    def extra_repr(self) -> str:
        return f"bins={self.bins}"


def grid_means(features: Tensor, bins: int) -> Tensor:
    """(N, C, h, w) -> (N, C, bins, bins), of the type of `features`."""
    height, width = features.shape[-2:]
    precise = features.to(torch.promote_types(features.dtype, torch.float32))
    rows = cell_weights(height, bins, precise)  # (bins, h)
    columns = cell_weights(width, bins, precise)  # (bins, w)
    return (rows @ precise @ columns.T).to(features.dtype)


def cell_weights(length: int, bins: int, like: Tensor) -> Tensor:
    """(bins, length) weights of the mean over each cell of an axis, of the type and device of `like`.

    Cell b covers floor(b * length / bins) .. ceil((b + 1) * length / bins) - 1; cells may overlap.
    """
    position = torch.arange(length, device=like.device)
    cell = torch.arange(bins, device=like.device).unsqueeze(1)
    first = cell * length // bins
    end = ((cell + 1) * length + bins - 1) // bins
    inside = (position >= first) & (position < end)
    return inside.to(like.dtype) / (end - first).to(like.dtype)


@torch.no_grad()
def init_encoder(module: nn.Module) -> None:
    """The published start of an encoder: convolutions normal with sqrt(2 / (k * k * out / groups)), norm 1 and 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = math.prod(layer.kernel_size) * layer.out_channels // layer.groups
            layer.weight.normal_(0, math.sqrt(2 / fan_out))
        elif isinstance(layer, nn.BatchNorm2d):
            layer.weight.fill_(1)
            layer.bias.zero_()


@torch.no_grad()
def init_decoder(module: nn.Module) -> None:
    """The published start of a decoder: convolutions Kaiming normal, norm 1 and 1e-4."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.weight.fill_(1)
            layer.bias.fill_(1e-4)
