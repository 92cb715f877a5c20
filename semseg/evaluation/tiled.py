"""Stage 7 for images at their own resolution: overlapping windows, blended, in memory that does not grow with height.

The network runs on one row of windows after the other. Their logits are summed at the network's own low resolution,
each weighted by how far its position is from the edge of its window. What no later window touches is divided by the sum
of the weights, upsampled, turned into probabilities, and handed to a sink.

An image that fits into one window goes through the network as it is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg.config.preprocessing import Preprocessing
from semseg.data.geometry import Size, round_up
from semseg.data.windows import (
    FinishedRows,
    RowSink,
    Window,
    WindowReader,
    WindowRow,
    blend_weights,
    plan_window_rows,
)
from semseg.errors import ConfigError
from semseg.evaluation.inference import (
    ClassMap,
    LinearInterpolation,
    interpolate_axis,
    linear_interpolation,
    select_classes,
    strip_height,
)
from semseg.evaluation.unsure import warn_of_undefined
from semseg.nets.blocks import to_full_precision
from semseg.nets.ensemble import list_conventions, list_members
from semseg.nets.gpu import copies_without_waiting
from semseg.nets.interfaces import SegmentationNetwork, choose_size_divisor
from semseg.nets.normalise import normalise


class WindowLayout(NamedTuple):
    """The windows of a network, in pixels; all three are multiples of `divisor`."""

    side: int
    step: int  # from window to window
    divisor: int  # images are padded to multiples of it


def choose_layout(
    net: SegmentationNetwork,
    crop: Sequence[int],
    *,
    divisor: int | None = None,
    window: int | None = None,
    stride: int | None = None,
) -> WindowLayout:
    """The windows for a network that was trained on crops of `crop` [height, width] pixels.

    Args:
        divisor: model.size_divisor; None: the network's.
        window: eval.window; None: the size of the crops, or of the one image that the network takes.
        stride: eval.stride; None: 2/3 of the window.

    Raises:
        ConfigError: for another window than the one that the network takes.
    """
    divisor = choose_size_divisor(net, divisor)
    size: Size | None = getattr(net, "image_size", None)
    if size is not None and window not in (None, size.height):
        raise ConfigError(f"window={window}: this network takes windows of {size.height} pixels only. Leave it out.")
    side = size.height if size is not None else round_up(window or max(crop), divisor)
    return WindowLayout(side, min(side, round_up(stride or max(1, 2 * side // 3), divisor)), divisor)


@torch.no_grad()
def predict_by_windows(
    net: SegmentationNetwork,
    image: WindowReader | Tensor,
    convention: Preprocessing,
    layout: WindowLayout,
    sink: RowSink,
    *,
    label: Tensor | None = None,
    flip: bool = False,
    batch_size: int = 1,
    memory_limit_mb: int = 1024,
) -> None:
    """Predict an image, and hand its rows to `sink` from top to bottom.

    Args:
        net: in eval mode.
        image: a reader, or pixels (C, H, W) on any device.
        label: (H, W) int64 class indices, whose probabilities the sink gets too; 0 where it is -1.
        flip: average with the mirrored windows: the mean of the probabilities.
        batch_size: windows that go through the network together.
        memory_limit_mb: of the upsampled rows that exist at once; it never changes the result.
    """
    source = image if isinstance(image, Tensor) else ReaderPixels(image)
    size = Size(int(source.shape[-2]), int(source.shape[-1]))
    rows = None
    for logits in blend_windows(net, source, convention, layout, flip=flip, batch_size=batch_size):
        if rows is None:
            rows = UpsampledRows(size, pad_to_windows(net, size, layout), logits, memory_limit_mb)
        for finished in rows.add(logits, with_probabilities=sink.takes_probabilities, label=label):
            sink.write_rows(finished)


def pad_to_windows(net: SegmentationNetwork, size: Size, layout: WindowLayout) -> Size:
    """The size of an image with the padding below and on the right that the windows need."""
    least = getattr(net, "image_size", None) or Size(1, 1)
    sides = (max(round_up(length, layout.divisor), minimum) for length, minimum in zip(size, least, strict=True))
    return Size(*sides)


class ReaderPixels:
    """A reader as far as `cut_window` uses a tensor (C, H, W)."""

    def __init__(self, reader: WindowReader) -> None:
        self.reader = reader
        self.shape = (reader.num_bands, reader.height, reader.width)

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Tensor:
        """Pixels (C, h, w) of rows and columns inside the image."""
        _, rows, columns = index
        window = Window(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
        return torch.from_numpy(np.ascontiguousarray(self.reader.read(*window))).permute(2, 0, 1)


def cut_window(source: Tensor | ReaderPixels, window: Window) -> Tensor:
    """The part of a window (C, h, w) that is inside the image; a window may reach beyond its end."""
    rows = slice(window.top, min(window.top + window.height, int(source.shape[-2])))
    columns = slice(window.left, min(window.left + window.width, int(source.shape[-1])))
    return source[:, rows, columns]


def blend_windows(
    net: SegmentationNetwork,
    source: Tensor | ReaderPixels,
    convention: Preprocessing,
    layout: WindowLayout,
    *,
    flip: bool = False,
    batch_size: int = 1,
) -> Iterator[Tensor]:
    """The blended logits of a padded image in strips of rows from top to bottom: (M, n, w, K), M = 2 with `flip`."""
    size = pad_to_windows(net, Size(int(source.shape[-2]), int(source.shape[-1])), layout)
    blend = None
    for row in plan_window_rows(size, layout.side, layout.step):
        for start in range(0, len(row.windows), batch_size):
            windows = row.windows[start : start + batch_size]
            logits = run_windows(net, source, windows, convention, flip=flip)  # (M, n, K, h, w)
            blend = blend or WindowBlend(size, row.windows, logits)
            for index, window in enumerate(windows):
                blend.add(window, logits[:, index])
        assert blend is not None, "a row has a window"
        yield blend.finish(row)


class WindowBlend:
    """The weighted sum of the logits of a row of windows, and what later rows will be added to.

    Args:
        size: of the padded image.
        windows: those of a row.
        logits: of some windows, (M, n, K, h, w).
    """

    def __init__(self, size: Size, windows: Sequence[Window], logits: Tensor) -> None:
        self.stride = windows[0].width // logits.shape[-1]
        self.down = weigh_positions(windows[0].height, size.height, logits.shape[-2], logits)  # (h)
        self.across = weigh_positions(windows[0].width, size.width, logits.shape[-1], logits)  # (w)
        width = size.width // self.stride
        self.total = logits.new_zeros(len(logits), logits.shape[2], logits.shape[-2], width)
        self.row_weights = logits.new_zeros(logits.shape[-2])  # sums of `down` over the rows of windows
        self.column_weights = logits.new_zeros(width)  # sums of `across` over the windows of a row
        for window in windows:
            self.column_weights[self.columns(window)] += self.across

    def columns(self, window: Window) -> slice:
        """The positions of a window along a row of logits."""
        start = window.left // self.stride
        return slice(start, start + len(self.across))

    def add(self, window: Window, logits: Tensor) -> None:
        """Add the logits (M, K, h, w) of a window of the current row."""
        self.total[..., self.columns(window)] += logits * (self.down[:, None] * self.across)

    def finish(self, row: WindowRow) -> Tensor:
        """The rows of logits (M, n, w, K) that are complete after `row`; the others wait for the next one."""
        self.row_weights += self.down
        count = (row.finished - row.windows[0].top) // self.stride
        weights = self.row_weights[:count, None] * self.column_weights
        finished = (self.total[:, :, :count] / weights).permute(0, 2, 3, 1)
        self.total = torch.cat([self.total[:, :, count:], torch.zeros_like(self.total[:, :, :count])], dim=2)
        self.row_weights = torch.cat([self.row_weights[count:], torch.zeros_like(self.row_weights[:count])])
        return finished


def weigh_positions(length: int, whole: int, positions: int, like: Tensor) -> Tensor:
    """The weights (positions) along a side of `length` pixels of the windows of an image whose side is `whole` pixels.

    A single window has the weight 1 everywhere, so that dividing by it changes no bit.
    """
    weights = np.ones(positions, np.float32) if length == whole else blend_weights(positions)
    return torch.from_numpy(weights).to(like)


def run_windows(
    net: SegmentationNetwork,
    source: Tensor | ReaderPixels,
    windows: Sequence[Window],
    convention: Preprocessing,
    *,
    flip: bool,
) -> Tensor:
    """The logits (M, N, K, h, w) of N windows of the same size, which may reach beyond the end of the image.

    Raises:
        ConfigError: for an ensemble of networks with logits at different strides.
    """
    weights = next(net.parameters(), torch.empty(0))
    layout = torch.channels_last if weights.device.type == "cpu" else torch.preserve_format
    parts = [cut_window(source, window) for window in windows]
    shape = (len(windows), len(parts[0]), windows[0].height, windows[0].width)
    pixels = torch.zeros(shape, dtype=parts[0].dtype, device=parts[0].device)
    for canvas, part in zip(pixels, parts, strict=True):
        canvas[:, : part.shape[1], : part.shape[2]] = part
    is_padded = any(part.shape[1:] != pixels.shape[2:] for part in parts)
    sizes = torch.tensor([part.shape[1:] for part in parts]) if is_padded else None
    pixels = pixels.to(weights.device, non_blocking=copies_without_waiting(weights.device))
    conventions = list_conventions(net, convention)
    images = {
        own: normalise(pixels, own, sizes).to(weights.dtype, memory_format=layout) for own in dict.fromkeys(conventions)
    }
    maps = []
    for member, own in zip(list_members(net), conventions, strict=True):
        image = images[own]
        maps.append(to_full_precision(member(image).main))
        if flip:
            maps.append(to_full_precision(member(image.flip(-1)).main).flip(-1))
    if len({logits.shape for logits in maps}) > 1:
        raise ConfigError(
            "these networks have logits at different strides, which windows at native resolution do not average. Use "
            "networks of one stride."
        )
    return torch.stack(maps)


class UpsampledRows:
    """Turns strips of logits into rows of predictions at the size of the image, as `merge_scales` does for whole maps.

    Args:
        size: of the image.
        padded: of the image with its padding, which the logits are of.
        like: some logits.
        memory_limit_mb: limit of the arrays that grow with the number of output rows at once.
    """

    def __init__(self, size: Size, padded: Size, like: Tensor, memory_limit_mb: int) -> None:
        self.size, self.memory_limit_mb = size, memory_limit_mb
        stride = padded.width // like.shape[2]
        self.vertical = linear_interpolation(padded.height // stride, padded.height, like)
        horizontal = linear_interpolation(padded.width // stride, padded.width, like)
        self.horizontal = LinearInterpolation(*(values[: size.width] for values in horizontal))
        self.last_read = self.vertical.second.tolist()  # the last row of logits that each output row needs
        self.logits = like[:, :0]  # (M, n, w, K) rows of logits from `first` on
        self.first = self.next = 0  # row of logits, output row

    def add(self, logits: Tensor, *, with_probabilities: bool, label: Tensor | None = None) -> Iterator[FinishedRows]:
        """Take the next rows of logits (M, n, w, K); yields the output rows that they complete.

        Args:
            label: that of the image; see `predict_by_windows`.
        """
        self.logits = torch.cat([self.logits, logits], dim=1)
        available = self.first + self.logits.shape[1]
        end = min(bisect_left(self.last_read, available), self.size.height)
        like, num_classes = self.logits, self.logits.shape[-1]
        row_bytes = max(self.size.width, like.shape[2]) * num_classes * like.element_size()
        step = strip_height(row_bytes, self.memory_limit_mb, like.device)
        for top in range(self.next, end, step):
            rows = slice(top, min(top + step, end))
            total = self._probabilities(rows)
            confidence, ids = total.max(-1)
            # On the device: the probabilities of all classes may be gigabytes.
            of_label = None if label is None else select_classes(total, label[rows].to(total.device))
            confidence = confidence.cpu()
            warn_of_undefined(confidence)
            yield FinishedRows(
                top,
                ids.to("cpu", torch.int16).numpy(),
                confidence.numpy(),
                total.permute(2, 0, 1).cpu().numpy() if with_probabilities else None,
                None if of_label is None else of_label.cpu().numpy(),
            )
        self.next = max(self.next, end)
        needed = int(self.vertical.first[self.next]) if self.next < len(self.last_read) else available
        self.logits = self.logits[:, needed - self.first :].clone()  # a view would keep the memory of the others
        self.first = needed

    def _probabilities(self, rows: slice) -> Tensor:
        """The mean probabilities (n, width, K) of output rows."""
        first, second, weight = (values[rows] for values in self.vertical)
        vertical = LinearInterpolation(first - self.first, second - self.first, weight)
        maps = (interpolate_axis(interpolate_axis(logits, 0, vertical), 1, self.horizontal) for logits in self.logits)
        total = next(maps).softmax(-1)
        for logits in maps:
            total += logits.softmax(-1)
        return total.div_(len(self.logits))


class ArraySink:
    """A sink that keeps the whole prediction in memory.

    Args:
        size: of the image.
        probabilities: array to fill, (K, height, width) of any floating type; None: they are not kept.
    """

    def __init__(self, size: Size, probabilities: NDArray[np.floating] | None = None) -> None:
        self.ids = np.empty(size, np.int16)
        self.confidence: NDArray[np.floating] = np.empty(size, np.float32)
        self.probabilities = probabilities
        self.label_confidence: NDArray[np.floating] | None = None  # (height, width), if a label was given

    @property
    def takes_probabilities(self) -> bool:
        """Whether there is an array for them."""
        return self.probabilities is not None

    def write_rows(self, rows: FinishedRows) -> None:
        """Keep the next rows."""
        place = slice(rows.top, rows.top + len(rows.ids))
        self.ids[place] = rows.ids
        self.confidence = self.confidence.astype(rows.confidence.dtype, copy=False)
        self.confidence[place] = rows.confidence
        if self.probabilities is not None:
            assert rows.probabilities is not None, "this sink takes them"
            self.probabilities[:, place] = rows.probabilities
        if rows.label_confidence is not None:
            if self.label_confidence is None:
                self.label_confidence = np.empty(self.ids.shape, rows.label_confidence.dtype)
            self.label_confidence[place] = rows.label_confidence

    def to_class_map(self, device: torch.device) -> ClassMap:
        """What was predicted, on `device`."""
        of_label = None if self.label_confidence is None else torch.from_numpy(self.label_confidence).to(device)
        return ClassMap(torch.from_numpy(self.ids).to(device), torch.from_numpy(self.confidence).to(device), of_label)
