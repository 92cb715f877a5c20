"""The same validation images at every validation, so that one can watch a network learn."""

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
from semseg.training.loggers.external import TakesPictures


class LogPanels(Callback):
    """Sends image | ground truth | prediction of some validation images to all loggers that take pictures.

    Args:
        source: of the images.
        num_images: the first ones of the validation split; of several ranks, the first ones of rank 0.
    """

    def __init__(self, source: DataSource, num_images: int) -> None:
        self.source, self.num_images = source, num_images
        self._shown: set[int] = set()  # places in the split

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        groups = trainer.datamodule.eval_groups("val")  # pyright: ignore[reportAttributeAccessIssue]
        own = itertools.chain.from_iterable(groups[trainer.global_rank :: trainer.world_size])
        self._shown = set(sorted(own)[: self.num_images])

    def on_validation_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: list[EvalSample],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        takers = [logger for logger in trainer.loggers if isinstance(logger, TakesPictures)]
        if not trainer.is_global_zero or trainer.sanity_checking or not takers:
            return
        for sample in batch:
            if sample.bad or sample.position not in self._shown:
                continue
            record = self.source.records("val")[sample.position]
            limit = self.source.config.max_pixels
            image = read_pair(record, self.source.label_map, max_pixels=limit).image
            label, prediction = (ids.cpu().numpy() for ids in (sample.label, outputs[sample.path]))
            pixels = draw_comparison(image, label, prediction, self.source.classes)
            for logger in takers:
                logger.log_picture(f"{sample.position}_{Path(record.image).stem}", pixels, trainer.global_step)
