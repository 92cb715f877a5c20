"""Which memory layout trains a network faster, by the kind of its convolutions: benchmarks/channels_last.py."""

from __future__ import annotations

from torch import nn

MOSTLY = 0.5  # fraction of the convolutions


def fraction_of_depthwise(net: nn.Module) -> float:
    """The fraction of a network's convolutions with kernels above 1 x 1 that are depthwise, 0..1."""
    spatial = [module for module in net.modules() if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1]
    depthwise = [module for module in spatial if 1 < module.groups == module.in_channels]
    return len(depthwise) / max(1, len(spatial))


def is_faster_in_channels_last(net: nn.Module, device: str, precision: str) -> bool:
    """Whether a network is trained faster in channels_last, by the measurements of benchmarks/channels_last.py.

    On a CPU that is so for networks whose convolutions are mostly depthwise, and not for others. On a GPU it is so in
    half precision, whose matrix units need that layout; in float32 it was not measured.

    Args:
        device: cpu, or another type.
        precision: trainer.precision.
    """
    if device == "cpu":
        return fraction_of_depthwise(net) > MOSTLY
    return "16" in precision
