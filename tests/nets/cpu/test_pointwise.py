"""1 x 1 convolutions by oneDNN equal those of PyTorch, and no other convolutions are sent there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semseg.nets.cpu import pointwise
from semseg.nets.cpu.pointwise import OneDnnPointwise, is_onednn_faster
from semseg.nets.registry import build_segmenter


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each F.conv2d within `OneDnnPointwise`, whether it went to oneDNN."""
    calls: list[bool] = []
    original = pointwise._pointwise_conv2d

    def record(*args: object, **named: object) -> Tensor | None:
        found = original(*args, **named)  # pyright: ignore[reportArgumentType]
        calls.append(found is not None)
        return found

    monkeypatch.setattr(pointwise, "_pointwise_conv2d", record)
    return calls


def inputs(size: tuple[int, int] = (16, 12), kernel: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 24, *size), (40, 24, kernel, kernel), (40,)
    image, weight, bias = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return image, weight, bias


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_pytorch(
    layout: torch.memory_format, with_bias: bool, calls: list[bool], one_thread: None
) -> None:
    image, weight, bias = inputs()
    leaves = (image, weight, bias) if with_bias else (image, weight)
    laid_out = image.contiguous(memory_format=layout)
    expected = F.conv2d(laid_out, *leaves[1:])
    with OneDnnPointwise():
        found = F.conv2d(laid_out, *leaves[1:])
    assert calls == [True]
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    change = torch.randn(expected.shape)
    for one, other in zip(*(torch.autograd.grad(y, leaves, change) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"stride": (1, 1), "padding": [0, 0], "dilation": 3}, {"padding": 0}])
def test_options_equal_to_the_defaults_are_accepted(options: dict[str, object], calls: list[bool]) -> None:
    with OneDnnPointwise():
        F.conv2d(*inputs(), **options)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert calls == [True]


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {"padding": "same"}, {"stride": (1, 2)}], ids=str)
def test_other_options_are_left_to_pytorch(options: dict[str, object], calls: list[bool]) -> None:
    expected = F.conv2d(*inputs(), **options)  # pyright: ignore[reportArgumentType, reportCallIssue]
    with OneDnnPointwise():
        found = F.conv2d(*inputs(), **options)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert calls == [False]
    assert torch.equal(found, expected)


def test_other_inputs_are_left_to_pytorch(calls: list[bool]) -> None:
    image, weight, bias = inputs()
    with OneDnnPointwise():
        F.conv2d(image.double(), weight.double(), bias.double())
        F.conv2d(image[0], weight, bias)
        F.conv2d(*inputs(size=(3, 3)))
        F.conv2d(*inputs(kernel=3))
        F.conv2d(image, weight[:, :12], bias, groups=2)
        F.conv2d(image.to("meta"), weight.to("meta"))
    assert calls == [False] * 6


def test_it_is_faster_with_one_thread_and_avx512_only(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "has_avx512", lambda: True)
    assert is_onednn_faster()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not is_onednn_faster()
    monkeypatch.undo()
    monkeypatch.setattr(pointwise, "has_avx512", lambda: False)
    assert not is_onednn_faster()
    monkeypatch.undo()
    torch.set_num_threads(2)
    assert not is_onednn_faster()


@pytest.mark.slow
def test_a_network_gives_the_same_logits_and_gradients(monkeypatch: pytest.MonkeyPatch, calls: list[bool]) -> None:
    torch.manual_seed(0)
    net = build_segmenter("resnet18", "upernet", 5).eval()
    image = torch.randn(1, 3, 32, 64)
    answers: list[tuple[Tensor, Tensor | None]] = []
    for is_faster in (False, True):
        monkeypatch.setattr(pointwise, "is_onednn_faster", lambda is_faster=is_faster: is_faster)
        net.zero_grad()
        logits = net(image).main
        logits.square().mean().backward()
        weight = next(layer.weight for layer in net.modules() if isinstance(layer, nn.Conv2d))
        answers.append((logits.detach(), weight.grad))
    assert any(calls)
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
