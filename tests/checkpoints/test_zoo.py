from __future__ import annotations

import re

import pytest

from semseg.checkpoints.zoo import (
    HUB_SCORES,
    MODEL_SCORES,
    PUBLISHED_SCORES,
    ZOO,
    find_zoo_network,
    release_of_folder,
)
from semseg.config.groups import CONFIG_DIR
from semseg.errors import CheckpointError
from semseg.storage.hub import parse_hub_name
from semseg.storage.hub_list import HUB_LICENCES, HUB_ZOO, HubEntry


def test_a_name_means_two_files_of_one_folder_on_the_server() -> None:
    assert ZOO["hrnetv2_c1"].urls() == (
        "http://sceneparsing.csail.mit.edu/model/pytorch/ade20k-hrnetv2-c1/encoder_epoch_30.pth",
        "http://sceneparsing.csail.mit.edu/model/pytorch/ade20k-hrnetv2-c1/decoder_epoch_30.pth",
    )


def test_the_name_of_the_folder_on_the_server_will_do() -> None:
    assert find_zoo_network("zoo:ade20k-resnet101-upernet") is find_zoo_network("zoo:upernet101") is ZOO["upernet101"]
    oldest = find_zoo_network("zoo:baseline-resnet50_dilated8-ppm_bilinear_deepsup")
    assert not isinstance(oldest, HubEntry) and oldest.release.year == 2018


def test_networks_of_the_hub_have_short_names_too() -> None:
    entry = find_zoo_network("zoo:segformer_b0")
    assert entry is find_zoo_network("zoo:nvidia/segformer-b0-finetuned-ade-512-512") is HUB_ZOO["segformer_b0"]
    assert not set(HUB_ZOO) & set(ZOO)
    assert len(HUB_LICENCES) == len(HUB_ZOO), "no network is listed twice"
    for entry in HUB_ZOO.values():
        assert parse_hub_name(entry.hub_name).name == entry.hub_name and entry.licence


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(CheckpointError, match=r"Did you mean zoo:upernet50\? Valid: .*hrnetv2_c1"):
        find_zoo_network("zoo:upernet5")
    with pytest.raises(CheckpointError, match=r"Did you mean zoo:segformer_b3\?"):
        find_zoo_network("zoo:segformer-b3")


@pytest.mark.parametrize("network", ZOO.values(), ids=lambda network: network.name)
def test_release_and_input_convention_follow_the_folder(network: tuple) -> None:
    assert release_of_folder(network.folder) is network.release
    assert network.release.convention == {2018: "bgr_mean", 2020: "rgb_mean_std"}[network.release.year]


def test_every_published_network_has_a_configuration_of_its_name() -> None:
    names = {path.stem for path in (CONFIG_DIR / "model").glob("*.yaml")}
    assert {name.replace("_bilinear", "") for name in ZOO} <= names
    # A score of a network that is not listed would be shown nowhere.
    assert set(MODEL_SCORES) <= names
    assert set(HUB_SCORES) <= set(HUB_ZOO)


def test_a_score_has_a_source_with_a_letter_of_its_own() -> None:
    sources = {score.source for score in [*MODEL_SCORES.values(), *HUB_SCORES.values()]}
    assert len({source.mark for source in sources}) == len(sources)


def test_the_published_scores_are_those_of_the_documents() -> None:
    readme = (CONFIG_DIR.parent / "README.md").read_text()
    for name, (one, five) in PUBLISHED_SCORES.items():
        row = rf"\| `{name}`.* \| one \| {one.mean_iou:.2f} \| {one.pixel_accuracy:.2f} \| .*\n"
        row += rf"\| \| five \| {five.mean_iou:.2f} \| {five.pixel_accuracy:.2f} \|"
        assert re.search(row, readme), name
        recipe = (CONFIG_DIR / "experiment" / f"published_{name}.yaml").read_text()
        one_scale = f"one scale {one.mean_iou:.2f} mean IoU, {one.pixel_accuracy:.2f} pixel accuracy"
        assert f"{one_scale}; five scales {five.mean_iou:.2f}, {five.pixel_accuracy:.2f}." in recipe, name
