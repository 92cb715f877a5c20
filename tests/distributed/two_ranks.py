"""What the tests have two training processes do. Imports no pytest: every rank loads it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping

from helpers.in_process import TINY_RUN, configured, fit
from semseg.config.schema import Config
from semseg.data.batch import Batch
from semseg.lit_module import SegmentationModule
from semseg.training.callbacks.guards import at_next_smaller_edge
from semseg.training.callbacks.stop import StoppedError
from semseg.training.losses import Loss

# Five images in sub-batches of two on two ranks; two epochs of three steps of two sub-batches a rank.
RESUMED = [
    *TINY_RUN, "data.steps_per_epoch=6", "trainer.accumulate_grad_batches=2", "trainer.max_epochs=2",
    "model/decoder=c1_deepsup", "trainer.devices=2", "trainer.strategy=ddp",
]  # fmt: skip
STOPS = (2, 3)  # steps: in the first epoch, and at its end
# Sub-batches of one image, each of its own size; normalisation and dropout must not know how they are shared out.
SHARED_OUT = [
    *TINY_RUN, "data.batch_size=1", "model.freeze_bn=true", "+model.encoder.dropout=false", "trainer.precision=64-true",
    "optim.lr=0.003", "trainer.max_epochs=1",
]  # fmt: skip
ON_TWO = ["trainer.devices=2", "trainer.strategy=ddp", "data.steps_per_epoch=4"]
ALONE = ["trainer.accumulate_grad_batches=2", "data.steps_per_epoch=8"]

# The loss of every second step goes to the log, and early stopping watches it at the ends of epochs.
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
    "frozen statistics": ["model/decoder=ppm_deepsup", "model.deepsup_weight=0", "model.freeze_bn=true"],
}
if find_spec("timm") is not None:
    UNUSED["unread maps"] = ["model/encoder=timm", "model.encoder.name=hrnet_w18_small", "model.encoder.weights=none"]

# Rank 1 has no memory for canvases as large as a short edge of 48 gives them; one of 32 stays below.
SCARCE = [
    *TINY_RUN, "data.steps_per_epoch=6", "trainer.max_epochs=1", "trainer.devices=2", "trainer.strategy=ddp",
    "loss.average=pixels", "trainer.accumulate_grad_batches=2",
]  # fmt: skip
LARGE = 48 * 48  # pixels
LOSSES, TRAINING_STEP = (
    SegmentationModule.losses,
    SegmentationModule.training_step,
)  # as they are before they are patched


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


def scarce_losses(module: SegmentationModule, batch: Batch, average: str) -> Loss:
    """`losses` on devices of which the second has little memory: it fails half way, in front of a collective."""
    if module.global_rank == 1 and batch.image[0, 0].numel() >= LARGE:
        module.net.encoder.fine(module.input(batch.image, batch.size))  # pyright: ignore[reportCallIssue]
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return LOSSES(module, batch, average)


def shrinking_step(module: SegmentationModule, batch: Batch, batch_idx: int) -> torch.Tensor:
    """`training_step` by a policy that needs no failure: rank 1 takes large canvases at the next smaller short edge."""
    if module.global_rank == 1 and batch.image[0, 0].numel() >= LARGE:
        smaller = at_next_smaller_edge(batch, [32, 48], size_divisor=8, label_stride=8)
        assert smaller is not None
        module.oom_retries += 1
        batch = smaller
    return TRAINING_STEP(module, batch, batch_idx)


class BestLoss(Callback):
    """Notes the loss that early stopping holds for the best."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (stopping,) = (callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping))  # pyright: ignore[reportAttributeAccessIssue]
        self.value = float(stopping.best_score)


class Weights(Callback):
    """Keeps what this rank's network is in the end, what of it was frozen, and how many sub-batches it has shrunk."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.unused = list(pl_module.unused)
        self.num_shrunk = pl_module.oom_retries


def end_with_little_memory(root: str, folder: Path) -> dict[str, Any]:
    """Weights of this rank after runs in which large sub-batches of rank 1 fail, or never come."""
    ends = {}
    for name, stub in (("losses", scarce_losses), ("training_step", shrinking_step)):
        weights = Weights()
        policy = "retry" if name == "losses" else "stop"
        with patch.object(SegmentationModule, name, stub):
            fit(run_of([*SCARCE, f"trainer.on_oom={policy}"], root, folder / policy), weights)
        ends[policy] = {"state": weights.state, "num_shrunk": weights.num_shrunk}
    return ends


def end_with_unused_parts(root: str, folder: Path) -> dict[str, Any]:
    """Weights of this rank after two steps of the networks in UNUSED, and the names of what was frozen."""
    ends = {}
    for name, words in UNUSED.items():
        weights = Weights()
        # Of two words for one part of the network the later one is meant.
        parts = {word.partition("=")[0].replace("/", ".") for word in words if word.startswith("model/")}
        kept = [word for word in TWO_STEPS if not word.lstrip("~").replace("/", ".").startswith(tuple(parts))]
        fit(run_of([*kept, *words], root, folder / name.replace(" ", "_")), weights)
        ends[name] = {"state": weights.state, "unused": weights.unused}
    return ends


def run_of(words: list[str], root: str, run_dir: Path) -> Config:
    drawn = ["data=scenes", "data.make.num_train=5", "data.make.num_val=2"]
    return configured(*drawn, *words, f"data.root={root}", f"run_dir={run_dir}")


def stop_and_go_on(rank: int, world: int, *, root: str, folder: str) -> dict[str, Any]:
    """Runs in `folder`: `whole`, `stopped_<step>` for all STOPS, and `two`; returns what this rank has seen of those.

    The entry "stopped" tells the steps at which this rank was stopped, "seen" the sub-batches of `two`, "scarce" and
    "unused" what `end_with_little_memory` and `end_with_unused_parts` give, "logged" the sub-batches of the run
    `logged` and the best loss of its early stopping.
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
    scarce = end_with_little_memory(root, Path(folder))
    unused = end_with_unused_parts(root, Path(folder))
    logged, best = Watch(), BestLoss()
    fit(run_of(LOGGED, root, Path(folder) / "logged"), logged, best)
    return {
        "stopped": stopped, "seen": watch.seen, "scarce": scarce, "unused": unused,
        "logged": {"seen": logged.seen, "best": best.value},
    }  # fmt: skip
