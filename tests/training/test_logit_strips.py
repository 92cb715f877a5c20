"""Losses of labels finer than the logits, in strips of rows: numbers of the plain computation, in bounded memory."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from semseg.config.schema import LossConfig, LossTermsConfig
from semseg.nets.interfaces import Logits
from semseg.training import logit_strips
from semseg.training.logit_strips import LogitsByStrip
from semseg.training.losses import Loss, build_terms, count_correct, segmentation_loss

CONFIGS = {
    "cross entropy": LossConfig(label_smoothing=0.1, class_weights=[1.0, 0.5, 2.0, 0.0, 1.0]),
    "ohem": LossConfig(terms=LossTermsConfig(cross_entropy=0, ohem=1), ohem_min_kept=0.3, ohem_threshold=0.2),
    "focal": LossConfig(terms=LossTermsConfig(cross_entropy=0, focal=1), class_weights=[1.0, 0.5, 2.0, 0.0, 1.0]),
    "dice": LossConfig(terms=LossTermsConfig(cross_entropy=1, dice=0.5)),
    "lovasz": LossConfig(terms=LossTermsConfig(cross_entropy=1, lovasz=0.5)),
}


def make_pair(height: int = 37, width: int = 50) -> tuple[Logits, Tensor]:
    generator = torch.Generator().manual_seed(0)
    main, aux = (3 * torch.randn(2, 5, *size, generator=generator) for size in ((10, 13), (5, 7)))
    label = torch.randint(-1, 5, (2, height, width), generator=generator)
    return Logits(main.requires_grad_(), aux.requires_grad_()), label


def loss_of(config: LossConfig, logits: Logits, label: Tensor) -> tuple[Loss, tuple[Tensor, ...]]:
    loss = segmentation_loss(logits, label, terms=build_terms(config, 5))
    assert logits.aux is not None
    return loss, torch.autograd.grad(loss.total, (logits.main, logits.aux))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("strip_bytes", [1, 5000, 10**9])
def test_losses_in_strips_equal_those_of_the_whole_map(name: str, strip_bytes: int) -> None:
    logits, label = make_pair()
    whole, gradients = loss_of(CONFIGS[name], logits, label)
    with (
        patch.object(logit_strips, "WHOLE_BYTES", 0),
        patch.object(LogitsByStrip.__init__, "__defaults__", (strip_bytes,)),
    ):
        in_strips, in_strips_gradients = loss_of(CONFIGS[name], logits, label)
    torch.testing.assert_close(in_strips.total, whole.total, rtol=1e-6, atol=1e-6)
    assert (in_strips.correct, in_strips.scored) == (whole.correct, whole.scored)
    for found, expected in zip(in_strips_gradients, gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_in_double_precision_they_agree_to_its_last_digits() -> None:
    logits, label = make_pair(64, 31)
    double = Logits(logits.main.detach().double().requires_grad_(), None)
    whole = segmentation_loss(double, label)
    with patch.object(logit_strips, "WHOLE_BYTES", 0):
        in_strips = segmentation_loss(double, label)
    assert float(in_strips.total) == pytest.approx(float(whole.total), rel=1e-13)
    gradients = [torch.autograd.grad(one.total, double.main)[0] for one in (whole, in_strips)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_without_a_scored_pixel_the_loss_is_0_with_zero_gradients() -> None:
    logits, label = make_pair()
    with patch.object(logit_strips, "WHOLE_BYTES", 0):
        loss, gradients = loss_of(LossConfig(), logits, torch.full_like(label, -1))
    assert float(loss.total) == 0
    assert all((gradient == 0).all() for gradient in gradients)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.mark.parametrize("name", ["cross entropy", "ohem", "focal", "dice"])
def test_no_tensor_is_as_large_as_all_upsampled_logits(name: str) -> None:
    main = torch.randn(1, 5, 64, 64, requires_grad=True)
    label = torch.randint(0, 5, (1, 512, 512))
    config = CONFIGS[name]
    with (
        patch.object(logit_strips, "WHOLE_BYTES", 0),
        patch.object(LogitsByStrip.__init__, "__defaults__", (2**17,)),
        LargestTensor() as seen,
    ):
        segmentation_loss(Logits(main, None), label, terms=build_terms(config, 5)).total.backward()
    assert seen.largest <= label.numel()  # maps of losses and labels, but not five times as much


def test_the_accuracy_in_the_log_is_counted_in_strips_too() -> None:
    logits, label = make_pair()
    expected = count_correct(logits.main, label)
    with patch.object(logit_strips, "WHOLE_BYTES", 0):
        assert count_correct(logits.main, label) == expected


def test_labels_at_the_resolution_of_the_logits_and_small_maps_are_computed_as_before() -> None:
    logits, label = make_pair()
    assert isinstance(logit_strips.fit_to_label(logits.main, label), Tensor)
    fitting = logit_strips.fit_to_label(logits.main, label[:, :10, :13])
    assert fitting is logits.main
