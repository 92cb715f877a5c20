from __future__ import annotations

from helpers.contract import EncoderContract
from semseg.nets.registry import build_encoder


class TestResNet18(EncoderContract):
    name = "resnet18"
    channels = (64, 128, 256, 512)


class TestResNet50(EncoderContract):
    name = "resnet50"
    channels = (256, 512, 1024, 2048)


class TestResNet101(EncoderContract):
    name = "resnet101"
    channels = (256, 512, 1024, 2048)


def test_the_convolution_that_had_the_stride_gets_half_of_the_dilation() -> None:
    encoder = build_encoder("resnet50", output_stride=8)
    dilations = [[block.conv2.dilation[0] for block in stage] for stage in (encoder.layer3, encoder.layer4)]
    assert dilations == [[1, 2, 2, 2, 2, 2], [2, 4, 4]]
    assert encoder.layer4[0].conv2.stride == encoder.layer4[0].downsample[0].stride == (1, 1)


def test_a_basic_block_halves_the_dilation_of_its_first_convolution_only() -> None:
    encoder = build_encoder("resnet18", output_stride=16)
    assert [(block.conv1.dilation[0], block.conv2.dilation[0]) for block in encoder.layer4] == [(1, 2), (2, 2)]
    assert encoder.layer3[0].conv1.stride == (2, 2)
