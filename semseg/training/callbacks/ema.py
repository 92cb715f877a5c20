"""A moving average of the weights that runs are validated and saved with, and that an interrupted run keeps exactly."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging

from semseg.config.schema import EmaConfig


class MovingAverage(EMAWeightAveraging):
    """Lightning's exponential moving average, statistics of normalisation included.

    Validation runs on the average, and checkpoints hold it in the place of the weights, beside the weights that
    training goes on from. Unlike Lightning's, it can be saved in the middle of a validation; it follows the weights
    until it starts; and the weights are not replaced at the end of training, so that a run can still be prolonged.
    """

    def __init__(self, config: EmaConfig) -> None:
        assert config.decay is not None, "made only where there is a decay"
        super().__init__(decay=config.decay, use_buffers=True)
        self.start_step = config.start_step
        self._is_swapped = False  # the network holds the average now, for a validation

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Made before the network had its device and its type: there it would be slow, and round 64-bit weights.
        assert self._average_model is not None, "setup comes first"
        self._average_model.to(pl_module.device, torch.promote_types(next(pl_module.parameters()).dtype, torch.float32))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._average_model is not None and trainer.global_step <= self.start_step:
            self._average_model.n_averaged.zero_()  # the next update copies
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        self._is_swapped = True

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        self._is_swapped = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._is_swapped:
            names = ("state_dict", "current_model_state")
            checkpoint[names[0]], checkpoint[names[1]] = checkpoint[names[1]], checkpoint[names[0]]
