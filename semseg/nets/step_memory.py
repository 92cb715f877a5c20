"""How much memory a training step takes, counted without taking it: the network runs on tensors without numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from semseg.data.geometry import Size
from semseg.nets.segmenter import Segmenter


class StepMemory(NamedTuple):
    """Bytes of one training step in float32."""

    activations: int  # kept for the backward pass
    weights: int  # the network once; gradients and the optimiser's state are as much again, each


def step_memory(net: Segmenter, canvas: Size, batch_size: int) -> StepMemory:
    """What a sub-batch of `canvas` keeps for the backward pass, every storage counted once.

    What a device needs besides, for work in progress and its own housekeeping, is not in it.

    Args:
        net: on the device "meta", in training mode.
    """
    own = [*net.parameters(), *net.buffers()]
    owned = {tensor.untyped_storage()._cdata for tensor in own}
    kept: dict[int, Tensor] = {}  # the tensors too, so that no number is given to a second storage

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        net(torch.empty(batch_size, 3, *canvas, device="meta"))
    activations = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in owned)
    return StepMemory(activations, sum(tensor.nbytes for tensor in own))
