from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import MobileNetV2 as TorchvisionMobileNetV2

from helpers.contract import LAYOUTS, EncoderContract, check_layout
from semseg.checkpoints.initialise import find_differences, load_encoder_weights
from semseg.nets.encoders.mobilenet import InvertedResidual
from semseg.nets.registry import build_decoder, build_encoder


class TestMobileNetV2(EncoderContract):
    name = "mobilenetv2"
    channels = (24, 32, 64, 160, 320)
    strides = {8: (4, 8, 8, 8, 8), 16: (4, 8, 16, 16, 16), 32: (4, 8, 16, 32, 32)}  # noqa: RUF012
    layout = "mobilenetv2dilated"
    weights = "/mobilenet_v2.pth.tar"


@pytest.mark.parametrize("decoder", ["c1", "c1_deepsup", "ppm", "ppm_deepsup"])
def test_published_decoders_fit_its_channels(decoder: str) -> None:
    with torch.device("meta"):
        check_layout(build_decoder(decoder, TestMobileNetV2.channels, 150), f"decoder/{decoder}/320")


def test_the_convolution_that_had_the_stride_gets_half_of_the_dilation() -> None:
    with torch.device("meta"):
        encoder = build_encoder("mobilenetv2_dilated8")
    depthwise = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d) and layer.groups > 1][1:]
    assert [layer.stride[0] for layer in depthwise] == [2, 1, 2] + 13 * [1]
    assert [layer.dilation[0] for layer in depthwise] == 5 * [1] + [1, 2, 2, 2, 2, 2, 2] + [2, 4, 4, 4]
    assert all(layer.groups == layer.in_channels for layer in depthwise)
    assert all(layer.padding == layer.dilation for layer in depthwise)


def test_blocks_that_keep_channels_and_resolution_have_a_shortcut() -> None:
    with torch.device("meta"):
        blocks = [layer for layer in build_encoder("mobilenetv2").modules() if isinstance(layer, InvertedResidual)]
    with_shortcut = [number for number, block in enumerate(blocks, start=1) if block.has_shortcut]
    assert with_shortcut == [3, 5, 6, 8, 9, 10, 12, 13, 15, 16]


def test_the_published_imagenet_file_fits() -> None:
    encoder = build_encoder("mobilenetv2")
    published = {name: torch.empty(shape) for name, shape in LAYOUTS["layouts"]["base/mobilenetv2"]}
    state = encoder.convert_weights(published)
    assert find_differences(state, encoder.state_dict()) == []
    assert all(state[name] is published[name] for name in state)
    assert len(published) - len(state) == 8  # the last convolution, its norm, and the classifier


@torch.no_grad()
def test_torchvision_s_weights_give_torchvision_s_maps_to_the_last_bit(tmp_path: Path) -> None:
    library = models.mobilenet_v2(weights=None)
    for layer in library.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value in (*layer.parameters(), layer.get_buffer("running_mean"), layer.get_buffer("running_var")):
                value.uniform_(0.5, 1.5)
    halved = {name: value.half() if value.ndim > 1 else value for name, value in library.state_dict().items()}
    torch.save(halved, tmp_path / "weights.pth")
    check_same_maps(library, tmp_path / "weights.pth")


@pytest.mark.shared
@torch.no_grad()
def test_real_imagenet_weights_give_torchvision_s_maps(shared: Path) -> None:
    check_same_maps(models.mobilenet_v2(weights=None), shared / "weights/mobilenet_v2-imagenet.pth")


def check_same_maps(library: TorchvisionMobileNetV2, path: Path) -> None:
    library.load_state_dict(torch.load(path, weights_only=True))
    encoder = build_encoder("mobilenetv2").eval()
    load_encoder_weights(encoder, path)
    image = torch.randn(2, 3, 97, 64)
    for ours, theirs in zip(encoder(image), maps_of(library.eval(), image), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def maps_of(library: TorchvisionMobileNetV2, image: Tensor) -> list[Tensor]:
    """What torchvision's network gives after the blocks whose outputs are our maps."""
    features, maps = image, []
    for index, block in enumerate(library.features):
        features = block(features)
        if index in (2, 4, 7, 14, 17):
            maps.append(features)
    return maps
