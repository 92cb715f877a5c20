"""Types of numbers by precision and device: for prediction and serving, and for sums that must not be rounded."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

# By the names of Lightning. The weights of `*-true` have the type themselves; those of `*-mixed` stay in float32.
AUTOCAST_TYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
WITHOUT_FLOAT64 = ("mps",)  # kinds of devices: Apple's GPUs
WEIGHT_TYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64, "64": torch.float64}


def choose_weight_type(precision: str) -> torch.dtype:
    """The type of the weights of a network that runs in this precision."""
    return WEIGHT_TYPES.get(precision, torch.float32)


def choose_widest_float(device: torch.device) -> torch.dtype:
    """The type of sums on a device: float64, or float32 where there is no other."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def create_autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a network runs in this precision, as Lightning's plugin creates it."""
    if precision not in AUTOCAST_TYPES:
        return nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST_TYPES[precision])
