from __future__ import annotations

import pytest

from semseg.checkpoints.zoo import ZOO, find_published_network, release_of_folder
from semseg.config.groups import CONFIG_DIR
from semseg.errors import CheckpointError


def test_a_name_means_two_files_of_one_folder_on_the_server() -> None:
    assert find_published_network("zoo:hrnetv2_c1").urls() == (
        "http://sceneparsing.csail.mit.edu/model/pytorch/ade20k-hrnetv2-c1/encoder_epoch_30.pth",
        "http://sceneparsing.csail.mit.edu/model/pytorch/ade20k-hrnetv2-c1/decoder_epoch_30.pth",
    )


def test_the_name_of_the_folder_on_the_server_will_do() -> None:
    assert find_published_network("zoo:ade20k-resnet101-upernet") is find_published_network("zoo:upernet101")
    assert find_published_network("zoo:baseline-resnet50_dilated8-ppm_bilinear_deepsup").release.year == 2018


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(CheckpointError, match=r"Did you mean zoo:upernet50\? Valid: .*hrnetv2_c1"):
        find_published_network("zoo:upernet5")


@pytest.mark.parametrize("network", ZOO.values(), ids=lambda network: network.name)
def test_release_and_input_convention_follow_the_folder(network: tuple) -> None:
    assert release_of_folder(network.folder) is network.release
    assert network.release.convention == {2018: "bgr_mean", 2020: "rgb_mean_std"}[network.release.year]


def test_every_published_network_has_a_configuration_of_its_name() -> None:
    names = {path.stem for path in (CONFIG_DIR / "model").glob("*.yaml")}
    assert {name.replace("_bilinear", "") for name in ZOO} <= names
