"""The options of F.conv2d and the features of the processor, for all CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class ConvOptions(NamedTuple):
    """The options of F.conv2d, in its order."""

    stride: int | Sequence[int] = 1
    padding: int | str | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1


def common_value(option: int | str | Sequence[int]) -> int | None:
    """The value of an option on both axes; None if the axes differ, or for padding by name ("same")."""
    if isinstance(option, int):
        return option
    return option[0] if not isinstance(option, str) and len(set(option)) == 1 else None


def has_avx512() -> bool:
    """Whether this processor has 512-bit vector instructions."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
