"""Pictures of the same validation images after every validation, which show how the network learns."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from semseg.data.batch import EvalSample
from semseg.data.pairs import read_pair
from semseg.data.sources import DataSource
from semseg.reports.draw import draw_comparison
from semseg.training.loggers.external import PictureLogger


class LogPanels(Callback):
    """Sends image | ground truth | prediction of some validation images to all loggers that take pictures.

    Args:
        source: the data set of the images.
        num_images: how many; the first ones of the validation split, or of rank 0's part of it.
    """

    def __init__(self, source: DataSource, num_images: int) -> None:
        self.source, self.num_images = source, num_images
        self._positions: set[int] = set()  # in the split

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        groups = trainer.datamodule.eval_groups("val")  # pyright: ignore[reportAttributeAccessIssue]
        own_images = itertools.chain.from_iterable(groups[trainer.global_rank :: trainer.world_size])
        self._positions = set(sorted(own_images)[: self.num_images])

    def on_validation_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: list[EvalSample],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        picture_loggers = [logger for logger in trainer.loggers if isinstance(logger, PictureLogger)]
        if not trainer.is_global_zero or trainer.sanity_checking or not picture_loggers:
            return
        for sample in batch:
            if sample.bad or sample.position not in self._positions:
                continue
            record = self.source.records("val")[sample.position]
            limit = self.source.config.max_pixels
            image = read_pair(record, self.source.label_map, max_pixels=limit).image
            label, prediction = (ids.cpu().numpy() for ids in (sample.label, outputs[sample.path]))
            pixels = draw_comparison(image, label, prediction, self.source.classes)
            for logger in picture_loggers:
                logger.log_picture(f"{sample.position}_{Path(record.image).stem}", pixels, trainer.global_step)
