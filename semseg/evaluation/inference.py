"""Stage 7: from the scaled inputs of an image to its class map, in bounded memory. Used by all modes.

The network runs once per scale, on the whole image or on windows, and on images of equal shape together. Its logits are
kept at their own low resolution, channels last. Then they are upsampled, turned into probabilities and averaged, one
strip of output rows at a time, so that num_classes x height x width numbers never exist at once.

Every output pixel is computed by the same operations in the same order, whatever the height of the strips: products
and sums that are rounded one by one, and a softmax over contiguous numbers. The result is therefore equal to the last
bit for every memory limit (except for CUDA's softmax of more than 1024 classes, which depends on addresses).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from semseg.config.preprocessing import Preprocessing
from semseg.data.geometry import Size, round_up
from semseg.data.plan import group_by_shape
from semseg.data.windows import window_starts
from semseg.errors import ConfigError
from semseg.nets.blocks import to_full_precision
from semseg.nets.ensemble import list_conventions, list_members
from semseg.nets.gpu import copies_without_waiting
from semseg.nets.normalise import normalise

BYTES_PER_MB = 2**20
# Arrays of a strip's size that exist at once: the sum, two gathered columns, their rows, probabilities, a copy to keep.
BUFFERS = 6
# On the CPU a strip whose arrays fit in the cache is five times as fast as one whose arrays do not.
CPU_STRIP_BYTES = BYTES_PER_MB // 2


class ClassMap(NamedTuple):
    """The prediction for one image, on the device of the network."""

    ids: Tensor  # (height, width) int16: the class of the highest probability; of equal ones the first
    confidence: Tensor  # (height, width): that probability; float32, or float64 for a float64 network
    label_confidence: Tensor | None = None  # (height, width): that of the class in the label, if one was given


def predict_class_map(
    net: nn.Module,
    scales: Sequence[Tensor],
    out_size: tuple[int, int],
    convention: Preprocessing,
    *,
    flip: bool = False,
    window: int | None = None,
    stride: int | None = None,
    memory_limit_mb: int = 1024,
    probabilities: NDArray[np.floating] | None = None,
) -> ClassMap:
    """Predict one image: the mean over all scales of the softmax of the upsampled logits.

    The same as `merge_scales(scale_logits(...))`, where the arguments are documented. To score several subsets of the
    scales, call `scale_logits` once and `merge_scales` for each subset.
    """
    logits = scale_logits(net, scales, convention, flip=flip, window=window, stride=stride)
    return merge_scales(logits, out_size, memory_limit_mb=memory_limit_mb, probabilities=probabilities)


# ---- running the network


def scale_logits(
    net: nn.Module,
    scales: Sequence[Tensor],
    convention: Preprocessing,
    *,
    flip: bool = False,
    window: int | None = None,
    stride: int | None = None,
) -> list[Tensor]:
    """Run the network at every scale of one image.

    Args:
        net: a SegmentationNetwork in eval mode.
        scales: uint8 RGB images (3, H, W), one per scale, on any device; H and W multiples of size_divisor.
        flip: run the network on the mirrored image too.
        window: side of a square window in pixels of the scaled image, rounded up to a multiple of size_divisor; the
            logits of overlapping windows are averaged. None, or larger than the image: the whole image at once.
        stride: pixels from window to window, at most `window`, rounded up in the same way; None: 2/3 of the window.

    Returns:
        One tensor per scale, on the network's device: (M, h, w, K) with M = 1, or M = 2 with the logits of the mirrored
        image flipped back; float32, or float64 for a float64 network.

    Raises:
        ConfigError: if a window is set and the sides of an image are not multiples of size_divisor.
    """
    (logits,) = batch_logits(net, [scales], convention, flip=flip, window=window, stride=stride)
    return logits


@torch.no_grad()
def batch_logits(
    net: nn.Module,
    images: Sequence[Sequence[Tensor]],
    convention: Preprocessing,
    *,
    flip: bool = False,
    window: int | None = None,
    stride: int | None = None,
) -> list[list[Tensor]]:
    """`scale_logits` for several images with the same number of scales.

    Images that have the same shape at a scale go through the network together. On a GPU that is faster, and it may
    change the rounding of their logits.

    An ensemble gives the logits of all members for the first scale, then those for the second, and so on.
    """
    members = list_members(net)
    if len(members) > 1:
        options = {"flip": flip, "window": window, "stride": stride}
        conventions = list_conventions(net, convention)
        by_member = [
            batch_logits(member, images, own, **options) for member, own in zip(members, conventions, strict=True)
        ]
        return [
            [logits for scale in zip(*lists, strict=True) for logits in scale] for lists in zip(*by_member, strict=True)
        ]
    weights = next(net.parameters(), torch.empty(0))  # float32 unless trainer.precision is one of *-true
    # Convolutions on the CPU are 10 % faster in channels_last, and merge_scales reads logits in this layout.
    layout = torch.channels_last if weights.device.type == "cpu" else torch.preserve_format
    is_async = copies_without_waiting(weights.device)
    found: list[list[Tensor]] = [[] for _ in images]
    for scale in zip(*images, strict=True):  # all images at one scale
        for positions in group_by_shape([pixels.shape for pixels in scale], max_members=len(images)):
            stacked = torch.stack([scale[each].to(weights.device, non_blocking=is_async) for each in positions])
            image = normalise(stacked, convention).to(weights.dtype, memory_format=layout)  # (N, 3, H, W)
            maps = [run_in_windows(net, image, window, stride)]
            if flip:
                maps.append(run_in_windows(net, image.flip(-1), window, stride).flip(-1))
            logits = torch.stack([output.permute(0, 2, 3, 1) for output in maps], dim=1)  # (N, M, h, w, K)
            for position, logits_of_image in zip(positions, logits, strict=True):
                found[position].append(logits_of_image)
    return found


def run_in_windows(net: nn.Module, image: Tensor, window: int | None, stride: int | None) -> Tensor:
    """Logits (N, K, h, w) of images (N, 3, H, W): whole, or averaged over the windows that cover a position.

    A network of one size gets windows of that size; an image that is smaller is padded with 0.
    """
    height, width = image.shape[-2:]
    size: Size | None = getattr(net, "image_size", None)
    if size is None and (window is None or window >= max(height, width)):
        return to_full_precision(net(image).main)  # half-precision probabilities of 150 classes do not sum to 1
    divisor = int(net.size_divisor)  # pyright: ignore[reportArgumentType] - a SegmentationNetwork has it
    if height % divisor or width % divisor:
        raise ConfigError(
            f"window={window or max(size or ())}: with windows, height and width of an image must be multiples of "
            f"{divisor} pixels, not {height} x {width}. Set model.size_divisor to null or to a multiple of {divisor}."
        )
    if size is not None and window not in (None, size.height):
        raise ConfigError(f"window={window}: this network takes windows of {size.height} pixels only. Leave it out.")
    side = size.height if size is not None else round_up(window or divisor, divisor)
    step = round_up(stride or max(1, 2 * (window or side) // 3), divisor)
    if size is not None:
        image = F.pad(image, (0, max(0, side - width), 0, max(0, side - height)))
    total = num_windows = torch.empty(0)
    label_stride = 1
    for top in window_starts(image.shape[-2], side, step):
        for left in window_starts(image.shape[-1], side, step):
            part = image[..., top : top + side, left : left + side]
            logits = to_full_precision(net(part).main)
            label_stride = part.shape[-1] // logits.shape[-1]  # divides size_divisor
            if not total.numel():
                sides = (length // label_stride for length in image.shape[-2:])
                total = logits.new_zeros(*logits.shape[:2], *sides)
                num_windows = torch.zeros_like(total[:1, :1])
            rows = slice(top // label_stride, top // label_stride + logits.shape[-2])
            columns = slice(left // label_stride, left // label_stride + logits.shape[-1])
            total[..., rows, columns] += logits
            num_windows[..., rows, columns] += 1
    return (total / num_windows)[..., : height // label_stride, : width // label_stride]


# ---- from logits to classes


@torch.no_grad()
def merge_scales(
    logits: Sequence[Tensor],
    out_size: tuple[int, int],
    *,
    memory_limit_mb: int = 1024,
    probabilities: NDArray[np.floating] | None = None,
    label: Tensor | None = None,
) -> ClassMap:
    """Predict the classes from the mean over scales (and mirrored images) of the softmax of the upsampled logits.

    Upsampling equals F.interpolate (bilinear, align_corners=False) up to rounding: it interpolates rows first, then
    columns. The result is equal to the last bit for every memory limit.

    Args:
        logits: (M, h, w, K) of each scale, from `scale_logits`.
        out_size: (height, width) of the class map.
        memory_limit_mb: limit of all arrays that grow with K x width x rows of a strip; a strip has at least one row.
        probabilities: array to fill with the mean probabilities: (K, height, width), any floating type; may be
            memory-mapped.
        label: (height, width) int64 class indices, whose probabilities the class map gets too; 0 where it is -1.
    """
    height, width = out_size
    maps = [UpsampledMap(view, out_size) for scale in logits for view in scale]
    num_classes, like = logits[0].shape[-1], logits[0]
    ids = torch.empty(out_size, dtype=torch.int16, device=like.device)
    confidence = torch.empty(out_size, dtype=like.dtype, device=like.device)
    label_confidence = None if label is None else torch.empty_like(confidence)
    max_width = max(width, *(view.logits.shape[1] for view in maps))
    step = strip_height(max_width * num_classes * like.element_size(), memory_limit_mb, like.device)
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        total = maps[0].rows(rows).softmax(-1)  # (n, width, K)
        for view in maps[1:]:
            total += view.rows(rows).softmax(-1)
        total /= len(maps)
        confidence[rows], ids[rows] = total.max(-1)
        if label is not None and label_confidence is not None:
            label_confidence[rows] = select_classes(total, label[rows])
        if probabilities is not None:
            converted = total.half() if probabilities.dtype == np.float16 else total
            probabilities[:, rows] = converted.permute(2, 0, 1).cpu().numpy()
    return ClassMap(ids, confidence, label_confidence)


def merge_subsets(
    logits: Sequence[Tensor],
    scales: Sequence[int],
    subsets: Sequence[Sequence[int]],
    out_size: tuple[int, int],
    *,
    memory_limit_mb: int = 1024,
    label: Tensor | None = None,
) -> list[ClassMap]:
    """`merge_scales` for an image at all scales, and for subsets of them.

    Args:
        logits: of every scale, as from `batch_logits`; an ensemble has several tensors for each.
        scales: short edges, in the order of the logits.
        subsets: some of `scales` each.
        label: the first class map, that of all scales, gets its probabilities.
    """
    per_scale = len(logits) // len(scales)
    by_scale = {edge: logits[index * per_scale : (index + 1) * per_scale] for index, edge in enumerate(scales)}
    return [
        merge_scales(
            [views for edge in subset for views in by_scale[edge]],
            out_size,
            memory_limit_mb=memory_limit_mb,
            label=label if number == 0 else None,
        )
        for number, subset in enumerate((scales, *subsets))
    ]


def select_classes(probabilities: Tensor, label: Tensor) -> Tensor:
    """The probabilities (n, width) of the classes in a label (n, width), of all (n, width, K); 0 where it is -1."""
    found = probabilities.gather(-1, label.clamp(min=0)[..., None])[..., 0]
    return found.masked_fill_(label < 0, 0)


def strip_height(row_bytes: int, memory_limit_mb: int, device: torch.device) -> int:
    """Number of output rows per strip, at least 1, if one row of one array takes `row_bytes`.

    >>> strip_height(row_bytes=2**20, memory_limit_mb=1024, device=torch.device("cuda"))
    170
    """
    array_bytes = memory_limit_mb * BYTES_PER_MB // BUFFERS
    if device.type == "cpu":
        array_bytes = min(array_bytes, CPU_STRIP_BYTES)
    return max(1, array_bytes // row_bytes)


class LinearInterpolation(NamedTuple):
    """Linear interpolation along one axis: the two neighbours of each output position, and the weight of the second."""

    first: Tensor  # (n,) int64
    second: Tensor  # (n,) int64
    weight: Tensor  # (n,) 0..1, weight of the second neighbour, in the type of the logits


def linear_interpolation(length: int, out_length: int, like: Tensor) -> LinearInterpolation:
    """Interpolation from `length` to `out_length` positions, rounded as in PyTorch's own interpolation."""
    positions = torch.arange(out_length, device=like.device, dtype=like.dtype)
    scale = like.new_full((), length) / out_length  # filled in by the device, without an upload
    source = ((positions + 0.5) * scale - 0.5).clamp(min=0)
    first = source.long().clamp(max=length - 1)
    return LinearInterpolation(first, (first + 1).clamp(max=length - 1), source - first)


class UpsampledMap:
    """A map of logits (h, w, K) upsampled to (height, width), computed for any range of rows on request."""

    def __init__(self, logits: Tensor, size: tuple[int, int]) -> None:
        self.logits = logits
        self.vertical = linear_interpolation(logits.shape[0], size[0], logits)
        self.horizontal = linear_interpolation(logits.shape[1], size[1], logits)

    def rows(self, rows: slice) -> Tensor:
        """Output rows `rows`: (n, width, K)."""
        vertical = LinearInterpolation(*(values[rows] for values in self.vertical))
        return interpolate_axis(interpolate_axis(self.logits, 0, vertical), 1, self.horizontal)


def interpolate_axis(values: Tensor, axis: int, interpolation: LinearInterpolation) -> Tensor:
    """Interpolate (h, w, K) along axis 0 or 1."""
    weight = interpolation.weight.view((-1, 1, 1) if axis == 0 else (-1, 1))
    # Each product and sum is rounded once: the last bit of torch.lerp may depend on the memory address.
    first = values.index_select(axis, interpolation.first).mul_(1 - weight)
    return first.add_(values.index_select(axis, interpolation.second).mul_(weight))
