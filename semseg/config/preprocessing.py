"""Preprocessing of pixel values. It belongs to the weights, and is stored in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Preprocessing(NamedTuple):
    """Normalised = (pixel * scale - mean) / std, pixels 0..255, channels in `channel_order`."""

    channel_order: str  # "rgb" or "bgr"
    scale: float  # applied to 0..255 before the mean is subtracted
    mean: tuple[float, float, float]  # in channel_order
    std: tuple[float, float, float]  # in channel_order
    antialias: bool  # whether evaluation resizes with antialiasing (training always does)

    def as_plain(self) -> dict[str, Any]:
        """Text, numbers and lists only, for checkpoints and JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._asdict().items()}

    @classmethod
    def from_plain(cls, plain: Any) -> Preprocessing:
        """The inverse of `as_plain`, for a file of any origin.

        Raises:
            ValueError: if an entry is missing, unknown, or out of range.
        """
        if not isinstance(plain, Mapping) or set(plain) != set(cls._fields):
            raise ValueError(f"the preprocessing must have {', '.join(cls._fields)}")
        order, scale, mean, std, antialias = (plain[name] for name in cls._fields)
        if order not in ("rgb", "bgr") or not isinstance(antialias, bool):
            raise ValueError("the preprocessing has an unknown channel_order or antialias")
        for name, numbers in (("scale", [scale]), ("mean", mean), ("std", std)):
            if not isinstance(numbers, list | tuple) or len(numbers) != (1 if name == "scale" else 3):
                raise ValueError(f"{name} of the preprocessing must have a number for each channel")
            if not all(_is_number(number) and (name == "mean" or number > 0) for number in numbers):
                raise ValueError(f"{name} of the preprocessing is out of range")
        return cls(order, scale, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), antialias)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6  # excludes NaN and infinite values


PREPROCESSING: dict[str, Preprocessing] = {
    # October 2018, as in Caffe; evaluation resized without antialiasing.
    "bgr_mean": Preprocessing("bgr", 1.0, (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0), antialias=False),
    # 2020 and torchvision.
    "rgb_mean_std": Preprocessing("rgb", 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), antialias=True),
}
