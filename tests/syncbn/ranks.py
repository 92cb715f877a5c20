"""What the tests of normalisation have several gloo processes do. Imports no pytest: every rank loads it.

Starting a process costs seconds, so all cases of one world size run in one launch, and the launch is cached.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.ranks import launch
from semseg.syncbn import layer as synced

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "syncbn.json").read_text())
CHANNELS = 4
STEPS = 5
PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True)
class Case:
    """One layer trained for STEPS steps; rank r has shapes[r] without the channel axis."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    convention: str = "torch"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    channels_last: bool = False
    offset: float = 0.0
    is_compiled: bool = False

    def layer(self) -> nn.Module:
        plain = PLAIN[len(self.shapes[0]) + 1](CHANNELS, **self.options).to(self.parameter_dtype)
        if plain.affine:
            with torch.no_grad():
                plain.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
                plain.bias.copy_(torch.linspace(-1, 1, CHANNELS))
        return plain

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def tensors(self, step: int, rank: int) -> tuple[Tensor, Tensor]:
        """Input and output gradient of one rank. Channel 0 varies so little that the published rule clamps it."""
        images, *sizes = self.shapes[rank]
        rng = torch.Generator().manual_seed(1000 * step + rank)
        x, grad = (torch.randn(images, CHANNELS, *sizes, generator=rng, dtype=torch.float64) for _ in range(2))
        x[:, 0] *= 1e-3 if self.dtype == torch.float64 else 1
        x = (x * (1 + rank) + self.offset).to(self.dtype)
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last)
        return x, grad.to(self.dtype)


ONE_VALUE = ((1, 1, 1), (0, 1, 1))
UNEVEN_2 = ((1, 7, 9), (2, 4, 3))
UNEVEN_3 = ((2, 3, 5), (0, 4, 4), (1, 1, 1))
CASES: dict[int, list[Case]] = {
    2: [
        Case("uneven", UNEVEN_2),
        Case("published", UNEVEN_2, "published"),
        Case("rank without images", ((0, 5, 5), (3, 5, 5))),
        Case("published, rank without images", ((3, 5, 5), (0, 2, 2)), "published"),
        Case("1d", ((7,), (5,))),
        Case("1d with length", ((2, 5), (3, 8))),
        Case("3d", ((1, 2, 3, 4), (2, 3, 2, 2))),
        Case("cumulative average", UNEVEN_2, options={"momentum": None}),
        Case("no weight", UNEVEN_2, options={"affine": False}),
        Case("nothing tracked", UNEVEN_2, options={"track_running_stats": False}),
        Case("channels last", UNEVEN_2, channels_last=True),
        Case("published, channels last", UNEVEN_2, "published", channels_last=True),
        Case("float32", UNEVEN_2, dtype=torch.float32),
        Case("float32, mean 1e4", ((2, 16, 16), (1, 9, 7)), dtype=torch.float32, offset=1e4),
        Case("channels last, mean 1e4", ((2, 16, 16), (1, 9, 7)), dtype=torch.float32, offset=1e4, channels_last=True),
        Case("bfloat16", UNEVEN_2, dtype=torch.bfloat16),
        Case("float16", UNEVEN_2, dtype=torch.float16),
        Case("one value in all", ONE_VALUE),
        Case("one value in all, published", ONE_VALUE, "published"),
        Case("one value each", ((1, 1, 1), (1, 1, 1))),
        Case("compiled", UNEVEN_2, is_compiled=True),
        Case("compiled, published", UNEVEN_2, "published", is_compiled=True),
    ],
    3: [
        Case("uneven", UNEVEN_3),
        Case("published", UNEVEN_3, "published"),
        Case("float32", UNEVEN_3, dtype=torch.float32),
        Case("one rank has all", ((0, 2, 2), (3, 4, 2), (0, 1, 1))),
    ],
}


@dataclass
class Trained:
    """What one rank has after the steps of a case."""

    outputs: list[Tensor]
    input_grads: list[Tensor]
    weight_grad: Tensor | None
    bias_grad: Tensor | None
    state: dict[str, Tensor]


def train(case: Case, layer: nn.Module, rank: int) -> Trained:
    outputs, input_grads = [], []
    for step in range(STEPS):
        x, grad = case.tensors(step, rank)
        x.requires_grad_()
        y = layer(x)
        y.backward(grad)
        outputs.append(y.detach())
        input_grads.append(x.grad)
    return Trained(
        outputs,
        input_grads,
        None if layer.weight is None else layer.weight.grad,
        None if layer.bias is None else layer.bias.grad,
        layer.state_dict(),
    )


def run_cases(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for case in CASES[world]:
        layer = synced.convert_batch_norms(case.layer(), case.convention)
        if case.is_compiled:
            torch._dynamo.reset()
            layer.compile(backend="aot_eager", fullgraph=True, dynamic=True)
        results[case.name] = train(case, layer, rank)
    results["evaluation"] = differing_evaluations(rank)
    if world == 2:
        results["message"] = one_untracked_value(rank)
        results["golden"] = {name: golden_case(name, rank) for name in GOLDEN["cases"]}
    if world == 3:
        results["subset"] = subset_of_ranks(rank)
    return results


def differing_evaluations(rank: int) -> bool:
    """Evaluation and frozen layers without a collective: each rank runs another number of them."""
    layer = synced.convert_batch_norms(nn.BatchNorm2d(CHANNELS), "published")
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.eval()
    for _ in range(rank + 1):
        layer(torch.randn(1, CHANNELS, 2, 2))
    return all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def one_untracked_value(rank: int) -> str:
    layer = synced.convert_batch_norms(nn.BatchNorm2d(CHANNELS, track_running_stats=False))
    try:
        layer(torch.zeros(1 - rank, CHANNELS, 1, 1))
    except ValueError as error:
        return str(error)
    return ""


def golden_case(name: str, rank: int) -> list[dict[str, Tensor]]:
    """The three steps of a case of syncbn.json, as rank `rank` sees them."""
    case = GOLDEN["cases"][name]
    layer = nn.BatchNorm2d(GOLDEN["channels"], eps=GOLDEN["eps"], dtype=torch.float64)
    initial = {} if case["initial"] is None else case["initial"]
    with torch.no_grad():
        for key in ("weight", "bias"):
            getattr(layer, key).copy_(torch.tensor(GOLDEN[key], dtype=torch.float64))
        for key in ("running_mean", "running_var"):
            if key in initial:
                getattr(layer, key).copy_(torch.tensor(initial[key], dtype=torch.float64))
    layer = synced.convert_batch_norms(layer, "published", momentum=case["momentum"])
    if initial.get("_running_iter") == [400.0]:
        # Between the 509th and 510th of the iterations that really occur, which a whole number cannot say.
        layer.num_batches_tracked = torch.tensor(
            math.log((1000 - 400) / (1000 - 1)) / math.log(0.999), dtype=torch.float64
        )
    steps = []
    for inputs, grads in zip(GOLDEN["inputs"], GOLDEN["output_grads"], strict=True):
        x = torch.tensor(inputs[rank], dtype=torch.float64, requires_grad=True)
        layer.zero_grad()
        y = layer(x)
        y.backward(torch.tensor(grads[rank], dtype=torch.float64))
        steps.append(
            {
                "output": y.detach(),
                "input_grad": x.grad,
                "weight_grad": layer.weight.grad,
                "bias_grad": layer.bias.grad,
                "running_mean": layer.running_mean.clone(),
                "running_var": layer.running_var.clone(),
            }
        )
    layer.eval()
    steps[-1]["evaluated"] = layer(torch.tensor(GOLDEN["inputs"][0][0], dtype=torch.float64)).detach()
    return steps


def subset_of_ranks(rank: int) -> Trained:
    """Ranks 0 and 1 share statistics; rank 2 is alone."""
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    layer = synced.convert_batch_norms(SUBSET.layer(), process_group=groups[rank // 2])
    return train(SUBSET, layer, rank)


SUBSET = Case("subset", ((1, 7, 9), (2, 4, 3), (2, 2, 2)))


@functools.cache
def trained(world: int) -> list[dict[str, Any]]:
    """Results of `run_cases`, one per rank."""
    return launch(run_cases, world)
