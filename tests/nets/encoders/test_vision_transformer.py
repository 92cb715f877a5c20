"""Plain vision transformers of timm as encoders: which maps they give, at which sizes, and with which weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import RotaryEmbeddingDinoV3
from torch import Tensor, nn

from helpers.tiny_vit import build_timm
from semseg.checkpoints.initialise import find_differences
from semseg.errors import ConfigError
from semseg.nets.encoders.timm import ExportableRotary
from semseg.nets.interfaces import Encoder
from semseg.nets.registry import build_decoder, build_encoder, build_segmenter
from semseg.nets.segmenter import Segmenter

DEPTHS = {"tiny_dinov2": 4, "tiny_dinov3": 4, "test_vit": 6}
DECODERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("c1", {}), ("ppm", {"deep_supervision": True}), ("upernet", {"width": 8}), ("linear", {}),
    ("segformer", {"width": 8}),
)  # fmt: skip


def meta_encoder(name: str, **options: Any) -> Encoder:
    with torch.device("meta"):
        return build_encoder("timm", name=name, **options)


@torch.no_grad()
@pytest.mark.parametrize("name", DEPTHS)
def test_its_maps_are_timms_normalised_outputs_of_blocks_to_the_last_bit(name: str) -> None:
    theirs = build_timm(name)
    for parameter in theirs.parameters():
        parameter.normal_(std=0.1)
    encoder = build_encoder("timm", name=name, blocks=[1, -1]).eval()
    published = encoder.convert_weights(theirs.state_dict())
    assert find_differences(published, encoder.state_dict()) == []
    encoder.load_state_dict(published)
    patch = encoder.size_divisor
    image = torch.randn(2, 3, 3 * patch, 5 * patch)
    expected = theirs.forward_intermediates(image, [1, DEPTHS[name] - 1], norm=True, intermediates_only=True)
    assert [tuple(features.shape[-2:]) for features in expected] == [(3, 5)] * 2
    assert all(torch.equal(ours, features) for ours, features in zip(encoder(image), expected, strict=True))
    last = theirs.forward_features(image)[:, theirs.num_prefix_tokens :]  # the tokens that the classifier sees
    torch.testing.assert_close(encoder(image)[-1].flatten(2).mT, last)


@torch.no_grad()
def test_without_its_own_normalisation_maps_have_ours() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("timm", name="tiny_dinov2", final_norm=False).eval()
    assert not [name for name in encoder.state_dict() if name.startswith("model.model.norm.")]
    image = torch.randn(1, 3, 28, 42)
    raw = encoder.model(image)
    for ours, theirs in zip(encoder(image), raw, strict=True):
        assert torch.equal(ours, F.layer_norm(theirs.permute(0, 2, 3, 1), theirs.shape[1:2]).permute(0, 3, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "chosen", "left"),
    [
        ("vit_tiny_patch16_224", {}, (2, 5, 8, 11), 12),
        ("test_vit", {}, (1, 2, 4, 5), 6),
        ("test_vit", {"blocks": [0, 3]}, (0, 3), 4),  # two blocks are left out
        ("test_vit", {"blocks": [-3, -2, -1]}, (3, 4, 5), 6),
    ],
)
def test_blocks_are_evenly_spaced_or_chosen(
    name: str, options: dict[str, Any], chosen: tuple[int, ...], left: int
) -> None:
    encoder = meta_encoder(name, **options)
    assert tuple(encoder.model.out_indices) == chosen
    assert len(encoder.model.model.blocks) == left and len(encoder.channels) == len(chosen)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny_dinov2", "tiny_dinov3", "vit_small_patch8_224", "vit_base_patch16_siglip_224"])
def test_maps_are_the_image_over_the_patches_rounded_up_at_any_size(name: str) -> None:
    encoder = meta_encoder(name).eval()
    for size in ((64, 96), (97, 33), (1, 1)):
        maps = encoder(torch.empty(1, 3, *size, device="meta"))
        for features, channels, stride in zip(maps, encoder.channels, encoder.strides, strict=True):
            assert features.shape == (1, channels, *(math.ceil(length / stride) for length in size))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_dinov2", "tiny_dinov3"])
def test_every_weight_gets_a_gradient_under_every_decoder(name: str) -> None:
    for decoder, options in DECODERS:
        net = build_segmenter("timm", decoder, 3, {"name": name}, options).train()
        for size in ((2, 3, 50, 30), (1, 3, 5, 5)):  # and one image whose map is one pixel
            net.zero_grad()
            logits = net(torch.randn(*size))
            assert logits.main.shape[-2:] == tuple(math.ceil(side / net.label_stride) for side in size[-2:])
            torch.stack([head.square().mean() for head in logits if head is not None]).sum().backward()
            gradients = [weight.grad for weight in net.parameters()]
            assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_it_trains_and_predicts_in_mixed_precision() -> None:
    net = build_segmenter("timm", "upernet", 3, {"name": "tiny_dinov3"}, {"width": 8})
    image = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        exact = net.eval()(image).main
    with torch.autocast("cpu", torch.bfloat16):
        net.train()(image).main.float().square().mean().backward()
        mixed = net.eval()(image).main
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in net.parameters())
    assert mixed.shape == exact.shape and mixed.isfinite().all()


def test_deterministic_training_resamples_position_embeddings_with_the_same_result_and_gradient() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("timm", name="tiny_dinov2").eval()
    positions = encoder.get_parameter("model.model.pos_embed")
    torch.nn.init.normal_(positions)
    image, found = torch.randn(1, 3, 28, 126), []
    for is_deterministic in (False, True):
        torch.use_deterministic_algorithms(is_deterministic)
        try:
            maps = encoder(image)
        finally:
            torch.use_deterministic_algorithms(False)
        (gradient,) = torch.autograd.grad((maps[-1] * maps[0].detach().roll(1)).sum(), positions)
        found.append((maps[-1].detach(), gradient))
    for plain, deterministic in zip(*found, strict=True):
        assert not torch.equal(plain, deterministic)  # computed in another way
        torch.testing.assert_close(plain, deterministic, rtol=1e-4, atol=1e-4)


def test_positions_that_are_resampled_by_matrices_are_not_rounded_under_autocast() -> None:
    from semseg.nets.encoders.timm import resample

    positions = torch.randn(1, 24, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = resample(positions, (7, 4), "bicubic")
    torch.testing.assert_close(found, F.interpolate(positions, (7, 4), mode="bicubic", antialias=True))


# ---- patches of 14 pixels


def test_patches_of_14_become_16_under_a_decoder_that_reads_a_pyramid() -> None:
    for decoder, strides, divisor, label_stride in (("linear", 14, 14, 14), ("upernet", 16, 32, 4)):
        with torch.device("meta"):
            net = build_segmenter("timm", decoder, 3, {"name": "tiny_dinov2"})
        assert set(net.encoder.strides) == {strides}
        assert (net.size_divisor, net.label_stride) == (divisor, label_stride)
    with torch.device("meta"):
        without = build_segmenter("timm", "upernet", 3, {"name": "tiny_dinov2", "pyramid": False})
    assert (without.size_divisor, without.label_stride) == (14, 14)


@torch.no_grad()
def test_weights_for_patches_of_14_see_the_same_picture_through_patches_of_16() -> None:
    torch.manual_seed(0)
    theirs = build_timm("tiny_dinov2")
    theirs.patch_embed.proj.weight.normal_(std=0.02)
    theirs.pos_embed.normal_(std=0.02)
    encoder = build_encoder("timm", name="tiny_dinov2", pyramid=True).eval()
    published = encoder.convert_weights(theirs.state_dict())
    assert find_differences(published, encoder.state_dict()) == []
    encoder.load_state_dict(published)
    kernel = encoder.model.model.patch_embed.proj.weight
    assert kernel.shape[-2:] == (16, 16)
    # A patch that is enlarged from 14 to 16 pixels has the same embedding.
    patch = torch.randn(1, 3, 14, 14)
    small = F.conv2d(patch, theirs.patch_embed.proj.weight)
    large = F.conv2d(F.interpolate(patch, (16, 16), mode="bicubic", antialias=True), kernel)
    assert F.cosine_similarity(small.flatten(), large.flatten(), dim=0) > 0.99


# ---- rotary positions


@torch.no_grad()
def test_rotary_positions_are_timms_to_the_last_bit() -> None:
    encoder = build_encoder("timm", name="tiny_dinov3")
    (ours,) = (module for module in encoder.modules() if isinstance(module, RotaryEmbeddingDinoV3))
    assert type(ours) is ExportableRotary
    theirs = copy.deepcopy(ours)
    theirs.__class__ = RotaryEmbeddingDinoV3
    for shape in ([1, 1], [3, 5], [16, 7]):
        for module in (encoder.train(), encoder.eval()):
            assert torch.equal(ours.get_embed(shape), theirs.get_embed(shape)), module.training
        assert ours.get_embed(shape, torch.bfloat16).dtype == torch.bfloat16


def test_a_rotary_embedding_that_moves_its_positions_in_training_stays_timms() -> None:
    from semseg.nets.encoders.timm import make_rotary_exportable

    moving = nn.Sequential(RotaryEmbeddingDinoV3(16, jitter_coords=2.0), RotaryEmbeddingDinoV3(16, grid_offset=0.5))
    make_rotary_exportable(moving)
    assert [type(module) for module in moving] == [RotaryEmbeddingDinoV3] * 2


# ---- licences and options


def test_the_licence_of_the_weights_is_that_of_timm() -> None:
    assert meta_encoder("vit_small_patch16_dinov3").licence == "dinov3-license"
    assert meta_encoder("test_vit").licence == "apache-2.0"


@pytest.mark.parametrize(
    ("decoder", "options", "message"),
    [
        ("linear", {"blocks": [3, 6]}, "model.encoder.blocks=[3, 6]: must be increasing numbers of blocks of test_vit, "
         "from 0 to 5, or from -6 to -1."),
        ("linear", {"blocks": [3, 3]}, "model.encoder.blocks=[3, 3]: must be increasing"),
        ("linear", {"blocks": [-7]}, "model.encoder.blocks=[-7]: must be increasing"),
        ("linear", {"blocks": 3}, "model.encoder.blocks=3: must be a list of integers."),
        ("linear", {"blocks": ["3"]}, "model.encoder.blocks=['3']: must be a list of integers."),
        ("upernet", {"blocks": [1, 5]}, "model.encoder.blocks gives 2 maps, but a pyramid is made of one map or of 4. "
         "Choose as many blocks, or set model.encoder.pyramid=false."),
        ("c1", {"pyramid": True}, "model.encoder.pyramid=true: c1 reads one map. Leave it out, or choose "),
        ("upernet", {"name": "test_convnext", "pyramid": True}, "model.encoder.pyramid=true: the maps of test_convnext "
         "are a pyramid already, of strides 4, 8, 16, 32. Leave it out."),
        ("c1", {"name": "test_convnext", "blocks": [1]}, "model.encoder.blocks=[1]: is for plain vision transformers. "
         "The maps of timm's test_convnext are those of its stages, of strides 4, 8, 16, 32. Leave it out."),
        ("c1", {"name": "test_resnet", "final_norm": False}, "model.encoder.final_norm=false: is for plain vision "),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(decoder: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught, torch.device("meta"):
        build_segmenter("timm", decoder, 3, {"name": "test_vit", **options})
    assert str(caught.value).startswith(message)


def test_an_encoder_of_a_program_without_these_options_keeps_its_maps() -> None:
    class OneStride(Encoder):
        channels = (8, 8)
        strides = (16, 16)

        def forward(self, image: Tensor) -> list[Tensor]:
            return [image.new_zeros(len(image), 8, 2, 2)] * 2

    encoder = OneStride()
    net = Segmenter(encoder, build_decoder("upernet", encoder.channels, 3, width=4), 3)
    assert net.label_stride == 16 and not encoder.wants_pyramid
