"""mode=models: the ready-made networks with their cost and their published scores."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from rich.console import Console
from rich.table import Table

from semseg.checkpoints.network import build_architecture
from semseg.checkpoints.zoo import PUBLISHED_SCORES, ZOO
from semseg.config.groups import list_options
from semseg.config.load import load_config
from semseg.config.schema import Config, ModelConfig
from semseg.nets.cost import COST_SIZE, NetworkCost, measure_cost

ZOO_NUM_CLASSES = 150  # classes of the published networks
PACKAGES = {"timm": "timm", "smp": "segmentation_models_pytorch"}  # by library, which is the name of the extra too


def run(config: Config, overrides: list[str]) -> None:
    """Print the table; nothing is downloaded or written."""
    Console().print(models_table())


def models_table() -> Table:
    """One row for each file of configs/model/."""
    table = Table(
        title=f"networks: model=<name>, {ZOO_NUM_CLASSES} classes, one image of {COST_SIZE.height} x {COST_SIZE.width}",
        caption="M: million parameters; mIoU: percent on ADE20K validation at one and at five scales, as published, "
        "not measured by us; zoo: ckpt=zoo:<name>",
    )
    table.add_column("model", no_wrap=True)
    for name in ("M", "GFLOPs", "mIoU", "mIoU x5"):
        table.add_column(name, justify="right")
    table.add_column("weights")
    for name in list_options("model"):
        if name in ("custom", "transformers"):  # a network of the user's own, or any of the hub
            continue
        cost = measure_model(name)
        counted = ["", ""] if cost is None else [f"{cost.parameters / 1e6:.1f}", f"{cost.flops / 1e9:.0f}"]
        scores = PUBLISHED_SCORES.get(name)
        published = ["", ""] if scores is None else [f"{score.mean_iou:.2f}" for score in scores]
        weights = "zoo" if name in ZOO else ""
        table.add_row(name, *counted, *published, f"needs {find_missing_extra(name)}" if cost is None else weights)
    return table


def measure_model(name: str) -> NetworkCost | None:
    """The cost of a network of configs/model/; None if it needs a library that is not installed."""
    if find_missing_extra(name) is not None:
        return None
    config, _ = load_config([f"model={name}"])
    return measure_on_meta(config.model)


def find_missing_extra(name: str) -> str | None:
    """The extra that a network of configs/model/ needs, if its package is not installed."""
    model = load_config([f"model={name}"])[0].model
    library = model.library or model.encoder.get("library")
    package = PACKAGES.get(str(library))
    return str(library) if package is not None and find_spec(package) is None else None


def measure_on_meta(model: ModelConfig) -> NetworkCost:
    """The cost of a network, built on the meta device."""
    with torch.device("meta"):
        return measure_cost(build_architecture(model, ZOO_NUM_CLASSES))
