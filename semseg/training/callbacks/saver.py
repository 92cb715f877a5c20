"""Writes last.ckpt: after every epoch, at intervals in between, and when the run is asked to stop."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from semseg.checkpoints.atomic_io import report_failed_save
from semseg.config.schema import CheckpointConfig
from semseg.data.batch import Batch
from semseg.errors import CheckpointError
from semseg.storage.atomic import atomic_write, describe_write_error
from semseg.storage.commands import relative_to_cwd
from semseg.storage.run_folders import CHECKPOINT_FOLDER
from semseg.system.process import STOP_SIGNALS
from semseg.system.text import escape_lines
from semseg.training.callbacks.step_reduction import HostReduction, StepReduction, Summands
from semseg.training.callbacks.stop import StoppedError, StopSignals
from semseg.training.loggers.csv import CSVLog
from semseg.training.resume import limit_batches
from semseg.training.step_means import is_step_complete

LAST = "last.ckpt"


def is_validated(trainer: pl.Trainer) -> bool:
    """Whether a validation follows the current epoch."""
    interval = trainer.check_val_every_n_epoch
    return trainer.enable_validation and bool(interval) and (trainer.current_epoch + 1) % (interval or 1) == 0


class Saver(Checkpoint):
    """Writes last.ckpt, and stops all ranks at the same step when a signal asks for it.

    last.ckpt is written before every validation, at the end of every epoch, after every `every_n_steps` steps and
    `every_n_minutes` minutes of training, at `trainer.max_steps`, and when any rank was asked to stop. The last `keep`
    of those written between epochs are kept as step_<number>.ckpt.

    Raises:
        StoppedError: on all ranks at the same step, once last.ckpt is written.
        CheckpointError: if it cannot be written, unless `on_error` is "warn".
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, reduction: StepReduction) -> None:
        self.folder = run_dir / CHECKPOINT_FOLDER
        self.config = config
        self.signals = StopSignals()
        self._last_save = time.monotonic()
        self._saved_step = 0
        # With several ranks, what the sums have shown by now: on a GPU those of the step before.
        self._has_others = False
        self._agreed_signal = 0
        self._agreed_due = False
        self._host_reduction: HostReduction | None = None
        reduction.register(Summands(1 + len(STOP_SIGNALS), self._list_flags, self._read_sums))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._has_others = trainer.world_size > 1
        self._host_reduction = HostReduction(trainer.world_size)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.signals.install()  # now, because Lightning sets its own while it starts
        self._last_save = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        is_last = batch_idx + 1 == trainer.num_training_batches
        if not is_step_complete(trainer, batch_idx):
            return  # checkpoints hold no partly accumulated gradients
        if is_last and not is_validated(trainer):
            return  # on_train_epoch_end comes next, after callbacks that judge the epoch
        signal_number, is_due = self.signals.received or 0, self._is_due()
        if self._has_others:
            signal_number, is_due = self._agreed_signal, self._agreed_due
        step = trainer.global_step
        is_periodic = bool(self.config.every_n_steps) and step % (self.config.every_n_steps or 1) == 0
        is_end = step == trainer.max_steps  # may be inside an epoch
        should_save = bool(is_last or is_due or is_periodic or signal_number or is_end)
        is_saved = should_save and self.save(trainer)
        if is_saved and (is_due or is_periodic) and not is_last:
            self.keep_copy(trainer, step)
        self._stop_if(signal_number, trainer)

    def on_validation_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Some ranks have more batches than others, and all must take part. The state is in last.ckpt already.
        groups = len(trainer.datamodule.eval_groups("val"))  # pyright: ignore[reportAttributeAccessIssue]
        num_common = limit_batches(groups // trainer.world_size, trainer.limit_val_batches)
        if not trainer.sanity_checking and batch_idx < num_common:
            self._stop_if(self._agree_on_signal(), trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # ended by trainer.max_steps: on_train_batch_end has saved it
        signal_number = self._agree_on_signal()
        self.save(trainer)
        self._stop_if(signal_number, trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.signals.restore()

    def save(self, trainer: pl.Trainer) -> bool:
        """Write the log and last.ckpt; returns whether last.ckpt was written."""
        try:
            self.save_log(trainer)
            trainer.save_checkpoint(self.folder / LAST)
        except CheckpointError as error:
            if self.config.on_error != "warn":
                raise
            report_failed_save(trainer, error)
            return False
        finally:
            self._last_save = time.monotonic()
            self._saved_step, self._agreed_due = trainer.global_step, False
        return True

    def save_log(self, trainer: pl.Trainer) -> None:
        """Write the log; if it cannot be written, only warn with `on_error`.

        The rank that writes it must reach the checkpoint, in which all ranks communicate.
        """
        try:
            for logger in trainer.loggers:
                logger.write() if isinstance(logger, CSVLog) else logger.save()
        except OSError as error:
            self._warn_or_raise(error)

    def keep_copy(self, trainer: pl.Trainer, step: int) -> None:
        """Keep the checkpoint just written under the name of its step, and delete the oldest of these."""
        if not self.config.keep or not trainer.is_global_zero:
            return
        kept = self.folder / f"step_{step:08d}.ckpt"
        kept.unlink(missing_ok=True)
        try:
            os.link(self.folder / LAST, kept)  # last.ckpt is replaced, never modified
        except OSError:  # a file system without links
            try:
                with atomic_write(kept) as temporary:
                    shutil.copyfile(self.folder / LAST, temporary)
            except OSError as error:
                self._warn_or_raise(error)
        # Not by the step, which may be lower than before (resume_force).
        copies = sorted(self.folder.glob("step_*.ckpt"), key=lambda path: (path == kept, path.stat().st_mtime_ns))
        for old in copies[: -self.config.keep]:
            old.unlink()

    def _warn_or_raise(self, error: OSError) -> None:
        """Print a warning about a file that cannot be written, if `on_error` says so; otherwise raise the error."""
        message = describe_write_error(error, self.folder)
        if self.config.on_error != "warn" or message is None:
            raise error
        print(f"warning: {escape_lines(message)}", file=sys.stderr, flush=True)

    def _is_due(self) -> bool:
        minutes = self.config.every_n_minutes
        return minutes is not None and time.monotonic() - self._last_save >= 60 * minutes

    def _list_flags(self) -> list[int]:
        """Whether a checkpoint is due on this rank, and which signal it has received."""
        return [int(self._is_due()), *(int(number == self.signals.received) for number in STOP_SIGNALS)]

    def _read_sums(self, step: int, sums: list[int]) -> None:
        due, *counts = sums
        received = [int(number) for number, count in zip(STOP_SIGNALS, counts, strict=True) if count]
        self._agreed_signal = max([self._agreed_signal, *received])
        if due and step > self._saved_step:  # otherwise the checkpoint has been written since
            self._agreed_due = True

    def _agree_on_signal(self) -> int:
        """The signal that any rank has received, 0 if none has; outside of training steps."""
        assert self._host_reduction is not None, "on_fit_start comes first"
        return self._host_reduction.find_maximum(max(int(self.signals.received or 0), self._agreed_signal))

    def _stop_if(self, number: int, trainer: pl.Trainer) -> None:
        if not number:
            return
        name = signal.Signals(number).name
        file = relative_to_cwd(self.folder / LAST)
        raise StoppedError(f"stopped by {name} at step {trainer.global_step}; {file} is written.", number)
