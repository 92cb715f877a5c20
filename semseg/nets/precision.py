"""trainer.precision where there is no Lightning: in prediction and serving."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

# By the names of Lightning. The weights of `*-true` have the type themselves; those of `*-mixed` stay in float32.
AUTOCAST_TYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
WEIGHT_TYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64, "64": torch.float64}


def choose_weight_type(precision: str) -> torch.dtype:
    """The type of the weights of a network that runs in this precision."""
    return WEIGHT_TYPES.get(precision, torch.float32)


def create_autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a network runs in this precision, as Lightning's plugin creates it."""
    if precision not in AUTOCAST_TYPES:
        return nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST_TYPES[precision])
