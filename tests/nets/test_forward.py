"""Outputs of every published pair of encoder and decoder, compared with runs of the original code in float64."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.fill import filled, image, sampled
from helpers.reference import golden
from semseg.evaluation.inference import merge_scales
from semseg.nets.interfaces import Decoder, Logits
from semseg.nets.registry import build_decoder, build_encoder

REFERENCE = golden("nets_forward.json")
TOLERANCE = 1e-6  # relative to the output's standard deviation
Module = TypeVar("Module", bound=nn.Module)
MOMENTUM = 0.001  # for the running statistics in the original, except in HRNet


class EncoderRun(NamedTuple):
    """Maps of an encoder in eval mode for one image, in training mode for two, and its norms after that."""

    eval_maps: list[Tensor]
    train_maps: list[Tensor]
    norms: dict[str, float]


@cache
@torch.no_grad()
def encoder_run(name: str) -> EncoderRun:
    with torch.device("meta"):
        encoder = build_encoder(name)
    fill(encoder)
    eval_maps = encoder.eval()(image("input", (1, 3, 96, 128)))
    train_maps = encoder.train()(image("input", (2, 3, 96, 128)))
    return EncoderRun(eval_maps, train_maps, norm_sums(encoder))


@cache
def filled_decoder(name: str, channels: tuple[int, ...]) -> Decoder:
    with torch.device("meta"):
        decoder = build_decoder(name, channels, 150)
    return fill(decoder)


@cache
def filled_value(key: str, shape: torch.Size) -> Tensor:
    """The float64 value of the tensor `key`, which is the same in all networks that have it in this shape."""
    value = filled(key, shape)
    return value.double() if value.is_floating_point() else value


@pytest.fixture(scope="module", autouse=True)
def forget_networks() -> Iterator[None]:
    """Free the gigabyte that the networks take."""
    yield
    for cached in (encoder_run, filled_decoder, filled_value):
        cached.cache_clear()


def mark_repeated(names: Iterable[str]) -> list[Any]:
    """Networks, those that only repeat blocks of others or pair what other pairs have marked as long."""
    repeated = (
        r"resnet101|resnet50_dilated16|resnet50_dilated8\+(upernet|c1|ppm_bilinear)|resnext101\+(upernet|ppm)|"
        r"resnet50\+ppm_bilinear$"
    )
    return [pytest.param(name, marks=pytest.mark.long if re.match(repeated, name) else ()) for name in names]


def probabilities(logits: Tensor) -> Tensor:
    """(1, K, 110, 150): the probabilities of inference from logits (1, K, h, w)."""
    found = np.empty((logits.shape[1], 110, 150), np.float64)
    merge_scales([logits.permute(0, 2, 3, 1)], (110, 150), probabilities=found)
    return torch.from_numpy(found)[None]


def fill(module: Module) -> Module:
    """Replace the meta tensors of a network by the values of its names, in float64; its statistics are copies."""
    state = {key: filled_value(key, value.shape) for key, value in module.state_dict().items()}
    copied = {key: value.clone() for key, value in state.items() if "running" in key or "num_batches" in key}
    module.load_state_dict(state | copied, assign=True)
    for layer in module.modules():
        if isinstance(layer, nn.Dropout2d):
            layer.p = 0.0
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = getattr(layer, "published_momentum", MOMENTUM)
    return module


def norm_sums(module: nn.Module) -> dict[str, float]:
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    return {
        "sum_abs_running_mean": sum(float(norm.get_buffer("running_mean").abs().sum()) for norm in norms),
        "sum_running_var": sum(float(norm.get_buffer("running_var").sum()) for norm in norms),
    }


def assert_equal(output: Tensor, expected: dict) -> None:
    assert list(output.shape) == expected["shape"]
    error = np.abs(sampled(output) - np.array(expected["samples"])).max()
    assert error <= TOLERANCE * expected["std"]


def assert_log_softmax(logits: Logits, expected: dict) -> None:
    assert_equal(logits.main.log_softmax(1), expected["main"])
    assert (logits.aux is None) == ("deepsup" not in expected)
    if logits.aux is not None:
        assert_equal(logits.aux.log_softmax(1), expected["deepsup"])


@pytest.mark.slow
@pytest.mark.parametrize("name", mark_repeated(REFERENCE["encoders"]))
def test_maps_are_those_of_the_original(name: str) -> None:
    run, expected = encoder_run(name), REFERENCE["encoders"][name]
    for features, reference in zip(run.eval_maps, expected["eval"], strict=True):
        assert_equal(features, reference)
    for features, reference in zip(run.train_maps, expected["train"], strict=True):
        assert_equal(features, reference)
    assert run.norms == pytest.approx(expected["norm_after_one_train_forward"], rel=1e-8)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("pair", mark_repeated(REFERENCE["combos"]))
def test_outputs_are_those_of_the_original(pair: str) -> None:
    encoder_name, decoder_name = pair.split("+")
    run, expected = encoder_run(encoder_name), REFERENCE["combos"][pair]
    decoder = filled_decoder(decoder_name, tuple(features.shape[1] for features in run.eval_maps))
    before = {key: value.clone() for key, value in decoder.state_dict().items() if "running" in key or "num_" in key}

    decoder.eval()
    decoder.training = True  # the auxiliary head runs, normalisation stays frozen
    frozen = decoder(run.eval_maps)
    assert_log_softmax(frozen, expected["log_softmax_frozen_norm"])
    assert_equal(probabilities(frozen.main), expected["infer_softmax"])
    assert_log_softmax(decoder.train()(run.train_maps), expected["log_softmax_batch_norm"])
    assert norm_sums(decoder) == pytest.approx(expected["norm_after_one_train_forward"], rel=1e-8)

    decoder.load_state_dict(before, strict=False)  # other pairs have the same decoder


@torch.no_grad()
def test_eval_mode_gives_the_main_logits_of_training_mode() -> None:
    run = encoder_run("resnet18_dilated8")
    decoder = filled_decoder("ppm_bilinear_deepsup", (64, 128, 256, 512)).eval()
    assert_equal(
        probabilities(decoder(run.eval_maps).main),
        REFERENCE["combos"]["resnet18_dilated8+ppm_bilinear_deepsup"]["infer_softmax"],
    )


@torch.no_grad()
def test_float32_stays_close_to_float64() -> None:
    run = encoder_run("resnet18_dilated8")
    exact = filled_decoder("ppm_bilinear", (64, 128, 256, 512)).eval()(run.eval_maps).main.log_softmax(1)
    with torch.device("meta"):
        encoder = build_encoder("resnet18_dilated8")
        decoder = build_decoder("ppm_bilinear", encoder.channels, 150)
    encoder, decoder = fill(encoder).float().eval(), fill(decoder).float().eval()
    single = decoder(encoder(image("input", (1, 3, 96, 128)).float())).main.log_softmax(1)
    assert float((single - exact).abs().max() / exact.std()) < 5e-4
