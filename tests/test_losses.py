from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from semseg.losses import segmentation_loss
from semseg.nets.features import Logits


def test_uniform_logits_cost_the_logarithm_of_the_number_of_classes() -> None:
    logits = Logits(torch.zeros(1, 4, 2, 2), None)
    loss = segmentation_loss(logits, torch.tensor([[[0, 1], [2, -1]]]))
    assert float(loss.total) == pytest.approx(math.log(4))
    assert int(loss.scored) == 3


def test_the_auxiliary_loss_weighs_four_tenths() -> None:
    zeros, label = torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)
    loss = segmentation_loss(Logits(zeros, zeros), label, deepsup_weight=0.4)
    assert float(loss.total) == pytest.approx(1.4 * math.log(4))


def test_an_auxiliary_map_of_another_size_is_resized_to_the_label() -> None:
    aux = torch.randn(1, 3, 4, 6)
    label = torch.randint(0, 3, (1, 2, 3))
    main = torch.zeros(1, 3, 2, 3)
    resized = F.interpolate(aux, size=(2, 3), mode="bilinear", align_corners=False)
    expected = math.log(3) + F.cross_entropy(resized, label)
    assert float(segmentation_loss(Logits(main, aux), label, 1.0).total) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.reliability
def test_c11_a_sub_batch_with_nothing_to_score_gives_zero_and_zero_gradients() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = segmentation_loss(Logits(logits, logits), torch.full((2, 4, 4), -1))
    loss.total.backward()
    assert float(loss.total) == 0
    assert logits.grad is not None and float(logits.grad.abs().max()) == 0


@pytest.mark.reliability
def test_c12_no_gradient_reaches_pixels_that_are_not_scored() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    segmentation_loss(Logits(logits, None), torch.tensor([[[0, -1], [-1, 2]]])).total.backward()
    assert logits.grad is not None
    assert float(logits.grad[0, :, 0, 1].abs().max()) == 0
    assert float(logits.grad[0, :, 0, 0].abs().max()) > 0


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(1, 5, 64, 64).bfloat16()
    label = torch.randint(0, 5, (1, 64, 64))
    loss = segmentation_loss(Logits(logits, None), label)
    assert loss.total.dtype == torch.float32
    assert float(loss.total) == pytest.approx(float(F.cross_entropy(logits.float(), label)), rel=1e-6)


def test_accuracy_counts_whole_pixels() -> None:
    logits = torch.tensor([[[[9.0, 0.0]], [[0.0, 9.0]]]])  # predicts 0, 1
    loss = segmentation_loss(Logits(logits, None), torch.tensor([[[0, 0]]]))
    assert (int(loss.correct), int(loss.scored)) == (1, 2)
