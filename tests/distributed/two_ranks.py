"""What the tests have two training processes do. Imports no pytest: every rank loads it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch.profiler import ProfilerActivity, profile

from helpers.in_process import TINY_RUN, configured, fit
from semseg.checkpoints import atomic_io
from semseg.config.schema import Config
from semseg.data.batch import Batch
from semseg.training.callbacks.stop import StoppedError
from semseg.training.loggers.csv import CSVLog

# Five images in sub-batches of two on two ranks; two epochs of three steps of two sub-batches a rank. Step 2 is inside
# an interval of the log.
RESUMED = [
    *TINY_RUN, "data.steps_per_epoch=6", "trainer.accumulate_grad_batches=2", "trainer.max_epochs=2",
    "model/decoder=c1_deepsup", "trainer.devices=2", "trainer.strategy=ddp", "trainer.log_every_n_steps=20",
]  # fmt: skip
STOPS = (2, 3)  # steps: in the first epoch, and at its end
# Sub-batches of one image, each of its own size; normalisation and dropout must not know how they are shared out.
SHARED_OUT = [
    *TINY_RUN, "data.batch_size=1", "model.freeze_bn=true", "+model.encoder.dropout=false", "trainer.precision=64-true",
    "optim.lr=0.003", "trainer.max_epochs=1",
]  # fmt: skip
ON_TWO = ["trainer.devices=2", "trainer.strategy=ddp", "data.steps_per_epoch=4"]
ALONE = ["trainer.accumulate_grad_batches=2", "data.steps_per_epoch=8"]

# The log has rows for every second step and the ends of epochs, where early stopping watches the loss.
LOGGED = [
    *TINY_RUN, "trainer.devices=2", "trainer.strategy=ddp", "data.steps_per_epoch=6", "trainer.max_epochs=2",
    "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=2", "trainer.precision=64-true",
    "callbacks=early_stopping", "callbacks.early_stopping.monitor=train/loss", "callbacks.early_stopping.mode=min",
    "callbacks.early_stopping.check_on_train_epoch_end=true",
]  # fmt: skip
# Networks with parts that the loss does not reach, or that are frozen; each takes two steps.
TWO_STEPS = [*TINY_RUN, "trainer.devices=2", "trainer.strategy=ddp", "data.steps_per_epoch=2", "trainer.max_epochs=1"]
UNUSED = {
    "auxiliary head": ["model/decoder=c1_deepsup", "model.deepsup_weight=0"],
    "frozen encoder": ["model/decoder=c1_deepsup", "model.deepsup_weight=0", "model.encoder.frozen=true"],
    "frozen statistics": ["model/decoder=c1_deepsup", "model.deepsup_weight=0", "model.freeze_bn=true"],
}
if find_spec("timm") is not None:
    from helpers.tiny_vit import tiny_dinov3

    UNUSED["unread maps"] = ["model/encoder=timm", "model.encoder.name=hrnet_w18_small", "model.encoder.weights=none"]
    UNUSED["a pyramid"] = [  # every parameter gets a gradient
        "model/encoder=timm", f"model.encoder.name={tiny_dinov3.__name__}", "model.encoder.weights=none",
        "model/decoder=segformer", "model.decoder.width=8", "optim.layer_decay=0.8",
    ]  # fmt: skip


# Without synchronised statistics: what remains are the gradients and our own exchanges. Steps 1 and 4 are logged.
EXCHANGED = [
    *TINY_RUN, "trainer.devices=2", "trainer.strategy=ddp", "data.steps_per_epoch=8", "trainer.max_epochs=1",
    "model.freeze_bn=true", "data.on_bad=skip", "trainer.log_every_n_steps=4", "data.val.list=null",
]  # fmt: skip


class BestScores(Callback):
    """Notes at the end what this rank holds for the best score."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        best = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]  # pyright: ignore[reportAttributeAccessIssue]
        self.scores = [
            -1.0 if callback.best_model_score is None else float(callback.best_model_score) for callback in best
        ]


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


class BestLoss(Callback):
    """Notes the loss that early stopping holds for the best."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (stopping,) = (callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping))  # pyright: ignore[reportAttributeAccessIssue]
        self.value = float(stopping.best_score)


class Weights(Callback):
    """Keeps what this rank's network is in the end, and what of it was frozen."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.unused = list(pl_module.unused)


class Collectives(Callback):
    """Counts what the ranks exchange in every step: the collectives of PyTorch by name, whoever calls them."""

    def __init__(self) -> None:
        self.by_step: list[Counter[str]] = []
        self._profile: profile | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._end_step()
        self._profile = profile(activities=[ProfilerActivity.CPU])
        self._profile.__enter__()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end_step()

    def _end_step(self) -> None:
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            names = (event.key for event in self._profile.events() or ())
            self.by_step.append(Counter(name for name in names if name.startswith("gloo:")))
        self._profile = None


def count_collectives(root: str, folder: Path) -> dict[str, tuple[list[Counter[str]], str]]:
    """The collectives of every step, and what ended the run, by optim.fused; rank 1 gets SIGTERM in step 6."""
    counted = {}
    for fused in ("true", "false"):
        collectives = Collectives()
        config = run_of([*EXCHANGED, f"optim.fused={fused}"], root, folder / f"fused_{fused}")
        try:
            fit(config, collectives, StopAt(6))
        except StoppedError as error:
            counted[fused] = (collectives.by_step, str(error))
    return counted


def train_on_full_disk(rank: int, root: str, folder: Path) -> list[float]:
    """The best score that this rank holds after three epochs; rank 0 cannot write the log and best.ckpt at first."""
    fails = {"log": True, "best": True} if rank == 0 else dict[str, bool]()
    write_log, write = CSVLog.write, atomic_io._write_verified
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.csv")

    def write_log_at_last(log: CSVLog) -> None:
        if fails.pop("log", False):
            raise full
        write_log(log)

    def write_at_last(target: Path, checkpoint: dict[str, Any]) -> None:
        if target.name == "best.ckpt" and fails.pop("best", False):
            raise full
        write(target, checkpoint)

    best = BestScores()
    words = [*TWO_STEPS, "trainer.max_epochs=3", "checkpoint.on_error=warn"]
    with patch.object(CSVLog, "write", write_log_at_last), patch.object(atomic_io, "_write_verified", write_at_last):
        fit(run_of(words, root, folder / "full_disk"), best)
    return best.scores


def end_with_unused_parts(root: str, folder: Path) -> dict[str, Any]:
    """Weights of this rank after two steps of the networks in UNUSED, and the names of what was frozen."""
    ends = {}
    for name, words in UNUSED.items():
        weights = Weights()
        # If two overrides choose the same part of the network, the later one is used.
        parts = {word.partition("=")[0].replace("/", ".") for word in words if word.startswith("model/")}
        kept = [word for word in TWO_STEPS if not word.lstrip("~").replace("/", ".").startswith(tuple(parts))]
        fit(run_of([*kept, *words], root, folder / name.replace(" ", "_")), weights)
        ends[name] = {"state": weights.state, "unused": weights.unused}
    return ends


def run_of(words: list[str], root: str, run_dir: Path) -> Config:
    drawn = ["data=scenes", "data.make.num_train=5", "data.make.num_val=2"]
    return configured(*drawn, *words, f"data.root={root}", f"run_dir={run_dir}")


def stop_and_resume(rank: int, world: int, *, root: str, folder: str) -> dict[str, Any]:
    """Runs in `folder`: `whole`, `stopped_<step>` for all STOPS, and `two`; returns what this rank has seen of those.

    The entry "stopped" holds the steps at which this rank was stopped, "seen" the sub-batches of `two`,
    "unused" what `end_with_unused_parts` gives, "logged" the sub-batches of the run
    `logged` and the best loss of its early stopping, "collectives" what `count_collectives` gives, and "full disk" what
    `train_on_full_disk` gives.
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
    unused = end_with_unused_parts(root, Path(folder))
    logged, best = Watch(), BestLoss()
    fit(run_of(LOGGED, root, Path(folder) / "logged"), logged, best)
    return {
        "stopped": stopped, "seen": watch.seen, "unused": unused,
        "logged": {"seen": logged.seen, "best": best.value},
        "collectives": count_collectives(root, Path(folder)), "full disk": train_on_full_disk(rank, root, Path(folder)),
    }  # fmt: skip
