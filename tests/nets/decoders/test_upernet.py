from __future__ import annotations

import pytest
import torch

from helpers.contract import DecoderContract
from semseg.errors import ConfigError
from semseg.nets.decoders.upernet import UPerNet


class TestUPerNet(DecoderContract):
    name = "upernet"
    layouts = ("upernet/2048",)


class TestUPerNetLite(DecoderContract):
    name = "upernet_lite"
    layouts = ("upernet_lite/2048",)


class TestUPerNetOnResNet18(DecoderContract):
    """The original could not."""

    name = "upernet_lite"
    channels = (64, 128, 256, 512)


@torch.no_grad()
def test_branches_are_convolved_after_upsampling() -> None:
    decoder = UPerNet((4, 8, 16, 32), 3, width=8).eval()
    seen = []
    for branch in decoder.ppm_conv:
        branch[0].register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[-2:])))
    decoder([torch.randn(1, channels, 9, 13) for channels in (4, 8, 16, 32)])
    assert seen == [(9, 13)] * 4


def test_a_width_of_0_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"^model\.decoder\.width=0: must be at least 1"):
        UPerNet((4, 8, 16, 32), 3, width=0)
