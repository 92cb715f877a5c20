"""mode=models: the ready-made networks with their cost, published score and licence.

What they cost is in model_costs.csv, which tests/golden/make_model_costs.py writes and a test verifies: building all of
them takes a minute, and needs every library. torch is imported only for a network that is not in that file.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from semseg.checkpoints.zoo import HUB_SCORES, MODEL_SCORES, ZOO, CitedScore
from semseg.config.groups import list_options
from semseg.config.load import load_config
from semseg.config.origin import describe_licence
from semseg.config.schema import ZOO_PREFIX, Config, ModelConfig
from semseg.storage.hub_list import HUB_ZOO

NUM_CLASSES = 150  # of the networks in the list
COSTS_FILE = Path(__file__).with_name("model_costs.csv")
GENERIC = ("custom", "transformers")  # files of configs/model/ that name no network
PACKAGES = {"timm": "timm", "smp": "segmentation_models_pytorch", "transformers": "transformers"}  # of the extras


class ModelCost(NamedTuple):
    """What is known about a network without its weights, at 512 x 512 or the one size that it takes."""

    parameters: int
    flops: int  # a multiplication and an addition are two; 0: they cannot be counted without values
    label_stride: int
    licence: str  # of the weights that it starts from; empty: not stated


def run(config: Config, overrides: list[str]) -> None:
    """Print the tables; nothing is downloaded or written."""
    console = Console()
    for table in (models_table(), zoo_table()):
        console.print(table)
        console.print()
    console.print(describe_sources(), soft_wrap=False, highlight=False)


def models_table() -> Table:
    """One row for each network of configs/model/."""
    table = make_table("networks to train: model=<name>", "initial weights")
    for name in list_models():
        add_row(table, name, find_cost(name), MODEL_SCORES.get(name), find_missing_extra(name))
    return table


def zoo_table() -> Table:
    """One row for each network of the zoo."""
    costs = read_costs()
    table = make_table("trained networks: ckpt=zoo:<name>, init_from=zoo:<name>", "licence")
    for name in ZOO:
        cost = costs.get(name.replace("_bilinear", ""))
        add_row(table, name, cost and cost._replace(licence=""), MODEL_SCORES.get(name))
    for name, entry in HUB_ZOO.items():
        cost = costs.get(f"{ZOO_PREFIX}{name}")
        add_row(table, name, cost and cost._replace(licence=entry.licence), HUB_SCORES.get(name))
    return table


def make_table(title: str, licence: str) -> Table:
    table = Table(
        title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left"
    )
    table.add_column("name", no_wrap=True)
    for name in ("M", "GFLOPs", "1/x", "mIoU"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(licence, overflow="fold")
    return table


def add_row(
    table: Table, name: str, cost: ModelCost | None, score: CitedScore | None, extra: str | None = None
) -> None:
    missing = f"needs {extra}" if extra else ""
    if cost is None:
        table.add_row(name, "", "", "", str(score or ""), missing)
        return
    table.add_row(
        name,
        f"{cost.parameters / 1e6:.1f}",
        f"{cost.flops / 1e9:.0f}" if cost.flops else "",
        str(cost.label_stride),
        str(score or ""),
        ", ".join(filter(None, [shorten_licence(cost.licence), missing])),
    )


def shorten_licence(licence: str) -> str:
    """A licence for a narrow column.

    >>> shorten_licence("other (NVIDIA, non-commercial)")
    'NVIDIA, nc'
    """
    found = re.fullmatch(r"other \((.*)\)", licence)
    return describe_licence(found[1] if found else licence).replace("non-commercial", "nc")


def describe_sources() -> str:
    """What the columns are, and where the scores are published."""
    sources = {score.source for score in [*MODEL_SCORES.values(), *HUB_SCORES.values()]}
    lines = [
        f"M: million parameters with {NUM_CLASSES} classes. GFLOPs: one image of 512 x 512. 1/x: size of the class map "
        "before it is enlarged. nc: not for commercial use.",
        "mIoU: percent on ADE20K validation at one scale, as published for this architecture, not measured by us:",
        *sorted(f"  {source.mark}  {source.text}" for source in sources),
        "More: model=smp, model=transformers, ckpt=hf:<owner>/<name>, and docs/models.md, which helps to choose.",
    ]
    return "\n".join(lines)


def list_models() -> list[str]:
    """The networks of configs/model/."""
    return [name for name in list_options("model") if name not in GENERIC]


def find_cost(name: str) -> ModelCost | None:
    """The cost of a network of configs/model/, from the file, or measured if it is not there."""
    return read_costs().get(name) or measure_model(name)


@cache
def read_costs() -> Mapping[str, ModelCost]:
    """The costs in the file, by the name of the network; those of the hub have the prefix of the zoo."""
    with COSTS_FILE.open(newline="", encoding="utf-8") as file:
        return {
            row["name"]: ModelCost(int(row["parameters"]), int(row["flops"]), int(row["label_stride"]), row["licence"])
            for row in csv.DictReader(file)
        }


def find_missing_extra(name: str) -> str | None:
    """The extra that a network of configs/model/ needs, if its package is not installed."""
    missing = [extra for extra, package in PACKAGES.items() if find_spec(package) is None]
    if not missing:
        return None
    model = load_config([f"model={name}"])[0].model
    library = str(model.library or model.encoder.get("library"))
    return library if library in missing else None


def measure_model(name: str) -> ModelCost | None:
    """The cost of a network of configs/model/; None if it needs a library that is not installed."""
    if find_missing_extra(name) is not None:
        return None
    return describe_on_meta(load_config([f"model={name}"])[0].model)


def describe_on_meta(model: ModelConfig) -> ModelCost:
    """What is known about a network without its weights."""
    # PyTorch is imported only for networks that are not in the file.
    from semseg.checkpoints.network import build_architecture  # noqa: PLC0415
    from semseg.nets.cost import measure_cost  # noqa: PLC0415
    from semseg.nets.meta import build_on_meta  # noqa: PLC0415

    net = build_on_meta(lambda: build_architecture(model, NUM_CLASSES))
    cost = measure_cost(net)
    return ModelCost(cost.parameters, cost.flops, net.label_stride, net.licence)
