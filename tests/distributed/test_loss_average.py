"""How the loss is averaged over ranks whose numbers of scored pixels differ."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from semseg.losses import segmentation_loss
from semseg.nets.features import Logits

LABELS = (torch.tensor([[[0, 1, 2, 0]]]), torch.tensor([[[1, -1, -1, -1]]]), torch.full((1, 1, 4), -1))
SCORES = torch.arange(12, dtype=torch.float64).reshape(1, 3, 1, 4) / 5


def mean_gradient(rank: int, average: str, folder: str) -> None:
    """What DDP gives: the mean over ranks of each one's gradient."""
    os.environ.update(MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(LABELS))
    logits = (SCORES * (rank + 1)).requires_grad_()
    segmentation_loss(Logits(logits, None), LABELS[rank], average=average).total.backward()
    assert logits.grad is not None
    torch.save(logits.grad / len(LABELS), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("average", ["ranks", "pixels"])
def test_the_gradient_is_that_of_the_mean_it_names(average: str, tmp_path: Path) -> None:
    mp.spawn(mean_gradient, (average, str(tmp_path)), nprocs=len(LABELS))
    inputs = [(SCORES * (rank + 1)).requires_grad_() for rank in range(len(LABELS))]
    sums = [F.cross_entropy(x, y, ignore_index=-1, reduction="sum") for x, y in zip(inputs, LABELS, strict=True)]
    means = {
        "ranks": (sums[0] / 4 + sums[1] / 1 + 0) / 3,  # the rank with nothing to score counts as 0
        "pixels": (sums[0] + sums[1]) / 5,  # five scored pixels in all
    }
    means[average].backward()
    for rank, x in enumerate(inputs):
        expected = torch.zeros_like(x) if x.grad is None else x.grad
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
