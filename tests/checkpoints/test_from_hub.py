"""ckpt=hf:<name>, zoo:<name> of the hub and ckpt=<folder of transformers>, in every mode that takes a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import semseg
from helpers.command_line import TINY, run_here
from helpers.fake_hub import CARD, COMMIT, add_to_cache, use_hub
from helpers.in_process import configured
from helpers.transformers_networks import NAMES, save_network
from semseg.build import find_network, restore_network
from semseg.checkpoints.format import read_checkpoint
from semseg.checkpoints.from_hub import choose_class_table
from semseg.config.origin import WeightsOrigin
from semseg.config.schema import Config
from semseg.data.classes import built_in_classes
from semseg.errors import CheckpointError, ConfigError, SemsegError
from semseg.storage import hub as hub_module
from semseg.storage.hub_list import HUB_ZOO, HubEntry

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
NAME = "owner/tiny"
CKPT = f"ckpt=hf:{NAME}"
ORIGIN = WeightsOrigin(NAME, "other (tiny-license)", COMMIT)
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_reduce_labels": True}
PREDICT = ["mode=predict", "input=photo.png", "predict.scales=[32]", "trainer.accelerator=cpu", "data.num_workers=0"]


@pytest.fixture(scope="module")
def segformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SegFormer of random weights, as transformers writes it, with a card."""
    folder = save_network("segformer", tmp_path_factory.mktemp("hub") / "segformer", HALF)
    (folder / "README.md").write_bytes(CARD)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the hub; nothing else can be reached."""
    use_hub(monkeypatch, tmp_path / "cache", "http://127.0.0.1:9", is_offline=True)
    hub_module.report_origin.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def cached(hub: Path, segformer: Path) -> Path:
    """The cache with the SegFormer as owner/tiny; returns its folder there."""
    return add_to_cache(hub, NAME, {path.name: path.read_bytes() for path in segformer.iterdir()})


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8))
    return path


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change config.json, which may be a link into the cache."""
    path = folder / "config.json"
    plain = json.loads(path.read_text())
    change(plain)
    path.unlink()
    path.write_text(json.dumps(plain))


def open_in_tests(spec: str, *words: str) -> Any:
    return find_network(spec, configured("mode=predict", f"ckpt={spec}", "input=x.png", *words), [])


def test_a_network_of_the_hub_is_what_the_library_says(cached: Path) -> None:
    import transformers

    saved = open_in_tests(f"hf:{NAME}")
    assert saved.origin == ORIGIN and saved.source == f"hf:{NAME}@{COMMIT}"
    assert saved.classes.names == NAMES and saved.convention.mean == (0.5, 0.5, 0.5)
    assert (saved.config.model.name, saved.config.model.revision) == (NAME, COMMIT)
    # Its labels were reduced in training: class 0 has the id 1 in files.
    assert (saved.config.data.num_classes, saved.config.data.first_id, saved.config.data.ignore) == (3, 1, [0])
    net = restore_network(saved)
    library = transformers.SegformerForSemanticSegmentation.from_pretrained(cached).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.allclose(net(image).main, library(image).logits, atol=1e-5)


def test_it_predicts_and_its_checkpoint_needs_neither_hub_nor_cache(
    cached: Path, photo: Path, tmp_path: Path, hub: Path
) -> None:
    printed = run_here(tmp_path, *PREDICT, CKPT, "predict.save=[ids]", "run_dir=a")
    assert f"weights: hf:{NAME} at {COMMIT[:12]}, licence: other (tiny-license)" in printed
    assert printed.count("licence") == 1
    assert f"hf:{NAME}@{COMMIT}: segformer, 3 classes" in printed
    ids = cv2.imread(str(tmp_path / "a" / "photo_ids.png"), cv2.IMREAD_UNCHANGED)
    assert ids.shape == (40, 56) and ids.min() >= 1 and ids.max() <= 3
    for output in ("net.ckpt", "net.safetensors"):
        run_here(tmp_path, "mode=convert", CKPT, f"output={output}")
    shutil.rmtree(hub)
    assert read_checkpoint(tmp_path / "net.ckpt").origin == ORIGIN
    for number, file in enumerate(("net.ckpt", "net.safetensors")):
        printed = run_here(tmp_path, *PREDICT, f"ckpt={file}", "predict.save=[ids]", f"run_dir=b{number}")
        assert f"{file} was trained from: {ORIGIN}" in printed
        again = cv2.imread(str(tmp_path / f"b{number}" / "photo_ids.png"), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(again, ids)
    predictor = semseg.load(tmp_path / "net.ckpt", "predict.scales=[32]", device="cpu")
    assert np.array_equal(predictor.predict(photo).ids + 1, ids)


def test_a_local_folder_is_used_as_it_is(segformer: Path, photo: Path) -> None:
    predictor = semseg.load(segformer, "predict.scales=[32]", device="cpu")
    assert predictor.source == str(segformer) and predictor.classes.names == NAMES
    assert predictor.predict(photo).ids.shape == (40, 56)


def test_a_run_starts_from_it_with_other_classes_and_keeps_its_licence(cached: Path, tmp_path: Path) -> None:
    data = [word for word in TINY if not word.startswith("model")]
    printed = run_here(tmp_path, *data, f"init_from=hf:{NAME}", "run_dir=a", "data.batch_size=2")
    assert "2 re-initialised (model.decode_head.classifier.weight, model.decode_head.classifier.bias)" in printed
    saved = read_checkpoint(tmp_path / "a" / "checkpoints" / "last.ckpt")
    assert saved.origin == ORIGIN and saved.config.model.revision == COMMIT
    assert saved.classes.num_classes == 11
    assert "other (tiny-license)" in (tmp_path / "a" / "report.html").read_text()
    shutil.rmtree(cached.parents[2])
    printed = run_here(tmp_path, "mode=eval", "ckpt=a", "trainer.accelerator=cpu", "data.num_workers=0", "run_dir=b")
    assert "mean IoU" in printed and f"was trained from: {ORIGIN}" in printed
    assert "other (tiny-license)" in (tmp_path / "b" / "report.html").read_text()


def test_mask_classification_starts_with_other_classes_too(hub: Path, tmp_path: Path) -> None:
    folder = save_network("mask2former", tmp_path / "net", HALF)
    saved = open_in_tests(str(folder))
    from semseg.checkpoints.initialise import initialise_from
    from semseg.checkpoints.network import build_network

    net = build_network(saved.config.model, 5)
    # Of 3 classes and none: the classifier, its bias, and the weights of the classes in the loss.
    assert len(initialise_from(net, saved).reinitialised) == 3


def test_a_name_of_the_zoo_is_a_name_of_the_hub(
    cached: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HUB_ZOO, "tiny", HubEntry("tiny", NAME, "mit"))
    assert open_in_tests("zoo:tiny").source == f"hf:{NAME}@{COMMIT}"


def test_it_can_be_fetched_ahead_and_other_files_cannot(cached: Path, tmp_path: Path) -> None:
    assert run_here(tmp_path, "mode=download", CKPT).splitlines()[-1] == str(cached)
    printed = run_here(tmp_path, "mode=download", "ckpt=net.ckpt", code=2)
    assert "ckpt=net.ckpt: there is nothing to download. Use zoo:<name> or hf:" in printed
    printed = run_here(
        tmp_path, "mode=download", "ckpt=zoo:upernet50", "download.offline=true", "download.cache=x", code=1
    )
    assert "encoder_epoch_30.pth: not in the cache" in printed


def test_data_of_other_classes_are_refused(cached: Path, photo: Path, tmp_path: Path) -> None:
    data = [word for word in TINY if word.startswith("data")]
    printed = run_here(tmp_path, "mode=eval", CKPT, *data, "trainer.accelerator=cpu", code=2)
    assert f"data=scenes has 11 classes, but hf:{NAME}@{COMMIT} was trained for 3" in printed
    printed = run_here(tmp_path, *PREDICT, CKPT, "model.convention=bgr_mean", code=2)
    assert "model.convention: the network comes from ckpt" in printed


def test_wrong_names_are_refused_in_one_line(hub: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be hf:<owner>/<name>.*Did you mean zoo:segformer_b0\?"):
        open_in_tests("hf:segformer-b0")
    with pytest.raises(SemsegError, match="is not in the cache"):
        open_in_tests("hf:nobody/nothing")


def as_classifier(plain: dict[str, Any]) -> None:
    plain["architectures"] = ["SegformerForImageClassification"]


def as_other_family(plain: dict[str, Any]) -> None:
    plain.update(model_type="vit", architectures=["ViTForImageClassification"])


def as_unknown_family(plain: dict[str, Any]) -> None:
    plain.update(model_type="detr", architectures=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_classifier, r"is a 'SegformerForImageClassification', not trained for semantic seg.*model=transformers"),
        (as_other_family, r"is a 'ViTForImageClassification', not trained for semantic segmentation\. Choose another"),
        (as_unknown_family, r"model_type is 'detr', which is not supported\. Supported: segformer"),
        (lambda plain: plain.update(depths=[1, 1, 1, 2]), r"lacks \d+ weights of its network"),
        (lambda plain: plain.update(decoder_hidden_size=32), r"do not fit its own config\.json"),
        (lambda plain: plain.update(auto_map={"AutoModel": "evil.Model"}, model_type="evil"), "is not supported"),
    ],
)
def test_a_network_that_is_not_trained_for_this_is_refused_in_one_line(
    cached: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    change_config(cached, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_in_tests(f"hf:{NAME}")
    assert "\n" not in str(caught.value) and str(caught.value).startswith((f"hf:{NAME}@{COMMIT}", NAME))


def test_a_damaged_file_is_refused_in_one_line(cached: Path) -> None:
    path = cached / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:1000])
    with pytest.raises(CheckpointError, match="its weights cannot be loaded"):
        open_in_tests(f"hf:{NAME}")


def test_without_the_library_its_installation_is_named(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install .*\[transformers\]"):
        open_in_tests(f"hf:{NAME}")


def test_names_of_a_known_data_set_bring_its_colours_and_ids() -> None:
    ade20k = built_in_classes("ade20k")
    spelt = [f"{name.upper()} , other" for name in ade20k.names]
    spelt[7] = "something else"
    assert choose_class_table(spelt) == ("ade20k", ade20k)
    assert choose_class_table(built_in_classes("cityscapes").names)[0] == "cityscapes"
    assert choose_class_table(["a", "b"])[0] is None


def test_a_network_of_cityscapes_brings_that_data_set(cached: Path) -> None:
    from semseg.checkpoints import from_hub

    given: Config = configured("mode=predict", CKPT, "input=x.png")
    network = type("Network", (), {"class_names": built_in_classes("cityscapes").names})
    data = from_hub.choose_data(network, "cityscapes", given.data)  # pyright: ignore[reportArgumentType]
    assert (data.name, data.first_id) == ("cityscapes", 0)
    own = replace(given.data, root="elsewhere")
    assert from_hub.choose_data(network, "ade20k", own) is own  # pyright: ignore[reportArgumentType]
