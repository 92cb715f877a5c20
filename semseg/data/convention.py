"""How pixel values enter a network. Bound to the weights, and carried along in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class InputConvention(NamedTuple):
    """Normalised = (pixel * scale - mean) / std, pixels 0..255, channels in `channel_order`."""

    channel_order: str  # "rgb" or "bgr"
    scale: float  # applied to 0..255 before the mean is taken off
    mean: tuple[float, float, float]  # in channel_order
    std: tuple[float, float, float]  # in channel_order
    antialias: bool  # whether evaluation resizes with antialiasing (training always does)

    def as_plain(self) -> dict[str, Any]:
        """Words, numbers and lists only, for checkpoints and JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._asdict().items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> InputConvention:
        """The inverse of `as_plain`."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()
        }
        return cls(**values)


CONVENTIONS: dict[str, InputConvention] = {
    # October 2018: Caffe's habit; evaluation resized by plain bilinear.
    "bgr_mean": InputConvention("bgr", 1.0, (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0), antialias=False),
    # 2020 and torchvision.
    "rgb_mean_std": InputConvention("rgb", 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), antialias=True),
}
