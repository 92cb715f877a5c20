"""The memory that a training step needs, counted on meta tensors, which allocate none."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from semseg.data.geometry import Size
from semseg.nets.interfaces import SegmentationNetwork
from semseg.nets.meta import reads_meta_values


class StepMemory(NamedTuple):
    """Bytes of one training step in float32."""

    activations: int  # saved for the backward pass
    weights: int  # the network's weights; gradients and each state of the optimiser need as much again

    @property
    def with_momentum(self) -> int:
        """Everything that a step of SGD keeps: activations, weights, gradients and momentum."""
        return self.activations + 3 * self.weights


def estimate_step_memory(net: SegmentationNetwork, canvas: Size, batch_size: int) -> StepMemory | None:
    """Estimate the memory of a training step on one sub-batch of `canvas`; every storage is counted once.

    None for a network whose forward pass reads values of tensors, which do not exist on the device "meta".

    Temporary buffers of operators and the overhead of the device are not included. The network runs as on a GPU: maps
    are upsampled and concatenated before a convolution.

    Args:
        net: on the device "meta", in training mode.
    """
    weights = [*net.parameters(), *net.buffers()]
    weight_storages = {tensor.untyped_storage()._cdata for tensor in weights}
    saved: dict[int, Tensor] = {}  # with the tensors, so that no address is reused for another storage

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    num_images = max(2, batch_size)  # batch normalisation refuses a single value, which a small image may have
    with torch.enable_grad(), saved_tensors_hooks(save, lambda tensor: tensor):
        try:
            net(torch.empty(num_images, net.convention.num_bands, *canvas, device="meta"))
        except Exception as error:
            if not reads_meta_values(error):
                raise
            return None
    num_bytes = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in weight_storages)
    return StepMemory(num_bytes * batch_size // num_images, sum(tensor.nbytes for tensor in weights))
