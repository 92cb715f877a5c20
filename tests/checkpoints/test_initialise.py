from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from safetensors.torch import save_file
from torch import Tensor

from helpers.in_process import configured
from helpers.published_files import served, with_bookkeeping, without_counters
from semseg.checkpoints.format import SavedNetwork, load_weights, write_ckpt, write_safetensors
from semseg.checkpoints.initialise import initialise_from, load_encoder_weights
from semseg.checkpoints.network import build_network, fetch_imagenet_weights
from semseg.config.preprocessing import PREPROCESSING, RGB, BandRange, Preprocessing
from semseg.config.schema import DownloadConfig, ModelConfig
from semseg.data.bands import BandFile, BandOptions
from semseg.data.classes import ClassTable
from semseg.data.images import read_image
from semseg.data.sources import DataSource
from semseg.errors import CheckpointError, ConfigError
from semseg.nets.bands import band_convention, inherit_convention
from semseg.nets.interfaces import Encoder
from semseg.nets.normalise import normalise
from semseg.nets.registry import build_encoder, build_segmenter
from semseg.nets.segmenter import Segmenter


def imagenet_file(path: Path, encoder: Encoder) -> dict[str, Tensor]:
    """Write `encoder` with a classifier, as the ImageNet files of the releases are."""
    state = without_counters(encoder.state_dict())
    torch.save(with_bookkeeping(state, 3) | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, path)
    return state


def assert_same(encoder: Encoder, weights: dict[str, Tensor]) -> None:
    state = encoder.state_dict()
    assert weights and all(torch.equal(state[name], value) for name, value in weights.items())


def test_an_imagenet_file_fills_the_encoder_without_its_classifier(tmp_path: Path) -> None:
    weights = imagenet_file(tmp_path / "resnet18.pth", build_encoder("resnet18"))
    encoder = build_encoder("resnet18_dilated8")
    load_encoder_weights(encoder, tmp_path / "resnet18.pth")
    assert_same(encoder, weights)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "wrapped", "state_dict", "half"])
def test_weights_are_found_in_whatever_they_are_wrapped(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    source = build_encoder("resnet18")
    weights = source.state_dict()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file(weights, path)
    if kind == "wrapped":
        torch.save({f"module.{name}": value for name, value in weights.items()}, path)
    if kind == "state_dict":
        torch.save({"state_dict": weights, "arch": "resnet18"}, path)
    if kind == "half":
        weights = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
        torch.save(weights, path)
    encoder = build_encoder("resnet18")
    load_encoder_weights(encoder, path)
    assert all(value.dtype != torch.float16 for value in encoder.state_dict().values())
    assert_same(encoder, {name: value.float() for name, value in weights.items() if value.is_floating_point()})


NIR = ("red", "green", "blue", "nir")
SMALL_MODEL = ["model/encoder=resnet18", "model/decoder=c1"]


def reading(names: Sequence[str]) -> BandOptions:
    return BandOptions((BandFile("", tuple(names)),), tuple(names), (BandRange(0, 3000),) * len(names), dtype="uint16")


def write_trained(path: Path, convention: Preprocessing, bands: BandOptions | None = None) -> SavedNetwork:
    """Write a checkpoint whose network was trained with this preprocessing."""
    config = configured("data=scenes", "model.encoder.weights=none", *SMALL_MODEL)
    classes = DataSource(config.data).classes
    net = build_network(config.model, classes.num_classes, bands=bands)
    saved = SavedNetwork("", net.state_dict(), config, classes, convention)
    write_ckpt(path, saved)
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_the_encoder_of_a_checkpoint_keeps_its_preprocessing(tmp_path: Path, suffix: str) -> None:
    saved, path = write_trained(tmp_path / "a.ckpt", PREPROCESSING["bgr_mean"]), tmp_path / f"a.{suffix}"
    if suffix == "safetensors":
        write_safetensors(path, saved)
    words = [*SMALL_MODEL, f"model.encoder.weights={path}"]
    assert build_network(configured(*words).model, 3).convention == PREPROCESSING["bgr_mean"]
    given = configured(*words, "model.convention=rgb_mean_std").model
    assert build_network(given, 3).convention == PREPROCESSING["rgb_mean_std"]
    of_bands = build_network(configured(*words).model, 3, bands=reading(NIR))
    assert of_bands.convention == band_convention(PREPROCESSING["bgr_mean"], reading(NIR))
    own = saved.weights["encoder.conv1.weight"]
    assert torch.allclose(of_bands.state_dict()["encoder.conv1.weight"][:, :3], 0.75 * own.flip(1))


@pytest.mark.slow
def test_the_encoder_of_a_checkpoint_for_other_bands_is_loaded_for_these_bands_only(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    convention = band_convention(PREPROCESSING["rgb_mean_std"], reading(NIR))._replace(mean=(0.1, 0.2, 0.3, 0.4))
    saved = write_trained(path, convention, reading(NIR))
    model = configured(*SMALL_MODEL, f"model.encoder.weights={path}").model
    net = build_network(model, 3, bands=reading(NIR))
    assert net.convention == convention
    assert torch.equal(net.state_dict()["encoder.conv1.weight"], saved.weights["encoder.conv1.weight"])
    for bands in (None, reading(("red", "green", "swir"))):
        with pytest.raises(CheckpointError, match=r"the bands red, green, blue, nir, and data\.bands are red, green"):
            build_network(model, 3, bands=bands)


@pytest.mark.parametrize("names", [NIR, ("nir", "red", "green")])
def test_weights_for_colours_of_16_bits_are_adapted_to_other_bands(names: tuple[str, ...]) -> None:
    colours = band_convention(PREPROCESSING["rgb_mean_std"], reading(RGB))
    assert colours.ranges and not colours.takes_pictures
    expected = band_convention(PREPROCESSING["rgb_mean_std"], reading(names))
    assert inherit_convention(colours, reading(names)) == expected and len(expected.mean) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "convention"), [("baseline-x", "bgr_mean"), ("ade20k-x", "rgb_mean_std")])
def test_an_encoder_of_the_releases_has_the_preprocessing_of_its_year(
    tmp_path: Path, folder: str, convention: str
) -> None:
    path = tmp_path / folder / "encoder_epoch_20.pth"
    path.parent.mkdir()
    torch.save(build_encoder("resnet18").state_dict(), path)
    model = configured(*SMALL_MODEL, f"model.encoder.weights={path}").model
    assert build_network(model, 3).convention == PREPROCESSING[convention]


def test_a_file_of_another_encoder_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "resnet50.pth"
    imagenet_file(path, build_encoder("resnet50"))
    encoder = build_encoder("resnet18")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_encoder_weights(encoder, path)
    message = str(caught.value)
    assert message.startswith(f"{path}: does not fit model.encoder: ")
    assert "unexpected (layer1.0.conv3.weight" in message
    assert "of another shape (layer1.0.conv1.weight (64, 128, 1, 1) instead of (64, 128, 3, 3)" in message
    assert_same(encoder, before)


def test_a_file_without_weights_is_reported(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "notes.pth")
    with pytest.raises(CheckpointError, match=r"notes\.pth: contains no weights \(it contains epoch"):
        load_encoder_weights(build_encoder("resnet18"), tmp_path / "notes.pth")


def test_imagenet_weights_need_an_encoder_that_has_some() -> None:
    encoder = build_encoder("resnet18")
    encoder.weights_file = None
    with pytest.raises(ConfigError, match=r"model\.encoder\.weights=imagenet: none are known for resnet18"):
        fetch_imagenet_weights(encoder, "resnet18", DownloadConfig())


@pytest.mark.slow
def test_imagenet_weights_are_downloaded_once(tmp_path: Path) -> None:
    (tmp_path / "pretrained_resnet").mkdir()
    weights = imagenet_file(tmp_path / "pretrained_resnet" / "resnet18-imagenet.pth", build_encoder("resnet18"))
    model = ModelConfig(encoder={"name": "resnet18", "weights": "imagenet"}, decoder={"name": "c1"})
    with served(tmp_path) as server:
        mirrors = {"http://sceneparsing.csail.mit.edu/model/": [f"{server}/"]}
        config = DownloadConfig(cache=str(tmp_path / "cache"), mirrors=mirrors, retries=0)
        assert_same(build_network(model, 2, config).encoder, weights)
    assert_same(build_network(model, 2, config).encoder, weights)  # the server is gone


@pytest.mark.shared
def test_real_imagenet_weights_tell_what_photographs_show(shared: Path) -> None:
    """The encoder with the rest of its published network on top: classes as ImageNet numbers them."""
    path = shared / "weights" / "mobilenet_v2-imagenet.pth"
    encoder = build_encoder("mobilenetv2").eval()
    load_encoder_weights(encoder, path)
    weights = {name: value.float() for name, value in load_weights(path).items()}
    top = torchvision.models.mobilenet_v2().eval()
    top.load_state_dict(weights)
    image = read_image(next((shared / "ade20k_samples").rglob("ADE_val_00000002.jpg")))
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    pixels = TF.center_crop(TF.resize(pixels, [256], antialias=True), [224, 224])
    with torch.no_grad():
        deepest = encoder(normalise(pixels[None], encoder.convention))[-1]
        scores = top.classifier(top.features[-1](deepest).mean((2, 3))).softmax(1)[0]
    bell_cote, church = 442, 497
    assert int(scores.argmax()) == bell_cote and float(scores.max()) > 0.5
    assert church in scores.topk(3).indices.tolist()


def saved(encoder: str, decoder: str, num_classes: int, options: dict | None = None) -> SavedNetwork:
    """A random network as a checkpoint holds it."""
    torch.manual_seed(2)
    net = build_segmenter(encoder, decoder, num_classes, decoder_options=options)
    config = configured(f"model/encoder={encoder}", f"model/decoder={decoder}")
    return SavedNetwork(
        source="old.ckpt",
        weights={name: value.clone() for name, value in net.state_dict().items()},
        config=config,
        classes=ClassTable.from_names([str(index) for index in range(num_classes)]),
        convention=PREPROCESSING["bgr_mean"],
    )


def fresh(encoder: str, decoder: str, num_classes: int) -> Segmenter:
    torch.manual_seed(3)
    return build_segmenter(encoder, decoder, num_classes)


def test_the_same_network_is_loaded_whole() -> None:
    start, net = saved("resnet18", "c1", 4), fresh("resnet18", "c1", 4)
    report = initialise_from(net, start)
    assert all(torch.equal(value, start.weights[name]) for name, value in net.state_dict().items())
    assert (len(report.loaded), *report[1:]) == (len(start.weights), [], [], [])


def test_classifiers_for_other_classes_keep_their_fresh_weights() -> None:
    start, net = saved("resnet18", "c1_deepsup", 150), fresh("resnet18", "c1_deepsup", 4)
    classifier = net.decoder.conv_last.weight.clone()
    report = initialise_from(net, start)
    assert report.reinitialised == [
        "decoder.conv_last.weight", "decoder.conv_last.bias",
        "decoder.conv_last_deepsup.weight", "decoder.conv_last_deepsup.bias",
    ]  # fmt: skip
    assert torch.equal(net.decoder.conv_last.weight, classifier)
    assert torch.equal(net.decoder.cbr[0].weight, start.weights["decoder.cbr.0.weight"])


@pytest.mark.slow
def test_an_auxiliary_head_may_come_or_go() -> None:
    head = {"decoder.cbr_deepsup.0.weight", "decoder.conv_last_deepsup.bias"}
    without = initialise_from(fresh("resnet18", "c1", 4), saved("resnet18", "c1_deepsup", 4))
    assert head <= set(without.skipped) and without.missing == []
    added = initialise_from(fresh("resnet18", "c1_deepsup", 4), saved("resnet18", "c1", 4))
    assert head <= set(added.missing) and added.skipped == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "decoder", "expected"),
    [
        ("resnet50", "c1", "unexpected (encoder.layer1.0.conv3.weight"),
        ("resnet18", "ppm", "missing (decoder.cbr.0.weight"),
    ],
)
def test_another_architecture_is_refused_and_nothing_changes(encoder: str, decoder: str, expected: str) -> None:
    net = fresh("resnet18", "c1", 4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        initialise_from(net, saved(encoder, decoder, 4))
    assert expected in str(caught.value)
    assert f"The file holds {encoder} + {decoder}" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_table_lists_what_was_not_loaded() -> None:
    report = initialise_from(fresh("resnet18", "c1_deepsup", 4), saved("resnet18", "c1", 4))
    table = report.make_table("old.ckpt")
    cells = {name: list(column.cells) for name, column in zip(("kind", "count", "names"), table.columns, strict=True)}
    assert cells["kind"] == ["loaded", "skipped", "re-initialised", "missing"]
    assert cells["names"][0] == "" and "decoder.cbr_deepsup.0.weight" in cells["names"][3]
