"""Preprocessing of pixel values. It belongs to the weights, and is stored in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

RGB = ("red", "green", "blue")
PIXEL_TYPES = ("uint8", "uint16", "int16", "float32")  # in which images are read, sent to the device, and normalised
MAX_BANDS = 128  # OpenCV resizes no more
MAX_VALUE = 1e30  # of a range; its span is far below the largest float32
SMALLEST_SPAN = 1e-6  # of a range, as a fraction of its values: float32 resolves it


class BandRange(NamedTuple):
    """The values of a band that become 0 and 255 before the normalisation; what is beyond them is cut off."""

    low: float
    high: float


class Preprocessing(NamedTuple):
    """Normalised = (pixel * scale - mean) / std, pixels 0..255, channels in `channel_order`.

    With `ranges`, pixel = 255 * (value - low) / (high - low), cut off at 0 and 255, for the value in the file.
    """

    channel_order: str  # "rgb" or "bgr"; bgr: red and blue are exchanged, only for the bands RGB
    scale: float  # applied to 0..255 before the mean is subtracted
    mean: tuple[float, ...]  # of each band, in channel_order
    std: tuple[float, ...]  # of each band, in channel_order
    antialias: bool  # whether evaluation resizes with antialiasing (training always does)
    bands: tuple[str, ...] = RGB  # in the order of the arrays
    ranges: tuple[BandRange, ...] = ()  # of each band, in the order of `bands`; empty: values are 0..255
    dtype: str = ""  # what the files of training held, one of PIXEL_TYPES; empty: not known, or 8 bits

    @property
    def num_bands(self) -> int:
        """Channels of the input of the network."""
        return len(self.bands)

    @property
    def takes_pictures(self) -> bool:
        """Whether images are 8-bit RGB."""
        return self.bands == RGB and not self.ranges

    def as_plain(self) -> dict[str, Any]:
        """Text, numbers and lists only, for checkpoints and JSON; what is about bands only if they are not RGB's."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in self._asdict().items()}
        del plain["bands"], plain["ranges"], plain["dtype"]
        if self.takes_pictures:
            return plain
        plain |= {"bands": list(self.bands), "ranges": [list(ends) for ends in self.ranges]}
        return plain | ({"dtype": self.dtype} if self.dtype else {})

    @classmethod
    def from_plain(cls, plain: Any) -> Preprocessing:
        """The inverse of `as_plain`, for a file of any origin.

        Raises:
            ValueError: if an entry is missing, unknown, or out of range.
        """
        needed, known = cls._fields[:5], set(cls._fields)
        if not isinstance(plain, Mapping) or not set(needed) <= set(plain) <= known:
            raise ValueError(f"the preprocessing must have {', '.join(needed)}")
        order, scale, mean, std, antialias = (plain[name] for name in needed)
        if order not in ("rgb", "bgr") or not isinstance(antialias, bool):
            raise ValueError("the preprocessing has an unknown channel_order or antialias")
        bands = _read_bands(plain.get("bands", list(RGB)), order)
        for name, numbers in (("scale", [scale]), ("mean", mean), ("std", std)):
            if not isinstance(numbers, list | tuple) or len(numbers) != (1 if name == "scale" else len(bands)):
                raise ValueError(f"{name} of the preprocessing must have a number for each channel")
            if not all(_is_number(number) and (name == "mean" or number > 0) for number in numbers):
                raise ValueError(f"{name} of the preprocessing is out of range")
        ranges = _read_ranges(plain.get("ranges", []), len(bands))
        dtype = plain.get("dtype", "")
        if dtype not in ("", *PIXEL_TYPES):
            raise ValueError("the preprocessing has an unknown dtype")
        return cls(order, scale, tuple(mean), tuple(std), antialias, bands, ranges, dtype)


def _read_bands(names: Any, order: str) -> tuple[str, ...]:
    """Raises a ValueError if `names` are not names of bands, each once."""
    is_list = isinstance(names, list | tuple) and 0 < len(names) <= MAX_BANDS
    if not is_list or not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
        raise ValueError("bands of the preprocessing must be a list of names, each once")
    if order == "bgr" and tuple(names) != RGB:
        raise ValueError("the preprocessing has a channel_order that its bands cannot have")
    return tuple(names)


def _read_ranges(ranges: Any, num_bands: int) -> tuple[BandRange, ...]:
    """Raises a ValueError unless there is a range for each band, or none at all."""
    if not isinstance(ranges, list | tuple) or len(ranges) not in (0, num_bands):
        raise ValueError("ranges of the preprocessing must have one for each band")
    if not all(isinstance(ends, list | tuple) and len(ends) == 2 and is_range(*ends) for ends in ranges):
        raise ValueError("ranges of the preprocessing are out of range")
    return tuple(BandRange(float(low), float(high)) for low, high in ranges)


def is_range(low: Any, high: Any) -> bool:
    """Whether two values are numbers, float32 tells them apart, and the first is the smaller one."""
    are_numbers = all(type(value) in (int, float) and abs(value) < MAX_VALUE for value in (low, high))
    return are_numbers and high - low > max(abs(low), abs(high)) * SMALLEST_SPAN


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6  # excludes NaN and infinite values


PREPROCESSING: dict[str, Preprocessing] = {
    # October 2018, as in Caffe; evaluation resized without antialiasing.
    "bgr_mean": Preprocessing("bgr", 1.0, (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0), antialias=False),
    # 2020 and torchvision.
    "rgb_mean_std": Preprocessing("rgb", 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), antialias=True),
}
