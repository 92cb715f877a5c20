"""How long the first steps of a run wait for images: what data.num_workers=auto is corrected by in the next run."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from semseg.data.batch import Batch
from semseg.data.header_cache import cache_file, load_cache, save_cache
from semseg.nets.gpu import wait_for_device

NUM_WARM_UP = 10  # steps that are not measured: workers start, and kernels are chosen
NUM_TIMED = 100


class Waiting(NamedTuple):
    """What a run has measured."""

    num_workers: int  # of each rank
    fraction: float  # of the time that the first rank waited for images, 0..1


class WaitingRecord:
    """Where the waiting of runs with the same conditions is recorded.

    Args:
        cache: the folder of the cache.
        root: folder of the data set.
        conditions: plain data; other conditions have another record.
    """

    def __init__(self, cache: Path, root: Path, conditions: Any) -> None:
        self.key = hashlib.sha256(json.dumps(conditions, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.path = cache_file("waiting", root, cache)

    def read(self) -> Waiting | None:
        """What the last such run has measured; None if there was none."""
        match load_cache(self.path).get(self.key):
            case {"num_workers": int(num_workers), "fraction": float(fraction)} if (
                num_workers >= 0 and 0 <= fraction <= 1
            ):
                return Waiting(num_workers, fraction)
        return None

    def write(self, waiting: Waiting) -> None:
        """Replace the measurement of such runs. A cache that cannot be written is left alone."""
        save_cache(self.path, load_cache(self.path) | {self.key: waiting._asdict()})


class RecordWaiting(Callback):
    """Measures the waiting of the first NUM_TIMED steps after NUM_WARM_UP others, on the first rank.

    Each of these steps ends when the device has computed it: otherwise a host that has only queued the work would
    seem to wait for images. Nothing is recorded of a shorter run.
    """

    def __init__(self, record: WaitingRecord) -> None:
        self.record = record
        self._num_steps = 0
        self._waiting_s = self._step_s = self._lap_start = 0.0
        self._has_saved = False  # since the last step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lap_start = time.monotonic()  # neither a validation nor the checkpoints after it are waiting for images
        self._has_saved = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        seconds = self._lap()
        if not self._has_saved:
            self._waiting_s += seconds
        self._has_saved = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._has_saved = True  # which took part of the time before the next step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self._num_steps >= NUM_WARM_UP + NUM_TIMED or not trainer.is_global_zero:
            return
        wait_for_device(pl_module.device)
        self._step_s += self._lap()
        self._num_steps += 1
        if self._num_steps == NUM_WARM_UP:
            self._waiting_s = self._step_s = 0.0
        if self._num_steps == NUM_WARM_UP + NUM_TIMED:
            loader = trainer.datamodule.num_train_workers  # pyright: ignore[reportAttributeAccessIssue]
            self.record.write(Waiting(loader, self._waiting_s / max(self._waiting_s + self._step_s, 1e-9)))

    def _lap(self) -> float:
        """Seconds since the last call."""
        now = time.monotonic()
        seconds, self._lap_start = now - self._lap_start, now
        return seconds
