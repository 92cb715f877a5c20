"""A moving average of the weights, which is validated and saved, and which a resumed run continues exactly."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging


class MovingAverage(EMAWeightAveraging):
    """Lightning's exponential moving average, statistics of normalisation included.

    Validation runs on the average, and checkpoints hold it as the weights of the network, beside the weights that
    training resumes with. Unlike Lightning's callback, it can be saved in the middle of a validation; it equals the
    weights until it starts; and the weights are not replaced at the end of training, so that a run can be extended.

    Args:
        decay: average = decay * average + (1 - decay) * weights after every step.
        start_step: until then the average is the weights.
    """

    def __init__(self, decay: float, start_step: int) -> None:
        super().__init__(decay=decay, use_buffers=True)
        self.start_step = start_step
        self._is_swapped = False  # whether the network holds the average, during a validation

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning copies the network before it has its device and type: slow, and it would round 64-bit weights.
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
