from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.in_process import configured
from helpers.published_files import served, write_files
from helpers.reference import golden
from semseg.build import find_network, restore_network
from semseg.checkpoints.format import load_weights
from semseg.checkpoints.initialise import drop_old_buffers
from semseg.checkpoints.published import (
    PublishedFiles,
    find_matching_layout,
    find_published_files,
    identify_decoder,
    identify_encoder,
    read_published,
)
from semseg.config.preprocessing import PREPROCESSING
from semseg.config.schema import Config, DownloadConfig
from semseg.errors import CheckpointError, DownloadError
from semseg.nets.registry import resolve_network

LAYOUTS = golden("nets_layouts.json")["layouts"]
TWO_CLASSES = ("resnet18_dilated8", "c1_deepsup", 2)


def config(*words: str) -> Config:
    return configured("mode=eval", "ckpt=x", *words)


def read(folder: Path, *words: str):
    return find_network(str(folder), config(*words), list(words))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        (layout.partition("/")[2], other.split("/")[1])
        for layout in LAYOUTS if layout.startswith("encoder/")
        for other in LAYOUTS
        if other.startswith("decoder/") and int(other.split("/")[2]) == {
            "resnet18": 512, "mobilenetv2dilated": 320, "hrnetv2": 720
        }.get(layout.partition("/")[2], 2048)
    ],
)  # fmt: skip
def test_every_published_layout_is_recognised(encoder: str, decoder: str) -> None:
    width = {"resnet18": 512, "mobilenetv2dilated": 320, "hrnetv2": 720}.get(encoder, 2048)
    meta = torch.device("meta")
    body = {key: torch.empty(shape, device=meta) for key, shape in LAYOUTS[f"encoder/{encoder}"]}
    head = {key: torch.empty(shape, device=meta) for key, shape in LAYOUTS[f"decoder/{decoder}/{width}"]}
    expected_encoder = resolve_network("encoder", encoder).name
    assert identify_encoder(Path("x"), body) == expected_encoder
    found, expected = identify_decoder(Path("x"), head, expected_encoder, 150), resolve_network("decoder", decoder)
    assert found.name == expected.name
    assert found.options == ({"width": 512} if decoder == "upernet" else dict(expected.options))


@pytest.mark.slow
@pytest.mark.parametrize(("bookkeeping", "counters"), [(0, False), (2, False), (3, False), (3, True)])
def test_files_of_every_age_give_the_same_network(tmp_path: Path, bookkeeping: int, counters: bool) -> None:
    encoder, decoder = write_files(tmp_path, *TWO_CLASSES, bookkeeping=bookkeeping, counters=counters)
    net = restore_network(read(tmp_path))
    for part, original in ((net.encoder, encoder), (net.decoder, decoder)):
        state = part.state_dict()
        assert all(torch.equal(state[name], value) for name, value in original.state_dict().items())
    assert net.num_classes == 2 and net.label_stride == 8


def test_the_last_epoch_with_both_files_is_taken(tmp_path: Path) -> None:
    for epoch in (3, 20):
        write_files(tmp_path, *TWO_CLASSES, epoch=epoch)
    (tmp_path / "encoder_epoch_30.pth").write_bytes(b"")
    files = find_published_files(str(tmp_path))
    assert files == PublishedFiles(tmp_path / "encoder_epoch_20.pth", tmp_path / "decoder_epoch_20.pth")
    assert files.epoch == 20
    assert find_published_files(f"{files.encoder},{files.decoder}") == files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "convention", "reason"),
    [
        ("baseline-resnet18_dilated8-c1_bilinear_deepsup", "bgr_mean", "2018 by the folder's name"),
        ("ade20k-resnet18dilated-c1_deepsup", "rgb_mean_std", "2020 by the folder's name"),
        ("mine", "rgb_mean_std", "2020 assumed"),
    ],
)
def test_the_release_follows_a_rule_that_is_reported(tmp_path: Path, folder: str, convention: str, reason: str) -> None:
    write_files(tmp_path / folder, *TWO_CLASSES)
    saved = read(tmp_path / folder)
    assert saved.convention == restore_network(saved).convention == PREPROCESSING[convention]
    assert reason in saved.note
    assert "resnet18 at output stride 8 + c1 with deep supervision, 2 classes" in saved.note
    assert "\n" not in saved.note


@pytest.mark.slow
def test_what_the_files_lack_can_be_overridden(tmp_path: Path) -> None:
    write_files(tmp_path, *TWO_CLASSES)
    saved = read(tmp_path, "++model.convention=bgr_mean", "model.encoder.output_stride=16")
    assert saved.convention == PREPROCESSING["bgr_mean"]
    assert restore_network(saved).encoder.strides == (4, 8, 16, 16)


@pytest.mark.slow
def test_upernet_sits_on_an_encoder_without_dilation(tmp_path: Path) -> None:
    write_files(tmp_path, "resnet18", "upernet_lite", 2)
    net = restore_network(read(tmp_path))
    assert (net.size_divisor, net.label_stride) == (32, 4)
    assert net.decoder.conv_last[1].in_channels == 256


@pytest.mark.slow
def test_the_classes_are_those_of_ade20k_if_there_are_150(tmp_path: Path) -> None:
    write_files(tmp_path, "resnet18_dilated8", "c1")
    assert read(tmp_path).classes.names[0] == "wall"
    write_files(tmp_path, "resnet18_dilated8", "c1", 3)
    assert read(tmp_path).classes.names == ("class 0", "class 1", "class 2")


@pytest.mark.slow
def test_another_architecture_is_refused_with_its_first_differences(tmp_path: Path) -> None:
    write_files(tmp_path, *TWO_CLASSES)
    path = tmp_path / "encoder_epoch_20.pth"
    weights = drop_old_buffers(load_weights(path))
    weights["layer5.0.conv1.weight"] = weights.pop("layer4.1.conv2.weight")
    torch.save(weights, path)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"{path}: matches no published architecture. The nearest is resnet18: 1 missing (layer4.1.conv2.weight); "
        "1 unexpected (layer5.0.conv1.weight)."
    )


def test_a_decoder_in_place_of_an_encoder_is_reported(tmp_path: Path) -> None:
    write_files(tmp_path, *TWO_CLASSES)
    (tmp_path / "encoder_epoch_20.pth").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        find_published_files(f"{tmp_path}/encoder_epoch_20.pth,{tmp_path}/decoder_epoch_20.pth")
    decoder = tmp_path / "decoder_epoch_20.pth"
    with pytest.raises(CheckpointError, match="matches no published architecture"):
        read_published(PublishedFiles(decoder, decoder), config(), [])


def test_a_shape_that_differs_is_a_difference() -> None:
    state = {"a": torch.empty(2, 3), "b": torch.empty(1), "c.num_batches_tracked": torch.empty(())}
    with pytest.raises(CheckpointError, match=r"1 of another shape \(a \(2, 4\) instead of \(2, 3\)\)"):
        find_matching_layout(Path("x"), {"a": torch.empty(2, 4), "b": torch.empty(1)}, {"net": state})
    assert find_matching_layout(Path("x"), {"a": torch.empty(2, 3), "b": torch.empty(1)}, {"net": state}) == "net"


@pytest.mark.slow
def test_a_network_of_the_zoo_is_downloaded(tmp_path: Path) -> None:
    write_files(tmp_path / "ade20k-resnet18dilated-ppm_deepsup", "resnet18_dilated8", "ppm_deepsup", 150)
    with served(tmp_path) as server:
        mirrors = {"http://sceneparsing.csail.mit.edu/model/pytorch": [server]}
        given = replace(config(), download=DownloadConfig(cache=str(tmp_path / "cache"), mirrors=mirrors, retries=0))
        saved = find_network("zoo:resnet18_dilated8_ppm_deepsup", given, [])
    assert "release of 2020 by the zoo" in saved.note
    assert (restore_network(saved).num_classes, saved.epoch) == (150, 20)


def test_an_unavailable_server_is_reported_with_the_manual_way(tmp_path: Path) -> None:
    given = replace(config(), download=DownloadConfig(cache=str(tmp_path), offline=True))
    with pytest.raises(DownloadError, match=r"encoder_epoch_30\.pth.*Download it by hand.*or give ckpt=<folder"):
        find_network("zoo:upernet50", given, [])
