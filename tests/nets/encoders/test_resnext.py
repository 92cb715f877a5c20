from __future__ import annotations

from helpers.contract import EncoderContract
from semseg.nets.registry import build_encoder


class TestResNeXt101(EncoderContract):
    name = "resnext101"
    channels = (256, 512, 1024, 2048)


def test_only_the_3x3_convolutions_of_the_blocks_have_groups() -> None:
    encoder = build_encoder("resnext101")
    block = encoder.layer1[0]
    assert [conv.groups for conv in (block.conv1, block.conv2, block.conv3, encoder.conv3)] == [1, 32, 1, 1]
    assert block.conv2.out_channels == 128
