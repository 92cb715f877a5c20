"""What the tests have two training processes do. Imports no pytest: every rank loads it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from in_process import TINY_RUN, configured, fit
from semseg.collate import Batch
from semseg.config import Config
from semseg.stopping import StoppedError

# Five images in sub-batches of two on two ranks; two epochs of three steps of two sub-batches a rank.
RESUMED = [
    *TINY_RUN, "data.steps_per_epoch=6", "trainer.accumulate_grad_batches=2", "trainer.max_epochs=2",
    "model/decoder=c1_deepsup", "trainer.devices=2", "trainer.strategy=ddp",
]  # fmt: skip
STOPS = (2, 3, 5)  # steps: in the first epoch, at its end, in the second epoch
# Sub-batches of one image, each of its own size; normalisation and dropout must not know how they are shared out.
SHARED_OUT = [
    *TINY_RUN, "data.batch_size=1", "model.freeze_bn=true", "+model.encoder.dropout=false", "trainer.precision=64-true",
    "optim.lr=0.003", "trainer.max_epochs=1",
]  # fmt: skip
ON_TWO = ["trainer.devices=2", "trainer.strategy=ddp", "data.steps_per_epoch=4"]
ALONE = ["trainer.accumulate_grad_batches=2", "data.steps_per_epoch=8"]


class StopAt(Callback):
    """Rank 1 alone gets SIGTERM during the last sub-batch of step `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        is_last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_last and trainer.global_step + 1 == self.step and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Watch(Callback):
    """Notes images, size and loss of every sub-batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[str], list[int], float]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches  # which Lightning has divided it by
        self.seen.append((batch.paths, list(batch.image.shape), loss))


def run_of(words: list[str], root: str, run_dir: Path) -> Config:
    return configured("data=scenes", *words, f"data.root={root}", f"run_dir={run_dir}")


def stop_and_go_on(rank: int, world: int, *, root: str, folder: str) -> dict[str, Any]:
    """Runs in `folder`: `whole`, `stopped_<step>` for all STOPS, and `two`; returns what this rank has seen of those.

    The entry "stopped" tells the steps at which this rank was stopped, "seen" the sub-batches of `two`.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    fit(run_of(RESUMED, root, Path(folder) / "whole"))
    stopped = []
    for step in STOPS:
        config = run_of(RESUMED, root, Path(folder) / f"stopped_{step}")
        with contextlib.suppress(StoppedError):
            fit(config, StopAt(step))
            continue
        stopped.append(step)
        fit(config, resume=Path(config.run_dir) / "checkpoints" / "last.ckpt")
    watch = Watch()
    fit(run_of([*SHARED_OUT, *ON_TWO], root, Path(folder) / "two"), watch)
    return {"stopped": stopped, "seen": watch.seen}
