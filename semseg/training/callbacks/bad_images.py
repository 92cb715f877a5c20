"""Images that cannot be read, where `data.on_bad=skip` leaves them out: reported, counted over all ranks, limited."""

from __future__ import annotations

import sys
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from semseg.data.batch import Batch
from semseg.data.records import check_bad_fraction
from semseg.system.text import escape_lines
from semseg.training.callbacks.step_reduction import StepReduction, Summands

LEFT_OUT_COUNT = "data/left_out"  # in the log

_reported: set[str] = set()


def report_bad_image(reason: str) -> None:
    """Print why an image is left out; once in a process."""
    if reason not in _reported:
        _reported.add(reason)
        print(f"left out: {escape_lines(reason)}", file=sys.stderr, flush=True)


class CountBadImages(Callback):
    """Counts images left out of training over all ranks and the whole run, and stops it at data.max_bad.

    The count is data/left_out in the log.

    Args:
        batch_size: images of a sub-batch, per device.
        max_bad: the largest fraction of images that may be left out.
        reduction: sums the counts of a step over the ranks.
    """

    def __init__(self, batch_size: int, max_bad: float, reduction: StepReduction) -> None:
        self.batch_size, self.max_bad = batch_size, max_bad
        self.seen = self.left_out = 0
        self._here = [0, 0]  # left out and seen by this rank since the last step of the optimiser
        self._reduction = reduction
        reduction.register(Summands(2, self._take_counts, self._add_counts))

    def state_dict(self) -> dict[str, Any]:
        self._reduction.flush()
        return {"seen": self.seen, "left_out": self.left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen, self.left_out = state_dict["seen"], state_dict["left_out"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        for reason in batch.bad:
            report_bad_image(reason)
        left_out, seen = self._here
        self._here = [left_out + len(batch.bad), seen + self.batch_size]

    def read_counts(self) -> dict[str, int]:
        self._reduction.flush()
        return {LEFT_OUT_COUNT: self.left_out}

    def _take_counts(self) -> list[int]:
        here, self._here = self._here, [0, 0]
        return here

    def _add_counts(self, step: int, counts: list[int]) -> None:
        self.left_out += counts[0]
        self.seen += counts[1]
        check_bad_fraction(self.left_out, self.seen, self.max_bad)
