"""Outputs of every published pair of encoder and decoder, held against runs of the original code in float64."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import golden
from nets.fill import fill_module, image, sampled
from semseg.inference import upsampled_softmax
from semseg.launch import CONFIG_DIR, compose_config
from semseg.nets.features import Encoder, Logits
from semseg.nets.registry import DECODERS, ENCODERS, construct

REFERENCE = golden("nets_forward.json")
TOLERANCE = 1e-6  # of the output's standard deviation
# Every encoder and every decoder once or more; `make test-long` runs all pairs.
NORMAL_RUN = {
    "resnet18+ppm_bilinear_deepsup",
    "resnet18_dilated8+c1_bilinear",
    "resnet18_dilated8+c1_bilinear_deepsup",
    "resnet18_dilated16+c1_bilinear_deepsup",
    "resnet50+upernet_lite",
    "resnet50+upernet",
    "resnet50_dilated8+ppm_bilinear",
    "resnet50_dilated8+ppm_bilinear_deepsup",
    "resnet50_dilated16+ppm_bilinear_deepsup",
    "resnet101_dilated8+ppm_bilinear_deepsup",
    "resnext101+c1_bilinear",
}
PAIRS = [
    pytest.param(pair, marks=[] if pair in NORMAL_RUN else pytest.mark.long) for pair in REFERENCE["combos"]
]


def from_config(kind: str, name: str) -> dict:
    """Name and options of a part, through its configuration file, so that the file is tested too."""
    section = dict(compose_config([f"model/{kind}={name}"]).model[kind])
    section.pop("weights", None)
    return section


@lru_cache(maxsize=1)
def filled_encoder(name: str) -> Encoder:
    options = from_config("encoder", name)
    encoder = construct("encoder", ENCODERS, options.pop("name"), options)
    fill_module(encoder)
    return encoder.double()


@lru_cache(maxsize=2)
def encoder_maps(name: str, training: bool) -> tuple[Tensor, ...]:
    encoder = filled_encoder(name).train(training)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    with torch.no_grad():
        maps = tuple(encoder(image("input", (2 if training else 1, 3, 96, 128))))
    encoder.load_state_dict(before)
    return maps


def filled_decoder(name: str, channels: tuple[int, ...]) -> nn.Module:
    options = from_config("decoder", name)
    decoder = construct("decoder", DECODERS, options.pop("name"), options, channels, 150)
    fill_module(decoder)
    for layer in decoder.modules():
        if isinstance(layer, nn.Dropout2d):
            layer.p = 0.0
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.001  # what the original had in all these networks
    return decoder.double()


def assert_equal(output: Tensor, expected: dict) -> None:
    assert list(output.shape) == expected["shape"]
    error = np.abs(sampled(output) - np.array(expected["samples"])).max()
    assert error <= TOLERANCE * expected["std"] + 1e-9  # the reference is printed with ten digits


def assert_log_softmax(logits: Logits, expected: dict) -> None:
    assert_equal(logits.main.log_softmax(1), expected["main"])
    assert (logits.aux is None) == ("deepsup" not in expected)
    if logits.aux is not None:
        assert_equal(logits.aux.log_softmax(1), expected["deepsup"])


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_outputs_are_those_of_the_original(pair: str) -> None:
    encoder_name, decoder_name = pair.split("+")
    expected = REFERENCE["combos"][pair]
    maps, train_maps = encoder_maps(encoder_name, False), encoder_maps(encoder_name, True)
    for is_training, found in ((False, maps), (True, train_maps)):
        for features, reference in zip(
            found, REFERENCE["encoders"][encoder_name]["train" if is_training else "eval"], strict=True
        ):
            assert_equal(features, reference)

    decoder = filled_decoder(decoder_name, tuple(features.shape[1] for features in maps)).eval()
    assert_equal(upsampled_softmax(decoder(maps).main, (110, 150)), expected["infer_softmax"])
    decoder.training = True  # the auxiliary head runs, normalisation stays frozen
    assert_log_softmax(decoder(maps), expected["log_softmax_frozen_norm"])
    decoder.train()
    assert_log_softmax(decoder(train_maps), expected["log_softmax_batch_norm"])
    norms = [layer for layer in decoder.modules() if isinstance(layer, nn.BatchNorm2d)]
    sums = expected["norm_after_one_train_forward"]
    assert sum(float(n.running_mean.abs().sum()) for n in norms) == pytest.approx(sums["sum_abs_running_mean"], rel=1e-8)
    assert sum(float(n.running_var.sum()) for n in norms) == pytest.approx(sums["sum_running_var"], rel=1e-8)


@torch.no_grad()
def test_running_statistics_of_an_encoder_after_one_step() -> None:
    encoder = filled_encoder("resnet18").train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    norms = [layer for layer in encoder.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.001
    encoder(image("input", (2, 3, 96, 128)))
    sums = REFERENCE["encoders"]["resnet18"]["norm_after_one_train_forward"]
    assert sum(float(n.running_mean.abs().sum()) for n in norms) == pytest.approx(sums["sum_abs_running_mean"], rel=1e-8)
    assert sum(float(n.running_var.sum()) for n in norms) == pytest.approx(sums["sum_running_var"], rel=1e-8)
    encoder.load_state_dict(before)


@torch.no_grad()
def test_float32_stays_close_to_float64() -> None:
    encoder = filled_encoder("resnet18_dilated8").eval()
    maps = encoder(image("input", (1, 3, 96, 128)))
    decoder = filled_decoder("ppm", encoder.channels).eval()
    exact = decoder(maps).main.log_softmax(1)
    single = decoder.float()([features.float() for features in encoder.float()(image("input", (1, 3, 96, 128)).float())])
    assert float((single.main.log_softmax(1) - exact).abs().max() / exact.std()) < 5e-4
    filled_encoder.cache_clear()


def test_every_published_name_has_a_configuration_file() -> None:
    for pair in REFERENCE["combos"]:
        encoder, decoder = pair.split("+")
        assert (CONFIG_DIR / "model/encoder" / f"{encoder}.yaml").is_file()
        assert (CONFIG_DIR / "model/decoder" / f"{decoder}.yaml").is_file()


def test_bilinear_resizing_uses_pixel_centres() -> None:
    assert F.interpolate(torch.tensor([[[[0.0, 1.0]]]]), scale_factor=2, mode="bilinear").flatten().tolist() == [
        0.0, 0.25, 0.75, 1.0, 0.0, 0.25, 0.75, 1.0,
    ]  # fmt: skip
