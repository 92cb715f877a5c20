"""Stage 3: LZW in TIFF, decoded by libtiff. No torch.

The decoder of imagecodecs follows the codes of a damaged stream into memory that is not its own: of some thousand
damaged files, one ends the process (tests/data/test_fuzz_data.py). libtiff, which Pillow has, checks them.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semseg.data.decoders import pillow_without_limit, silent_stderr

# Tags of an image of one row of bytes, whose only strip begins behind them: width, height, bits, compression,
# photometric interpretation, offset, samples, rows of a strip, bytes of the strip.
_ENTRY, _NUM_ENTRIES = struct.Struct("<HHII"), 9
_LONG = 4  # the type of their values
_START = 8 + 2 + _NUM_ENTRIES * _ENTRY.size + 4


def decode_lzw(data: bytes, /, *, out: int) -> NDArray[np.uint8]:
    """The first `out` bytes of an LZW stream of a TIFF.

    Raises:
        ValueError: if it is damaged, or shorter.
    """
    tags = ((256, out), (257, 1), (258, 8), (259, 5), (262, 1), (273, _START), (277, 1), (278, 1), (279, len(data)))
    entries = b"".join(_ENTRY.pack(tag, _LONG, 1, value) for tag, value in tags)
    head = b"".join((b"II*\0", struct.pack("<IH", 8, _NUM_ENTRIES), entries, bytes(4)))
    try:
        with silent_stderr, pillow_without_limit, Image.open(io.BytesIO(head + data), formats=("TIFF",)) as image:
            return np.asarray(image).reshape(-1)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types for damaged bytes
        raise ValueError("its LZW stream is damaged") from error
