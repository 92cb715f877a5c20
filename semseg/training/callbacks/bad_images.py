"""Images that cannot be read, where `data.on_bad=skip` leaves them out: reported, counted over all ranks, limited."""

from __future__ import annotations

import sys
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from semseg.data.batch import Batch
from semseg.errors import DataError
from semseg.system.text import escape_lines
from semseg.training.callbacks.stop import Votes

MIN_IMAGES = 100  # the fraction of bad images is taken of at least this many

_reported: set[str] = set()


def report_bad_image(reason: str) -> None:
    """Print why an image is left out; once in a process."""
    if reason not in _reported:
        _reported.add(reason)
        print(f"left out: {escape_lines(reason)}", file=sys.stderr, flush=True)


def check_bad_fraction(left_out: int, seen: int, limit: float) -> None:
    """Stop if so many images cannot be read that it is no accident.

    Raises:
        DataError: if `left_out` is more than the fraction `limit` of the images seen, or of MIN_IMAGES.
    """
    if left_out > limit * max(seen, MIN_IMAGES):
        raise DataError(
            f"{left_out} of {seen} images could not be read, more than data.max_bad={limit:g} allows; they are named "
            "above. Fix or remove them, or raise data.max_bad."
        )


class CountBadImages(Callback):
    """Counts images left out of training over all ranks and the whole run, and stops it at data.max_bad.

    The count is logged as data/left_out with the step.

    Args:
        batch_size: images of a sub-batch, per device.
        max_bad: the largest fraction of images that may be left out.
    """

    def __init__(self, batch_size: int, max_bad: float) -> None:
        self.batch_size, self.max_bad = batch_size, max_bad
        self.seen = self.left_out = 0
        self._votes: Votes | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "left_out": self.left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen, self.left_out = state_dict["seen"], state_dict["left_out"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._votes = Votes(trainer.world_size)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        assert self._votes is not None, "on_fit_start comes first"
        for reason in batch.bad:
            report_bad_image(reason)
        bad, seen = self._votes.sum(len(batch.bad), self.batch_size)
        self.left_out += bad
        self.seen += seen
        pl_module.log("data/left_out", float(self.left_out), logger=False, batch_size=1)
        check_bad_fraction(self.left_out, self.seen, self.max_bad)
