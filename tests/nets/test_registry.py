from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import golden
from nets.contract import check_decoder, check_encoder
from semseg.errors import ConfigError
from semseg.nets.registry import DECODERS, ENCODERS, build_segmenter, construct
from semseg.optim import decay_split

LAYOUTS = golden("nets_layouts.json")
CHANNELS = {512: (64, 128, 256, 512), 2048: (256, 512, 1024, 2048)}
OPTIONS = {
    "c1": ("c1", {}),
    "c1_deepsup": ("c1", {"deep_supervision": True}),
    "ppm": ("ppm", {}),
    "ppm_deepsup": ("ppm", {"deep_supervision": True}),
    "upernet": ("upernet", {}),
    "upernet_lite": ("upernet", {"width": 256}),
}


def published(layout: str) -> nn.Module:
    """The encoder or decoder that a layout describes, with 150 classes."""
    kind, name, *deepest = layout.split("/")
    if kind == "encoder":
        return construct("encoder", ENCODERS, name, {})
    decoder, options = OPTIONS[name]
    return construct("decoder", DECODERS, decoder, options, CHANNELS[int(deepest[0])], 150)


@pytest.mark.parametrize("layout", LAYOUTS["layouts"])
def test_state_dicts_have_the_published_keys_and_shapes_in_order(layout: str) -> None:
    module = published(layout)
    assert [[key, list(value.shape)] for key, value in module.state_dict().items()] == LAYOUTS["layouts"][layout]
    decay, free = decay_split(module)
    numel = {"decay": sum(p.numel() for p in decay), "no_decay": sum(p.numel() for p in free)}
    assert numel == LAYOUTS["numel"][layout]


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_encoders_keep_their_contract(name: str, output_stride: int) -> None:
    encoder = construct("encoder", ENCODERS, name, {"output_stride": output_stride})
    assert encoder.strides == tuple(min(stride, output_stride) for stride in (4, 8, 16, 32))
    check_encoder(encoder)


@pytest.mark.parametrize("name", ["resnet101", "resnext101"])
def test_deep_encoders_keep_their_contract(name: str) -> None:
    check_encoder(construct("encoder", ENCODERS, name, {}))


@pytest.mark.parametrize("name", OPTIONS)
def test_decoders_keep_their_contract_on_any_channels(name: str) -> None:
    decoder, options = OPTIONS[name]
    channels = (24, 40, 112, 320)
    check_decoder(construct("decoder", DECODERS, decoder, options, channels, 7), channels, 7)


@pytest.mark.parametrize(
    ("encoder", "options", "decoder", "divisor", "stride"),
    [
        ("resnet18", {"output_stride": 8}, "ppm", 8, 8),
        ("resnet18", {"output_stride": 16}, "c1", 16, 16),
        ("resnet18", {}, "c1", 32, 32),
        ("resnet18", {}, "upernet", 32, 4),
        ("resnet18", {"output_stride": 8}, "upernet", 8, 4),
    ],
)
def test_strides_are_derived(encoder: str, options: dict, decoder: str, divisor: int, stride: int) -> None:
    net = build_segmenter(encoder, decoder, 5, options)
    assert (net.size_divisor, net.label_stride) == (divisor, stride)
    logits = net.eval()(torch.randn(1, 3, 2 * divisor, 3 * divisor)).main
    assert logits.shape == (1, 5, 2 * divisor // stride, 3 * divisor // stride)


def test_one_image_of_the_smallest_size_trains() -> None:
    for decoder in DECODERS:
        net = build_segmenter("resnet18", decoder, 5).train()
        net(torch.randn(1, 3, 32, 32)).main.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet19", "c1", 5), "Did you mean resnet18"),
        (("resnet18", "upernett", 5), "Did you mean upernet"),
        (("resnet18", "c1", 5, {"output_strid": 8}), "Did you mean output_stride"),
        (("resnet18", "c1", 5, {"output_stride": 4}), "must be 8, 16 or 32"),
        (("resnet18", "upernet", 5, {}, {"deep_supervision": True}), "Valid: width"),
        (("resnet18", "c1", 5, {"groups": 2}), "no such option"),
    ],
)
def test_a_wrong_name_or_option_is_told(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_segmenter(*arguments)
