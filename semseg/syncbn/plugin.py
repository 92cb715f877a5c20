"""Lightning's way to the synced layers: a LayerSync plugin, and the table behind `syncbn=reduce|native|off`.

Lightning calls a LayerSync in `fit` under DDP only: not with one device (the torch convention is plain
batch normalisation there; for the published one call `convert` yourself), and not in validate, test or predict.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
from pytorch_lightning.plugins import LayerSync, TorchSyncBatchNorm
from torch import nn

from semseg.errors import ConfigError, check_choice
from semseg.syncbn.layer import CONVENTIONS, PUBLISHED_MOMENTUM, convert, revert

GROUPS = ("world", "node")
NODE_VARIABLES = ("GROUP_RANK", "NODE_RANK", "SLURM_NODEID")  # torchrun, Lightning, SLURM


class ReducedBatchNorm(LayerSync):
    """Statistics of batch normalisation over all ranks, or over those of one node, on any device and backend.

    Args:
        convention: "torch" or "published", see semseg/syncbn/layer.py.
        group: "world", or "node" to keep the collectives inside each machine.
        momentum: of the published convention.

    Raises:
        ConfigError: for an unknown convention or group.
    """

    def __init__(self, convention: str = "torch", group: str = "world", momentum: float = PUBLISHED_MOMENTUM) -> None:
        self.convention = check_choice("syncbn.convention", convention, CONVENTIONS)
        self.group = check_choice("syncbn.group", group, GROUPS)
        self.momentum = momentum

    def apply(self, model: nn.Module) -> nn.Module:
        process_group = node_group() if self.group == "node" else None
        return convert(model, self.convention, process_group, self.momentum)

    def revert(self, model: nn.Module) -> nn.Module:
        return revert(model)


def node_group() -> dist.ProcessGroup | None:
    """The process group of the ranks on this node; None without torch.distributed. Every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    # The host alone does not tell apart two launchers on one machine, nor the number alone unnumbered machines.
    number = next((os.environ[name] for name in NODE_VARIABLES if name in os.environ), "")
    nodes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(nodes, f"{socket.gethostname()}/{number}")
    mine = None
    for node in dict.fromkeys(nodes):  # the same order on every rank, as new_group asks for
        ranks = [rank for rank, where in enumerate(nodes) if where == node]
        group = dist.new_group(ranks)
        if isinstance(group, dist.ProcessGroup):  # else this process is not in it
            mine = group
    return mine


def _reduce(convention: str, accelerator: str, group: str) -> LayerSync:
    return ReducedBatchNorm(convention, group)


def _native(convention: str, accelerator: str, group: str) -> LayerSync:
    has_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    if not has_gpu:
        raise ConfigError(
            f"syncbn=native is torch.nn.SyncBatchNorm, which runs on CUDA only (trainer.accelerator={accelerator}). "
            "Use syncbn=reduce, which runs everywhere."
        )
    if (convention, group) != ("torch", "world"):
        raise ConfigError(
            f"syncbn=native knows only syncbn.convention=torch and syncbn.group=world, not {convention} and {group}. "
            "Use syncbn=reduce."
        )
    return TorchSyncBatchNorm()


def _off(convention: str, accelerator: str, group: str) -> None:
    return None


SYNCBN: dict[str, Callable[[str, str, str], LayerSync | None]] = {"reduce": _reduce, "native": _native, "off": _off}


def layer_sync(
    name: str, convention: str = "torch", accelerator: str = "auto", group: str = "world"
) -> LayerSync | None:
    """The plugin for `syncbn=name`, or None for `off`. `accelerator` is the Trainer's: auto, cpu, gpu, cuda.

    Raises:
        ConfigError: for an unknown word, or if `native` cannot do what is asked.
    """
    return SYNCBN[check_choice("syncbn", name, SYNCBN)](convention, accelerator, group)
