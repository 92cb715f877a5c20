"""Every architecture of segmentation-models-pytorch: exact, at any size, trained, refused where it cannot work."""

from __future__ import annotations

import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from helpers.local_server import local_server
from semseg.checkpoints.network import build_network, fetch_imagenet_weights
from semseg.config.preprocessing import PREPROCESSING
from semseg.config.schema import DownloadConfig, ModelConfig, OptimConfig
from semseg.errors import CheckpointError, ConfigError, DownloadError, ExportError
from semseg.export.onnx import Deviation, write_onnx, write_torch_export
from semseg.nets.interfaces import Logits, SegmentationNetwork
from semseg.nets.libraries.smp import ARCHITECTURES, SmpNetwork, build_model, read_preprocessing
from semseg.nets.meta import build_on_meta
from semseg.training.losses import segmentation_loss
from semseg.training.optim import parameter_groups
from semseg.training.unused import freeze_unused, summarise_modules

# Small enough for a test. The encoder of DPT is a vision transformer, that of the others the smallest ResNet.
NARROW: dict[str, dict[str, Any]] = {
    "unet": {"decoder_channels": [32, 16, 8, 8, 8]},
    "unetplusplus": {"decoder_channels": [32, 16, 8, 8, 8]},
    "manet": {"decoder_channels": [32, 16, 8, 8, 8], "decoder_pab_channels": 16},
    "linknet": {},
    "fpn": {"decoder_pyramid_channels": 64, "decoder_segmentation_channels": 64},
    "pspnet": {"psp_out_channels": 32},
    "pan": {},
    "deeplabv3": {"decoder_channels": 16},
    "deeplabv3plus": {"decoder_channels": 16},
    "segformer": {"decoder_segmentation_channels": 32},
    "upernet": {"decoder_channels": 16},
    "dpt": {"decoder_intermediate_channels": [16, 16, 16, 16], "decoder_fusion_channels": 16},
}
STRIDES = {  # (size_divisor, label_stride, min_size)
    "unet": (32, 1, 1), "unetplusplus": (32, 1, 1), "manet": (32, 1, 1), "linknet": (32, 1, 1), "fpn": (32, 4, 1),
    "pspnet": (8, 8, 1), "pan": (16, 4, 128), "deeplabv3": (8, 8, 1), "deeplabv3plus": (16, 4, 1),
    "segformer": (32, 4, 1), "upernet": (32, 4, 1), "dpt": (32, 2, 1),
}  # fmt: skip
UNUSED = {
    "pspnet": ["model.encoder.layer3", "model.encoder.layer4"],
    "dpt": ["model.encoder.model.norm", "model.encoder.model.head"],
}


def mark_long_but(*short: str) -> list[Any]:
    """All architectures; those that are not `short` are left to `make test-long`."""
    return [pytest.param(arch, marks=pytest.mark.slow if arch in short else pytest.mark.long) for arch in ARCHITECTURES]


def encoder_of(arch: str) -> str:
    return "tu-vit_tiny_patch16_224" if arch == "dpt" else "resnet18"


def configure(arch: str = "unet", encoder: str = "", weights: str = "none", **options: Any) -> ModelConfig:
    keys = {"name": encoder or encoder_of(arch), "weights": weights}
    return ModelConfig(library="smp", arch=arch, encoder=keys, options=options or NARROW[arch])


@cache
def shared_network(arch: str) -> SegmentationNetwork:
    """A network of 5 classes. Tests leave its mode at eval; training steps change its statistics only."""
    torch.manual_seed(0)
    return build_network(configure(arch), 5).eval()


@cache
def shared_image() -> Tensor:
    return torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("arch", mark_long_but(*ARCHITECTURES))
def test_it_equals_smp_with_smps_own_state_dict(arch: str) -> None:
    net = shared_network(arch)
    arguments = {"dynamic_img_size": True} if arch == "dpt" else {}
    theirs = smp.create_model(arch, encoder_of(arch), None, classes=5, **NARROW[arch], **arguments).eval()
    theirs.load_state_dict(net.model.state_dict())  # strict
    assert list(theirs.state_dict()) == list(net.model.state_dict())
    logits, expected = net(shared_image()).main, theirs(shared_image())
    assert logits.shape[-2:] == tuple(length // net.label_stride for length in (128, 160))
    upsampled = F.interpolate(logits, size=(128, 160), mode="bilinear", align_corners=True)  # as smp does
    torch.testing.assert_close(upsampled if net.label_stride > 1 else logits, expected, rtol=0, atol=1e-5)
    if arch != "dpt" and net.label_stride > 1:  # smp's own switch
        plain = smp.create_model(arch, encoder_of(arch), None, classes=5, **NARROW[arch], upsampling=1).eval()
        plain.load_state_dict(net.model.state_dict())
        assert torch.equal(logits, plain(shared_image()))


@torch.no_grad()
@pytest.mark.parametrize("arch", mark_long_but("unet", "pan"))
def test_images_of_any_size_give_logits_at_the_announced_stride(arch: str) -> None:
    net = shared_network(arch)
    assert (net.size_divisor, net.label_stride, net.min_size) == STRIDES[arch]
    for size in ((1, 1), (65, 97), (130, 33)):
        logits = net(torch.randn(1, 3, *size)).main
        assert logits.shape == (1, 5, *(math.ceil(length / net.label_stride) for length in size))
        assert logits.isfinite().all()
    image = shared_image()[..., 1:, 1:]
    padded = net(F.pad(image, (0, 1, 0, 1))).main
    assert torch.equal(net(image).main, padded[..., : -(-127 // net.label_stride), : -(-159 // net.label_stride)])


@pytest.mark.parametrize("arch", mark_long_but("pspnet", "pan", "deeplabv3plus", "dpt"))
def test_one_small_image_trains_every_parameter_but_the_named_ones(arch: str) -> None:
    torch.manual_seed(0)
    net = build_network(configure(arch), 5).train()
    unused = freeze_unused(net, lambda logits, label: segmentation_loss(logits, label).total)
    assert summarise_modules(unused, net) == UNUSED.get(arch, [])
    net(torch.randn(1, 3, 32, 32)).main.square().mean().backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (name in unused), name
        assert parameter.grad is None or parameter.grad.isfinite().all()
    config = OptimConfig(lr=1.0, lr_encoder=0.1, layer_decay=0.5)
    groups = parameter_groups(net, config, unused.values())
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    assert len({group["name"].removesuffix("_no_decay") for group in groups}) > 4


@torch.no_grad()
@pytest.mark.parametrize("arch", mark_long_but("fpn"))
def test_bfloat16_changes_the_logits_little(arch: str) -> None:
    net = shared_network(arch)
    exact = net(shared_image()).main
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(shared_image()).main.float()
    assert float((rough - exact).abs().mean() / exact.std()) < 0.2


@pytest.mark.parametrize(
    ("arch", "encoder", "options", "message"),
    [
        ("unte", "resnet18", {}, "model.arch: 'unte' is not known. Did you mean unet?"),
        ("unet", "resnet19", {}, "model.encoder.name=resnet19: smp has no such encoder. Did you mean resnet1"),
        ("unet", "tu-resnet19", {}, "model.encoder.name=tu-resnet19: timm has no such network. Did you mean resnet18?"),
        ("unet", "", {}, "model.encoder.name must be set"),
        ("unet", "resnet18", {"decoder_chanels": [1]}, "Did you mean model.options.decoder_channels?"),
        ("linknet", "resnet18", {"decoder_channels": [8]}, "smp's linknet has no such option."),
        ("unet", "resnet18", {"decoder_channels": [64, 32]}, "must be a list of 5 whole numbers above 0, such as (256"),
        ("unet", "resnet18", {"decoder_channels": 64}, "must be a list of 5 whole numbers"),
        ("fpn", "resnet18", {"decoder_pyramid_channels": "wide"}, "must be a whole number above 0, such as 256"),
        ("fpn", "resnet18", {"decoder_dropout": 2.0}, "must be a number from 0 and below 1, such as 0.2"),
        ("fpn", "resnet18", {"decoder_merge_policy": "sum"}, "smp cannot build this network ("),
        ("fpn", "resnet18", {"encoder_depth": 3}, "model.options.encoder_depth: cannot be set here."),
        ("fpn", "resnet18", {"upsampling": 1}, "model.options.upsampling: cannot be set here."),
        ("fpn", "resnet18", {"aux_params": {"classes": 3}}, "It adds a classifier of whole images"),
        ("deeplabv3", "vgg11", {}, "model.encoder.name=vgg11: smp cannot dilate this encoder"),
        ("pan", "densenet121", {}, "smp cannot dilate this encoder"),
        ("deeplabv3", "resnet18", {"encoder_output_stride": 4}, "support output stride 8 or 16"),
        ("unetplusplus", "mit_b0", {}, "(UnetPlusPlus is not support encoder_name=mit_b0)"),
        ("unet", "tu-vit_tiny_patch16_224", {}, "smp cannot build this network (Unsupported model downsampling"),
        ("dpt", "resnet18", {}, "smp's DPT needs a vision transformer of timm"),
        pytest.param(
            "dpt", "tu-beit_base_patch16_224", {}, "takes images of one size, or has patches that are not 16 pixels",
            marks=pytest.mark.long,
        ),
    ],
)  # fmt: skip
def test_what_smp_would_swallow_or_cannot_build_is_one_sentence(
    arch: str, encoder: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught, torch.device("cpu" if arch == "dpt" else "meta"):
        build_network(ModelConfig(library="smp", arch=arch, encoder={"name": encoder}, options=options), 3)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_reach_smp() -> None:
    with torch.device("meta"):
        net = build_network(configure("deeplabv3", encoder_output_stride=16), 3)
        assert (net.size_divisor, net.label_stride) == (16, 16)
        assert build_network(configure("pan", encoder_output_stride=32), 3).min_size == 256
        assert build_network(configure("unet", decoder_channels=[8] * 5), 3).model.segmentation_head[0].in_channels == 8


def test_keys_of_other_networks_are_refused() -> None:
    encoder = {"name": "resnet18", "weights": "none"}
    for model, message in (
        (
            ModelConfig(library="smp", arch="unet", encoder=encoder, revision="main"),
            "model.revision=main: is for model=",
        ),
        (
            ModelConfig(library="smp", arch="unet", encoder={**encoder, "output_stride": 8}),
            "model.encoder.output_stride: is for encoders of ours. Options of smp's networks are model.options.<name>",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            build_network(model, 3)
        assert message in str(caught.value)
    with_decoder = ModelConfig(library="smp", arch="unet", encoder=encoder, decoder={"name": "ppm"})
    assert "is a whole network, without model.decoder" in next(iter(with_decoder.find_problems()))


# ---- weights


def test_weights_of_a_file_fill_the_encoder(tmp_path: Path) -> None:
    published = smp.encoders.get_encoder("resnet18").state_dict() | {
        "fc.weight": torch.zeros(2),
        "fc.bias": torch.zeros(2),
    }
    torch.save(published, tmp_path / "model.pth")
    net = build_network(configure("fpn", weights=str(tmp_path / "model.pth")), 3)
    assert torch.equal(net.model.encoder.layer1[0].conv1.weight, published["layer1.0.conv1.weight"])
    assert net.convention == PREPROCESSING["rgb_mean_std"]
    whole = {f"net.model.encoder.{name}": value for name, value in net.model.encoder.state_dict().items()}
    torch.save({"state_dict": whole | {"net.model.decoder.x": torch.zeros(1)}}, tmp_path / "last.ckpt")
    assert build_network(configure("unet", weights=str(tmp_path / "last.ckpt")), 3).arch == "unet"
    torch.save(dict(list(published.items())[3:]), tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match=r"does not fit model\.encoder: 3 missing"):
        build_network(configure("unet", weights=str(tmp_path / "half.pth")), 3)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "encoder"), [("fpn", "tu-resnet18"), ("dpt", "tu-vit_tiny_patch16_224")])
def test_weights_of_timm_fill_an_encoder_of_timm(tmp_path: Path, arch: str, encoder: str) -> None:
    published = timm.create_model(encoder.removeprefix("tu-")).state_dict()
    torch.save(published, tmp_path / "model.pth")
    net = build_network(configure(arch, encoder, str(tmp_path / "model.pth")), 3)
    own = {name.removeprefix("model."): value for name, value in net.backbone.state_dict().items()}
    assert all(torch.equal(own[name], value) for name, value in published.items() if name in own and "pos" not in name)
    if arch == "fpn":
        torch.save(dict(list(published.items())[3:]), tmp_path / "half.pth")
        with pytest.raises(CheckpointError, match=r"half\.pth"):
            build_network(configure(arch, encoder, str(tmp_path / "half.pth")), 3)


def test_imagenet_weights_and_preprocessing_come_from_the_revision_that_smp_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = smp.encoders.encoders["resnet18"]["pretrained_settings"]["imagenet"]
    with torch.device("meta"):
        net = build_network(configure(), 3)
    assert isinstance(net, SmpNetwork) and net.weights_file is not None
    assert f"{settings['repo_id']}/resolve/{settings['revision']}/model.safetensors" in net.weights_file.url
    path = f"/{settings['repo_id']}/resolve/{settings['revision']}"
    described = {"mean": [103.0, 116.0, 123.0], "std": [1.0, 1.0, 1.0], "input_space": "BGR", "input_range": [0, 255]}
    with local_server() as server:
        server.files[f"{path}/config.json"] = json.dumps(described).encode()
        server.files[f"{path}/model.safetensors"] = save(smp.encoders.get_encoder("resnet18").state_dict())
        monkeypatch.setattr("semseg.nets.libraries.smp.HUB_ADDRESS", server.url(""))
        net = build_network(configure(weights="imagenet"), 3, DownloadConfig(cache=str(tmp_path)))
    assert net.convention[:5] == ("bgr", 1.0, (103.0, 116.0, 123.0), (1.0, 1.0, 1.0), True)
    assert (tmp_path / settings["repo_id"] / "config.json").is_file()
    assert net.weights_file is not None and net.origin is not None
    assert settings["revision"] in net.origin.source or net.origin.revision == settings["revision"]
    with pytest.raises(DownloadError, match=r"or set model.encoder.weights to a file you have"):
        fetch_imagenet_weights(net, "resnet18", DownloadConfig(cache=str(tmp_path / "empty"), offline=True))


def test_a_description_of_smps_hub_becomes_our_preprocessing(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "input_range": [0, 1], "input_space": "RGB"}')
    assert read_preprocessing(path)[:5] == ("rgb", 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), True)
    path.write_text('{"architectures": ["other"]}')
    assert read_preprocessing(path) is None
    path.write_text('{"mean": [0.5], "std": [0.5, 0.5, 0.5]}')
    with pytest.raises(CheckpointError, match=r"config\.json: does not describe the input of a network"):
        read_preprocessing(path)


def test_without_smp_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    monkeypatch.delitem(sys.modules, "semseg.nets.libraries.smp")
    with pytest.raises(ConfigError, match="model=smp needs segmentation-models-pytorch: pip install"):
        build_network(configure(), 3)


# ---- export


def export(arch: str, path: Path) -> Deviation:
    """Write a network and compare it with the file at five sizes; the caller sees what deviates."""
    net = shared_network(arch)
    return (write_onnx if path.suffix == ".onnx" else write_torch_export)(path, net, {})


class GridPooling(SegmentationNetwork):
    """Pooling to a grid alone: exporters write it for the traced size, with other numbers at other sizes."""

    size_divisor = label_stride = num_classes = 1

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(3)

    @property
    def backbone(self) -> nn.Module:
        return self.pool

    def forward(self, image: Tensor) -> Logits:
        return Logits(F.interpolate(self.pool(image[:, :1]), image.shape[-2:]), None)


@pytest.mark.long  # the tests of every architecture export it too
def test_pooling_to_a_grid_is_exported_for_every_size(tmp_path: Path) -> None:
    deviation = write_onnx(tmp_path / "net.onnx", GridPooling().eval(), {})
    assert deviation.largest < 1e-5 * deviation.scale


@pytest.mark.long
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_exported_for_every_size(arch: str, suffix: str, tmp_path: Path) -> None:
    if (arch, suffix) == ("pan", ".pt2"):
        with pytest.raises(ExportError, match="this network cannot be exported to"):
            export(arch, tmp_path / f"net{suffix}")
        return
    deviation = export(arch, tmp_path / f"net{suffix}")
    assert deviation.largest < 1e-5 * deviation.scale


def test_an_encoder_whose_constructor_reads_values_is_built_in_memory_first(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = smp.MODEL_ARCHITECTURES_MAPPING["unet"]

    def build(**arguments: Any) -> nn.Module:
        torch.linspace(0, 0.1, 3)[0].item()  # rates of stochastic depth, as in encoders of timm
        return unet(**arguments)

    monkeypatch.setitem(smp.MODEL_ARCHITECTURES_MAPPING, "unet", build)
    net = build_on_meta(lambda: build_model("unet", "resnet18", 3, NARROW["unet"]))
    assert all(parameter.is_meta for parameter in net.parameters())
