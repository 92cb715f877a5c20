"""Stage 5: a convolution of concatenated maps, the coarser ones upsampled to the finest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from semseg.nets.blocks import cast, resize, without_autocast


class UpsampledConcatConv(nn.Sequential):
    """A 3 x 3 or 1 x 1 convolution of several maps as one, and the layers that follow it.

    Takes maps (N, C_i, h_i, w_i), the finest first; returns what the last layer gives at the size of the first map.
    There are two ways to the same result, which differ in rounding.

    The direct way upsamples the maps bilinearly to the size of the first (align_corners=False), concatenates them and
    calls the layers.

    The factored way never makes the concatenated map. A convolution is the sum of one convolution per map, and for a
    map that was upsampled, mixing channels and interpolating commute. With the upsampled size H x W, the kernel
    w (K, C, 3, 3), and interpolation matrices R (3, H, h) and S (3, W, w) that give each output row and column its
    neighbour before, itself and its neighbour after, the convolution of a map x (N, C, h, w) is

        einsum("kcuv, ncij, vXj, uYi -> nkYX", w, x, S, R)

    evaluated from left to right: channels are mixed at the coarse resolution, then come two products with narrow
    matrices, one per axis. For a map of half the size this takes a third of the arithmetic of the direct way, for a
    grid of pooled cells a hundredth. A 1 x 1 convolution is applied at the coarse resolution, and its result is
    upsampled.

    Interpolation weights and the sums over kernel positions and maps are float32 (float64 for float64 maps), whatever
    the type of the maps and under autocast. In the direct way they are as well, on CUDA: autocast interpolates in
    float32 there, and a convolution of half-precision numbers adds up in float32.

    The convolution is an ordinary child, the first one. It is called, so that its hooks run, in the direct way only;
    the factored way reads its weight. A network therefore takes the direct way as soon as the convolution has a hook
    (FLOP counters, pruning), is not exactly an nn.Conv2d (quantised, parametrised), or global module hooks exist.

    Args:
        finest_last: the order of the maps' channels in the convolution is that from the coarsest to the finest.

    Attributes:
        factored: None: the factored way on the CPU outside of autocast, the direct way elsewhere, because nothing was
            measured on a GPU. True or False: always or never, apart from exported graphs, which keep the whole
            convolution for runtimes to fuse and quantise, and from the exceptions above.
    """

    factored: bool | None = None

    def __init__(self, conv: nn.Module, *layers: nn.Module, finest_last: bool = False) -> None:
        super().__init__(conv, *layers)
        self.finest_last = finest_last
        assert isinstance(conv, nn.Conv2d), "the first layer is the convolution"
        assert (conv.kernel_size, conv.padding) in (((3, 3), (1, 1)), ((1, 1), (0, 0))) and conv.bias is None

    def forward(self, input: Sequence[Tensor]) -> Tensor:
        """Maps (N, C_i, h_i, w_i), whose channels are those of the convolution together, the finest first."""
        finest, *coarser = input
        if not self.is_factored(finest.device.type):
            # Under autocast of CUDA upsampled maps are float32. The convolution would round their concatenation to the
            # type of the finest: the same numbers, at the cost of a concatenation twice as large.
            upsampled = [finest, *(cast(resize(features, finest), finest.dtype) for features in coarser)]
            return super().forward(torch.cat(upsampled[::-1] if self.finest_last else upsampled, 1))
        conv, *layers = self.children()
        assert isinstance(conv, nn.Conv2d)
        output = conv_of_maps(input, self.split_weight(conv.weight, input))
        for layer in layers:
            output = layer(output)
        return output

    def split_weight(self, weight: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """The part of the convolution's weight for each of the maps."""
        channels = [features.shape[1] for features in maps]
        if not self.finest_last:
            return list(weight.split(channels, 1))
        return list(weight.split(channels[::-1], 1))[::-1]

    def is_factored(self, device: str) -> bool:
        """Whether maps on a device of this type go the factored way now."""
        if self.factored is False or torch.compiler.is_exporting():
            return False
        if not torch.compiler.is_compiling() and (_has_any_global_hook() or has_hooks(self[0])):
            return False
        if type(self[0]) is not nn.Conv2d:
            return False
        return self.factored or (device == "cpu" and not torch.is_autocast_enabled("cpu"))


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module calls hooks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def conv_of_maps(maps: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """F.conv2d of the upsampled and concatenated `maps`, the finest first, as the sum of one convolution per map.

    Args:
        weights: (K, C_i, 3, 3) or (K, C_i, 1, 1) for each map.
    """
    finest, *coarser = maps
    is_pointwise = weights[0].shape[-2:] == (1, 1)
    padding = 0 if is_pointwise else 1
    result = F.conv2d(finest, weights[0], padding=padding)
    total = cast(result, choose_sum_type(result.dtype))
    for features, weight_of_map in zip(coarser, weights[1:], strict=True):
        if is_pointwise:
            mixed = cast(F.conv2d(features, weight_of_map), total.dtype)
            total.add_(resize(mixed, finest))  # in place: no backward pass needs the sum
        elif features.shape[-2:] == finest.shape[-2:]:
            total.add_(F.conv2d(features, weight_of_map, padding=padding))
        else:
            with without_autocast(features.device.type):
                total.add_(conv_of_upsampled(features, weight_of_map, finest.shape[-2:]))
    return cast(total, result.dtype)


def choose_sum_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers of type `dtype` are added up: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def conv_of_upsampled(features: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    """F.conv2d(upsampled features, weight, padding=1) in the factored way, see UpsampledConcatConv.

    Args:
        features: (N, C, h, w).
        weight: (K, C, 3, 3).
        size: (H, W) of the upsampled map.

    Returns:
        (N, K, H, W) in channels_last, in float32 or float64.
    """
    features, weight = (cast(values, choose_sum_type(values.dtype)) for values in (features, weight))
    rows, columns = (
        interpolation_matrices(length, out_length, features)  # (3, H, h) and (3, W, w)
        for length, out_length in zip(features.shape[2:], size, strict=True)
    )
    features = features.contiguous(memory_format=torch.channels_last)
    mixed = (mix_channels(features, weight[:, :, kernel_row]) for kernel_row in range(3))
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or features.device.type != "cpu":
        return interpolate(rows, columns, mixed).permute(0, 3, 1, 2)
    from semseg.nets.cpu.strips import interpolate_in_strips  # noqa: PLC0415 - only where a network runs on the CPU

    return interpolate_in_strips(interpolate, rows, columns, list(mixed)).permute(0, 3, 1, 2)


def mix_channels(features: Tensor, kernel_row: Tensor) -> Tensor:
    """(N, C, h, w) and one row of the kernels (K, C, 3) -> (N * h, w, 3, K)."""
    num_images, channels, height, width = features.shape
    kernel = kernel_row.permute(2, 0, 1).reshape(-1, channels, 1, 1)
    # A 1 x 1 convolution is faster than the equivalent matrix product.
    return F.conv2d(features, kernel).permute(0, 2, 3, 1).reshape(num_images * height, width, 3, len(kernel_row))


def interpolate(rows: Tensor, columns: Tensor, mixed: Iterable[Tensor]) -> Tensor:
    """einsum("uYi, vXj, unijvk -> nYXk", rows, columns, mixed): interpolate, and sum over the nine kernel positions.

    Args:
        rows: (3, H, h).
        columns: (3, W, w).
        mixed: for each of the three rows of a kernel (N * h, w, 3, K), from `mix_channels`.

    Returns:
        (N, H, W, K).
    """
    total: Tensor | None = None
    for row_matrix, mixed_row in zip(rows, mixed, strict=True):
        full_width = add_products(None, columns, mixed_row.unbind(2))  # (N * h, W, K)
        full_width = full_width.view(-1, row_matrix.shape[1], full_width[0].numel())  # (N, h, W * K)
        total = add_products(total, row_matrix[None], [full_width])  # (N, H, W * K)
    assert total is not None
    return total.view(*total.shape[:2], columns.shape[1], -1)


def add_products(total: Tensor | None, lefts: Tensor, rights: Sequence[Tensor]) -> Tensor:
    """total + the sum of left @ right: left (n, m) for the whole batch, right (B, m, k), total (B, n, k) or None."""
    for left, right in zip(lefts, rights, strict=True):
        batch_of_left = left.expand(len(right), *left.shape)
        # In place, because a new total costs as much as the product.
        total = torch.bmm(batch_of_left, right) if total is None else total.baddbmm_(batch_of_left, right)
    assert total is not None
    return total


def interpolation_matrices(length: int, out_length: int, like: Tensor) -> Tensor:
    """(3, out_length, length): bilinear upsampling of one axis, shifted by -1, 0 and 1 pixels; 0 beyond the ends.

    As in F.interpolate with align_corners=False; of the type and device of `like`.
    """
    precise = choose_sum_type(like.dtype)
    target = torch.arange(out_length, device=like.device) + torch.arange(-1, 2, device=like.device).unsqueeze(1)
    # The position that F.interpolate reads: (target + 1/2) * length / out_length - 1/2, clamped at both ends.
    source = ((target.to(precise) + 0.5) * (length / out_length) - 0.5).clamp(0, length - 1).unsqueeze(-1)
    weights = (1 - (source - torch.arange(length, device=like.device, dtype=precise)).abs()).clamp(min=0)
    is_inside = (target >= 0) & (target < out_length)
    return (weights * is_inside.unsqueeze(-1)).to(like.dtype)
