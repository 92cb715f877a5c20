"""The same validation images at every validation, so that one can watch a network learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from semseg.data.datasets import EvalSample
from semseg.data.images import read_pair
from semseg.data.sources import DataSource
from semseg.draw import comparison
from semseg.loggers import TakesPictures


class LogPanels(Callback):
    """Sends image | ground truth | prediction of some validation images to all loggers that take pictures.

    Args:
        source: of the images.
        num_images: the first ones of the validation split; of several ranks, the first ones of rank 0.
    """

    def __init__(self, source: DataSource, num_images: int) -> None:
        self.source, self.num_images = source, num_images

    def on_validation_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: EvalSample,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        is_shown = trainer.is_global_zero and batch_idx < self.num_images and not trainer.sanity_checking
        takers = [logger for logger in trainer.loggers if isinstance(logger, TakesPictures)]
        if outputs is None or not is_shown or not takers:  # outputs: none of an image that cannot be read
            return
        record = self.source.records("val")[batch.index]
        image = read_pair(record, self.source.label_map).image
        label, prediction = (ids.cpu().numpy() for ids in (batch.label, outputs))
        pixels = comparison(image, label, prediction, self.source.classes)
        name = f"{batch.index}_{Path(record.image).stem}"
        for logger in takers:
            logger.log_picture(name, pixels, trainer.global_step)
