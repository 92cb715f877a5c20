"""Stage 5: layers and initialisations that encoders and decoders share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

_uses_plain_operators = ContextVar("_uses_plain_operators", default=False)


@contextmanager
def plain_operators() -> Iterator[None]:
    """While active, layers run the operators of the published architecture instead of equivalent ones.

    For counting operations, so that the numbers compare with those of papers and other libraries.
    """
    token = _uses_plain_operators.set(True)
    try:
        yield
    finally:
        _uses_plain_operators.reset(token)


def uses_plain_operators() -> bool:
    """Whether `plain_operators` is active; never in a compiled or exported graph."""
    return not torch.compiler.is_compiling() and _uses_plain_operators.get()


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that can train on one value per channel.

    A 1 x 1 map of one image (the coarsest grid of pyramid pooling, one image per device) has no variance.
    nn.BatchNorm2d raises an error there; this layer normalises by the running statistics and does not update them.
    """

    def forward(self, input: Tensor) -> Tensor:
        one_value = input.shape[0] * input.shape[2] * input.shape[3] == 1
        if self.training and one_value and self.running_mean is not None:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(input)


NormFactory = Callable[[int], BatchNorm2d]  # number of channels -> normalisation layer


def conv_norm_relu(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, norm: NormFactory = BatchNorm2d
) -> nn.Sequential:
    """Convolution without bias, batch normalisation, ReLU; "same" padding."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        norm(out_channels),
        nn.ReLU(inplace=True),
    )


def resize(features: Tensor, like: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, C, height and width of `like`), bilinear, align_corners=False."""
    if same_size(features, like):
        return features
    return F.interpolate(features, size=like.shape[-2:], mode="bilinear", align_corners=False)


def same_size(first: Tensor, second: Tensor) -> bool:
    """Whether height and width are equal; in an exported graph of dynamic sizes, whether they are at every size."""
    if not torch.compiler.is_exporting():
        return first.shape[-2:] == second.shape[-2:]
    return all(statically_known_true(a == b) for a, b in zip(first.shape[-2:], second.shape[-2:], strict=True))


def without_autocast(device: str) -> AbstractContextManager[object]:
    """A context in which autocast is off on devices of this type; nothing changes where it is off already."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in another type; the tensor itself if it has that type, so that exported graphs have no cast."""
    return values if values.dtype == dtype else values.to(dtype)


class GridPool(nn.Module):
    """Average over a `bins` x `bins` grid of cells: F.adaptive_avg_pool2d as two matrix products.

    The matrices are built from the shape of the input, so that torch.compile and exporters need no new graph for every
    image size, and the backward pass is deterministic on CUDA.

    Both products are computed in float32 or float64, whatever the type of the input and under autocast: weights rounded
    to bfloat16 would shift every mean of a cell by up to half a percent. On a GPU products of float32 are those of TF32
    (semseg/nets/gpu.py), which shifts it by up to a twentieth of a percent.
    """

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, bins, bins) in the type of `features`."""
        with without_autocast(features.device.type):
            return grid_means(features, self.bins)

    def extra_repr(self) -> str:
        return f"bins={self.bins}"


def to_full_precision(values: Tensor) -> Tensor:
    """The values in float32, or as they are in float64: sums over many of them lose digits in half precision."""
    return cast(values, torch.promote_types(values.dtype, torch.float32))


def grid_means(features: Tensor, bins: int) -> Tensor:
    """(N, C, h, w) -> (N, C, bins, bins) in the type of `features`."""
    if uses_plain_operators():
        return F.adaptive_avg_pool2d(features, bins)
    height, width = features.shape[-2:]
    precise = to_full_precision(features)
    rows = cell_weights(height, bins, precise)  # (bins, h)
    columns = cell_weights(width, bins, precise)  # (bins, w)
    if precise.is_contiguous() or torch.compiler.is_exporting():
        return (rows @ precise @ columns.T).to(features.dtype)
    # Channels last: one product for all channels, where torch.matmul would compute one per channel.
    last = precise.permute(0, 2, 3, 1)  # (N, h, w, C)
    means = columns @ (rows @ last.flatten(2)).unflatten(2, last.shape[2:])  # (N, bins, bins, C)
    return means.permute(0, 3, 1, 2).to(features.dtype)


def cell_weights(length: int, bins: int, like: Tensor) -> Tensor:
    """(bins, length) weights of the mean over each cell of an axis, in the type and on the device of `like`.

    Cell b covers floor(b * length / bins) .. ceil((b + 1) * length / bins) - 1; cells may overlap.
    """
    position = torch.arange(length, device=like.device)
    cell = torch.arange(bins, device=like.device).unsqueeze(1)
    # Both bounds are multiplied by bins, because an integer division takes a dozen operators in an exported graph.
    is_inside = ((position + 1) * bins > cell * length) & (position * bins < (cell + 1) * length)
    return is_inside.to(like.dtype) / is_inside.sum(1, keepdim=True).to(like.dtype)


@torch.no_grad()
def init_encoder(module: nn.Module) -> None:
    """The 2018 initialisation of encoders: convolutions normal, std sqrt(2 / (k * k * out / groups)), norms 1 and 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = math.prod(layer.kernel_size) * layer.out_channels // layer.groups
            layer.weight.normal_(0, math.sqrt(2 / fan_out))
        elif isinstance(layer, nn.BatchNorm2d):
            layer.weight.fill_(1)
            layer.bias.zero_()


@torch.no_grad()
def init_decoder(module: nn.Module) -> None:
    """The 2018 initialisation of decoders: convolutions Kaiming normal, norms 1 and 1e-4."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.weight.fill_(1)
            layer.bias.fill_(1e-4)
