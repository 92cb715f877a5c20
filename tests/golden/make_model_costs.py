"""Writes semseg/modes/model_costs.csv, the costs that mode=models shows: run it after a change of networks.

python tests/golden/make_model_costs.py     (a minute; needs the extras timm and transformers)
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]

from helpers.hub_configs import HUB_CONFIGS  # noqa: E402 - found by the line above
from semseg.config.schema import ZOO_PREFIX  # noqa: E402
from semseg.modes.models import COSTS_FILE, ModelCost, describe_on_meta, list_models, measure_model  # noqa: E402


def measure_all() -> dict[str, ModelCost]:
    """The costs of all networks, by the names in the file."""
    ours = {name: measure_model(name) for name in list_models()}
    return ours | {f"{ZOO_PREFIX}{name}": describe_on_meta(create()) for name, create in HUB_CONFIGS.items()}


if __name__ == "__main__":
    costs = measure_all()
    with COSTS_FILE.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("name", *ModelCost._fields))
        rows.writerows((name, *cost) for name, cost in costs.items())
