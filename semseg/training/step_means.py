"""Loss and accuracy over several steps: the mean of a row of the log, and the running mean of the progress."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from torch import Tensor

from semseg.nets.precision import choose_widest_float

TRAIN_METRICS = ("train/loss", "train/accuracy")
WINDOW = 20  # steps of the running mean


@runtime_checkable
class HasStepMean(Protocol):
    """A module that trains; this package needs to know no more about semseg/lit_module.py."""

    @property
    def step_mean(self) -> Tensor:
        """(2) loss and accuracy of the current step on this device."""
        ...


def get_step_mean(module: pl.LightningModule) -> Tensor:
    """(2) loss and accuracy of the current step on this device."""
    assert isinstance(module, HasStepMean), "callbacks of training get a module that trains"
    return module.step_mean


def is_step_complete(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a step of the optimiser ends with this sub-batch. The last one of an epoch takes those that remain."""
    num_done = batch_idx + 1
    return num_done % trainer.accumulate_grad_batches == 0 or num_done == trainer.num_training_batches


class StepSums(NamedTuple):
    """Sums over steps and ranks, as a checkpoint holds them."""

    loss: float
    accuracy: float
    num_steps: int  # of all ranks


NO_STEPS = StepSums(0.0, 0.0, 0)


class IntervalMean:
    """The mean of loss and accuracy over the steps of an interval on all ranks, independent of when a run was stopped.

    The values are float32 and their sums float64, which are exact for values that differ by less than a factor of about
    a million: so they do not depend on the order of the terms, and neither on the steps after which the ranks add up
    their sums, which is at every checkpoint. Steps with a NaN or infinite loss are left out. Apple's GPUs have float32
    sums, whose last digits depend on that order.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)  # loss, accuracy, steps of this rank; on the device

    def add(self, step_mean: Tensor) -> None:
        """Add a step: (2) loss and accuracy. Does not wait for the device."""
        sum_type = choose_widest_float(step_mean.device)
        values = torch.cat([step_mean.float().to(sum_type), step_mean.new_ones(1).to(sum_type)])
        values = torch.where(values[0].isfinite(), values, torch.zeros_like(values))
        self._sums = self._sums.to(values.dtype).to(values.device) + values

    def reduce(self, trainer: pl.Trainer) -> StepSums:
        """The sums over all ranks, each of which must call this."""
        device = trainer.strategy.root_device
        sums = trainer.strategy.reduce(
            self._sums.to(choose_widest_float(device)).to(device, copy=True), reduce_op="sum"
        )
        assert isinstance(sums, Tensor)
        loss, accuracy, num_steps = sums.tolist()
        return StepSums(loss, accuracy, int(num_steps))

    def restart(self, sums: StepSums = NO_STEPS) -> None:
        """Begin with the sums of a checkpoint, on one rank, or with none."""
        self._sums = torch.tensor(sums, dtype=torch.float64)


def compute_means(sums: StepSums) -> dict[str, float]:
    """Loss and accuracy by their names in the log; NaN if there is no step.

    >>> compute_means(StepSums(6.0, 1.5, 2))
    {'train/loss': 3.0, 'train/accuracy': 0.75}
    """
    means = [value / sums.num_steps if sums.num_steps else float("nan") for value in (sums.loss, sums.accuracy)]
    return dict(zip(TRAIN_METRICS, means, strict=True))


class RunningMean(NamedTuple):
    """Loss and accuracy of the last steps on this device."""

    loss: float
    accuracy: float
    num_steps: int  # WINDOW; fewer at the start of a run, and after a resume


class LastSteps:
    """Loss and accuracy of the last WINDOW steps on this device."""

    def __init__(self) -> None:
        self._values: deque[Tensor] = deque(maxlen=WINDOW)

    def add(self, step_mean: Tensor) -> None:
        """Add a step: (2) loss and accuracy. Does not wait for the device."""
        self._values.append(step_mean)

    def compute_mean(self) -> RunningMean | None:
        """Their mean; None before the first step."""
        if not self._values:
            return None
        loss, accuracy = torch.stack(tuple(self._values)).to("cpu").double().mean(0).tolist()
        return RunningMean(loss, accuracy, len(self._values))
