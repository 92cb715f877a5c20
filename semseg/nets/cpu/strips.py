"""Stage 5: the factored convolution of an upsampled map in strips of columns that stay in the cache, for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

OUTPUT_STRIP_BYTES = 4 * 2**20  # size of the output that is computed at a time


def interpolate_in_strips(
    interpolate: Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor],
    rows: Tensor,
    columns: Tensor,
    mixed: Sequence[Tensor],
) -> Tensor:
    """`interpolate(rows, columns, mixed)`, computed a few output columns at a time.

    A strip of output columns depends on a few columns of the coarse map only.

    Args:
        interpolate: `semseg.nets.upsampled_conv.interpolate`.
        rows: (3, H, h).
        columns: (3, W, w).
        mixed: three of (N * h, w, 3, K).

    Returns:
        (N, H, W, K).
    """
    height, coarse_height = rows.shape[1:]
    width, (total_rows, _, _, num_channels) = columns.shape[1], mixed[0].shape
    output = mixed[0].new_empty(total_rows // coarse_height, height, width, num_channels)
    step = max(1, OUTPUT_STRIP_BYTES // (output[:, :, 0].numel() * output.element_size()))
    for start in range(0, width, step):
        strip = columns[:, start : start + step]  # (3, step, w)
        first, last = strip.sum((0, 1)).nonzero()[[0, -1], 0].tolist()  # columns of the coarse map that it reads
        source = slice(first, last + 1)
        output[:, :, start : start + step] = interpolate(
            rows, strip[..., source], [columns_of_row[:, source] for columns_of_row in mixed]
        )
    return output
