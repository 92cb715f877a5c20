"""Winograd's algorithm gives what F.conv2d gives: values, gradients, layouts, wherever it is used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semseg.checkpoints.network import build_network
from semseg.config.schema import ModelConfig
from semseg.nets.cpu import winograd
from semseg.nets.cpu.winograd import Thresholds, Winograd, conv2d, find_thresholds
from semseg.nets.registry import build_segmenter

THRESHOLDS = Thresholds(min_channels=128, min_tiles=32, max_waste=1.6)

CASES = {
    "same": (1, 1),
    "dilated": (2, 2),
    "widely dilated": (4, 4),
    "without padding": (0, 1),
    "shrinking": (1, 2),
    "growing": (3, 1),
}


def inputs(
    dtype: torch.dtype = torch.float64, size: tuple[int, int] = (21, 35), channels: tuple[int, int] = (5, 7)
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, channels[0], *size, generator=generator, dtype=dtype)
    weight = torch.randn(channels[1], channels[0], 3, 3, generator=generator, dtype=dtype)
    return image.requires_grad_(), weight.requires_grad_()


def assert_same(image: Tensor, weight: Tensor, padding: int, dilation: int) -> None:
    expected = F.conv2d(image, weight, padding=padding, dilation=dilation)
    found = conv2d(image, weight, padding, dilation)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    change = torch.randn(expected.shape, dtype=expected.dtype)
    for one, other in zip(*(torch.autograd.grad(y, (image, weight), change) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_direct_convolution(case: str) -> None:
    assert_same(*inputs(), *CASES[case])


@pytest.mark.parametrize("size", [(3, 3), (4, 4), (5, 4), (16, 8), (1, 9)])
def test_outputs_of_any_size(size: tuple[int, int]) -> None:
    assert_same(*inputs(size=size), 1, 1)


@pytest.mark.parametrize("strip_bytes", [1, 30_000])
def test_strips_of_any_height(strip_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "TILE_STRIP_BYTES", strip_bytes)
    assert_same(*inputs(), 2, 2)


@pytest.mark.parametrize("kernel_bytes", [1, 36 * 7 * 8 * 3])  # channels one by one; 3 and 2
def test_channels_in_several_parts(kernel_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "KERNEL_BYTES", kernel_bytes)
    assert_same(*inputs(), 2, 2)


@pytest.mark.parametrize(
    ("channels", "out_channels", "parts"), [(512, 512, 1), (2048, 512, 4), (512, 2048, 4), (5, 7, 1)]
)
def test_transformed_kernels_stay_small(channels: int, out_channels: int, parts: int) -> None:
    found = winograd.channel_slices(channels, out_channels, 4)
    assert len(found) == parts and found[0].start == 0 and found[-1].stop == channels
    assert all(36 * 4 * (part.stop - part.start) * out_channels <= winograd.KERNEL_BYTES for part in found)


def test_any_memory_layout() -> None:
    image, weight = inputs()
    expected = F.conv2d(image, weight, padding=1)
    for part in (image.contiguous(memory_format=torch.channels_last), image.mT.contiguous().mT):
        torch.testing.assert_close(conv2d(part, weight, 1, 1), expected, rtol=0, atol=1e-12)
    turned = weight.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(conv2d(image, turned, 1, 1), expected, rtol=0, atol=1e-12)


def test_the_numerical_gradient_agrees() -> None:
    image, weight = inputs(size=(5, 6), channels=(2, 3))
    assert torch.autograd.gradcheck(lambda image, weight: conv2d(image, weight, 1, 1), (image, weight))


def test_the_answer_can_be_changed_in_place() -> None:
    image, weight = inputs(size=(8, 8))
    conv2d(image, weight, 1, 1).add_(1).sum().backward()
    conv2d(image, weight, 0, 1).add_(1).sum().backward()
    assert image.grad is not None


def test_a_weight_alone_or_an_image_alone_gets_its_gradient() -> None:
    image, weight = inputs()
    conv2d(image.detach(), weight, 1, 1).sum().backward()
    conv2d(image, weight.detach(), 1, 1).sum().backward()
    assert weight.grad is not None
    assert image.grad is not None


def test_rounding_in_float32_is_close_to_that_of_the_direct_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 256, 40, 40, generator=generator).relu()
    weight = torch.randn(256, 256, 3, 3, generator=generator) * (2 / 9 / 256) ** 0.5
    exact = F.conv2d(image.double(), weight.double(), padding=1)
    winograd_error, direct_error = (
        (found - exact).square().mean().sqrt()
        for found in (conv2d(image, weight, 1, 1), F.conv2d(image, weight, padding=1))
    )
    assert (
        winograd_error < 15 * direct_error
    )  # oneDNN's direct convolution with 512-bit instructions: 1.6e-7; with others 6e-7
    assert winograd_error < 2e-6


# ---- which convolutions use it


@pytest.fixture
def convolved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the images that were convolved by Winograd's algorithm."""
    shapes: list[tuple[int, ...]] = []
    original = winograd.conv2d

    def record(image: Tensor, *rest: Tensor | int) -> Tensor:
        shapes.append(tuple(image.shape))
        return original(image, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(winograd, "conv2d", record)
    return shapes


def test_mostly_empty_tiles_are_left_to_the_direct_convolution(convolved: list[tuple[int, ...]]) -> None:
    layer = nn.Conv2d(128, 128, 3, padding=4, dilation=4)
    with Winograd(THRESHOLDS):
        layer(torch.randn(2, 128, 17, 17))  # 32 x 32 in tiles
        layer(torch.randn(2, 128, 31, 31))
    assert convolved == [(2, 128, 31, 31)]


def many_channels(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, 128, 24, 24, dtype=dtype)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "3 x 3": lambda: nn.Conv2d(128, 128, 3, padding=1),
    "dilated": lambda: nn.Conv2d(128, 130, 3, padding=2, dilation=2, bias=False),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "1 x 1": lambda: nn.Conv2d(128, 128, 1),
    "5 x 5": lambda: nn.Conv2d(128, 128, 5, padding=2),
    "stride": lambda: nn.Conv2d(128, 128, 3, 2, padding=1),
    "groups": lambda: nn.Conv2d(128, 256, 3, padding=1, groups=2),
    "few channels": lambda: nn.Conv2d(128, 64, 3, padding=1),
    "uneven padding": lambda: nn.Conv2d(128, 128, 3, padding=(1, 0)),
    "uneven dilation": lambda: nn.Conv2d(128, 128, 3, dilation=(1, 2)),
    "padding by name": lambda: nn.Conv2d(128, 128, 3, padding="same"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_convolutions_of_many_channels_use_it(kind: str, convolved: list[tuple[int, ...]]) -> None:
    layer, image = LAYERS[kind](), many_channels()
    expected = layer(image)
    with Winograd(THRESHOLDS):
        found = layer(image)
    assert convolved == [(1, 128, 24, 24)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", OTHERS)
def test_all_others_use_the_direct_convolution(kind: str, convolved: list[tuple[int, ...]]) -> None:
    layer, image = OTHERS[kind](), many_channels()
    with Winograd(THRESHOLDS):
        found = layer(image)
    assert torch.equal(found, layer(image))
    assert not convolved


@pytest.mark.parametrize(
    "image",
    [many_channels(torch.bfloat16), many_channels()[0], many_channels()[..., :9, :9]],
    ids=["half", "3-d", "small"],
)
def test_small_and_half_precision_images_use_the_direct_convolution(
    image: Tensor, convolved: list[tuple[int, ...]]
) -> None:
    layer = nn.Conv2d(128, 128, 3, padding=1).to(image.dtype)
    with Winograd(THRESHOLDS):
        layer(image)
    assert not convolved


def test_an_image_smaller_than_the_kernel_raises_pytorchs_error() -> None:
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"), Winograd(THRESHOLDS):
        F.conv2d(torch.randn(40, 128, 1, 1), torch.randn(128, 128, 3, 3))


@pytest.mark.parametrize("has_onednn_linear", [True, False], ids=["oneDNN", "bmm"])
def test_both_matrix_products_give_the_result(has_onednn_linear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_onednn_linear:
        monkeypatch.setattr(winograd, "ONEDNN_LINEAR", None)
    image, weight = (tensor.detach() for tensor in inputs(torch.float32))
    torch.testing.assert_close(conv2d(image, weight, 1, 1), F.conv2d(image, weight, padding=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("capability", "threads", "has_onednn", "least_channels"),
    [("AVX2", 64, False, 128), ("AVX512", 2, True, 256), ("AVX512", 2, False, None), ("AVX512", 64, True, None)],
)
def test_thresholds_depend_on_the_processor(
    capability: str, threads: int, has_onednn: bool, least_channels: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(winograd, "ONEDNN_LINEAR", F.linear if has_onednn else None)
    found = find_thresholds()
    assert (None if found is None else found.min_channels) == least_channels


@pytest.mark.slow
def test_a_network_uses_it_unless_it_is_switched_off(
    convolved: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "find_thresholds", lambda: Thresholds(min_channels=128, min_tiles=4, max_waste=4.0))
    net = build_segmenter("resnet18_dilated8", "c1", 5).eval().double()
    image = torch.randn(1, 3, 96, 128, dtype=torch.float64)
    logits = net(image).main
    count = len(convolved)
    assert count > 5
    net.has_cpu_kernels = False
    torch.testing.assert_close(logits, net(image).main, rtol=0, atol=1e-10)
    assert len(convolved) == count


def test_the_configuration_key_switches_the_kernels() -> None:
    encoder, decoder = {"name": "resnet18", "output_stride": 32}, {"name": "c1"}
    for is_enabled in (True, False):
        config = ModelConfig(encoder=dict(encoder), decoder=dict(decoder), winograd=is_enabled)
        assert build_network(config, 3).has_cpu_kernels == is_enabled
