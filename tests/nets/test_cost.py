"""Parameters and operations of networks, against numbers by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.in_process import TinyEncoder
from semseg.modes.models import measure_model
from semseg.nets.cost import NetworkCost, StageCost, measure_cost, write_cost
from semseg.nets.decoders.c1 import C1
from semseg.nets.decoders.ppm import PPM
from semseg.nets.segmenter import Segmenter


def tiny() -> NetworkCost:
    with torch.device("meta"):
        net = Segmenter(TinyEncoder(), C1((8, 16), 5), 5)
    return measure_cost(net)


def test_operations_are_those_of_a_hand_count() -> None:
    cost = tiny()
    fine, coarse, decoder = cost.stages
    # Pixels x 9 x channels in x channels out of 3 x 3 convolutions, twice; two parameters a channel of normalisation.
    first, second = 256**2 * 9 * 3 * 8, 128**2 * 9 * 8 * 8
    assert fine == StageCost("encoder.fine", 9 * 3 * 8 + 16 + 9 * 8 * 8 + 16, 2 * (first + second))
    assert coarse == StageCost("encoder.coarse", 9 * 8 * 16 + 32, 2 * 64**2 * 9 * 8 * 16)
    assert cost.flops == fine.flops + coarse.flops + decoder.flops
    assert cost.parameters == fine.parameters + coarse.parameters + decoder.parameters


def test_operations_are_those_of_the_architecture_and_not_of_cheaper_equivalents() -> None:
    with torch.device("meta"):
        net = Segmenter(TinyEncoder(), PPM((8, 16), 5), 5)
    branches = (1 + 4 + 9 + 36) * 16 * 512  # a 1 x 1 convolution in each cell of the four grids
    joined = 64**2 * 9 * (16 + 4 * 512) * 512  # the 3 x 3 convolution of the map and the upsampled grids, concatenated
    assert measure_cost(net).stages[-1].flops == 2 * (branches + joined + 64**2 * 512 * 5)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "billions"), [("upernet50", 489), ("resnet50_dilated8_ppm_deepsup", 369)])
def test_operations_of_published_networks_are_those_that_papers_count(model: str, billions: int) -> None:
    cost = measure_model(model)
    assert cost is not None and round(cost.flops / 1e9) == billions


def test_the_table_in_the_run_folder_has_every_stage(tmp_path: Path) -> None:
    write_cost(tmp_path / "model.txt", tiny())
    text = (tmp_path / "model.txt").read_text()
    assert all(name in text for name in ("encoder.fine", "encoder.coarse", "decoder", "total", "512 x 512"))


@pytest.mark.parametrize("name", ["mobilenetv2", "torchvision"])
def test_stages_add_up_where_layers_are_called_one_by_one(name: str) -> None:
    from semseg.nets.registry import build_segmenter

    options = {"name": "resnet18"} if name == "torchvision" else {}
    with torch.device("meta"):
        net = build_segmenter(name, "c1", 5, options, {})
    cost = measure_cost(net)
    assert len(cost.stages) > 3 and sum(stage.flops for stage in cost.stages) == cost.flops
