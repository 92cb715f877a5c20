from __future__ import annotations

import math

import pytest
import torch

from semseg.nets.registry import DECODERS, build_segmenter


@torch.no_grad()
@pytest.mark.parametrize(
    ("output_stride", "decoder", "size_divisor", "label_stride"),
    [(8, "ppm", 8, 8), (16, "c1", 16, 16), (32, "c1", 32, 32), (32, "upernet", 32, 4), (8, "upernet", 8, 4)],
)
def test_strides_are_derived(output_stride: int, decoder: str, size_divisor: int, label_stride: int) -> None:
    with torch.device("meta"):
        net = build_segmenter("resnet18", decoder, 5, {"output_stride": output_stride}).eval()
    assert (net.num_classes, net.size_divisor, net.label_stride) == (5, size_divisor, label_stride)
    logits = net(torch.empty(1, 3, 2 * size_divisor, 3 * size_divisor, device="meta")).main
    assert logits.shape == (1, 5, 2 * size_divisor // label_stride, 3 * size_divisor // label_stride)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("decoder", "output_stride"), [("c1", 32), ("ppm", 8), ("upernet", 8), ("upernet", 32)])
def test_images_of_any_size_are_evaluated(decoder: str, output_stride: int) -> None:
    net = build_segmenter("resnet18", decoder, 5, {"output_stride": output_stride}).eval()
    for size in ((1, 1), (1, 97), (33, 64)):
        logits = net(torch.randn(1, 3, *size)).main
        assert logits.shape == (1, 5, *(math.ceil(length / net.label_stride) for length in size))
        assert logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_one_image_with_a_deepest_map_of_one_pixel_trains(decoder: str) -> None:
    net = build_segmenter("resnet18", decoder, 5).train()
    net(torch.randn(1, 3, 32, 32)).main.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_channels_last_and_bfloat16_change_the_logits_little() -> None:
    net = build_segmenter("resnet18", "ppm", 5, {"output_stride": 8}).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        exact = net(image).main
        net = net.to(memory_format=torch.channels_last)
        image = image.contiguous(memory_format=torch.channels_last)
        assert torch.allclose(net(image).main, exact, rtol=1e-4, atol=1e-4 * float(exact.std()))
        with torch.autocast("cpu", torch.bfloat16):
            rough = net(image).main.float()
    assert float((rough - exact).abs().max() / exact.std()) < 0.2
