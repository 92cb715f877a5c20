"""What every encoder and every decoder must do. A new one inherits these tests: a class with its name and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from helpers.reference import golden
from semseg.nets.interfaces import Decoder, Encoder
from semseg.nets.registry import build_decoder, build_encoder
from semseg.training.optim import split_by_decay

LAYOUTS = golden("nets_layouts.json")
PUBLISHED_CHANNELS = {"512": (64, 128, 256, 512), "2048": (256, 512, 1024, 2048)}  # by the deepest
RESIDUAL_STRIDES = {8: (4, 8, 8, 8), 16: (4, 8, 16, 16), 32: (4, 8, 16, 32)}  # by output stride


def check_layout(module: nn.Module, layout: str) -> None:
    """Keys and shapes in the published order, and the numbers of elements with and without weight decay."""
    assert [[key, list(value.shape)] for key, value in module.state_dict().items()] == LAYOUTS["layouts"][layout]
    decay, free = split_by_decay(module)
    numel = {"decay": sum(p.numel() for p in decay), "no_decay": sum(p.numel() for p in free)}
    assert numel == LAYOUTS["numel"][layout]


@torch.no_grad()
def check_start(module: nn.Module, norm_bias: float, gain: str) -> None:
    """Convolutions have the deviation sqrt(2 / fan), up to chance; norms have 1 and `norm_bias`."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            ends = layer.out_channels if gain == "fan_out" else layer.in_channels
            expected = math.sqrt(2 / (math.prod(layer.kernel_size) * ends / layer.groups))
            assert layer.weight.std().item() == pytest.approx(expected, rel=8 / math.sqrt(layer.weight.numel()))
        if isinstance(layer, nn.BatchNorm2d):
            assert torch.equal(layer.weight, torch.ones(layer.num_features))
            assert torch.equal(layer.bias, torch.full((layer.num_features,), norm_bias))


@torch.no_grad()
def check_maps(encoder: Encoder, channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Channels and strides are as announced, and a map is the image over its stride, rounded up."""
    assert (encoder.channels, encoder.strides) == (channels, strides)
    device = next(encoder.parameters()).device
    for size in ((64, 96), (97, 33), (1, 1)):
        maps = encoder.eval()(torch.randn(1, 3, *size, device=device))
        for features, count, stride in zip(maps, channels, strides, strict=True):
            assert features.shape == (1, count, *(math.ceil(length / stride) for length in size))


def check_one_pixel_trains(encoder: Encoder) -> None:
    """One image whose maps are one pixel gives every weight a gradient."""
    maps = encoder.train()(torch.randn(1, 3, 1, 1))
    torch.stack([features.square().mean() for features in maps]).sum().backward()
    gradients = [parameter.grad for parameter in encoder.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


class EncoderContract:
    """Tests of an encoder at every output stride.

    `layout` and `weights` are its names in the releases, if they are not those that follow from `name`.
    """

    name: ClassVar[str]
    channels: ClassVar[tuple[int, ...]]
    strides: ClassVar[dict[int, tuple[int, ...]]] = RESIDUAL_STRIDES
    layout: ClassVar[str] = ""
    weights: ClassVar[str] = ""

    @pytest.mark.parametrize("output_stride", [8, 16, 32])
    def test_maps_are_the_image_over_the_strides_rounded_up(self, output_stride: int) -> None:
        with torch.device("meta"):
            encoder = build_encoder(self.name, output_stride=output_stride)
        check_maps(encoder, self.channels, self.strides[output_stride])
        assert encoder.size_divisor == output_stride

    @pytest.mark.parametrize("output_stride", [8, 32])
    def test_state_dict_is_the_published_one(self, output_stride: int) -> None:
        with torch.device("meta"):
            check_layout(build_encoder(self.name, output_stride=output_stride), f"encoder/{self.layout or self.name}")

    def test_it_starts_as_published_and_one_image_of_one_pixel_trains(self) -> None:
        torch.manual_seed(0)
        encoder = build_encoder(self.name)
        check_start(encoder, 0.0, "fan_out")
        check_one_pixel_trains(encoder)

    def test_its_imagenet_weights_are_published(self) -> None:
        with torch.device("meta"):
            file = build_encoder(self.name).weights_file
        assert file is not None
        assert file.url.startswith("http://sceneparsing.csail.mit.edu/model/pretrained_resnet/")
        assert file.url.endswith(self.weights or f"/{self.name}-imagenet.pth")


class DecoderContract:
    """Tests of a decoder. `layouts` are those of published files, `name/channels of the deepest map`."""

    name: ClassVar[str]
    layouts: ClassVar[tuple[str, ...]] = ()
    has_aux: ClassVar[bool] = False
    channels: ClassVar[tuple[int, ...]] = (24, 40, 112, 320)

    def decoder(self) -> Decoder:
        torch.manual_seed(0)
        return build_decoder(self.name, self.channels, 7)

    def maps(self, batch: int, sizes: Sequence[int]) -> list[Tensor]:
        """Four maps, fine to coarse, a pixel wider than high unless they are one pixel."""
        return [
            torch.randn(batch, count, size, size + (size > 1)) for count, size in zip(self.channels, sizes, strict=True)
        ]

    def test_state_dict_is_the_published_one(self) -> None:
        for layout in self.layouts:
            with torch.device("meta"):
                decoder = build_decoder(self.name, PUBLISHED_CHANNELS[layout.partition("/")[2]], 150)
            check_layout(decoder, f"decoder/{layout}")

    def test_it_starts_as_published(self) -> None:
        check_start(self.decoder(), 1e-4, "fan_in")

    def test_it_trains_at_the_announced_resolution(self) -> None:
        decoder = self.decoder().train()
        for batch, sizes in ((2, (16, 8, 4, 2)), (1, (5, 3, 2, 1)), (1, (8, 4, 4, 4))):
            maps = self.maps(batch, sizes)
            logits = decoder(maps)
            assert logits.main.shape == (batch, 7, *maps[decoder.feature_level].shape[-2:])
            assert (logits.aux is not None) == self.has_aux
            loss = logits.main.square().mean()
            if logits.aux is not None:
                assert logits.aux.shape == (batch, 7, *maps[-2].shape[-2:])
                loss = loss + logits.aux.square().mean()
            loss.backward()
            assert torch.isfinite(loss)
        assert all(parameter.grad is not None for parameter in decoder.parameters())
        assert decoder.eval()(maps).aux is None  # nobody reads it
