"""A moving average of the weights, which is validated and saved, and which a resumed run continues exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor, nn


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
        self.decay, self.start_step = decay, start_step
        self._is_swapped = False  # whether the network holds the average, during a validation

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning copies the network before it has its device and type: slow, and it would round 64-bit weights.
        average = self._average_model
        assert average is not None, "setup comes first"
        average.to(pl_module.device, torch.promote_types(next(pl_module.parameters()).dtype, torch.float32))
        average.n_averaged = average.n_averaged.cpu()  # it is read at every step, which would wait for a GPU

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        average, step = self._average_model, trainer.global_step
        if average is None or step <= self._latest_update_step:
            return  # a sub-batch after which the optimiser does not step
        if step <= self.start_step:
            average.n_averaged.zero_()
        # Not AveragedModel.update_parameters, which uploads the number of updates to the device.
        decay = self.decay if average.n_averaged > 0 else None
        update_average(list_values(average.module), list_values(pl_module), decay)
        average.n_averaged += 1
        self._latest_update_step = step

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


def list_values(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, without gradients."""
    return [value.detach() for value in (*module.parameters(), *module.buffers())]


@torch.no_grad()
def update_average(average: Sequence[Tensor], values: Sequence[Tensor], decay: float | None) -> None:
    """average = decay * average + (1 - decay) * values in place, without waiting for a device; None copies the values.

    Args:
        average: on the devices of `values`.
    """
    pairs = list(zip(average, values, strict=True))
    if decay is None:
        for averaged, value in pairs:
            averaged.copy_(value)
        return
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    # Rounded as torch's get_ema_avg_fn rounds it, which lerp is not; foreach is one kernel for many tensors.
    added = torch._foreach_mul([value for _, value in floating], 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
    kept = [averaged for averaged, _ in floating]
    torch._foreach_mul_(kept, decay)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(kept, added)  # pyright: ignore[reportPrivateImportUsage]
    for averaged, value in pairs:
        if not averaged.is_floating_point():  # numbers of updates of normalisation statistics
            averaged.copy_(averaged * decay + value * (1 - decay))
