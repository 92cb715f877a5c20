"""Stage 6 for labels finer than the logits: sums over the upsampled logits without all of them at once.

At the resolution of two images of 512 x 683 pixels, logits of 150 classes take 420 MB, and a loss and its gradient
several times as much. Here a strip of rows is upsampled, reduced to its sums and discarded; for the gradient it is
computed again (activation checkpointing). Terms of the loss that are functions of sums over pixels need no more. Their
values differ from those of the whole map by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from semseg.evaluation.inference import LinearInterpolation, linear_interpolation
from semseg.nets.blocks import to_full_precision

WHOLE_BYTES = 2**27  # upsampled logits up to this size are computed as a whole
STRIP_BYTES = 2**25  # of the upsampled logits of a strip

# (logits (N, K, n, W), maps (N, n, W)...) -> sums over their pixels, tensors of any shape
RowSums = Callable[..., tuple[Tensor, ...]]


class Strip(NamedTuple):
    """Some rows of the label, and the rows of the logits that they are interpolated from."""

    rows: slice  # of the label
    source: slice  # of the logits


class LogitsByStrip:
    """Logits (N, K, h, w) at the resolution of a label (N, H, W), of which only a strip of rows exists at once.

    Args:
        logits: float32 or float64.
        strip_bytes: of the upsampled logits of a strip, which has at least one row.
    """

    def __init__(self, logits: Tensor, label: Tensor, strip_bytes: int = STRIP_BYTES) -> None:
        self.logits = logits
        self.shape = torch.Size([*logits.shape[:2], *label.shape[1:]])
        self.dtype, self.device = logits.dtype, logits.device
        self.vertical = linear_interpolation(logits.shape[2], label.shape[1], logits)
        row_bytes = self.shape.numel() // label.shape[1] * logits.element_size()
        self.num_rows = max(1, strip_bytes // max(1, row_bytes))

    def upsample_all(self) -> Tensor:
        """All of them, for terms that need every pixel at once."""
        return F.interpolate(self.logits, size=self.shape[2:], mode="bilinear", align_corners=False)

    def sum(self, function: RowSums, *maps: Tensor) -> tuple[Tensor, ...]:
        """The sums of a function over all strips, with a gradient."""
        total: tuple[Tensor, ...] = ()
        for strip in self._strips():
            parts = [values[:, strip.rows] for values in maps]
            sums = checkpoint(
                self._apply, function, strip, self.logits[:, :, strip.source], *parts,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
            assert isinstance(sums, tuple)
            total = tuple(a + b for a, b in zip(total, sums, strict=True)) if total else sums
        return total

    @torch.no_grad()
    def map(self, function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
        """The results (N, n, W) of a function of every strip as one map (N, H, W), without a gradient."""
        results = [
            self._apply(function, strip, self.logits[:, :, strip.source], *(values[:, strip.rows] for values in maps))
            for strip in self._strips()
        ]
        return torch.cat(results, dim=1)

    def _strips(self) -> Iterator[Strip]:
        height = self.shape[2]
        for top in range(0, height, self.num_rows):
            bottom = min(top + self.num_rows, height)
            # One more row on each side: the device may round positions differently, and asking it would wait for it.
            source = slice(max(0, self._source_row(top) - 1), self._source_row(bottom - 1) + 3)
            yield Strip(slice(top, bottom), source)

    def _source_row(self, row: int) -> int:
        """The first of the two rows of the logits between which a row of the label lies."""
        height, out_height = self.logits.shape[2], self.shape[2]
        return max(0, (2 * row + 1) * height - out_height) // (2 * out_height)

    def _apply(self, function: Callable[..., Any], strip: Strip, source: Tensor, *maps: Tensor) -> Any:
        """The function of the upsampled logits of a strip, (N, K, n, W), and of the maps of its rows."""
        first, second, weight = LinearInterpolation(*(values[strip.rows] for values in self.vertical))
        weight = weight[:, None]
        start = strip.source.start
        rows = source.index_select(2, first - start) * (1 - weight) + source.index_select(2, second - start) * weight
        size = (rows.shape[2], self.shape[3])
        upsampled = F.interpolate(rows, size=size, mode="bilinear", align_corners=False)  # along the rows only
        return function(upsampled, *maps)


LogitsOfLabel = Tensor | LogitsByStrip  # (N, K, H, W), at the resolution of the label


def fit_to_label(logits: Tensor, label: Tensor) -> LogitsOfLabel:
    """Logits (N, K, h, w) in float32 or wider, at the resolution of a label (N, H, W); in strips if they are large.

    The resolutions differ for the auxiliary head of an undilated encoder, which is finer than the main one, and where
    model.label_stride is not the stride of the logits.
    """
    wide = to_full_precision(logits)
    if wide.shape[-2:] == label.shape[-2:]:
        return wide
    if label.numel() * wide.shape[1] * wide.element_size() > WHOLE_BYTES:
        return LogitsByStrip(wide, label)
    return F.interpolate(wide, size=label.shape[-2:], mode="bilinear", align_corners=False)


def sum_over_rows(function: RowSums, logits: LogitsOfLabel, *maps: Tensor) -> tuple[Tensor, ...]:
    """The sums that `function` gives for logits (N, K, H, W) and maps (N, H, W)."""
    return function(logits, *maps) if isinstance(logits, Tensor) else logits.sum(function, *maps)


def map_rows(function: Callable[..., Tensor], logits: LogitsOfLabel, *maps: Tensor) -> Tensor:
    """The map (N, H, W) that `function` gives for logits (N, K, H, W) and maps (N, H, W), without a gradient."""
    if isinstance(logits, LogitsByStrip):
        return logits.map(function, *maps)
    with torch.no_grad():
        return function(logits, *maps)


def as_tensor(logits: LogitsOfLabel) -> Tensor:
    """All logits (N, K, H, W) at once."""
    return logits if isinstance(logits, Tensor) else logits.upsample_all()
