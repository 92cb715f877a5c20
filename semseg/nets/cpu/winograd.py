"""Stage 5: 3 x 3 convolutions on the CPU with a quarter of the multiplications.

Winograd's minimal filtering F(4 x 4, 3 x 3) as in Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks"
(CVPR 2016), section 4, and in its notation. One tile of the image, for one input and one output channel:

        d: image tile         V                   M                   Y: output tile
        6 x 6 pixels          6 x 6 points        6 x 6 points        4 x 4 pixels

        + - - - - - - +       . . . . . .         . . . . . .
        |   + - - +   |       . . . . . .         . . . . . .         + - - - - +
        |   |  Y  |   |  -->  . . . . . .   -->   . . . . . .   -->   |    Y    |
        |   + - - +   |       . . . . . .         . . . . . .         + - - - - +
        + - - - - - - +       . . . . . .         . . . . . .

                   V = B^T d B         M = U * V           Y = A^T M A
        g: kernel, 3 x 3      U = G g G^T, 6 x 6 points

Neighbouring image tiles overlap by two pixels, output tiles do not. `M = U * V` is elementwise in the points and sums
over the input channels: 36 matrix products (tiles x C) (C x K). An output tile takes 36 multiplications per pair of
channels, the direct convolution takes 16 * 9 = 144. The transforms with the constant matrices A, B and G cost little
if there are many channels. On a GPU cuDNN chooses such algorithms itself.

The result equals the direct convolution up to rounding. The rounding depends on the points at which the transforms
interpolate: with 0, 2/3, -2/3, 3/2, -3/2 and infinity the error in float32 is half of that of the common choice 0, 1,
-1, 2, -2: 1.0e-6 or 1.6e-6 of the values at 512 channels, depending on the library of the products, where the direct
convolution has 2e-7 to 8e-7; benchmarks/winograd.py measures all of them.
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

from semseg.nets.cpu.conv_options import ConvOptions, common_value, has_avx512

OUTPUT_TILE, KERNEL = 4, 3  # pixels of one axis
IMAGE_TILE = OUTPUT_TILE + KERNEL - 1  # pixels of one axis, and the number of points
POINTS = (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)  # and infinity

# Size of the transformed tiles that exist at once. They fit in the cache, and the memory beyond the output is a few
# times this.
TILE_STRIP_BYTES = 8 * 2**20
# Size of the transformed kernels that exist at once, which are four times as large as the kernels: those of 512 x 512
# channels in float32.
KERNEL_BYTES = 36 * 2**20
# oneDNN's matrix product, made for torch.compile. With 512-bit instructions on AMD it is twice as fast as torch.bmm,
# which is MKL's.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
MAX_THREADS = 4  # with 512-bit instructions; more threads find too little work in a product


class Thresholds(NamedTuple):
    """Convolutions outside of these take the direct way, because the transforms cost more than they save."""

    min_channels: int
    min_tiles: int
    max_waste: float  # pixels of all tiles over those of the output; a widely dilated kernel wastes most


def find_thresholds() -> Thresholds | None:
    """The thresholds for this processor; None if the direct convolution is always at least as fast.

    512-bit instructions halve the time of the products, but not that of the transforms, which wait for memory.
    """
    if not has_avx512():
        return Thresholds(min_channels=128, min_tiles=32, max_waste=1.6)
    is_faster = ONEDNN_LINEAR is not None and torch.get_num_threads() <= MAX_THREADS
    return Thresholds(min_channels=256, min_tiles=256, max_waste=1.1) if is_faster else None


def strip_bytes() -> int:
    """TILE_STRIP_BYTES; twice that where products are so fast that reading the kernels again per strip matters."""
    return 2 * TILE_STRIP_BYTES if has_avx512() else TILE_STRIP_BYTES


class Transforms(NamedTuple):
    """The matrices of the paper for flattened tiles: Kronecker products, which transform both axes at once."""

    image: Tensor  # (36, 36): B^T
    kernel: Tensor  # (36, 9): G
    output: Tensor  # (16, 36): A^T

    def to(self, dtype: torch.dtype) -> Transforms:
        return Transforms(*(matrix.to(dtype) for matrix in self))


def build_transforms(points: Sequence[float] = POINTS) -> Transforms:
    """Toom-Cook's construction for IMAGE_TILE - 1 finite points and infinity, float64.

    A product of polynomials of degree 2 and 3 is determined by its values at six points. The convolution of a tile is
    the transpose of that product, with evaluation and interpolation exchanged.
    """
    output, kernel, product = (evaluation_matrix(points, length) for length in (OUTPUT_TILE, KERNEL, IMAGE_TILE))
    image = np.linalg.inv(product).T
    return Transforms(*(torch.from_numpy(np.kron(matrix, matrix)) for matrix in (image, kernel, output.T)))


def evaluation_matrix(points: Sequence[float], length: int) -> np.ndarray:
    """(points + 1, length): maps `length` coefficients to the polynomial's values at the points and at infinity.

    The value at infinity is the leading coefficient.
    """
    leading = np.eye(length)[-1:]
    return np.concatenate([np.vander(np.asarray(points), length, increasing=True), leading])


TRANSFORMS = build_transforms()


def use_winograd() -> AbstractContextManager[Any]:
    """A context in which convolutions use Winograd's algorithm, if it can be faster on this processor."""
    thresholds = find_thresholds()
    return nullcontext() if thresholds is None else Winograd(thresholds)


class Winograd(TorchFunctionMode):
    """While active, in this thread, every F.conv2d within the thresholds uses Winograd's algorithm."""

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__()
        self.thresholds = thresholds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            output = _winograd_conv2d(self.thresholds, *args, **kwargs)
            if output is not None:
                return output
        return func(*args, **kwargs)


def _winograd_conv2d(
    thresholds: Thresholds, input: Tensor, weight: Tensor, bias: Tensor | None = None, *positional: Any, **named: Any
) -> Tensor | None:
    """F.conv2d; None where the direct convolution is at least as fast, or the only choice."""
    options = ConvOptions(*positional, **named)
    padding, dilation = common_value(options.padding), common_value(options.dilation)
    if weight.shape[2:] != (KERNEL, KERNEL) or min(weight.shape[:2]) < thresholds.min_channels or input.dim() != 4:
        return None
    if common_value(options.stride) != 1 or options.groups != 1 or padding is None or dilation is None:
        return None
    if input.dtype not in (torch.float32, torch.float64) or not input.is_cpu:
        return None
    if not Tiling.for_image(input.shape, padding, dilation).is_within(thresholds, len(input)):
        return None
    output = conv2d(input, weight, padding, dilation)
    return output if bias is None else output.add_(bias.view(-1, 1, 1))


def conv2d(image: Tensor, weight: Tensor, padding: int, dilation: int) -> Tensor:
    """F.conv2d(image, weight, padding=padding, dilation=dilation) for 3 x 3 kernels, differentiable once.

    Args:
        image: (N, C, H, W) float32 or float64.
        weight: (K, C, 3, 3).

    Returns:
        (N, K, H + 2 (padding - dilation), W + 2 (padding - dilation)) in channels_last.
    """
    output = _WinogradFunction.apply(image, weight, padding, dilation)
    assert isinstance(output, Tensor)
    return output


class _WinogradFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, padding: int, dilation: int) -> Tensor:
        ctx.save_for_backward(image, weight)
        ctx.padding, ctx.dilation = padding, dilation
        return _convolve(image, weight, padding, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = grads
        image, weight = ctx.saved_tensors
        image_gradient = weight_gradient = None
        if ctx.needs_input_grad[1]:  # first, because it is the smaller one to keep while the other is computed
            weight_gradient = _weight_gradient(image, gradient, ctx.padding, ctx.dilation)
        if ctx.needs_input_grad[0]:
            mirrored = weight.transpose(0, 1).flip(2, 3)
            image_gradient = _convolve(gradient, mirrored, 2 * ctx.dilation - ctx.padding, ctx.dilation)
        return image_gradient, weight_gradient, None, None


class Tiling(NamedTuple):
    """The tiles of an output.

    A kernel of dilation D treats D x D interleaved images separately. Each of them is cut into rows x columns tiles.
    """

    height: int  # height of the output in pixels
    width: int  # width of the output in pixels
    rows: int
    columns: int
    padding: int
    dilation: int

    @classmethod
    def for_image(cls, shape: Sequence[int], padding: int, dilation: int) -> Tiling:
        """The tiling for an image (N, C, H, W)."""
        height, width = (length + 2 * (padding - dilation) for length in shape[2:])
        rows, columns = (-(-length // (OUTPUT_TILE * dilation)) for length in (height, width))
        return cls(height, width, rows, columns, padding, dilation)

    def is_within(self, thresholds: Thresholds, num_images: int) -> bool:
        """Whether there are enough tiles in `num_images` images, and enough of them are full."""
        pixels = self.height * self.width
        tiles = self.rows * self.columns * self.dilation**2
        is_large = num_images * pixels >= thresholds.min_tiles * OUTPUT_TILE**2
        return pixels > 0 and is_large and tiles * OUTPUT_TILE**2 <= thresholds.max_waste * pixels

    def image_tiles(self, image: Tensor, strip: slice) -> Tensor:
        """d: the image tiles of a strip, 0 outside of the image: (N, C, H, W) -> (num_tiles, 36, C)."""
        return self._extract_tiles(self._padded_rows(image, strip, self.padding, 2 * self.dilation), IMAGE_TILE)

    def gradient_tiles(self, gradient: Tensor, strip: slice) -> Tensor:
        """The output tiles of a strip, of a gradient: (N, K, height, width) -> (num_tiles, 16, K)."""
        return self._extract_tiles(self._padded_rows(gradient, strip, 0, 0), OUTPUT_TILE)

    def _padded_rows(self, pixels: Tensor, strip: slice, before: int, extra: int) -> Tensor:
        """(N, C, H, W) -> (N, rows, columns, C): the pixels that the tiles of a strip read, `before` pixels of padding.

        The width is rounded up to whole tiles, plus `extra`. Reading one strip at a time keeps the copy in the cache.
        """
        span, (height, width) = OUTPUT_TILE * self.dilation, pixels.shape[2:]
        begin, end = span * strip.start - before, span * strip.stop + extra - before
        top, bottom = (min(max(row, 0), height) for row in (begin, end))
        above = min(max(-begin, 0), end - begin)
        below = end - begin - above - (bottom - top)
        right = self.columns * span + extra - width - before
        return F.pad(pixels[:, :, top:bottom].permute(0, 2, 3, 1), (0, 0, before, right, above, below))

    def strips(self, num_images: int, channels: int, item_bytes: int) -> Iterator[slice]:
        """Rows of tiles to process at a time, of about equal number."""
        row_bytes = IMAGE_TILE**2 * num_images * self.columns * self.dilation**2 * channels * item_bytes
        step = max(1, strip_bytes() // row_bytes)
        step = -(-self.rows // -(-self.rows // step))
        return (slice(top, min(top + step, self.rows)) for top in range(0, self.rows, step))

    def _extract_tiles(self, rows: Tensor, side: int) -> Tensor:
        """Tiles (num_tiles, side^2, channels) of the rows (N, height, width, channels) of a strip."""
        span = OUTPUT_TILE * self.dilation
        image, row, column, channel = rows.stride()
        # Image, row of tiles, interleaved row, column of tiles, interleaved column; row, column, channel in a tile.
        counts = (len(rows), rows.shape[1] // span, self.dilation, self.columns, self.dilation)
        steps = (image, span * row, row, span * column, column, self.dilation * row, self.dilation * column, channel)
        tiles = rows.as_strided((*counts, side, side, rows.shape[3]), steps, rows.storage_offset())
        return tiles.reshape(-1, side**2, rows.shape[3])

    def write_tiles(self, tiles: Tensor, strip: slice, output: Tensor, *, add: bool) -> None:
        """Write the output tiles (num_tiles, 16, K) of a strip to `output` (N, height, width, K), or add them to it."""
        num_images, _, _, channels = output.shape
        dilation = self.dilation
        shape = (num_images, self.rows, OUTPUT_TILE, dilation, self.columns, OUTPUT_TILE, dilation, channels)
        target = output.view(shape)[:, strip]
        source = tiles.view(num_images, -1, dilation, self.columns, dilation, OUTPUT_TILE, OUTPUT_TILE, channels)
        (target.add_ if add else target.copy_)(source.permute(0, 1, 5, 2, 3, 6, 4, 7))


def _convolve(image: Tensor, weight: Tensor, padding: int, dilation: int) -> Tensor:
    """Y = A^T ((G g G^T) * (B^T d B)) A for all tiles d and kernels g."""
    (out_channels, channels), num_images = weight.shape[:2], len(image)
    matrices = TRANSFORMS.to(image.dtype)
    tiling = Tiling.for_image(image.shape, padding, dilation)
    size = (tiling.rows * OUTPUT_TILE * dilation, tiling.columns * OUTPUT_TILE * dilation)
    output = torch.empty((num_images, out_channels, *size), dtype=image.dtype, memory_format=torch.channels_last)
    for part in channel_slices(channels, out_channels, image.element_size()):
        u = _transform_kernels(matrices.kernel, weight[:, part])  # (36, K, C)
        for strip in tiling.strips(num_images, max(u.shape[1:]), image.element_size()):
            v = _transform_tiles(matrices.image, tiling.image_tiles(image[:, part], strip))  # (tiles, 36, C)
            y = _transform_tiles(matrices.output, _multiply_pointwise(v, u))  # (tiles, 16, K)
            tiling.write_tiles(y, strip, output.permute(0, 2, 3, 1), add=part.start > 0)
        del u  # before the kernels of the next part are transformed
    if size == (tiling.height, tiling.width):
        return output
    # A copy, because autograd forbids in-place changes of a view that a function returns.
    return output[:, :, : tiling.height, : tiling.width].clone(memory_format=torch.channels_last)


def channel_slices(channels: int, out_channels: int, item_bytes: int) -> list[slice]:
    """The image's channels in parts of about equal size, whose transformed kernels fit in KERNEL_BYTES.

    >>> channel_slices(2048, 512, item_bytes=4)[:2]
    [slice(0, 512, None), slice(512, 1024, None)]
    """
    num_parts = -(-(IMAGE_TILE**2) * channels * out_channels * item_bytes // KERNEL_BYTES)
    step = -(-channels // num_parts)
    return [slice(start, min(start + step, channels)) for start in range(0, channels, step)]


def _transform_kernels(matrix: Tensor, weight: Tensor) -> Tensor:
    """U = G g G^T: kernels (K, C, 3, 3) -> (36, K, C)."""
    return (matrix @ weight.permute(2, 3, 0, 1).reshape(KERNEL**2, -1)).view(IMAGE_TILE**2, *weight.shape[:2])


def _transform_tiles(matrix: Tensor, tiles: Tensor) -> Tensor:
    """(P, Q) @ tiles (n, Q, C) -> (n, P, C): V = B^T d B, or Y = A^T M A.

    One product per tile is faster than one over all tiles, whose operands do not fit in the cache.
    """
    return torch.bmm(matrix.expand(len(tiles), *matrix.shape), tiles)


def _multiply_pointwise(v: Tensor, u: Tensor) -> Tensor:
    """M = U * V, summed over the channels: V (n, 36, C) and U (36, K, C) -> (n, 36, K), a matrix product per point."""
    m = v.new_empty(*v.shape[:2], u.shape[1])
    if ONEDNN_LINEAR is None or v.dtype != torch.float32:
        torch.bmm(v.transpose(0, 1), u.transpose(1, 2), out=m.transpose(0, 1))
        return m
    for point, kernel in enumerate(u):
        m[:, point] = ONEDNN_LINEAR(v[:, point], kernel, None, "none", [], "")
    return m


def _weight_gradient(image: Tensor, gradient: Tensor, padding: int, dilation: int) -> Tensor:
    """(K, C, 3, 3): the transposed transforms around the products of output tiles and image tiles."""
    channels, out_channels = image.shape[1], gradient.shape[1]
    matrices = TRANSFORMS.to(image.dtype)
    tiling = Tiling.for_image(image.shape, padding, dilation)
    weight = image.new_empty(out_channels, channels, KERNEL, KERNEL)
    for part in channel_slices(channels, out_channels, image.element_size()):
        u_gradient = image.new_zeros(IMAGE_TILE**2, out_channels, len(range(channels)[part]))
        for strip in tiling.strips(len(image), max(u_gradient.shape[1:]), image.element_size()):
            v = _transform_tiles(matrices.image, tiling.image_tiles(image[:, part], strip))
            m_gradient = _transform_tiles(matrices.output.T, tiling.gradient_tiles(gradient, strip))
            u_gradient.baddbmm_(m_gradient.permute(1, 2, 0), v.transpose(0, 1))
        kernels = matrices.kernel.T @ u_gradient.view(IMAGE_TILE**2, -1)
        weight[:, part] = kernels.view(KERNEL, KERNEL, *u_gradient.shape[1:]).permute(2, 3, 0, 1)
        del u_gradient  # before that of the next part is allocated
    return weight
