"""Networks on the device "meta": names and shapes, without memory for values."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def build_on_meta(build: Callable[[], Module]) -> Module:
    """Build a network on the device "meta".

    A network whose constructor computes with values, such as rates from `torch.linspace(...)` read by `.item()`, is
    built in memory first.
    """
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:
        if not reads_meta_values(error):
            raise
    return build().to("meta")


def reads_meta_values(error: Exception) -> bool:
    """Whether `error` is PyTorch's refusal to read values of a tensor on the device "meta".

    It is a RuntimeError for `.item()`, a NotImplementedError for `.tolist()` and a TypeError for `.numpy()`.
    """
    return isinstance(error, RuntimeError | TypeError) and re.search(r"\bmeta\b", str(error), re.IGNORECASE) is not None
