"""Lightning's LayerSync plugin for the synchronised layers, and the table of `syncbn=reduce|native|off`.

Lightning calls a LayerSync only in `fit` under DDP: not with one device (where the torch convention is plain batch
normalisation; for the published convention, call `convert_batch_norms`), and not in validate, test or predict.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
from pytorch_lightning.plugins import LayerSync, TorchSyncBatchNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from semseg.errors import ConfigError, check_choice
from semseg.syncbn.layer import CONVENTIONS, convert_batch_norms, revert_batch_norms

SYNC_GROUPS = ("world", "node")
NODE_VARIABLES = ("GROUP_RANK", "NODE_RANK", "SLURM_NODEID")  # torchrun, Lightning, SLURM


class ReducedBatchNorm(LayerSync):
    """Batch normalisation with statistics over all ranks or those of one node, on any device and backend.

    Args:
        convention: "torch" or "published", see semseg/syncbn/layer.py.
        group: "world", or "node" to keep the collectives inside of each machine.

    Raises:
        ConfigError: for an unknown convention or group.
    """

    def __init__(self, convention: str = "torch", group: str = "world") -> None:
        self.convention = check_choice("syncbn.convention", convention, CONVENTIONS)
        self.group = check_choice("syncbn.group", group, SYNC_GROUPS)

    def apply(self, model: nn.Module) -> nn.Module:
        process_group = create_node_group() if self.group == "node" else None
        return convert_batch_norms(model, self.convention, process_group)

    def revert(self, model: nn.Module) -> nn.Module:
        return revert_batch_norms(model)


class NativeBatchNorm(TorchSyncBatchNorm):
    """torch.nn.SyncBatchNorm in place of the layers of batch normalisation.

    Raises:
        ConfigError: for a network whose layers have parts that torch.nn.SyncBatchNorm would not call, such as the
            activation in timm's BatchNormAct2d.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
        others = [layer for layer in layers if any(not isinstance(part, nn.Identity) for part in layer.children())]
        if others:
            raise ConfigError(
                f"syncbn=native: torch.nn.SyncBatchNorm would leave out the activation in {len(others)} layers "
                f"({type(others[0]).__name__}) of this network. Use syncbn=reduce."
            )
        return super().apply(model)


def create_node_group() -> dist.ProcessGroup | None:
    """Create the process group of the ranks on this node; None without torch.distributed. Every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    # The host alone does not distinguish two launchers on one machine, nor the number alone unnumbered machines.
    number = next((os.environ[name] for name in NODE_VARIABLES if name in os.environ), "")
    nodes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(nodes, f"{socket.gethostname()}/{number}")
    own_group = None
    for node in dict.fromkeys(nodes):  # in the same order on every rank, as new_group requires
        ranks = [rank for rank, node_of_rank in enumerate(nodes) if node_of_rank == node]
        group = dist.new_group(ranks)
        if isinstance(group, dist.ProcessGroup):  # otherwise this process does not belong to it
            own_group = group
    return own_group


def _build_reduced(convention: str, accelerator: str, group: str) -> LayerSync:
    return ReducedBatchNorm(convention, group)


def _build_native(convention: str, accelerator: str, group: str) -> LayerSync:
    has_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    if not has_gpu:
        raise ConfigError(
            f"syncbn=native is torch.nn.SyncBatchNorm, which runs on CUDA only (trainer.accelerator={accelerator}). "
            "Use syncbn=reduce, which runs everywhere."
        )
    if (convention, group) != ("torch", "world"):
        raise ConfigError(
            f"syncbn=native supports only syncbn.convention=torch and syncbn.group=world, not {convention}, {group}. "
            "Use syncbn=reduce."
        )
    return NativeBatchNorm()


def _build_none(convention: str, accelerator: str, group: str) -> None:
    return None


LAYER_SYNC_BUILDERS: dict[str, Callable[[str, str, str], LayerSync | None]] = {
    "reduce": _build_reduced,
    "native": _build_native,
    "off": _build_none,
}


def build_layer_sync(
    name: str, convention: str = "torch", accelerator: str = "auto", group: str = "world"
) -> LayerSync | None:
    """Build the plugin for `syncbn=name`; None for `off`. `accelerator` is the Trainer's: auto, cpu, gpu, cuda.

    Raises:
        ConfigError: for an unknown name, or if `native` does not support the other arguments.
    """
    return LAYER_SYNC_BUILDERS[check_choice("syncbn", name, LAYER_SYNC_BUILDERS)](convention, accelerator, group)
