from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest
import torch

from semseg.config.compose import compose_config
from semseg.config.schema import split_network_options
from semseg.errors import ConfigError
from semseg.nets.interfaces import Decoder, Encoder
from semseg.nets.registry import (
    NETWORK_TABLES,
    OLD_NAMES,
    build_decoder,
    build_encoder,
    build_segmenter,
    default_options,
    resolve_network,
)

CHANNELS = (8, 16, 32, 64)
NAMES = [(kind, name) for kind in NETWORK_TABLES for name in (*NETWORK_TABLES[kind], *OLD_NAMES[kind])]


def test_names_are_listed_without_torch() -> None:
    code = (
        "import sys, semseg.nets.registry as r; r.resolve_network('decoder', 'ppm'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_every_name_of_a_table_builds_a_network_of_its_kind() -> None:
    with torch.device("meta"):
        assert all(isinstance(build_encoder(name), Encoder) for name in NETWORK_TABLES["encoder"])
        assert all(isinstance(build_decoder(name, CHANNELS, 3), Decoder) for name in NETWORK_TABLES["decoder"])


@cache
def meta_size_divisor(name: str, output_stride: int | None) -> int:
    with torch.device("meta"):
        return build_encoder(name, **({} if output_stride is None else {"output_stride": output_stride})).size_divisor


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_old_names_are_current_names_with_options(kind: str, name: str) -> None:
    network = resolve_network(kind, name)
    assert network.name in NETWORK_TABLES[kind]
    if kind == "encoder":
        assert meta_size_divisor(network.name, network.options.get("output_stride")) == network.options.get(
            "output_stride", 32
        )
        return
    with torch.device("meta"):
        logits = build_decoder(name, CHANNELS, 3).train()([torch.randn(2, channels, 4, 4) for channels in CHANNELS])
    assert (logits.aux is not None) == network.options.get("deep_supervision", False)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [pair for pair in NAMES if not pair[1].endswith("dilated")])
def test_a_name_and_its_configuration_file_build_the_same_network(kind: str, name: str) -> None:
    section = compose_config([f"model/{kind}={name}"]).model[kind]
    current_name, options = split_network_options(dict(section), kind)
    network = resolve_network(kind, name)
    assert current_name == network.name
    defaults = default_options(NETWORK_TABLES[kind][current_name].load())
    chosen = {option: value for option, value in options.items() if value is not None}
    assert defaults | chosen == defaults | network.options


def test_an_option_takes_precedence_over_that_in_an_old_name() -> None:
    with torch.device("meta"):
        assert build_encoder("resnet18_dilated8", output_stride=16).strides == (4, 8, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet19", "c1", 5), "model.encoder.name: 'resnet19' is not known. Did you mean resnet18? Valid: "),
        (("resnet18", "upernett", 5), "model.decoder.name: 'upernett' is not known. Did you mean upernet? Valid: "),
        (
            ("resnet18", "c1", 5, {"output_strid": 8}),
            "model.encoder.output_strid: resnet18 has no such option. "
            "Did you mean model.encoder.output_stride? Valid: output_stride.",
        ),
        (("resnet18", "c1", 5, {"output_stride": 4}), "model.encoder.output_stride=4: must be 8, 16 or 32."),
        (("resnet18", "c1", 5, {"output_stride": "8x"}), "model.encoder.output_stride='8x': must be an integer."),
        (("resnet18", "c1", 5, {"groups": 2}), "model.encoder.groups: resnet18 has no such option. Valid: "),
        (
            ("resnet18", "upernet", 5, {}, {"deep_supervision": True}),
            "model.decoder.deep_supervision: upernet has no such option. Valid: width.",
        ),
        (
            ("resnet18", "ppm", 5, {}, {"deep_supervision": 1, "channels": 3}),
            "model.decoder.deep_supervision=1: must be true or false. "
            "model.decoder.channels: ppm has no such option. Valid: deep_supervision.",
        ),
    ],
)
def test_an_unknown_name_or_option_is_rejected(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_segmenter(*arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "options", "channels"),
    [
        ("c1", {}, (720,)),
        ("upernet", {"join": None}, (48, 96, 192, 384)),
        ("upernet", {"join": True}, (720,)),
        ("c1_deepsup", {"join": False}, (48, 96, 192, 384)),
    ],
)
def test_maps_are_not_joined_below_a_decoder_that_reads_a_pyramid(
    decoder: str, options: dict, channels: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        net = build_segmenter("hrnetv2", decoder, 3, options)
    assert net.encoder.channels == channels
    assert (net.size_divisor, net.label_stride) == (32, 32 if decoder == "c1_deepsup" else 4)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["c1_deepsup", "ppm_deepsup", "upernet_lite"])
def test_decoders_take_five_maps(decoder: str) -> None:
    with torch.device("meta"):
        net = build_segmenter("mobilenetv2_dilated8", decoder, 3).eval()
    assert net(torch.empty(1, 3, 64, 96, device="meta")).main.shape == (
        1,
        3,
        64 // net.label_stride,
        96 // net.label_stride,
    )
    assert (net.size_divisor, net.label_stride) == (8, 4 if decoder == "upernet_lite" else 8)


@pytest.mark.parametrize(("decoder", "options"), [("c1_deepsup", {}), ("ppm", {"deep_supervision": True})])
def test_deep_supervision_of_a_single_map_is_rejected_with_two_alternatives(decoder: str, options: dict) -> None:
    with pytest.raises(ConfigError) as caught, torch.device("meta"):
        build_segmenter("hrnetv2", decoder, 3, None, options)
    for part in ("model.decoder.deep_supervision=true", "hrnetv2", "model.encoder.join=false", "model/decoder=c1, ppm"):
        assert part in str(caught.value)
