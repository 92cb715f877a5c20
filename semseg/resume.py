"""A resumed run takes the very steps that the stopped one would have taken.

The order of the images is a pure function of the step (semseg/data/plan.py); here are the three other things that
a checkpoint of Lightning's does not settle: the random numbers of dropout, a validation that was cut short, and a
command line that does not fit the run it goes on with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from semseg.checkpoint import load_plain, network_of
from semseg.collate import Batch
from semseg.config import Config, as_plain, walk
from semseg.csv_log import CSVLog
from semseg.errors import CheckpointError, ConfigError
from semseg.restoring import check_training_state
from semseg.seeding import number_for

_DROPOUT = 2  # a stream of its own, apart from those of the plan


class SeedEveryStep(Callback):
    """Seeds torch's generators before every step, so that dropout depends on the step and the rank alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        position = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx
        torch.manual_seed(number_for(self.seed, _DROPOUT, position, trainer.global_rank))


class ForgetRepeatedSteps(Callback):
    """Takes what a resumed run does again out of the log and out of Lightning's counts."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step, is_pending = trainer.global_step, validation_is_pending(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, CSVLog):
                logger.forget_from(step)
                if is_pending:
                    logger.forget_columns(step - 1, "val/")
        if is_pending:
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()  # see finish_cut_validation


def validation_is_pending(trainer: pl.Trainer) -> bool:
    """Whether training goes on from the end of an epoch whose validation was cut short."""
    loop = trainer.fit_loop.epoch_loop
    return loop.restarting and loop.batch_progress.is_last_batch and loop.val_loop.batch_progress.current.completed == 0


def finish_cut_validation(loops: dict[str, Any]) -> None:
    """Change the saved state of Lightning's loops so that a validation which is still to come will run.

    A checkpoint of the last batch of an epoch is written before validation. Lightning would go on with the next
    epoch; told that it was in the middle of validating, it goes back and validates.

    Args:
        loops: the entry "fit_loop" of a checkpoint's "loops"; changed in place.
    """
    training = loops["epoch_loop.batch_progress"]
    is_cut = training["is_last_batch"] and training["total"]["completed"] == training["total"]["processed"] - 1
    if not is_cut:
        return
    for counts in (training["total"], training["current"]):
        counts["completed"] = counts["processed"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    validation["total"] = {"ready": 1, "completed": 0, "started": 1, "processed": 0}
    validation["current"] = {"ready": 0, "completed": 0, "started": 0, "processed": 0}
    validation["is_last_batch"] = False


class RunState(NamedTuple):
    """Where a run is, by one of its checkpoints."""

    path: Path
    config: Config
    epoch: int  # that was running, from 1
    is_epoch_done: bool  # validation included

    def is_finished(self, max_epochs: int) -> bool:
        return self.is_epoch_done and self.epoch >= max_epochs


def read_run_state(path: Path) -> RunState:
    """Read where the run of a checkpoint is.

    Raises:
        CheckpointError: if the file is damaged, not one of ours, or holds a network without its optimiser.
    """
    content = load_plain(path)
    saved = network_of(path, content)
    if "optimizer_states" not in content:
        raise CheckpointError(
            f"{path}: a network without its optimiser, so no run can go on from it. "
            f"Start a new one from its weights: init_from={path}."
        )
    check_training_state(path, content)
    training = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    is_done = training["is_last_batch"] and training["total"]["completed"] == training["total"]["processed"]
    return RunState(path, saved.config, int(content["epoch"]) + 1, is_done)


# What decides the steps of a run; the rest (folders, loggers, number of workers, ...) may change.
EXACT = ("seed", "model", "data", "augment", "optim", "schedule", "loss", "ema", "syncbn")
FREE = (
    "data.num_workers", "data.worker_timeout_s", "data.label_cache", "data.on_bad", "data.max_bad", "data.max_pixels",
    "data.root", "data.hint", "data.test", "data.miou_rule", "data.archive",
    "model.name", "model.channels_last", "model.winograd", "model.compile", "model.encoder.weights",
)  # fmt: skip
EXACT_TRAINER = ("trainer.accumulate_grad_batches", "trainer.gradient_clip_val", "trainer.precision")


def differing_keys(saved: Config, given: Config) -> dict[str, tuple[Any, Any]]:
    """Keys on which two runs cannot be the same run, with the saved and the given value."""
    before, after = (dict(walk(as_plain(config))) for config in (saved, given))
    return {
        key: (before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if decides_steps(key) and before.get(key) != after.get(key)
    }


def decides_steps(key: str) -> bool:
    """Whether another value of `key` gives other steps.

    >>> decides_steps("data.batch_size"), decides_steps("data.num_workers")
    (True, False)
    """
    is_free = any(key == free or key.startswith(f"{free}.") for free in FREE)
    return (key.partition(".")[0] in EXACT and not is_free) or key in EXACT_TRAINER


def check_same_run(saved: Config, given: Config, source: Path, *, force: bool) -> str | None:
    """None if `given` goes on exactly with the run `saved`; what differs, in words, if it is forced to.

    Raises:
        ConfigError: if keys differ that decide the steps, and `force` is not set.
    """
    differing = differing_keys(saved, given)
    if not differing:
        return None
    rows = (f"{key}: {before} in the checkpoint, {after} now" for key, (before, after) in differing.items())
    told = "\n  ".join(rows)
    if force:
        return f"{source}: going on with other settings, so not exactly (resume_force=true):\n  {told}"
    raise ConfigError(
        f"{source}: the run it belongs to was another one, so going on would not be exact:\n  {told}\n"
        "Start a new run with init_from=<checkpoint>, or go on all the same with resume_force=true."
    )
