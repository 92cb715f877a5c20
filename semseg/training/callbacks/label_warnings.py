"""Warnings about labels and predictions that are probably not what was meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from semseg.data.batch import Batch
from semseg.data.classes import ClassTable

MOSTLY_IGNORED = 0.9  # share of the pixels of training images
NEARLY_ALL = 0.99  # share of the predicted pixels
TOO_GOOD = 0.999  # accuracy of training in the first epoch
SHOWN = 8  # names in a warning


class WarnOfOddLabels(Callback):
    """After the first epoch that this process sees: whether its labels, of all ranks, held anything to learn."""

    def __init__(self, classes: ClassTable) -> None:
        self.classes = classes
        self.counts: Tensor | None = None  # (K + 1) pixels; the last place: not scored, padding aside
        self.accuracies: list[Tensor] = []  # of every step
        self.is_done = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not self.is_done:
            counts = pixel_counts(batch, self.classes.num_classes)
            self.counts = counts if self.counts is None else self.counts + counts
            self.accuracies += [value for name, value in trainer.callback_metrics.items() if name == "train/accuracy"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_done or self.counts is None:
            return
        self.is_done = True
        counts = trainer.strategy.reduce(self.counts, reduce_op="sum")
        assert isinstance(counts, Tensor)
        for told in odd_labels(counts.tolist(), self.classes.names):
            rank_zero_warn(told)
        accuracy = float(torch.stack(self.accuracies).mean()) if self.accuracies else 0.0
        if accuracy > TOO_GOOD:
            rank_zero_warn(
                f"the training accuracy of this epoch is {accuracy:.2%}, which is too good to be true of a first one: "
                "are the labels what they should be? mode=check shows them."
            )


def pixel_counts(batch: Batch, num_classes: int) -> Tensor:
    """(K + 1) int64: pixels of each class in a sub-batch, and those that are not scored within the images."""
    place = batch.label.flatten()
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=place.device)
    # Not bincount, which waits for the device to tell the largest number.
    counts.scatter_add_(0, torch.where(place < 0, num_classes, place), torch.ones_like(place))
    label_stride = batch.image.shape[-1] // batch.label.shape[-1]
    sizes = (batch.size + label_stride - 1) // label_stride
    inside = (sizes[:, 0] * sizes[:, 1]).sum()
    counts[num_classes] = inside - counts[:num_classes].sum()
    return counts


def odd_labels(counts: Sequence[int], names: Sequence[str]) -> list[str]:
    """Sentences about the pixels that were trained on.

    Args:
        counts: of each class, and of pixels that are not scored.
        names: of the classes.
    """
    *scored, ignored = counts
    told = []
    if ignored > MOSTLY_IGNORED * sum(counts):
        share = ignored / max(1, sum(counts))
        told.append(f"{share:.1%} of the pixels of this epoch are ignored: are data.first_id and data.ignore right?")
    never = [name for name, count in zip(names, scored, strict=True) if not count]
    if never:
        more = f" and {len(never) - SHOWN} more" if len(never) > SHOWN else ""
        told.append(
            f"{len(never)} of {len(names)} classes did not occur in this epoch: {', '.join(never[:SHOWN])}{more}. "
            "mode=check tells whether they are there at all."
        )
    return told


def odd_predictions(matrix: Tensor, names: Sequence[str]) -> str | None:
    """A sentence if nearly all predictions of a confusion matrix (K, K; columns are predictions) are of one class."""
    predicted = matrix.sum(0)
    total, most = int(predicted.sum()), int(predicted.argmax())
    if total == 0 or int(predicted[most]) <= NEARLY_ALL * total:
        return None
    return (
        f"{int(predicted[most]) / total:.1%} of the predictions are {names[most]!r}: the network has learned nothing "
        "else yet. If that stays, look at the learning rate, the class weights and the labels (mode=check)."
    )
