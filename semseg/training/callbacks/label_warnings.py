"""Warnings about labels and predictions that are probably a mistake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from semseg.data.batch import Batch
from semseg.training.step_means import get_step_mean

MAX_IGNORED_PIXELS = 0.9  # fraction of the pixels of training images
MAX_PREDICTED_PIXELS = 0.99  # fraction of the pixels that are predicted as one class
MAX_FIRST_ACCURACY = 0.999  # training accuracy in the first epoch
MAX_CLASS_NAMES = 8  # classes named in a warning


class WarnAboutLabels(Callback):
    """After the first epoch of this process: whether its labels, on all ranks, held anything to learn.

    Args:
        names: of the classes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.counts: Tensor | None = None  # (K + 1) pixels; the last entry: not scored, padding aside
        self.accuracies: list[Tensor] = []  # one per sub-batch of this rank
        self.is_done = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not self.is_done:
            counts = count_label_pixels(batch, len(self.names))
            self.counts = counts if self.counts is None else self.counts + counts
            self.accuracies.append(get_step_mean(pl_module)[1])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_done or self.counts is None:
            return
        self.is_done = True
        counts = trainer.strategy.reduce(self.counts, reduce_op="sum")
        assert isinstance(counts, Tensor)
        for warning in describe_odd_labels(counts.tolist(), self.names):
            rank_zero_warn(warning)
        accuracy = float(torch.stack(self.accuracies).mean()) if self.accuracies else 0.0
        if accuracy > MAX_FIRST_ACCURACY:
            rank_zero_warn(
                f"the training accuracy of this epoch is {accuracy:.2%}, which is too good to be true for a first "
                "epoch: are the labels right? mode=check shows them."
            )


def count_label_pixels(batch: Batch, num_classes: int) -> Tensor:
    """(K + 1) int64: pixels of each class in a sub-batch, and those within the images that are not scored."""
    label = batch.label.flatten()
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=label.device)
    # Not bincount, which waits for the device to report the largest number.
    counts.scatter_add_(0, torch.where(label < 0, num_classes, label), torch.ones_like(label))
    label_stride = batch.image.shape[-1] // batch.label.shape[-1]
    sizes = (batch.size + label_stride - 1) // label_stride
    inside = (sizes[:, 0] * sizes[:, 1]).sum()
    counts[num_classes] = inside - counts[:num_classes].sum()
    return counts


def describe_odd_labels(counts: Sequence[int], names: Sequence[str]) -> list[str]:
    """Warnings about the pixels that were trained on.

    Args:
        counts: pixels of each class, and those that are not scored.
        names: of the classes.
    """
    *scored, ignored = counts
    warnings = []
    if ignored > MAX_IGNORED_PIXELS * sum(counts):
        fraction = ignored / max(1, sum(counts))
        warnings.append(
            f"{fraction:.1%} of the pixels of this epoch are ignored: are data.first_id and data.ignore right?"
        )
    absent = [name for name, count in zip(names, scored, strict=True) if not count]
    if absent:
        listed = ", ".join(absent[:MAX_CLASS_NAMES])
        more = f" and {len(absent) - MAX_CLASS_NAMES} more" if len(absent) > MAX_CLASS_NAMES else ""
        warnings.append(
            f"{len(absent)} of {len(names)} classes did not occur in this epoch: {listed}{more}."
            " mode=check reports whether they occur at all, and settings that keep small objects."
        )
    return warnings


def describe_odd_predictions(matrix: Tensor, names: Sequence[str]) -> str | None:
    """A warning if nearly all predictions of a confusion matrix (K, K; columns are predictions) are of one class."""
    predicted = matrix.sum(0)
    total, index = int(predicted.sum()), int(predicted.argmax())
    if total == 0 or int(predicted[index]) <= MAX_PREDICTED_PIXELS * total:
        return None
    return (
        f"{int(predicted[index]) / total:.1%} of the predictions are {names[index]!r}: the network has learned nothing "
        "else yet. If that does not change, look at the learning rate, the class weights and the labels (mode=check)."
    )
