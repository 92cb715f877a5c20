"""Networks of every family for images of other bands: what their first layers are, and that they start as for RGB."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.transformers_networks import NUM_CLASSES, save_network
from semseg.checkpoints.format import SavedNetwork
from semseg.checkpoints.initialise import initialise_from
from semseg.checkpoints.network import build_network
from semseg.config.preprocessing import PREPROCESSING, RGB, BandRange
from semseg.config.schema import Config, ModelConfig
from semseg.data.bands import BandFile, BandOptions
from semseg.data.classes import ClassTable
from semseg.errors import CheckpointError, ConfigError
from semseg.nets.bands import check_bands, choose_reading, find_first_layers, repeat_weights

SIX = ("red", "green", "blue", "nir", "swir", "height")
NETWORKS = {
    "resnet18": ModelConfig(encoder={"name": "resnet18"}, decoder={"name": "c1"}),
    "mobilenetv2": ModelConfig(encoder={"name": "mobilenetv2"}, decoder={"name": "c1"}),
    "torchvision": ModelConfig(encoder={"name": "convnext_tiny", "library": "torchvision"}, decoder={"name": "c1"}),
    "timm": ModelConfig(encoder={"name": "test_vit", "library": "timm"}, decoder={"name": "linear"}),
    "smp": ModelConfig(library="smp", arch="unet", encoder={"name": "resnet18"}),
    "smp_several": ModelConfig(library="smp", arch="unet", encoder={"name": "mobileone_s0"}),
}


def options(names: tuple[str, ...], high: float = 200.0) -> BandOptions:
    return BandOptions((BandFile("", names),), names, (BandRange(0, high),) * len(names))


def compare_with_rgb(model: ModelConfig) -> None:
    """An image of twice the same three bands has the logits of the three bands: repeated and halved weights."""
    nets = []
    for bands in (None, options(SIX)):
        torch.manual_seed(0)
        nets.append(build_network(model, NUM_CLASSES, bands=bands).eval().double())  # sums in another order
    rgb, six = nets
    assert {name for name, value in rgb.state_dict().items() if value.shape != six.state_dict()[name].shape} == {
        f"{name}.weight" for name, layer in six.named_modules() if getattr(layer, "in_channels", 0) == 6
        and layer in list(six.modules()) and layer.weight.shape[1] == 6
        and rgb.get_submodule(name).weight.shape[1] == 3
    }  # fmt: skip
    image = torch.randn(1, 3, 2 * rgb.size_divisor, 2 * rgb.size_divisor, dtype=torch.float64)
    with torch.no_grad():
        expected, found = rgb(image).main, six(torch.cat([image, image], 1)).main
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()) + 1e-6)
    six.train()
    six(torch.randn(2, 6, *image.shape[2:], dtype=torch.float64)).main.sum().backward()
    assert all(layer.weight.grad is not None for layer in six.modules() if getattr(layer, "in_channels", 0) == 6
               and getattr(layer, "groups", 1) == 1 and hasattr(layer, "weight"))  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        name if name == "resnet18" else pytest.param(name, marks=pytest.mark.long if "_" in name else pytest.mark.slow)
        for name in NETWORKS
    ],
)
def test_every_family_has_first_layers_of_repeated_and_rescaled_weights(name: str) -> None:
    compare_with_rgb(NETWORKS[name])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["segformer", "upernet", "dpt", "mask2former"])
def test_networks_of_transformers_take_other_bands(family: str, tmp_path: Path) -> None:
    folder = save_network(family, tmp_path / family)
    compare_with_rgb(ModelConfig(library="transformers", name=str(folder), encoder={"weights": "hub"}))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["segformer", "mask2former", "eomt"])
def test_what_an_exporter_sees_takes_the_bands_of_the_network(family: str, tmp_path: Path) -> None:
    folder = save_network(family, tmp_path / family)
    model = ModelConfig(library="transformers", name=str(folder), encoder={"weights": "hub"})
    net = build_network(model, NUM_CLASSES, bands=options(SIX)).eval()
    image = torch.randn(1, 6, *(net.image_size or (2 * net.size_divisor, 2 * net.size_divisor)))
    with torch.no_grad(), net.as_graph():
        found = net(image).main
    with torch.no_grad():
        assert torch.allclose(found, net(image).main, atol=1e-4)


@pytest.mark.slow
def test_a_squeeze_to_three_channels_in_a_decoder_does_not_read_the_image() -> None:
    model = ModelConfig(library="smp", arch="manet", encoder={"name": "efficientnet-b3"})
    plain = build_network(model, 3)
    assert [layer.out_channels for layer in find_first_layers(plain)] == [40]
    assert sum(getattr(layer, "in_channels", 0) == 3 for layer in plain.modules()) > 1  # those of its attention
    net = build_network(model, 3, bands=options(SIX)).eval()
    side = net.size_divisor
    with torch.no_grad():
        assert net(torch.zeros(1, 6, side, side)).main.shape == (1, 3, side, side)


def test_a_colour_keeps_its_weights_wherever_it_stands() -> None:
    weight = torch.arange(12.0).view(4, 3, 1, 1)
    found = repeat_weights(weight, ["nir", "blue", "red"])
    assert torch.equal(found[:, 1], weight[:, 2]) and torch.equal(found[:, 2], weight[:, 0])
    assert torch.equal(repeat_weights(weight, ["blue", "green", "red"], "bgr"), weight)
    assert torch.equal(repeat_weights(weight, ["grey"]), weight.sum(1, keepdim=True))


def test_for_red_green_and_blue_nothing_changes() -> None:
    torch.manual_seed(0)
    plain = build_network(NETWORKS["resnet18"], 3)
    torch.manual_seed(0)
    deep = build_network(NETWORKS["resnet18"], 3, bands=options(RGB, 4000.0))
    assert all(torch.equal(value, deep.state_dict()[name]) for name, value in plain.state_dict().items())
    assert deep.convention.ranges[0] == (0, 4000) and deep.convention.mean == plain.convention.mean
    assert len(find_first_layers(plain)) == 1


def saved(model: ModelConfig, bands: BandOptions | None) -> SavedNetwork:
    net, classes = build_network(model, 3, bands=bands), ClassTable.from_names(["a", "b", "c"])
    return SavedNetwork("a.ckpt", net.state_dict(), Config(model=model), classes, net.convention)


def test_a_run_of_other_bands_starts_from_a_network_for_rgb_or_for_the_same_bands() -> None:
    model, four = NETWORKS["resnet18"], options(("red", "green", "blue", "nir"))
    rgb = saved(model, None)
    net = build_network(model, 3, bands=four)
    initialise_from(net, rgb)
    assert torch.equal(net.state_dict()["encoder.conv1.weight"][:, 3], 0.75 * rgb.weights["encoder.conv1.weight"][:, 0])
    initialise_from(net, saved(model, four))
    with pytest.raises(CheckpointError, match=r"takes the bands vv, vh, and data\.bands are red, green, blue, nir"):
        initialise_from(net, saved(model, options(("vv", "vh"))))


def test_images_of_other_bands_than_those_of_the_network_are_refused() -> None:
    four = options(("red", "green", "blue", "nir"))
    convention = build_network(NETWORKS["resnet18"], 3, bands=four).convention
    check_bands(convention, four)
    with pytest.warns(UserWarning, match=r"data\.value_range=\[0,9\] is not used: .* of its training, \[0,200\]"):
        check_bands(convention, options(("red", "green", "blue", "nir"), high=9))
    with pytest.raises(ConfigError, match=r"takes the bands \[red,green,blue,nir\].* data\.value_range=\[0,200\]"):
        check_bands(convention, None)
    with pytest.raises(ConfigError, match=r"data\.bands=\[red,green,blue,nir\]: the network takes the bands \[red,gre"):
        check_bands(PREPROCESSING["rgb_mean_std"], four)
    assert choose_reading(PREPROCESSING["rgb_mean_std"], Config().data) is None
    reading = choose_reading(convention, Config().data)
    assert reading is not None and reading.names == four.names and reading.ranges == four.ranges
