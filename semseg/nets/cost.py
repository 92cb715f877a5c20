"""The cost of a network: parameters and operations of each stage, counted on meta tensors."""

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
from semseg.nets.blocks import plain_operators
from semseg.nets.interfaces import SegmentationNetwork
from semseg.nets.meta import reads_meta_values
from semseg.storage.atomic import atomic_write

COST_SIZE = Size(512, 512)  # size of the image for counting operations


class StageCost(NamedTuple):
    """One part of a network. A multiplication and an addition are two operations."""

    name: str
    parameters: int
    flops: int  # convolutions, linear layers and attention


class NetworkCost(NamedTuple):
    """The cost of a network and of its stages."""

    size: Size
    parameters: int
    flops: int  # 0: not known
    stages: list[StageCost]

    def __str__(self) -> str:
        parameters = f"{self.parameters / 1e6:.1f} M parameters"
        if not self.flops:
            return parameters
        return f"{parameters}, {self.flops / 1e9:.1f} GFLOPs at {self.size.height} x {self.size.width}"


def measure_cost(net: SegmentationNetwork) -> NetworkCost:
    """Count parameters, and operations for one image of COST_SIZE, rounded up to size_divisor, without auxiliary head.

    A network of one size gets an image of that size. The operations of a network that looks at values on its way, as
    OneFormer does, cannot be counted.

    The operations are those of the published architecture, also where our layers compute its results with fewer.

    Args:
        net: on the device "meta"; it is set to eval mode.
    """
    size = net.image_size or canvas_size([COST_SIZE], net.size_divisor)
    counter = count_operations(net.eval(), torch.empty(1, net.convention.num_bands, *size, device="meta"))
    counts = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    root = type(net).__name__
    stages = [
        StageCost(name, count_parameters(part), sum_flops(f"{root}.{name}", part, counts))
        for name, part in iterate_stages(net)
        if count_parameters(part)
    ]
    return NetworkCost(size, count_parameters(net), counter.get_total_flops(), stages)


def count_operations(net: nn.Module, image: Tensor) -> FlopCounterMode:
    """Count the operations of the architecture of `net` for a sub-batch (N, 3, H, W), both on the device "meta"."""
    with torch.no_grad(), plain_operators(), FlopCounterMode(display=False) as counter:
        try:
            net(image)
        except Exception as error:
            if not reads_meta_values(error):
                raise
            return FlopCounterMode(display=False)
    return counter


def sum_flops(name: str, part: nn.Module, counts: dict[str, int]) -> int:
    """The operations counted for `part`; for its children if it is a container that is never called itself."""
    if name in counts:
        return counts[name]
    return sum(sum_flops(f"{name}.{child}", module, counts) for child, module in part.named_children())


def iterate_stages(net: SegmentationNetwork) -> Iterator[tuple[str, nn.Module]]:
    """The stages of the backbone (the encoder), and the modules beside it (the decoder)."""
    yield from _iterate_parts(net, "", net.backbone)


def _iterate_parts(part: nn.Module, prefix: str, backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    children = dict(part.named_children())
    for name, child in children.items():
        if child is backbone:
            yield from _iterate_children(child, f"{prefix}{name}")
        elif any(module is backbone for module in child.modules()) or (len(children) == 1 and any(child.children())):
            yield from _iterate_parts(child, f"{prefix}{name}.", backbone)
        else:
            yield f"{prefix}{name}", child


def _iterate_children(part: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    while len(children := dict(part.named_children())) == 1:  # a wrapper around the network
        ((child, part),) = children.items()
        name = f"{name}.{child}"
    yield from ((f"{name}.{child}", module) for child, module in children.items())


def count_parameters(part: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in part.parameters())


def build_cost_table(cost: NetworkCost) -> Table:
    """One row per stage, and the total."""
    table = Table(title=f"network, at {cost.size.height} x {cost.size.width}")
    table.add_column("stage")
    table.add_column("M parameters", justify="right")
    table.add_column("GFLOPs", justify="right")
    for stage in cost.stages:
        table.add_row(stage.name, f"{stage.parameters / 1e6:.3f}", f"{stage.flops / 1e9:.3f}")
    table.add_section()
    table.add_row("total", f"{cost.parameters / 1e6:.3f}", f"{cost.flops / 1e9:.3f}")
    return table


def write_cost(path: Path, cost: NetworkCost) -> None:
    """Write the table as text."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        Console(file=file, width=100).print(build_cost_table(cost))
