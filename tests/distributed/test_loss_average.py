"""How the loss is averaged over ranks whose numbers of scored pixels differ."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.ranks import launch
from semseg.nets.interfaces import Logits
from semseg.training.losses import cross_entropy, segmentation_loss

LABELS = (torch.tensor([[[0, 1, 2, 0]]]), torch.tensor([[[1, -1, -1, -1]]]), torch.full((1, 1, 4), -1))
SCORES = torch.arange(12, dtype=torch.float64).reshape(1, 3, 1, 4) / 5
# Class weights: none, some of them 0 (the second rank then has nothing that counts), and all of them 0.
WEIGHTS = {"plain": None, "weighted": [0.5, 0.0, 2.0], "nothing": [0.0, 0.0, 0.0]}
AVERAGES = ("ranks", "pixels")


def smoothing_of(weights: list[float] | None) -> float:
    return 0.0 if weights is None else 0.1


def mean_gradients(rank: int, world: int) -> dict[str, Tensor]:
    """What DDP gives: the mean over ranks of each one's gradient."""
    gradients = {}
    for name, weights in WEIGHTS.items():
        vector = None if weights is None else torch.tensor(weights)
        term = partial(cross_entropy, weights=vector, smoothing=smoothing_of(weights))
        for average in AVERAGES:
            logits = (SCORES * (rank + 1)).requires_grad_()
            loss = segmentation_loss(Logits(logits, None), LABELS[rank], average=average, terms=[(1.0, term)])
            loss.total.backward()
            assert logits.grad is not None
            gradients[f"{name}, {average}"] = logits.grad / len(LABELS)
    return gradients


@pytest.fixture(scope="module")
def found() -> list[dict[str, Tensor]]:
    """The gradients of every rank."""
    return launch(mean_gradients, len(LABELS))


@pytest.mark.reliability
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_d7_the_gradient_is_that_of_the_mean_it_names(name: str, average: str, found: list[dict[str, Tensor]]) -> None:
    weights = WEIGHTS[name]
    vector = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    inputs = [(SCORES * (rank + 1)).requires_grad_() for rank in range(len(LABELS))]
    sums = [
        F.cross_entropy(x, y, vector, ignore_index=-1, reduction="sum", label_smoothing=smoothing_of(weights))
        for x, y in zip(inputs, LABELS, strict=True)
    ]
    # What the scored pixels of each rank weigh: 0, 1, 2, 0 and 1 and none.
    heavy = {"plain": [4.0, 1.0, 0.0], "weighted": [3.0, 0.0, 0.0], "nothing": [0.0, 0.0, 0.0]}[name]
    if average == "ranks":  # a rank with nothing that counts has the loss 0
        mean = sum(total / weight for total, weight in zip(sums, heavy, strict=True) if weight) / len(LABELS)
    else:
        mean = sum(sums) / sum(heavy) if sum(heavy) else 0
    if isinstance(mean, Tensor):
        mean.backward()
    for x, gradients in zip(inputs, found, strict=True):
        expected = torch.zeros_like(x) if x.grad is None else x.grad
        torch.testing.assert_close(gradients[f"{name}, {average}"], expected, rtol=0, atol=1e-15)
