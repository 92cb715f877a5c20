"""Settings of this process for GPUs."""

from __future__ import annotations

import os

import torch

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the new name and the old one, which wins


def configure_gpu() -> None:
    """Set what every network here gains from; call it before the first tensor on a GPU.

    - Memory grows in segments, because sub-batches differ in size and blocks of fixed sizes fragment. A setting of the
      user is kept.
    - Matrix products use TF32, as convolutions do by default. PyTorch's newer names for it make Lightning fail.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    torch.set_float32_matmul_precision("high")


def copies_without_waiting(device: torch.device) -> bool:
    """Whether a copy to or from a device may be left unfinished: on Apple's GPUs, the values would be wrong."""
    return device.type == "cuda"


def wait_for_device(device: torch.device) -> None:
    """Wait until a GPU has done its work, so that a clock times the work and not its launch."""
    if device.type in ("cuda", "mps"):
        torch.accelerator.synchronize(device)
