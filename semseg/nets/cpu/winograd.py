"""Stage 5: 3 x 3 convolutions on the CPU with a quarter of the products.

Winograd's minimal filtering as in Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016),
section 4: an output tile of 4 x 4 takes 36 products a channel instead of 144. Image tiles (6 x 6), kernels and output
tiles are transformed by small fixed matrices; between them stand 36 matrix products. On a GPU cuDNN does this itself.

The answer is that of the direct convolution but for rounding, and the rounding depends on the points that the
transforms interpolate at: with 0, 2/3, -2/3, 3/2, -3/2 and infinity the error in float32 is half of what the usual
0, 1, -1, 2, -2 give: 1.0e-6 or 1.6e-6 of the values at 512 channels, by the library of the products, where the direct
way has 2e-7 to 8e-7; benchmarks/winograd.py measures all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

TILE, KERNEL = 4, 3  # outputs and kernel of one axis
SIDE = TILE + KERNEL - 1  # inputs of one axis, and points
POINTS = (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)  # and infinity

# Transformed tiles that exist at once: they fit the cache, and all memory beyond the output is a few times this.
BAND_BYTES = 8 * 2**20
# Transformed kernels that exist at once, four times as large as the kernels: those of 512 x 512 channels in float32.
KERNEL_BYTES = 36 * 2**20
# oneDNN's product, made for torch.compile: with 512-bit instructions on AMD twice as fast as torch.bmm, which is MKL's.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
FEW_THREADS = 4


class Limits(NamedTuple):
    """Below or above them the transforms cost more than the products that they save."""

    min_channels: int
    min_tiles: int
    max_waste: float  # pixels of all tiles to those of the output: a widely dilated kernel has large steps


def limits() -> Limits | None:
    """Those of this processor; None: the direct way is always at least as fast.

    512-bit instructions halve the time of the products, not that of the transforms, which wait for memory; and many
    threads find too little to do in a product.
    """
    if not has_wide_registers():
        return Limits(min_channels=128, min_tiles=32, max_waste=1.6)
    is_fast = ONEDNN_LINEAR is not None and torch.get_num_threads() <= FEW_THREADS
    return Limits(min_channels=256, min_tiles=256, max_waste=1.1) if is_fast else None


def has_wide_registers() -> bool:
    """Whether this processor has 512-bit instructions."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def band_bytes() -> int:
    """BAND_BYTES; twice that where products are so fast that reading the kernels again for each band shows."""
    return 2 * BAND_BYTES if has_wide_registers() else BAND_BYTES


class Transforms(NamedTuple):
    """The matrices of both axes at once, for flattened tiles."""

    image: Tensor  # (36, 36): B^T of the paper
    kernel: Tensor  # (36, 9): G
    output: Tensor  # (16, 36): A^T

    def to(self, dtype: torch.dtype) -> Transforms:
        return Transforms(*(matrix.to(dtype) for matrix in self))


def transforms(points: Sequence[float] = POINTS) -> Transforms:
    """Toom-Cook's construction for SIDE - 1 finite points and infinity, float64.

    A product of polynomials of degree 2 and 3 is known from its values at six points. A convolution of a tile is the
    transpose of that: evaluation and interpolation change places.
    """
    output, kernel, product = (evaluation(points, length) for length in (TILE, KERNEL, SIDE))
    image = np.linalg.inv(product).T
    return Transforms(*(torch.from_numpy(np.kron(one, one)) for one in (image, kernel, output.T)))


def evaluation(points: Sequence[float], length: int) -> np.ndarray:
    """(points + 1, length): the values of a polynomial of `length` coefficients at the points, and its leading one."""
    leading = np.eye(length)[-1:]
    return np.concatenate([np.vander(np.asarray(points), length, increasing=True), leading])


TRANSFORMS = transforms()


def use_winograd(is_wanted: bool, image: Tensor) -> AbstractContextManager[Any]:
    """The context in which a network shall run on `image`."""
    # Compilers and exporters get the convolutions as such: they have ways of their own for them.
    can = image.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    found = limits() if is_wanted and can else None
    return nullcontext() if found is None else Winograd(found)


class Winograd(TorchFunctionMode):
    """Within it, in this thread, every F.conv2d that gains by it goes the shorter way."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self.limits = limits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            found = _shortened(self.limits, *args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


class Settings(NamedTuple):
    """Those of F.conv2d, in its order."""

    stride: int | Sequence[int] = 1
    padding: int | str | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1


def _shortened(
    limits: Limits, input: Tensor, weight: Tensor, bias: Tensor | None = None, *settings: Any, **named: Any
) -> Tensor | None:
    """F.conv2d, or None where the direct way is at least as fast or the only one."""
    chosen = Settings(*settings, **named)
    padding, dilation = both(chosen.padding), both(chosen.dilation)
    if weight.shape[2:] != (KERNEL, KERNEL) or min(weight.shape[:2]) < limits.min_channels or input.dim() != 4:
        return None
    if both(chosen.stride) != 1 or chosen.groups != 1 or padding is None or dilation is None:
        return None
    if input.dtype not in (torch.float32, torch.float64) or not input.is_cpu:
        return None
    if not Tiling.of(input.shape, padding, dilation).pays(len(input), limits):
        return None
    found = conv2d(input, weight, padding, dilation)
    return found if bias is None else found.add_(bias.view(-1, 1, 1))


def both(setting: int | str | Sequence[int]) -> int | None:
    """The number that holds for both axes, if there is one."""
    if isinstance(setting, int):
        return setting
    return setting[0] if not isinstance(setting, str) and len(set(setting)) == 1 else None


def conv2d(image: Tensor, weight: Tensor, padding: int, dilation: int) -> Tensor:
    """F.conv2d(image, weight, padding=padding, dilation=dilation) for 3 x 3 kernels, differentiable once.

    Args:
        image: (N, C, H, W) float32 or float64.
        weight: (K, C, 3, 3).

    Returns:
        (N, K, H + 2 (padding - dilation), W + 2 (padding - dilation)) in channels_last.
    """
    found = _Convolution.apply(image, weight, padding, dilation)
    assert isinstance(found, Tensor)
    return found


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, padding: int, dilation: int) -> Tensor:
        ctx.save_for_backward(image, weight)
        ctx.padding, ctx.dilation = padding, dilation
        return _convolved(image, weight, padding, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = grads
        image, weight = ctx.saved_tensors
        of_image = of_weight = None
        if ctx.needs_input_grad[1]:  # first: it is the smaller one to keep while the other is made
            of_weight = _weight_gradient(image, gradient, ctx.padding, ctx.dilation)
        if ctx.needs_input_grad[0]:
            mirrored = weight.transpose(0, 1).flip(2, 3)
            of_image = _convolved(gradient, mirrored, 2 * ctx.dilation - ctx.padding, ctx.dilation)
        return of_image, of_weight, None, None


class Tiling(NamedTuple):
    """How an output is cut into tiles: of each of dilation x dilation interleaved pictures, rows x columns of them."""

    height: int  # of the output, pixels
    width: int
    rows: int
    columns: int
    padding: int
    dilation: int

    @classmethod
    def of(cls, shape: Sequence[int], padding: int, dilation: int) -> Tiling:
        """For an image (N, C, H, W)."""
        height, width = (length + 2 * (padding - dilation) for length in shape[2:])
        rows, columns = (-(-length // (TILE * dilation)) for length in (height, width))
        return cls(height, width, rows, columns, padding, dilation)

    def pays(self, count: int, limits: Limits) -> bool:
        """Whether there are tiles enough in `count` images, and enough of them full."""
        pixels = self.height * self.width
        tiles = self.rows * self.columns * self.dilation**2
        is_large = count * pixels >= limits.min_tiles * TILE**2
        return pixels > 0 and is_large and tiles * TILE**2 <= limits.max_waste * pixels

    def image_rows(self, image: Tensor, band: slice) -> Tensor:
        """(N, C, H, W) -> (N, rows, width + 2 dilation, C): what the tiles of a band read, 0 outside the image.

        The width is rounded up to whole tiles. Band by band, so that it stays in the cache.
        """
        return self._rows(image, band, self.padding, 2 * self.dilation)

    def output_rows(self, gradient: Tensor, band: slice) -> Tensor:
        """(N, K, height, width) -> (N, rows, width, K) of a band, rounded up likewise."""
        return self._rows(gradient, band, 0, 0)

    def _rows(self, pixels: Tensor, band: slice, before: int, extra: int) -> Tensor:
        span, (height, width) = TILE * self.dilation, pixels.shape[2:]
        begin, end = span * band.start - before, span * band.stop + extra - before
        top, bottom = (min(max(row, 0), height) for row in (begin, end))
        above = min(max(-begin, 0), end - begin)
        below = end - begin - above - (bottom - top)
        right = self.columns * span + extra - width - before
        return F.pad(pixels[:, :, top:bottom].permute(0, 2, 3, 1), (0, 0, before, right, above, below))

    def bands(self, count: int, channels: int, item_bytes: int) -> Iterator[slice]:
        """Rows of tiles to do at a time, for `count` images."""
        row_bytes = SIDE**2 * count * self.columns * self.dilation**2 * channels * item_bytes
        step = max(1, band_bytes() // row_bytes)
        step = -(-self.rows // -(-self.rows // step))  # bands of about equal height
        return (slice(top, min(top + step, self.rows)) for top in range(0, self.rows, step))

    def tiles(self, rows: Tensor, side: int) -> Tensor:
        """(tiles, side^2, channels) of the rows (N, height, width, channels) of a band."""
        span = TILE * self.dilation
        image, row, column, channel = rows.stride()
        counts = (len(rows), rows.shape[1] // span, self.dilation, self.columns, self.dilation)
        steps = (image, span * row, row, span * column, column, self.dilation * row, self.dilation * column, channel)
        tiles = rows.as_strided((*counts, side, side, rows.shape[3]), steps, rows.storage_offset())
        return tiles.reshape(-1, side**2, rows.shape[3])

    def place(self, tiles: Tensor, band: slice, output: Tensor, *, add: bool) -> None:
        """Put the output tiles (tiles, 16, K) of a band into `output` (N, height, width, K), or add them to it."""
        count, _, _, channels = output.shape
        dilation = self.dilation
        grid = output.view(count, self.rows, TILE, dilation, self.columns, TILE, dilation, channels)[:, band]
        found = tiles.view(count, -1, dilation, self.columns, dilation, TILE, TILE, channels)
        (grid.add_ if add else grid.copy_)(found.permute(0, 1, 5, 2, 3, 6, 4, 7))


def _convolved(image: Tensor, weight: Tensor, padding: int, dilation: int) -> Tensor:
    (out_channels, channels), count = weight.shape[:2], len(image)
    matrices = TRANSFORMS.to(image.dtype)
    tiling = Tiling.of(image.shape, padding, dilation)
    size = (tiling.rows * TILE * dilation, tiling.columns * TILE * dilation)
    output = torch.empty((count, out_channels, *size), dtype=image.dtype, memory_format=torch.channels_last)
    for part in channel_parts(channels, out_channels, image.element_size()):
        kernels = _transformed_kernels(matrices.kernel, weight[:, part])
        for band in tiling.bands(count, max(kernels.shape[1:]), image.element_size()):
            tiles = _each(matrices.image, tiling.tiles(tiling.image_rows(image[:, part], band), SIDE))
            found = _each(matrices.output, _products(tiles, kernels))
            tiling.place(found, band, output.permute(0, 2, 3, 1), add=part.start > 0)
        del kernels  # before those of the next part are made
    if size == (tiling.height, tiling.width):
        return output
    # A copy, for a view that a function returns cannot be changed in place.
    return output[:, :, : tiling.height, : tiling.width].clone(memory_format=torch.channels_last)


def channel_parts(channels: int, out_channels: int, item_bytes: int) -> list[slice]:
    """The channels of the image in parts of about equal size, whose transformed kernels fit KERNEL_BYTES.

    >>> channel_parts(2048, 512, item_bytes=4)[:2]
    [slice(0, 512, None), slice(512, 1024, None)]
    """
    count = -(-(SIDE**2) * channels * out_channels * item_bytes // KERNEL_BYTES)
    step = -(-channels // count)
    return [slice(start, min(start + step, channels)) for start in range(0, channels, step)]


def _transformed_kernels(matrix: Tensor, weight: Tensor) -> Tensor:
    """(K, C, 3, 3) -> (36, K, C)."""
    return (matrix @ weight.permute(2, 3, 0, 1).reshape(KERNEL**2, -1)).view(SIDE**2, *weight.shape[:2])


def _products(tiles: Tensor, kernels: Tensor) -> Tensor:
    """Tiles (n, 36, C) and kernels (36, K, C) -> (n, 36, K): at each point a product of matrices."""
    found = tiles.new_empty(*tiles.shape[:2], kernels.shape[1])
    if ONEDNN_LINEAR is None or tiles.dtype != torch.float32:
        torch.bmm(tiles.transpose(0, 1), kernels.transpose(1, 2), out=found.transpose(0, 1))
        return found
    for point, kernel in enumerate(kernels):
        found[:, point] = ONEDNN_LINEAR(tiles[:, point], kernel, None, "none", [], "")
    return found


def _weight_gradient(image: Tensor, gradient: Tensor, padding: int, dilation: int) -> Tensor:
    """(K, C, 3, 3): the transposed transforms around the products of output tiles and image tiles."""
    channels, out_channels = image.shape[1], gradient.shape[1]
    matrices = TRANSFORMS.to(image.dtype)
    tiling = Tiling.of(image.shape, padding, dilation)
    weight = image.new_empty(out_channels, channels, KERNEL, KERNEL)
    for part in channel_parts(channels, out_channels, image.element_size()):
        total = image.new_zeros(SIDE**2, out_channels, len(range(channels)[part]))
        for band in tiling.bands(len(image), max(total.shape[1:]), image.element_size()):
            tiles = _each(matrices.image, tiling.tiles(tiling.image_rows(image[:, part], band), SIDE))
            changes = _each(matrices.output.T, tiling.tiles(tiling.output_rows(gradient, band), TILE))
            total.baddbmm_(changes.permute(1, 2, 0), tiles.transpose(0, 1))
        found = matrices.kernel.T @ total.view(SIDE**2, -1)
        weight[:, part] = found.view(KERNEL, KERNEL, *total.shape[1:]).permute(2, 3, 0, 1)
        del total  # before that of the next part is made
    return weight


def _each(matrix: Tensor, tiles: Tensor) -> Tensor:
    """`matrix` @ each of the tiles; faster than one product over all, whose operands do not fit the cache."""
    return torch.bmm(matrix.expand(len(tiles), *matrix.shape), tiles)
