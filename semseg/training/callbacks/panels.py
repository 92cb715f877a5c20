"""The same validation images with their predictions after every validation, which show how the network learns."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
from numpy.typing import NDArray
from pytorch_lightning.callbacks import Callback

from semseg.data.batch import EvalSample
from semseg.data.pairs import read_shown
from semseg.data.sources import DataSource
from semseg.reports.draw import Pixels, draw_comparison
from semseg.training.loggers.external import PictureLogger


class PredictedImage(NamedTuple):
    """A validation image with its label and its prediction, in the size of its file."""

    position: int  # in the split
    path: str
    image: Pixels  # (H, W, 3) RGB
    label: NDArray[np.integer]  # (H, W), -1 = not scored
    prediction: NDArray[np.integer]  # (H, W)


class ValidationImages(Callback):
    """Passes some validation images to `take_image` on rank 0, as soon as they are predicted.

    Args:
        source: the data set of the images.
        num_images: how many; the first ones of the validation split, or of rank 0's part of it.
    """

    def __init__(self, source: DataSource, num_images: int) -> None:
        self.source, self.num_images = source, num_images
        self._positions: set[int] = set()  # in the split

    def needs_images(self, trainer: pl.Trainer) -> bool:
        """Whether the images of this validation are needed; otherwise they are not read."""
        raise NotImplementedError

    def take_image(self, trainer: pl.Trainer, predicted: PredictedImage) -> None:
        """Draw or send an image."""
        raise NotImplementedError

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        groups = data.eval_groups("val")
        own_images = itertools.chain.from_iterable(groups[trainer.global_rank :: trainer.world_size])
        self._positions = set(sorted(set(own_images) - data.find_by_window("val"))[: self.num_images])

    def on_validation_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: list[EvalSample],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking or not self.needs_images(trainer):
            return
        for sample in batch:
            if sample.path not in outputs or sample.position not in self._positions:
                continue  # it cannot be read, or it was scored by window
            record = self.source.records("val")[sample.position]
            image = read_shown(record, self.source.label_map, self.source.config)
            label, prediction = (ids.cpu().numpy() for ids in (sample.label, outputs[sample.path]))
            self.take_image(trainer, PredictedImage(sample.position, record.image, image, label, prediction))


class LogPanels(ValidationImages):
    """Sends image | ground truth | prediction of some validation images to all loggers that take pictures."""

    def needs_images(self, trainer: pl.Trainer) -> bool:
        return any(isinstance(logger, PictureLogger) for logger in trainer.loggers)

    def take_image(self, trainer: pl.Trainer, predicted: PredictedImage) -> None:
        pixels = draw_comparison(predicted.image, predicted.label, predicted.prediction, self.source.classes)
        for logger in trainer.loggers:
            if isinstance(logger, PictureLogger):
                logger.log_picture(f"{predicted.position}_{Path(predicted.path).stem}", pixels, trainer.global_step)
