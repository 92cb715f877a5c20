"""What the tests have two Lightning processes do. Imports no pytest: every rank loads it."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from helpers.ranks import launch
from semseg.nets.registry import build_segmenter
from semseg.syncbn import layer as synced
from semseg.syncbn.plugin import build_layer_sync, create_node_group

NUM_CLASSES = 5


class Pairs(Dataset):
    """Two images with labels; the second one is brighter, so that the ranks have statistics of their own."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(index)
        image = torch.randn(3, 32, 40, generator=rng, dtype=torch.float64) + index
        return image, torch.randint(NUM_CLASSES, (4, 5), generator=rng)


class Task(pl.LightningModule):
    """One SGD step on cross entropy."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seen: list[str] = []  # class of the first normalisation layer, per stage

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.look("train")
        image, label = batch
        return F.cross_entropy(logits(self.net(image)), label)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.look("val")

    def look(self, stage: str) -> None:
        first = next(m for m in self.modules() if isinstance(m, nn.BatchNorm2d))
        self.seen.append(f"{stage} {type(first).__name__}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def logits(output: Any) -> Tensor:
    return output.main if hasattr(output, "main") else output


def small_net() -> nn.Module:
    torch.manual_seed(0)
    frozen = nn.BatchNorm2d(4).eval()
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), frozen, nn.AvgPool2d(8))
    return nn.Sequential(*layers, nn.Conv2d(4, NUM_CLASSES, 1)).double()


def segmenter() -> nn.Module:
    torch.manual_seed(0)
    return build_segmenter("resnet18", "c1", NUM_CLASSES, {"output_stride": 8}).double()


NETS = {"small": small_net, "resnet18_dilated8 + c1": segmenter}


def fit(task: Task, devices: int, convention: str, group: str = "world") -> pl.Trainer:
    plugin = build_layer_sync("reduce", convention, "cpu", group)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        plugins=[plugin],
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision="64-true",
    )
    loader = DataLoader(Pairs(), batch_size=2 // devices)
    trainer.fit(task, loader, loader)
    return trainer


def steps(rank: int, world: int) -> dict[str, Any]:
    """One step of each network under DDP: weights afterwards and which layers were seen."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = {}
    for name, build in NETS.items():
        for convention in synced.CONVENTIONS:
            task = Task(build())
            fit(task, world, convention)
            task.look("after")
            results[f"{name}, {convention}"] = {
                "state": task.net.state_dict(),
                "seen": task.seen,
                "training": [m.training for m in task.net.modules() if isinstance(m, nn.BatchNorm2d)],
            }
    os.environ["NODE_RANK"] = "0"
    one_node = create_node_group()
    os.environ["NODE_RANK"] = str(rank)
    two_nodes = create_node_group()
    results["node sizes"] = [dist.get_world_size(group) for group in (one_node, two_nodes)]
    return results


@functools.cache
def under_ddp() -> list[dict[str, Any]]:
    """Results of `steps`, one per rank."""
    return launch(steps, 2)
