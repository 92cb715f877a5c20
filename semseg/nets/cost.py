"""What a network costs: parameters and operations of each stage, counted on tensors without numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from semseg.data.geometry import Size, canvas_size
from semseg.nets.blocks import written_out
from semseg.nets.segmenter import Segmenter
from semseg.storage.atomic import atomic_write

SIZE = Size(512, 512)  # of the image that operations are counted for


class Stage(NamedTuple):
    """One part of a network. A multiplication and an addition are two operations."""

    name: str
    parameters: int
    flops: int  # of convolutions, linear layers and attention


class Cost(NamedTuple):
    """A whole network and its stages."""

    size: Size
    parameters: int
    flops: int
    stages: list[Stage]

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e6:.1f} M parameters, "
            f"{self.flops / 1e9:.1f} GFLOPs at {self.size.height} x {self.size.width}"
        )


def cost_of(net: Segmenter) -> Cost:
    """Parameters, and operations for one image of SIZE or the next size that fits, without the auxiliary head.

    The operations are those of the architecture, whatever shorter way our layers take to its results.

    Args:
        net: on the device "meta"; it is put in eval mode.
    """
    size = canvas_size([SIZE], net.size_divisor)
    counter = count_operations(net.eval(), torch.empty(1, 3, *size, device="meta"))
    counts = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    root = type(net).__name__
    stages = [
        Stage(name, num_parameters(part), flops_of(f"{root}.{name}", part, counts))
        for name, part in parts(net)
        if num_parameters(part)
    ]
    return Cost(size, num_parameters(net), counter.get_total_flops(), stages)


def count_operations(net: nn.Module, image: Tensor) -> FlopCounterMode:
    """The operations that the architecture of `net` takes for a sub-batch (N, 3, H, W), both on the device "meta"."""
    with torch.no_grad(), written_out(), FlopCounterMode(display=False) as counter:
        net(image)
    return counter


def flops_of(name: str, part: nn.Module, counts: dict[str, int]) -> int:
    """The operations counted for `part`, or for its children if it only holds them and is never called itself."""
    if name in counts:
        return counts[name]
    return sum(flops_of(f"{name}.{child}", module, counts) for child, module in part.named_children())


def parts(net: Segmenter) -> Iterator[tuple[str, nn.Module]]:
    """The stages of the encoder, and the decoder."""
    name, part = "encoder", net.encoder
    while len(children := dict(part.named_children())) == 1:  # a wrapper around the real thing
        ((child, part),) = children.items()
        name = f"{name}.{child}"
    yield from ((f"{name}.{child}", module) for child, module in children.items())
    yield "decoder", net.decoder


def num_parameters(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def cost_table(cost: Cost) -> Table:
    """One row for each stage, and the sum."""
    table = Table(title=f"network, at {cost.size.height} x {cost.size.width}")
    table.add_column("stage")
    table.add_column("M parameters", justify="right")
    table.add_column("GFLOPs", justify="right")
    for stage in cost.stages:
        table.add_row(stage.name, f"{stage.parameters / 1e6:.3f}", f"{stage.flops / 1e9:.3f}")
    table.add_section()
    table.add_row("all", f"{cost.parameters / 1e6:.3f}", f"{cost.flops / 1e9:.3f}")
    return table


def write_cost(path: Path, cost: Cost) -> None:
    """Write the table as text."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        Console(file=file, width=100).print(cost_table(cost))
