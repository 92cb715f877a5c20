"""A pyramid of maps of one stride."""

from __future__ import annotations

import pytest
import torch

from helpers.tiny_vit import build_timm
from semseg.config.schema import OptimConfig
from semseg.nets.pyramid import Pyramid, PyramidDecoder
from semseg.nets.registry import build_decoder, build_segmenter
from semseg.nets.segmenter import Segmenter
from semseg.training.optim import parameter_groups

assert build_timm  # registers the networks


@pytest.mark.parametrize("channels", [(4, 6, 8, 10), (4,)])
def test_levels_have_4_2_1_and_half_the_resolution_at_every_size(channels: tuple[int, ...]) -> None:
    pyramid = Pyramid(channels, (16,) * len(channels))
    assert pyramid.strides == (4, 8, 16, 32)
    assert pyramid.channels == (channels if len(channels) > 1 else channels * 4)
    for size in ((3, 5), (1, 1), (4, 2)):
        levels = pyramid([torch.randn(2, count, *size) for count in channels])
        half = tuple((side + 1) // 2 for side in size)
        expected = [tuple(4 * side for side in size), tuple(2 * side for side in size), size, half]
        assert [tuple(level.shape[-2:]) for level in levels] == expected
        assert [level.shape[1] for level in levels] == list(pyramid.channels)


@torch.no_grad()
def test_a_level_does_not_depend_on_the_other_images() -> None:
    pyramid = Pyramid((4,), (16,)).train()
    images = torch.randn(2, 4, 3, 3)
    for both, one in zip(pyramid([images]), pyramid([images[:1]]), strict=True):
        torch.testing.assert_close(both[:1], one)


def test_upernet_reads_strides_4_to_32_and_gives_logits_at_4() -> None:
    seen: list[tuple[int, ...]] = []
    net = build_segmenter("timm", "upernet", 3, {"name": "tiny_dinov3"}, {"width": 8}).eval()
    assert isinstance(net, Segmenter) and isinstance(net.decoder, PyramidDecoder)
    net.decoder.head.register_forward_pre_hook(
        lambda module, inputs: seen.extend(tuple(features.shape[-2:]) for features in inputs[0])
    )
    with torch.no_grad():
        logits = net(torch.randn(1, 3, 96, 64)).main
    assert seen == [(24, 16), (12, 8), (6, 4), (3, 2)]
    assert logits.shape[-2:] == (24, 16) and (net.size_divisor, net.label_stride) == (32, 4)


def test_it_is_trained_with_the_decoder_on_a_frozen_encoder() -> None:
    with torch.device("meta"):
        net = build_segmenter("timm", "upernet", 3, {"name": "tiny_dinov3"}, {"width": 8})
    net.backbone.requires_grad_(False)
    groups = parameter_groups(net, OptimConfig(lr=0.1, lr_encoder=0.01))
    assert {group["lr"] for group in groups} == {0.1}
    decaying = {id(weight) for weight in groups[0]["params"]}
    pyramid = dict(net.decoder.pyramid.named_parameters())
    assert {name for name, weight in pyramid.items() if id(weight) in decaying} == {
        "quarter.0.weight", "quarter.3.weight", "halved.weight",
    }  # fmt: skip


def test_a_pyramid_decoder_has_the_stride_of_its_head() -> None:
    pyramid = Pyramid((4,), (16,))
    for name, stride in (("upernet", 4), ("segformer", 4)):
        decoder = PyramidDecoder(pyramid, build_decoder(name, pyramid.channels, 3, width=4))
        assert decoder.list_strides((16,))[decoder.feature_level] == stride
