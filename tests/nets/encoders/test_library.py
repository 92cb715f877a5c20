from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from semseg.checkpoints.initialise import find_differences
from semseg.config.compose import compose_config
from semseg.config.preprocessing import PREPROCESSING
from semseg.config.schema import split_network_options
from semseg.errors import CheckpointError, ConfigError
from semseg.nets.blocks import BatchNorm2d
from semseg.nets.interfaces import Encoder
from semseg.nets.registry import build_decoder, build_encoder
from semseg.nets.segmenter import Segmenter
from semseg.syncbn.layer import convert_batch_norms, revert_batch_norms

PYRAMID = (4, 8, 16, 32)
# Library, name -> channels of the maps, and for torchvision the modules whose outputs they are.
TORCHVISION = {
    "resnet18": ((64, 128, 256, 512), ("layer1", "layer2", "layer3", "layer4")),
    "regnet_y_400mf": ((48, 104, 208, 440), tuple(f"trunk_output.block{number}" for number in (1, 2, 3, 4))),
    "mobilenet_v2": ((24, 32, 96, 1280), tuple(f"features.{number}" for number in (3, 6, 13, 18))),
    "mobilenet_v3_small": ((16, 24, 48, 576), tuple(f"features.{number}" for number in (1, 3, 8, 12))),
    "efficientnet_b0": ((24, 40, 112, 1280), tuple(f"features.{number}" for number in (2, 3, 5, 8))),
    "convnext_tiny": ((96, 192, 384, 768), tuple(f"features.{number}" for number in (1, 3, 5, 7))),
    "swin_t": ((96, 192, 384, 768), tuple(f"features.{number}" for number in (1, 3, 5, 7))),
}
TIMM = {
    "test_resnet": (32, 48, 192, 96),  # networks of timm's own tests: 16 to 200 channels
    "test_convnext": (24, 32, 48, 64),
    "test_efficientnet": (24, 32, 48, 64),
    "swin_s3_tiny_224": (96, 192, 384, 768),
}
NORMALISED = ("convnext_tiny", "swin_t", "test_convnext", "swin_s3_tiny_224")
DECODERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("c1", {}),
    ("ppm", {"deep_supervision": True}),
    ("upernet", {"width": 16}),
    ("linear", {}),
    ("segformer", {"width": 16}),
)


def outputs_of(model: nn.Module, names: tuple[str, ...], image: Tensor) -> list[Tensor]:
    """The outputs of the modules `names` while `model` runs."""
    found: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: found.append(output.clone()))
        for name in names
    ]
    model(image)
    for handle in handles:
        handle.remove()
    return found


def layer_normed(features: Tensor) -> Tensor:
    """(N, C, h, w) with mean 0 and variance 1 over C."""
    return F.layer_norm(features.permute(0, 2, 3, 1), features.shape[1:2]).permute(0, 3, 1, 2)


def check_same(maps: list[Tensor], expected: list[Tensor], name: str) -> None:
    for ours, theirs in zip(maps, expected, strict=True):
        assert torch.equal(ours, layer_normed(theirs) if name in NORMALISED else theirs)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_weights_give_torchvision_s_maps_to_the_last_bit(name: str) -> None:
    channels, modules = TORCHVISION[name]
    library = models.get_model(name, weights=None).eval()
    encoder = build_encoder("torchvision", name=name).eval()
    published = encoder.convert_weights(library.state_dict())
    assert find_differences(published, encoder.state_dict()) == []
    encoder.load_state_dict(published)
    image = torch.randn(2, 3, 64, 96)
    expected = outputs_of(library, modules, image)
    if name.startswith("swin"):
        expected = [features.permute(0, 3, 1, 2) for features in expected]
    assert (encoder.channels, encoder.strides) == (channels, PYRAMID)
    check_same(encoder(image), expected, name)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", TIMM)
def test_timm_weights_give_timm_s_maps_to_the_last_bit(name: str) -> None:
    any_size = {"strict_img_size": False} if name.startswith("swin") else {}
    library = timm.create_model(name, **any_size).eval()
    encoder = build_encoder("timm", name=name).eval()
    before = torch.get_rng_state()
    published = encoder.convert_weights(library.state_dict())
    assert torch.equal(torch.get_rng_state(), before)  # although timm may build another network
    assert find_differences(published, encoder.state_dict()) == []
    encoder.load_state_dict(published)
    image = torch.randn(2, 3, 64, 96)
    expected = library.forward_intermediates(image, intermediates_only=True)[-4:]
    assert (encoder.channels, encoder.strides) == (TIMM[name], PYRAMID)
    check_same(encoder(image), expected, name)


def test_a_weight_that_is_not_in_a_timm_file_is_reported_as_missing() -> None:
    encoder = build_encoder("timm", name="test_convnext")
    published = timm.create_model("test_convnext").state_dict()
    del published["stem.1.bias"]
    found = encoder.convert_weights(published)
    assert find_differences(found, encoder.state_dict()) == ["1 missing (model.stem_1.bias)"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit"])
def test_timms_filter_gives_what_its_loader_gives(name: str) -> None:
    encoder = build_encoder("timm", name=name)
    published = timm.create_model(name).state_dict()
    filtered, probed = encoder.filter_weights(published), encoder.probe_weights(published)
    assert filtered is not None and filtered.keys() == probed.keys()
    assert all(torch.equal(value, probed[key]) for key, value in filtered.items())


def test_weights_of_another_timm_network_are_refused() -> None:
    published = timm.create_model("test_resnet").state_dict()
    with pytest.raises(CheckpointError, match="do not fit timm's test_efficientnet: "):
        build_encoder("timm", name="test_efficientnet").convert_weights(
            {**published, "conv_stem.weight": torch.zeros(1)}
        )


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("library", "name"),
    [("torchvision", "swin_t"), ("torchvision", "resnet18"), ("timm", "swin_s3_tiny_224"), ("timm", "test_vit")],
)
def test_maps_are_the_image_over_the_strides_rounded_up(library: str, name: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(library, name=name).eval()
    assert encoder.size_divisor == (16 if name == "test_vit" else 32)
    for size in ((64, 96), (97, 33), (1, 1)):
        maps = encoder(torch.empty(1, 3, *size, device="meta"))
        for features, channels, stride in zip(maps, encoder.channels, encoder.strides, strict=True):
            assert features.shape == (1, channels, *(math.ceil(length / stride) for length in size))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("torchvision", "resnet18"),
        pytest.param("torchvision", "convnext_tiny", marks=pytest.mark.long),
        pytest.param("torchvision", "swin_t", marks=pytest.mark.long),
        ("torchvision", "mobilenet_v3_small"),
        pytest.param("torchvision", "efficientnet_b0", marks=pytest.mark.long),
        ("timm", "test_resnet"),
        ("timm", "test_convnext"),
        ("timm", "test_vit"),
    ],
)
def test_every_decoder_trains_every_weight_of_the_encoder(library: str, name: str) -> None:
    encoder, image = build_encoder(library, name=name), torch.randn(2, 3, 32, 32)
    for decoder, options in DECODERS:
        net = Segmenter(encoder, build_decoder(decoder, encoder.channels, 3, **options), 3).train()
        net.zero_grad()
        logits = net(image)
        assert logits.main.shape == (2, 3, 32 // net.label_stride, 32 // net.label_stride)
        heads = [head for head in logits if head is not None]
        assert len(heads) == 1 + options.get("deep_supervision", False)
        torch.stack([head.mean() for head in heads]).sum().backward()
        without = [name for name, weight in net.named_parameters() if weight.grad is None]
        assert without == []  # because DistributedDataParallel would wait for them


@pytest.mark.parametrize(
    ("library", "name", "build"),
    [
        ("torchvision", "mobilenet_v3_small", models.mobilenet_v3_small),
        ("timm", "test_convnext", lambda: timm.create_model("test_convnext", features_only=True)),
    ],
)
def test_weights_are_initialised_by_the_library_and_measuring_the_network_draws_no_random_numbers(
    library: str, name: str, build: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(3)
    theirs, after = build().state_dict(), torch.get_rng_state()
    torch.manual_seed(3)
    encoder = build_encoder(library, name=name)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(value, theirs[key.removeprefix("model.")]) for key, value in encoder.state_dict().items())
    assert all(layer.training for layer in encoder.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name", "output_stride", "strides"),
    [
        ("torchvision", "resnet50", 8, (4, 8, 8, 8)),
        ("torchvision", "resnet50", 16, (4, 8, 16, 16)),
        ("timm", "resnet18", 8, (4, 8, 8, 8)),
        ("timm", "efficientnet_b0", 16, (4, 8, 16, 16)),
    ],
)
def test_a_dilated_network_has_as_many_maps_of_at_most_the_output_stride(
    library: str, name: str, output_stride: int, strides: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        encoder = build_encoder(library, name=name, output_stride=output_stride)
        assert (encoder.strides, encoder.size_divisor) == (strides, output_stride)
        assert [64 // features.shape[-1] for features in encoder(torch.empty(1, 3, 64, 64))] == list(strides)


def meta_encoder(library: str, name: str) -> Encoder:
    with torch.device("meta"):
        return build_encoder(library, name=name)


@pytest.mark.slow
def test_preprocessing_is_that_of_the_training_of_the_weights() -> None:
    assert meta_encoder("torchvision", "resnet18").convention == PREPROCESSING["rgb_mean_std"]
    for library, name in (("torchvision", "efficientnet_v2_l"), ("timm", "test_resnet")):
        convention = meta_encoder(library, name).convention
        assert (convention.mean, convention.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        assert (convention.channel_order, convention.scale, convention.antialias) == ("rgb", 1 / 255, True)


@pytest.mark.parametrize(
    ("library", "name", "url", "digest"),
    [
        ("torchvision", "swin_t", "https://download.pytorch.org/models/swin_t-704ceda3.pth", "sha256:704ceda3"),
        ("timm", "resnet18", "https://huggingface.co/timm/resnet18.a1_in1k/resolve/main/model.safetensors", ""),
        (
            "timm",
            "resnet18.fb_ssl_yfcc100m_ft_in1k",
            "https://huggingface.co/timm/resnet18.fb_ssl_yfcc100m_ft_in1k/resolve/main/model.safetensors",
            "",
        ),
    ],
)
def test_the_published_weights_are_known(library: str, name: str, url: str, digest: str) -> None:
    file = meta_encoder(library, name).weights_file
    assert file is not None and (file.url, file.digest) == (url, digest)


def test_one_image_whose_deepest_map_is_one_pixel_trains() -> None:
    for library, name in (("torchvision", "resnet18"), ("timm", "test_resnet")):
        encoder = build_encoder(library, name=name).train()
        norms = [layer for layer in encoder.modules() if isinstance(layer, nn.BatchNorm2d)]
        assert norms and all(type(layer) is BatchNorm2d for layer in norms)
        maps = encoder(torch.randn(1, 3, 32, 32))
        assert maps[-1].shape[-2:] == (1, 1)
        assert all(features.isfinite().all() for features in maps)


@pytest.mark.parametrize(("library", "name"), [("torchvision", "mobilenet_v3_small"), ("timm", "test_efficientnet")])
def test_synced_layers_do_what_the_library_s_layers_do(library: str, name: str) -> None:
    encoder = build_encoder(library, name=name).train()
    image = torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    before = encoder(image)
    classes = [type(layer) for layer in encoder.modules()]
    torch.manual_seed(0)
    synced = convert_batch_norms(encoder)(image)
    assert [type(layer) for layer in encoder.modules()] != classes
    assert all(torch.equal(*pair) for pair in zip(before, synced, strict=True))
    assert [type(layer) for layer in revert_batch_norms(encoder).modules()] == classes


def test_a_network_of_a_library_is_named_on_the_command_line() -> None:
    for library, name, channels in (("torchvision", "convnext_tiny", 768), ("timm", "efficientnet_b3", 384)):
        section = compose_config([f"model/encoder={library}", f"model.encoder.name={name}"]).model.encoder
        typed, options = split_network_options(dict(section), "encoder")
        with torch.device("meta"):
            assert build_encoder(typed, **options).channels[-1] == channels


@pytest.mark.parametrize(
    ("library", "options", "message"),
    [
        (
            "torchvision",
            {"name": "convnext_tinny"},
            "model.encoder.name: 'convnext_tinny' is not known. Did you mean convnext_tiny? Valid: convnext_base, ",
        ),
        ("torchvision", {"name": "vgg11"}, "model.encoder.name: 'vgg11' is not known. "),
        ("torchvision", {"name": 18}, "model.encoder.name=18: must be a string."),
        (
            "torchvision",
            {"name": "resnet18", "output_stride": 16},
            "model.encoder.output_stride=16: torchvision's resnet18 cannot be dilated. Use 32, or one of resnet101, ",
        ),
        ("torchvision", {"output_stride": 4}, "model.encoder.output_stride=4: must be 8, 16 or 32."),
        (
            "timm",
            {"name": "efficientnet_b33"},
            "model.encoder.name=efficientnet_b33: timm has no such network. Did you mean efficientnet_b3? ",
        ),
        (
            "timm",
            {"name": "hf-hub:timm/resnet18.a1_in1k"},
            "model.encoder.name=hf-hub:timm/resnet18.a1_in1k: timm has no such network.",
        ),
        (
            "timm",
            {"name": "vgg11", "output_stride": 16},
            "model.encoder.output_stride=16: timm's vgg11 cannot be dilated. Use 32.",
        ),
        ("timm", {"name": "resnet18", "output_stride": 4}, "model.encoder.output_stride=4: must be 8, 16 or 32."),
        (
            "timm",
            {"name": "mixer_s32_224"},
            "model.encoder.name=mixer_s32_224: timm's network gives no maps of strides 32, 32, 32, 32 for ",
        ),
    ],
)
def test_networks_that_a_library_does_not_have_are_rejected(
    library: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught, torch.device("meta"):
        build_encoder(library, **options)
    assert str(caught.value).startswith(message)


def test_an_unknown_library_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"model\.encoder\.library: 'tim' is not known\. Did you mean timm\?"):
        split_network_options({"library": "tim", "name": "resnet18"}, "encoder")


def test_without_timm_the_message_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "semseg.nets.encoders.timm", raising=False)
    with pytest.raises(ConfigError, match=r'pip install --editable "\.\[timm\]"'):
        build_encoder("timm", name="resnet18")
