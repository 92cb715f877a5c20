"""torch.compile with sizes that change from step to step: few graphs, whatever the number of canvases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

from helpers.in_process import TinyEncoder
from semseg.checkpoints.network import build_network
from semseg.config.schema import ModelConfig
from semseg.nets.decoders.c1 import C1
from semseg.nets.interfaces import SegmentationNetwork
from semseg.nets.normalise import normalise
from semseg.nets.registry import build_segmenter
from semseg.nets.segmenter import Segmenter

MAX_GRAPHS = 3  # a square canvas among the others costs one more
CANVASES = [(32 * height, 32 * width) for height in (2, 3, 4) for width in (2, 3, 4, 5)]


def count_graphs(net: SegmentationNetwork, canvases: list[tuple[int, int]]) -> int:
    """The graphs that the forward pass of a training step is compiled to, over several canvases."""
    torch._dynamo.reset()
    counters.clear()
    net.train().compile(dynamic=True, backend=aot_eager)
    for canvas in canvases:
        image = torch.zeros(2, 3, *canvas, dtype=torch.uint8)
        net(normalise(image, net.convention)).main.sum().backward()
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_a_network_is_compiled_a_few_times_for_many_canvases() -> None:
    encoder = TinyEncoder()
    net = Segmenter(encoder, C1(encoder.channels, 5), 5)
    assert count_graphs(net, CANVASES) <= MAX_GRAPHS


NETWORKS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "upernet": ("resnet18", "upernet", {}, {"width": 32}),
    "ppm_deepsup": ("resnet18", "ppm", {"output_stride": 8}, {"deep_supervision": True}),
    "mobilenet": ("mobilenetv2", "c1", {"output_stride": 8}, {"deep_supervision": True}),
    "hrnet": ("hrnetv2", "c1", {}, {}),
    "swin": ("torchvision", "upernet", {"name": "swin_t"}, {"width": 32}),
    "convnext": ("torchvision", "upernet", {"name": "convnext_tiny"}, {"width": 32}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network_is_compiled_a_few_times_for_many_canvases(name: str) -> None:
    encoder, decoder, encoder_options, decoder_options = NETWORKS[name]
    assert count_graphs(build_segmenter(encoder, decoder, 5, encoder_options, decoder_options), CANVASES) <= MAX_GRAPHS


@pytest.mark.long
@pytest.mark.parametrize("arch", ["unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "pan", "deeplabv3",
                                  "deeplabv3plus", "segformer", "upernet", "dpt"])  # fmt: skip
def test_a_network_of_smp_is_compiled_a_few_times_for_many_canvases(arch: str) -> None:
    encoder = "tu-vit_tiny_patch16_224" if arch == "dpt" else "resnet18"
    model = ModelConfig(library="smp", arch=arch, encoder={"name": encoder, "weights": "none"})
    assert count_graphs(build_network(model, 5), CANVASES) <= MAX_GRAPHS
