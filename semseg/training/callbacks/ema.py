"""A moving average of the weights, which is validated and saved, and which a resumed run continues exactly."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from semseg.checkpoints.format import TRAINED_WEIGHTS
from semseg.nets.precision import choose_weight_type


class MovingAverage(EMAWeightAveraging):
    """Lightning's exponential moving average, statistics of normalisation included.

    Validation runs on the average, and checkpoints hold it as the weights of the network, beside the weights that
    training resumes with. Unlike Lightning's callback, it can be saved in the middle of a validation; it equals the
    weights until it starts; a validation does not round it to the type of the network; and the weights are not replaced
    at the end of training, so that a run can be extended.

    Args:
        decay: average = decay * average + (1 - decay) * weights after every step.
        start_step: until then the average is the weights.
    """

    def __init__(self, decay: float, start_step: int) -> None:
        super().__init__(decay=decay, use_buffers=True)
        self.decay, self.start_step = decay, start_step
        self._trained: dict[str, Tensor] = {}  # the weights, during a validation, in which the network has the average

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None and choose_weight_type(str(trainer.precision)) == torch.float64:
            self._average_model.double()  # before a checkpoint is loaded into it

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning copies the network before it has its device and type: slow, and it would round 64-bit weights.
        average = self._average_model
        assert average is not None, "setup comes first"
        average.to(pl_module.device, torch.promote_types(next(pl_module.parameters()).dtype, torch.float32))
        average.n_averaged = average.n_averaged.cpu()  # it is read at every step, which would wait for a GPU

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._latest_update_step = trainer.global_step  # lower than the saved one if an epoch has fewer steps now

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
        update_average(average.module, pl_module, decay)
        average.n_averaged += 1
        self._latest_update_step = step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._average_model is not None:
            self._trained = {name: value.clone() for name, value in pl_module.state_dict().items()}
            self._copy_average_to_current(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._trained:
            pl_module.load_state_dict(self._trained)
            self._trained = {}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        average = self._average_model
        if average is None or TRAINED_WEIGHTS in checkpoint:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
        else:  # a run that gets an average when it resumes (resume_force)
            average.module.load_state_dict(checkpoint["state_dict"])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._trained:
            checkpoint[TRAINED_WEIGHTS] = self._trained


def list_values(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """What is averaged, parameters and statistics of normalisation, and the other buffers; without gradients.

    Those are no quantities that an average exists of: indices, counts, and settings that depend on the step.
    """
    averaged: list[Tensor] = list(module.parameters())
    copied: list[Tensor] = []
    for name, buffer in module.named_buffers():
        is_statistic = name.rpartition(".")[2] in ("running_mean", "running_var")
        (averaged if is_statistic else copied).append(buffer)
    return [value.detach() for value in averaged], copied


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float | None) -> None:
    """average = decay * average + (1 - decay) * module in place, without waiting for a device; None copies everything.

    Args:
        average: a copy of the module, on its device.
    """
    (kept, others), (values, copied) = list_values(average), list_values(module)
    if decay is None:
        others, copied = [*kept, *others], [*values, *copied]
    else:
        # In this form, what does not change (a frozen encoder) is its own average, however decay is rounded. foreach is
        # one kernel for many tensors.
        steps = torch._foreach_sub(values, kept)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(kept, steps, alpha=1 - decay)  # pyright: ignore[reportPrivateImportUsage]
    for other, value in zip(others, copied, strict=True):
        other.copy_(value)
