"""The log of the steps, the callbacks that write checkpoints, and signals in other modes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.callbacks import Callback

from semseg.checkpoints.atomic_io import BestCheckpoint
from semseg.config.schema import CheckpointConfig
from semseg.data.batch import Batch
from semseg.storage.run_folders import CHECKPOINT_FOLDER
from semseg.system.process import handle_stop_signals
from semseg.training.callbacks.saver import Saver
from semseg.training.callbacks.step_reduction import KeepsCounts, StepReduction
from semseg.training.step_means import IntervalMean, StepSums, compute_means, get_step_mean, is_step_complete
from semseg.training.training_state import SUMS_KEY


def checkpoint_callbacks(
    run_dir: Path, config: CheckpointConfig, reduction: StepReduction, *, has_val: bool
) -> list[Callback]:
    """The callbacks that write best.ckpt, if there is validation, and last.ckpt, which holds the best score as well."""
    last = Saver(run_dir, config, reduction)
    if not has_val:
        return [last]
    best = BestCheckpoint(
        run_dir / CHECKPOINT_FOLDER, "best", monitor=config.monitor, mode=config.mode, save_top_k=1,
        enable_version_counter=False, save_on_train_epoch_end=False, continue_on_error=config.on_error == "warn",
    )  # fmt: skip
    return [best, last]


class LogSteps(Callback):
    """Sends loss, accuracy, learning rates, times and memory to all loggers: a row of the log.

    There is a row for the first step of a run, for every `trainer.log_every_n_steps`-th step, and for the last step of
    every epoch and of the run. Its loss and accuracy are means over the steps since the row before and over all ranks;
    callbacks that monitor them see the same values. A checkpoint holds the sums since the last row, so that a resumed
    run writes the rows of one that never stopped.

    `time/data` and `time/step` are seconds per sub-batch on the first rank, averaged over the steps since the row
    before in this process: waiting for it (and writing checkpoints), and training on it. `memory` is the peak of this
    process's GPU memory so far, in GiB.

    Lightning itself logs a step after its checkpoints are written: a run resumed from one would lack that step.
    """

    def __init__(self) -> None:
        self._mean = IntervalMean()
        self._rates: dict[str, float] = {}
        self._seconds: dict[str, list[float]] = {"time/data": [], "time/step": []}
        self._lap_start = 0.0

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[SUMS_KEY] = self._mean.reduce(trainer)._asdict()  # all ranks save together

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.is_global_zero and SUMS_KEY in checkpoint:  # earlier releases had none
            self._mean.restart(StepSums(**checkpoint[SUMS_KEY]))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lap_start = time.monotonic()  # a run that resumes inside an epoch does not start one

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lap_start = time.monotonic()  # a validation is not waiting for data

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._lap("time/data")
        # Now, because the schedule has moved on when the step ends. Groups without decay have the rate of their part.
        groups = trainer.optimizers[0].param_groups
        self._rates = {f"lr/{group['name'].removesuffix('_no_decay')}": group["lr"] for group in groups}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._lap("time/step")
        if not is_step_complete(trainer, batch_idx):
            return
        self._mean.add(get_step_mean(pl_module))
        if not has_row(trainer, batch_idx):
            return
        means = compute_means(self._mean.reduce(trainer))
        self._mean.restart()
        counts = collect_counts(trainer)
        # For callbacks that monitor them.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in {**means, **counts}.items()})
        values = {**means, **counts, **self._rates, **self._cost(trainer), "epoch": trainer.current_epoch}
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step - 1)
        for seconds in self._seconds.values():
            seconds.clear()

    def _lap(self, name: str) -> None:
        now = time.monotonic()
        self._seconds[name].append(now - self._lap_start)
        self._lap_start = now

    def _cost(self, trainer: pl.Trainer) -> dict[str, float]:
        """Times and, on a GPU, memory."""
        cost = {name: sum(seconds) / max(len(seconds), 1) for name, seconds in self._seconds.items()}
        if trainer.strategy.root_device.type == "cuda":
            cost["memory"] = torch.cuda.max_memory_allocated() / 2**30
        return cost


def collect_counts(trainer: pl.Trainer) -> dict[str, float]:
    """What the callbacks have counted since the start of the run, by the names in the log."""
    counting = [callback for callback in trainer.callbacks if isinstance(callback, KeepsCounts)]  # pyright: ignore[reportAttributeAccessIssue]
    return {name: float(count) for callback in counting for name, count in callback.read_counts().items()}


def has_row(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether the log gets a row for the step that has just ended with this sub-batch."""
    step = trainer.global_step  # already counts this step
    is_regular = step % trainer.log_every_n_steps == 0  # pyright: ignore[reportAttributeAccessIssue]
    return step in (1, trainer.max_steps) or is_regular or batch_idx + 1 == trainer.num_training_batches


class EndOnSignals(Callback):
    """Stop signals end the process at once.

    Lightning's own handler of SIGTERM broadcasts from rank 0, which hangs a job if only one rank got the signal, and
    exits with code 0. Under SLURM it requeues the job, so it is kept there.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._handle_signals(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._handle_signals(trainer)

    def _handle_signals(self, trainer: pl.Trainer) -> None:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if not isinstance(environment, SLURMEnvironment):
            handle_stop_signals()
