from __future__ import annotations

import torch
from torch import nn

from helpers.contract import DecoderContract
from semseg.nets.decoders.ppm import PPM


class TestPPM(DecoderContract):
    name = "ppm"
    layouts = ("ppm/512", "ppm/2048")


class TestPPMDeepSupervision(DecoderContract):
    name = "ppm_deepsup"
    layouts = ("ppm_deepsup/512", "ppm_deepsup/2048")
    has_aux = True


def test_both_heads_drop_a_tenth_of_their_channels() -> None:
    decoder = PPM((4, 8, 16, 32), 3, deep_supervision=True)
    assert [layer.p for layer in decoder.modules() if isinstance(layer, nn.Dropout2d)] == [0.1, 0.1]


@torch.no_grad()
def test_branches_are_convolved_on_their_grid() -> None:
    decoder = PPM((4, 8, 16, 32), 3).eval()
    seen = []
    for branch in decoder.ppm:
        branch[1].register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[-2:])))
    decoder([torch.randn(1, channels, 9, 13) for channels in (4, 8, 16, 32)])
    assert seen == [(1, 1), (2, 2), (3, 3), (6, 6)]
