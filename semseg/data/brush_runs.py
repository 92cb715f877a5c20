"""Label Studio's run lengths of a brush: a stream of bits, and not COCO's run lengths. numpy only, no torch.

The stream packs the bytes of an RGBA image: 32 bits with their number, 5 bits with the bits of a value less one, four
times 4 bits with the bits of a run's length less one; then for each run 1 bit (whether a value is repeated), 2 bits
(which of the four sizes), the length less one, and one value or as many values as the length.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from semseg.data.geometry import Size

CHANNELS, ALPHA = 4, 3
LENGTH_BITS = (3, 4, 8, 16)  # that are written


def decode_brush(data: bytes, size: Size) -> NDArray[np.bool_]:
    """The painted pixels (H, W): those whose alpha is above 0.

    Raises:
        ValueError: if the stream is damaged or is for another number of pixels.
    """
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    position = 0

    def read(count: int) -> int:
        nonlocal position
        if position + count > len(bits):
            raise ValueError("the run lengths of a brush are truncated")
        start, skipped = divmod(position, 8)
        window = data[start : start + 8]
        position += count
        return (int.from_bytes(window, "big") >> (8 * len(window) - skipped - count)) & ((1 << count) - 1)

    total, value_bits = read(32), read(5) + 1
    length_bits = [read(4) + 1 for _ in range(4)]
    if total != size.height * size.width * CHANNELS:
        raise ValueError(f"the run lengths of a brush are for {total} values, not for {size} pixels in {CHANNELS}")
    painted, count = np.zeros(total, np.bool_), 0
    while count < total:
        is_repeated, kind = read(1), read(2)
        length = read(length_bits[kind]) + 1
        if count + length > total:
            raise ValueError("the run lengths of a brush have more values than pixels")
        if is_repeated:
            painted[count : count + length] = read(value_bits) > 0
        else:
            if position + length * value_bits > len(bits):
                raise ValueError("the run lengths of a brush are truncated")
            values = bits[position : position + length * value_bits].reshape(length, value_bits)
            painted[count : count + length] = values.any(axis=1)
            position += length * value_bits
        count += length
    return painted.reshape(size.height, size.width, CHANNELS)[..., ALPHA]


def encode_brush(mask: NDArray[np.bool_]) -> list[int]:
    """The bytes for a mask (H, W), as a list: the inverse of `decode_brush`."""
    pixels = mask.ravel()
    ends = [*(np.flatnonzero(pixels[1:] != pixels[:-1]) + 1).tolist(), pixels.size]
    parts = [f"{CHANNELS * pixels.size:032b}", f"{8 - 1:05b}", *(f"{bits - 1:04b}" for bits in LENGTH_BITS)]
    start = 0
    for end in ends:
        value = "1" * 8 if pixels.size and pixels[start] else "0" * 8
        left, start = CHANNELS * (end - start), end
        while left:
            length = min(left, 1 << LENGTH_BITS[-1])
            kind = next(index for index, bits in enumerate(LENGTH_BITS) if length <= 1 << bits)
            parts.append(f"1{kind:02b}{length - 1:0{LENGTH_BITS[kind]}b}{value}")
            left -= length
    return np.packbits(np.frombuffer("".join(parts).encode(), np.uint8) - ord("0")).tolist()
