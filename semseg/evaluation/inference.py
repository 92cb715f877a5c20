"""Stage 7: from the scaled inputs of an image to its class map, in bounded memory. Used by all modes.

The network runs once at every scale, on the whole image or window by window, images of one shape together. What is kept
are its logits at their own low resolution, channels last. Only then, a band of output rows at a time, are they
upsampled, turned into probabilities and averaged: num_classes x height x width numbers never exist at once.

Every output pixel is computed by the same operations in the same order, whatever the height of the bands: products
and sums that are rounded one by one, and a softmax over numbers that lie side by side. So the memory limit never
changes a bit of the answer (CUDA's softmax of more than 1024 classes excepted, which depends on addresses).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from semseg.config.preprocessing import Preprocessing
from semseg.data.geometry import round_up
from semseg.data.plan import groups_of_one_shape
from semseg.errors import ConfigError
from semseg.nets.normalise import normalise

MEGABYTE = 2**20
# Arrays of a band's size that exist at once: the sum, two gathered columns, their rows, probabilities, a copy to keep.
BUFFERS = 6
# On the CPU an array of a band that fits the cache is five times as fast as one that does not.
CPU_BAND_BYTES = MEGABYTE // 2


class Prediction(NamedTuple):
    """The answer for one image, on the device of the network."""

    ids: Tensor  # (height, width) int16: the class of the highest probability, the first one of equals
    confidence: Tensor  # (height, width): that probability; float32, or float64 for a float64 network


def predict(
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
) -> Prediction:
    """The class map of one image: the mean over all scales of the softmax of the upsampled logits.

    The same as `merge_scales` of `scale_logits`, where the arguments are explained. Whoever wants the answers of
    several subsets of the scales calls those two: the network runs once, and `merge_scales` for each subset.
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
        net: a Segmenter in eval mode.
        scales: uint8 RGB images (3, H, W), one per scale, anywhere; H and W multiples of the network's size_divisor.
        flip: run it on the mirror image too.
        window: side of a square window in pixels of the scaled image, rounded up to a multiple of size_divisor; the
            logits of overlapping windows are averaged. None, or larger than the image: the whole image at once.
        stride: pixels from window to window, at most `window`, rounded up likewise; None: 2/3 of the window.

    Returns:
        One tensor per scale, on the network's device: (M, h, w, K) with M = 1, or 2 with the mirrored answer turned
        back; float32, or float64 for a float64 network.

    Raises:
        ConfigError: with a window, if an image is no multiple of size_divisor.
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
    """`scale_logits` of several images, all at equally many scales.

    Those that have the same shape at a scale go through the network together: on a GPU that is faster, and may change
    the rounding of their logits.
    """
    weights = next(net.parameters(), torch.empty(0))  # their type is float32 but for trainer.precision=*-true
    # Convolutions on the CPU are a tenth faster so, and the logits come out as they are wanted below.
    layout = torch.channels_last if weights.device.type == "cpu" else torch.preserve_format
    found: list[list[Tensor]] = [[] for _ in images]
    for scale in zip(*images, strict=True):  # of every image
        for members in groups_of_one_shape([pixels.shape for pixels in scale], most=len(images)):
            stacked = torch.stack([scale[member].to(weights.device, non_blocking=True) for member in members])
            image = normalise(stacked, convention).to(weights.dtype, memory_format=layout)  # (N, 3, H, W)
            maps = [run_in_windows(net, image, window, stride)]
            if flip:
                maps.append(run_in_windows(net, image.flip(-1), window, stride).flip(-1))
            logits = torch.stack([one.permute(0, 2, 3, 1) for one in maps], dim=1)  # (N, M, h, w, K)
            for member, own in zip(members, logits, strict=True):
                found[member].append(own)
    return found


def run_in_windows(net: nn.Module, image: Tensor, window: int | None, stride: int | None) -> Tensor:
    """Logits (N, K, h, w) of images (N, 3, H, W): of the whole, or the mean over all windows that see a place."""
    height, width = image.shape[-2:]
    if window is None or window >= max(height, width):
        return wide(net(image).main)
    divisor = int(net.size_divisor)  # pyright: ignore[reportArgumentType] - of a Segmenter
    if height % divisor or width % divisor:
        raise ConfigError(
            f"window={window}: windows need images in multiples of the network's {divisor} pixels, got {height} x "
            f"{width}. Set model.size_divisor to null or to a multiple of {divisor}."
        )
    side = round_up(window, divisor)
    step = round_up(stride or max(1, 2 * window // 3), divisor)
    total = seen = torch.empty(0)
    for top in window_starts(height, side, step):
        for left in window_starts(width, side, step):
            part = image[..., top : top + side, left : left + side]
            logits = wide(net(part).main)
            shrink = part.shape[-1] // logits.shape[-1]  # pixels to one of the logits; divides size_divisor
            if not total.numel():
                total = logits.new_zeros(*logits.shape[:2], height // shrink, width // shrink)
                seen = torch.zeros_like(total[:1, :1])
            rows = slice(top // shrink, top // shrink + logits.shape[-2])
            columns = slice(left // shrink, left // shrink + logits.shape[-1])
            total[..., rows, columns] += logits
            seen[..., rows, columns] += 1
    return total / seen


def window_starts(length: int, side: int, step: int) -> list[int]:
    """Where the windows of one axis begin: every `step`, the last one flush with the end.

    >>> window_starts(100, side=40, step=32), window_starts(30, side=40, step=32)
    ([0, 32, 60], [0])
    """
    last = max(0, length - side)
    return [*range(0, last, step), last]


def wide(logits: Tensor) -> Tensor:
    """In float32 at least: 150 half-precision probabilities do not sum to 1."""
    return logits if logits.dtype == torch.float64 else logits.float()


# ---- from logits to classes


@torch.no_grad()
def merge_scales(
    logits: Sequence[Tensor],
    out_size: tuple[int, int],
    *,
    memory_limit_mb: int = 1024,
    probabilities: NDArray[np.floating] | None = None,
) -> Prediction:
    """The class map of the mean over scales (and mirror images) of the softmax of the upsampled logits.

    Upsampling is F.interpolate's (bilinear, align_corners=False), and equal to it but for rounding: it goes by rows
    first and then by columns. The answer is the same to the last bit for every memory limit.

    Args:
        logits: (M, h, w, K) of each scale, from `scale_logits`.
        out_size: (height, width) of the answer.
        memory_limit_mb: for everything that grows with K x width x rows of a band; at least one row is done at a time.
        probabilities: filled with the mean probabilities: (K, height, width), of any floating type; may lie in a file.
    """
    height, width = out_size
    maps = [Upsampled(one, out_size) for scale in logits for one in scale]
    num_classes, like = logits[0].shape[-1], logits[0]
    ids = torch.empty(out_size, dtype=torch.int16, device=like.device)
    confidence = torch.empty(out_size, dtype=like.dtype, device=like.device)
    widest = max(width, *(one.logits.shape[1] for one in maps))
    step = band_height(widest * num_classes * like.element_size(), memory_limit_mb, like.device)
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        total = maps[0].rows(rows).softmax(-1)  # (n, width, K)
        for one in maps[1:]:
            total += one.rows(rows).softmax(-1)
        total /= len(maps)
        confidence[rows], ids[rows] = total.max(-1)
        if probabilities is not None:
            narrow = total.half() if probabilities.dtype == np.float16 else total
            probabilities[:, rows] = narrow.permute(2, 0, 1).cpu().numpy()
    return Prediction(ids, confidence)


def band_height(row_bytes: int, memory_limit_mb: int, device: torch.device) -> int:
    """Output rows to do at a time, at least 1, where one row of one array takes `row_bytes`.

    >>> band_height(row_bytes=2**20, memory_limit_mb=1024, device=torch.device("cuda"))
    170
    """
    array_bytes = memory_limit_mb * MEGABYTE // BUFFERS
    if device.type == "cpu":
        array_bytes = min(array_bytes, CPU_BAND_BYTES)
    return max(1, array_bytes // row_bytes)


class Taps(NamedTuple):
    """What bilinear interpolation reads along one axis: a neighbour before, one after, and the share of the latter."""

    before: Tensor  # (n,) int64
    after: Tensor  # (n,) int64
    share: Tensor  # (n,) in the type of the logits, 0..1


def bilinear_taps(length: int, out_length: int, like: Tensor) -> Taps:
    """Taps from `length` places to `out_length`, rounded as PyTorch's own interpolation rounds them."""
    places = torch.arange(out_length, device=like.device, dtype=like.dtype)
    scale = torch.tensor(length, dtype=like.dtype, device=like.device) / out_length
    source = ((places + 0.5) * scale - 0.5).clamp(min=0)
    before = source.long().clamp(max=length - 1)
    return Taps(before, (before + 1).clamp(max=length - 1), source - before)


class Upsampled:
    """A map of logits (h, w, K) seen at (height, width), of which any rows can be had."""

    def __init__(self, logits: Tensor, size: tuple[int, int]) -> None:
        self.logits = logits
        self.row_taps = bilinear_taps(logits.shape[0], size[0], logits)
        self.column_taps = bilinear_taps(logits.shape[1], size[1], logits)

    def rows(self, rows: slice) -> Tensor:
        """Output rows `rows`: (n, width, K)."""
        taps = Taps(*(values[rows] for values in self.row_taps))
        return between(between(self.logits, 0, taps), 1, self.column_taps)


def between(values: Tensor, axis: int, taps: Taps) -> Tensor:
    """Interpolate (h, w, K) along axis 0 or 1."""
    share = taps.share.view((-1, 1, 1) if axis == 0 else (-1, 1))
    # One rounding for each product and sum: torch.lerp's last bit may depend on where a number lies in memory.
    before = values.index_select(axis, taps.before).mul_(1 - share)
    return before.add_(values.index_select(axis, taps.after).mul_(share))
