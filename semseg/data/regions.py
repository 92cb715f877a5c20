"""Regions of pixels as polygons and run lengths: drawing, COCO's encodings, and outlines. numpy only, no torch.

There is one rule for all polygons: a pixel belongs to a polygon if its centre lies inside an odd number of rings.
Coordinates are x, y in pixels, with (0, 0) at the top left corner of the first pixel, whose centre is (0.5, 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from semseg.data.geometry import Size

Ring = NDArray[np.float64]  # (n, 2) corners x, y; the last one is joined to the first
MAX_COORDINATE = 1e7  # pixels; larger numbers are mistakes
MAX_CROSSINGS = 2**26  # rows that the edges of a region cross in all; more would take long
_CHUNK = 2**21  # crossings at a time
_CHARACTER_BITS, _MORE, _SIGN = 5, 32, 16  # of COCO's text


class Patch(NamedTuple):
    """Pixels inside a window of an image."""

    top: int
    left: int
    mask: NDArray[np.bool_]  # (h, w)

    @property
    def area(self) -> int:
        return int(np.count_nonzero(self.mask))


def fill_rings(rings: Sequence[Ring], size: Size) -> Patch:
    """The pixels of an image whose centres lie inside an odd number of rings, which may leave the image.

    Raises:
        ValueError: if a number is not finite or absurdly large, or a ring has fewer than three corners.

    >>> fill_rings([np.array([[1.0, 1], [3, 1], [3, 2]])], Size(4, 4)).mask.tolist()
    [[False, True]]
    """
    for ring in rings:
        if len(ring) < 3:
            raise ValueError(f"a polygon has {len(ring)} points, at least 3 are needed")
        if not (np.abs(ring) <= MAX_COORDINATE).all():  # false for NaN
            raise ValueError("a polygon has a coordinate that is not a number of pixels")
    if not rings:
        return Patch(0, 0, np.zeros((0, 0), np.bool_))
    corners = np.concatenate(rings)
    left, top = np.clip(np.floor(corners.min(0)), 0, size[::-1]).astype(int).tolist()
    right, bottom = np.clip(np.ceil(corners.max(0)), 0, size[::-1]).astype(int).tolist()
    toggles = np.zeros((bottom - top, right - left + 1), np.uint8)
    num_crossings = 0
    for ring in rings:
        x, y = ring.T - 0.5  # pixel centres are at whole numbers
        x2, y2 = np.roll(x, -1), np.roll(y, -1)
        first = np.clip(np.ceil(np.minimum(y, y2)), top, bottom).astype(np.int64)
        count = np.clip(np.ceil(np.maximum(y, y2)), top, bottom).astype(np.int64) - first
        ends = np.cumsum(count)
        num_crossings += int(ends[-1])
        if num_crossings > MAX_CROSSINGS:
            raise ValueError("a polygon has too many long edges")
        for start in range(0, int(ends[-1]), _CHUNK):
            crossing = np.arange(start, min(start + _CHUNK, int(ends[-1])))
            edge = np.searchsorted(ends, crossing, side="right")
            row = crossing - (ends[edge] - count[edge]) + first[edge]
            at = x[edge] + (row - y[edge]) * (x2[edge] - x[edge]) / (y2[edge] - y[edge])
            column = np.clip(np.ceil(at), left, right).astype(np.int64) - left
            np.bitwise_xor.at(toggles, (row - top, column), 1)
    inside = np.bitwise_xor.accumulate(toggles[:, :-1], axis=1).astype(np.bool_)
    return Patch(top, left, inside)


def fill_disc(x: float, y: float, radius_x: float, radius_y: float, size: Size) -> Patch:
    """The pixels whose centres lie inside an ellipse with horizontal and vertical axes.

    Raises:
        ValueError: if a number is not finite or absurdly large.
    """
    if not all(abs(number) <= MAX_COORDINATE for number in (x, y, radius_x, radius_y)):
        raise ValueError("an ellipse has a coordinate that is not a number of pixels")
    left, right = (int(np.clip(np.floor(x + sign * radius_x), 0, size.width)) for sign in (-1, 1))
    top, bottom = (int(np.clip(np.floor(y + sign * radius_y), 0, size.height)) for sign in (-1, 1))
    rows = (np.arange(top, min(bottom + 1, size.height)) + 0.5 - y) / max(radius_y, 1e-9)
    columns = (np.arange(left, min(right + 1, size.width)) + 0.5 - x) / max(radius_x, 1e-9)
    return Patch(top, left, rows[:, None] ** 2 + columns**2 <= 1)


def unite(patches: Sequence[Patch]) -> Patch:
    """The pixels of any of several patches."""
    patches = [patch for patch in patches if patch.mask.size]
    if len(patches) == 1:
        return patches[0]
    if not patches:
        return Patch(0, 0, np.zeros((0, 0), np.bool_))
    top, left = min(patch.top for patch in patches), min(patch.left for patch in patches)
    bottom = max(patch.top + patch.mask.shape[0] for patch in patches)
    right = max(patch.left + patch.mask.shape[1] for patch in patches)
    mask = np.zeros((bottom - top, right - left), np.bool_)
    for patch in patches:
        height, width = patch.mask.shape
        mask[patch.top - top :, patch.left - left :][:height, :width] |= patch.mask
    return Patch(top, left, mask)


# ---- COCO's run lengths


def decode_runs(counts: ArrayLike, size: Size) -> NDArray[np.bool_]:
    """The mask (H, W) of run lengths in column-major order, of which the first is background.

    Raises:
        ValueError: if they are no whole numbers of at least 0, or do not sum to the number of pixels.
    """
    lengths = np.asarray(counts)
    if lengths.ndim != 1 or (lengths.size and lengths.dtype.kind not in "iu") or (lengths < 0).any():
        raise ValueError("run lengths must be whole numbers of at least 0")
    if (lengths > size.height * size.width).any() or int(lengths.sum()) != size.height * size.width:
        raise ValueError(f"run lengths sum to {int(lengths.sum())}, not to {size.height} x {size.width} pixels")
    is_object = np.arange(len(lengths)) % 2 == 1
    return np.repeat(is_object, lengths.astype(np.int64)).reshape(size.width, size.height).T


def encode_runs(mask: NDArray[np.bool_]) -> list[int]:
    """The run lengths of a mask (H, W): the inverse of `decode_runs`.

    >>> encode_runs(np.array([[0, 1], [0, 1], [1, 1]], bool))
    [2, 4]
    """
    pixels = mask.T.ravel()
    ends = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    bounds = [*([0] if pixels.size and pixels[0] else []), *ends.tolist(), pixels.size]
    return np.diff([0, *bounds]).tolist()


def encode_patch_runs(patch: Patch, size: Size) -> list[int]:
    """The run lengths of a patch in an image of `size`, without the image's own mask."""
    width = patch.mask.shape[1]
    columns = np.zeros((size.height, width), np.bool_)
    columns[patch.top : patch.top + patch.mask.shape[0]] = patch.mask
    counts = encode_runs(columns)
    counts[0] += patch.left * size.height
    after = (size.width - patch.left - width) * size.height
    if len(counts) % 2:
        counts[-1] += after
    elif after:
        counts.append(after)
    return counts


def decode_text(text: str) -> NDArray[np.int64]:
    """The run lengths in COCO's text: numbers of 5 bits a character, from the fourth on as differences to the last but
    one.

    Raises:
        ValueError: if it is damaged.
    """
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    if not codes.size or ((codes < 0) | (codes > 63)).any() or codes[-1] & _MORE:
        raise ValueError("the text of run lengths is damaged")
    ends = np.flatnonzero(codes & _MORE == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    digit = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    if digit.max() > 6:
        raise ValueError("the text of run lengths has absurdly large numbers")
    numbers = np.add.reduceat((codes & 31) << (_CHARACTER_BITS * digit), starts)
    numbers -= np.where(codes[ends] & _SIGN, np.int64(1) << (_CHARACTER_BITS * (digit[ends] + 1)), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def encode_text(counts: Sequence[int]) -> str:
    """Run lengths as COCO's text: the inverse of `decode_text`.

    >>> encode_text([2, 4])
    '24'
    """
    characters = []
    for position, count in enumerate(counts):
        number = count - counts[position - 2] if position > 2 else count
        while True:
            code, number = number & 31, number >> _CHARACTER_BITS
            has_more = number != (-1 if code & _SIGN else 0)
            characters.append(chr(48 + code + (_MORE if has_more else 0)))
            if not has_more:
                break
    return "".join(characters)


# ---- outlines


def trace_rings(mask: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """The outlines of a mask (H, W) along the edges of its pixels: rings (n, 2) of corners x, y, holes included.

    `fill_rings` of all rings together gives the mask again, exactly.
    """
    padded = np.pad(mask, 1).astype(np.int8)
    # A lattice point is a corner if 1 or 3 of its 4 pixels are set, and two corners if 2 opposite ones are.
    around = padded[:-1, :-1] + padded[1:, 1:], padded[:-1, 1:] + padded[1:, :-1]
    is_double = (around[0] + around[1] == 2) & (around[0] != 1)
    repeats = ((around[0] + around[1]) % 2 == 1).astype(np.int8) + 2 * is_double
    y, x = (np.repeat(axis, repeats[repeats > 0]) for axis in np.nonzero(repeats))
    # In each row the corners pair up to horizontal edges, in each column to vertical ones.
    across = _pair_up(np.arange(len(x)))
    down = _pair_up(np.lexsort((y, x)))
    rings = []
    is_left = np.ones(len(x), np.bool_)
    for start in range(len(x)):
        if not is_left[start]:
            continue
        corners, corner = [], start
        while is_left[corner]:
            corners += [corner, int(across[corner])]
            is_left[corners[-2:]] = False
            corner = int(down[corners[-1]])
        rings.append(np.stack([x[corners], y[corners]], axis=1))
    return rings


def _pair_up(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The partner of each corner, if those at positions 0 and 1, 2 and 3, ... of `order` belong together."""
    partner = np.empty(len(order), np.int64)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return partner
