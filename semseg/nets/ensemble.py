"""Several networks as one: their probabilities are averaged by what evaluates and predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from semseg.config.preprocessing import Preprocessing
from semseg.nets.interfaces import Logits, SegmentationNetwork


class Ensemble(SegmentationNetwork):
    """Networks with the same classes and bands, whose mean of probabilities is the prediction.

    The mean is taken at the size of the output, so that the networks may have logits at different strides. Each of them
    normalises images by its own convention; the ensemble has that of the first, by which images are read and resized.

    Args:
        members: in eval mode.
        divisors: images are padded or stretched to multiples of all of these, in pixels; one for each member.
    """

    def __init__(self, members: Sequence[SegmentationNetwork], divisors: Sequence[int]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        first = members[0]
        self.num_classes, self.convention = first.num_classes, first.convention
        self.size_divisor = math.lcm(*divisors)
        self.label_stride = max(member.label_stride for member in members)
        sizes = {member.image_size for member in members}
        self.image_size = first.image_size if len(sizes) == 1 else None  # otherwise each has windows of its own size

    def forward(self, image: Tensor) -> Logits:
        """An ensemble has no logits.

        Raises:
            TypeError: always.
        """
        raise TypeError("an ensemble averages probabilities, and has no logits: run its members")

    @property
    def backbone(self) -> nn.Module:
        return nn.ModuleList([member.backbone for member in list_members(self)])

    @property
    def architecture(self) -> str:
        return ", ".join(dict.fromkeys(member.architecture for member in list_members(self)))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        for member in self.members:
            member.compile(*args, **kwargs)


def list_conventions(net: nn.Module, convention: Preprocessing) -> list[Preprocessing]:
    """The preprocessing of each of `list_members`: `convention`, or those of the networks of an ensemble."""
    return [member.convention for member in list_members(net)] if isinstance(net, Ensemble) else [convention]


def list_members(net: nn.Module) -> list[Any]:
    """The networks of an ensemble; a network by itself if it is none."""
    return list(net.members) if isinstance(net, Ensemble) else [net]
