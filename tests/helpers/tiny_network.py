"""The smallest whole network, as a program adds it to registry.NETWORKS. Imports no pytest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from semseg.nets.blocks import conv_norm_relu
from semseg.nets.interfaces import Logits, SegmentationNetwork
from semseg.nets.registry import Constructor

TINY_NETWORK = {"tiny": Constructor("helpers.tiny_network", "TinyNetwork")}  # for patch.dict(NETWORKS, TINY_NETWORK)


class Progress(NamedTuple):
    """What set_progress was told."""

    step: int
    total_steps: int


class Library(nn.Module):
    """Stands for the network of a library: 4 blocks of a backbone, a classifier, and a layer that nothing uses."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(conv_norm_relu(before, width, 3, stride=2) for before in (3, width)),
            *(conv_norm_relu(width, width, 3) for _ in range(2)),
        )
        self.idle = nn.Linear(width, width)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.blocks(image))


class TinyNetwork(SegmentationNetwork):
    """Stride 4; with `own_loss` it trains with a loss of its own."""

    size_divisor, label_stride = 8, 4

    def __init__(self, num_classes: int, width: int = 8, own_loss: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.model = Library(width, num_classes)
        self.own_loss = own_loss
        self.seen: list[Progress] = []

    @property
    def backbone(self) -> nn.Module:
        return self.model.blocks

    def forward(self, image: Tensor) -> Logits:
        return Logits(self.model(image), None)

    def set_progress(self, step: int, total_steps: int) -> None:
        self.seen.append(Progress(step, total_steps))

    def compute_own_loss(self, image: Tensor, label: Tensor) -> tuple[Tensor, Logits] | None:
        if not self.own_loss:
            return None
        logits = self(image)
        target = torch.zeros_like(logits.main).scatter_(1, label.clamp(min=0)[:, None], 1.0)
        return ((logits.main - target).square().mean(1) * (label >= 0)).mean(), logits
