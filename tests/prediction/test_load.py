"""semseg.load: what it accepts, and errors that speak of its arguments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import semseg
from helpers.in_process import configured
from semseg.build import open_predictor
from semseg.checkpoints.format import FORMAT_KEY, describe_network
from semseg.checkpoints.network import build_network
from semseg.config.schema import config_to_plain
from semseg.data.classes import built_in_classes
from semseg.errors import ArgumentError, ConfigError, SemsegError

WORDS = [
    "data=camvid",
    "model/encoder=mobilenetv2",
    "model/decoder=c1",
    "model.encoder.weights=none",
    "eval.scales=[32]",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network with the 11 classes of CamVid, whose data set is not here."""
    config, path = configured(*WORDS), tmp_path_factory.mktemp("load") / "net.ckpt"
    net, classes = build_network(config.model, 11), built_in_classes("camvid")
    weights = {f"net.{name}": value for name, value in net.state_dict().items()}
    entry = describe_network(config_to_plain(config), classes, net.convention)
    torch.save({"state_dict": weights, "epoch": 1, "global_step": 1, FORMAT_KEY: entry}, path)
    return path


def test_a_network_is_described_by_its_parts_and_predicts(checkpoint: Path) -> None:
    net = semseg.load(checkpoint, "predict.scales=[32]", "predict.flip=true", device="cpu")
    assert "mobilenetv2 + c1: 11 classes" in repr(net) and str(checkpoint) in repr(net)
    assert net.settings.flip and net.device == torch.device("cpu")
    assert net.predict(np.zeros((20, 30, 3), np.uint8)).ids.shape == (20, 30)


@pytest.mark.parametrize("layout", ["false", "true", "auto"])
def test_weights_have_the_layout_of_model_channels_last(checkpoint: Path, layout: str) -> None:
    """auto: MobileNetV2 consists mostly of depthwise convolutions, which are faster in it on a CPU."""
    net = semseg.load(checkpoint, f"model.channels_last={layout}", "trainer=cpu", device="cpu").net
    weights = [weight for weight in net.parameters() if weight.ndim == 4 and min(weight.shape[1:]) > 1]
    assert {weight.is_contiguous(memory_format=torch.channels_last) for weight in weights} == {layout != "false"}


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "^device='gpu': PyTorch has no such device"),
        ("cuda", "^device='cuda': PyTorch sees no GPU here"),
        (1, "^device=1: PyTorch sees no GPU"),
        ("meta", "^device='meta': cannot be used here"),
    ],
)
def test_a_device_that_is_not_there_is_reported_before_anything_is_read(
    device: str | int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ArgumentError, match=message):
        semseg.load("nowhere.ckpt", device=device)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "^ckpt=None: must be a path"),
        (("net.ckpt", ["predict.flip=true"]), "an override is text"),
        (("net.ckpt", "scales=[32]"), r"no key 'scales'. Did you mean \w+\.scales\?"),
        (
            ("net.ckpt", "trainer.max_steps=3"),
            r"^trainer\.max_steps=3: does not change predictions.*trainer\.precision",
        ),
        (("net.ckpt", "data.train.images=a"), r"^data\.train\.images=a: does not change predictions"),
        (("net.ckpt", "predict.save=[ids]"), r"^predict\.save=\[ids\]: does not change predictions"),
        (("nowhere.ckpt",), r"^ckpt=nowhere\.ckpt: there is no such file"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(SemsegError, match=message):
        semseg.load(*arguments, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("override", ["data.num_classes=9", "data=cityscapes"])
def test_data_of_another_number_of_classes_is_rejected(checkpoint: Path, override: str) -> None:
    message = rf"classes, but {checkpoint} was trained for 11"
    with pytest.raises(ConfigError, match=message):
        semseg.load(checkpoint, override, device="cpu")
    words = ["mode=predict", "input=photo.jpg", f"ckpt={checkpoint}", "trainer=cpu", override]
    with pytest.raises(ConfigError, match=message):
        open_predictor(configured(*words), words)
    assert semseg.load(checkpoint, "data.num_classes=11", device="cpu").classes.num_classes == 11
