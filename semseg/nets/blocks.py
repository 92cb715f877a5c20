"""Stage 5: the pieces that encoders and decoders are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

BLOCK_BYTES = 4 * 2**20  # of an upsampled map, made at a time in evaluation
_is_written_out = ContextVar("_is_written_out", default=False)


@contextmanager
def written_out() -> Iterator[None]:
    """While inside, maps are joined, convolved and pooled as the papers write it, not the shorter way.

    For counting: the operations of an architecture are those that papers and other libraries state.
    """
    token = _is_written_out.set(True)
    try:
        yield
    finally:
        _is_written_out.reset(token)


def is_written_out() -> bool:
    """Whether `written_out` is in force; never in a compiled or exported graph."""
    return not torch.compiler.is_compiling() and _is_written_out.get()


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
    if same_size(features, like):
        return features
    return F.interpolate(features, size=like.shape[-2:], mode="bilinear", align_corners=False)


def same_size(first: Tensor, second: Tensor) -> bool:
    """Whether height and width are equal; where an exporter leaves them open: whether they are at every size."""
    if not torch.compiler.is_exporting():
        return first.shape[-2:] == second.shape[-2:]
    return all(statically_known_true(a == b) for a, b in zip(first.shape[-2:], second.shape[-2:], strict=True))


def apply_to_joined(layers: nn.Module, maps: Sequence[Tensor]) -> Tensor:
    """`layers` of all maps side by side, the coarser ones resized to the first; the joined map is never made.

    A convolution is linear in its input channels, so it is the sum of one convolution for each map; see
    `conv_of_upsampled` for what that saves.

    Args:
        layers: a sequence that begins with a convolution, 3 x 3, padding 1, without bias; its input channels are those
            of all maps together.
        maps: (N, C_i, h_i, w_i), the finest first.

    Returns:
        What the last layer gives for the joined map (N, C_1 + C_2 + ..., h, w) at the size of the first.
    """
    # One whole convolution, which other runtimes know how to fuse and to quantise.
    if torch.compiler.is_exporting() or is_written_out():
        return layers(torch.cat([maps[0], *(resize(features, maps[0]) for features in maps[1:])], 1))
    conv, *rest = layers.children()
    assert isinstance(conv, nn.Conv2d)
    finest, *coarser = maps
    weights = conv.weight.split([features.shape[1] for features in maps], 1)
    total = F.conv2d(finest, weights[0], padding=1)
    for features, weight in zip(coarser, weights[1:], strict=True):
        if features.shape[-2:] == finest.shape[-2:]:
            total.add_(F.conv2d(features, weight, padding=1))  # in place: no backward pass needs the sum
        else:
            total.add_(conv_of_upsampled(features, weight, finest.shape[-2:]))
    for layer in rest:
        total = layer(total)
    return total


def conv_of_upsampled(features: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    """F.conv2d(resize(features), weight, padding=1) for a 3 x 3 kernel, with the channels mixed before the upsampling.

    Mixing channels and interpolating between places commute. The expensive mixing is done where there are few places,
    and what is left at the full size is two products with narrow matrices, one for each axis. From a map of half the
    size that takes a third of the arithmetic, from a grid of pooled cells a hundredth.

    Args:
        features: (N, C, h, w).
        weight: (K, C, 3, 3).
        size: (H, W) of the upsampled map.

    Returns:
        (N, K, H, W) in channels_last.
    """
    rows, columns = (
        shifted_interpolation(length, out_length, features)  # (3, H, h) and (3, W, w)
        for length, out_length in zip(features.shape[2:], size, strict=True)
    )
    features = features.contiguous(memory_format=torch.channels_last)
    mixed = (mixed_channels(features, weight[:, :, tap]) for tap in range(3))
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or features.device.type != "cpu":
        return upsampled_sum(rows, columns, mixed).permute(0, 3, 1, 2)
    # A few columns at a time, which stay in the cache; each reads a few columns of the coarse map.
    whole = list(mixed)
    total = whole[0].new_empty(len(features), *size, len(weight))
    step = max(1, BLOCK_BYTES // (total[:, :, 0].numel() * total.element_size()))
    for start in range(0, size[1], step):
        block = columns[:, start : start + step]
        near = block.sum((0, 1)).nonzero()[[0, -1], 0].tolist()
        source = slice(near[0], near[1] + 1)
        found = upsampled_sum(rows, block[..., source], [taps[:, source] for taps in whole])
        total[:, :, start : start + step] = found
    return total.permute(0, 3, 1, 2)


def mixed_channels(features: Tensor, weight: Tensor) -> Tensor:
    """(N, C, h, w) and one row of kernels (K, C, 3) -> (N * h, w, 3, K): each place for each of the three."""
    count, channels, height, width = features.shape
    kernel = weight.permute(2, 0, 1).reshape(-1, channels, 1, 1)
    # A convolution of single places is faster than the product of matrices that it is.
    return F.conv2d(features, kernel).permute(0, 2, 3, 1).reshape(count * height, width, 3, len(weight))


def upsampled_sum(rows: Tensor, columns: Tensor, mixed: Iterable[Tensor]) -> Tensor:
    """(N, H, W, K): the sum over the nine places of a kernel; rows (3, H, h), columns (3, W, w), `mixed_channels`."""
    total: Tensor | None = None
    for row, taps in zip(rows, mixed, strict=True):
        wide = add_products(None, columns, taps.unbind(2))  # (N * h, W, K)
        total = add_products(total, row[None], [wide.view(-1, row.shape[1], wide[0].numel())])
    assert total is not None
    return total.view(*total.shape[:2], columns.shape[1], -1)


def add_products(total: Tensor | None, lefts: Tensor, rights: Sequence[Tensor]) -> Tensor:
    """total + the sum of left @ right; left (n, m) for all of a batch, right (B, m, k), total (B, n, k) or none."""
    for left, right in zip(lefts, rights, strict=True):
        for_all = left.expand(len(right), *left.shape)
        if total is None:
            total = torch.bmm(for_all, right)
        else:  # in place, for which autocast does nothing: a new total each time costs as much as the product
            total = total.baddbmm_(for_all.to(total.dtype), right.to(total.dtype))
    assert total is not None
    return total


def shifted_interpolation(length: int, out_length: int, like: Tensor) -> Tensor:
    """(3, out_length, length): what gives each place of the upsampled axis its neighbour before, itself, the one after.

    Bilinear interpolation, align_corners=False, as matrices of the type and device of `like`; 0 beyond the ends.
    """
    precise = torch.promote_types(like.dtype, torch.float32)
    target = torch.arange(out_length, device=like.device) + torch.tensor([[-1], [0], [1]], device=like.device)
    # What F.interpolate reads: source (target + 1/2) * length / out_length - 1/2, cut off at both ends.
    source = ((target.to(precise) + 0.5) * (length / out_length) - 0.5).clamp(0, length - 1).unsqueeze(-1)
    nearness = (1 - (source - torch.arange(length, device=like.device, dtype=precise)).abs()).clamp(min=0)
    inside = (target >= 0) & (target < out_length)
    return (nearness * inside.unsqueeze(-1)).to(like.dtype)


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
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return grid_means(features, self.bins)
        with torch.autocast(device, enabled=False):
            return grid_means(features, self.bins)

    def extra_repr(self) -> str:
        return f"bins={self.bins}"


def grid_means(features: Tensor, bins: int) -> Tensor:
    """(N, C, h, w) -> (N, C, bins, bins), of the type of `features`."""
    if is_written_out():
        return F.adaptive_avg_pool2d(features, bins)
    height, width = features.shape[-2:]
    precise = features.to(torch.promote_types(features.dtype, torch.float32))
    rows = cell_weights(height, bins, precise)  # (bins, h)
    columns = cell_weights(width, bins, precise)  # (bins, w)
    if precise.is_contiguous() or torch.compiler.is_exporting():
        return (rows @ precise @ columns.T).to(features.dtype)
    # Channels last: the channels go along, where torch.matmul would make a product for each of them.
    places = precise.permute(0, 2, 3, 1)  # (N, h, w, C)
    means = columns @ (rows @ places.flatten(2)).unflatten(2, places.shape[2:])  # (N, bins, bins, C)
    return means.permute(0, 3, 1, 2).to(features.dtype)


def cell_weights(length: int, bins: int, like: Tensor) -> Tensor:
    """(bins, length) weights of the mean over each cell of an axis, of the type and device of `like`.

    Cell b covers floor(b * length / bins) .. ceil((b + 1) * length / bins) - 1; cells may overlap.
    """
    position = torch.arange(length, device=like.device)
    cell = torch.arange(bins, device=like.device).unsqueeze(1)
    # Both bounds multiplied by bins: an integer division would be a dozen operators in an exported graph.
    inside = ((position + 1) * bins > cell * length) & (position * bins < (cell + 1) * length)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True).to(like.dtype)


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
