"""A resumed run takes exactly the steps that the stopped one would have taken.

The order of the images is a pure function of the sub-batch's number (semseg/data/plan.py). This file covers what
Lightning's checkpoints do not: the random numbers of dropout, the position of a run in its epochs, and whether it is
finished. same_run.py refuses a command line or data that do not fit the run.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason

from semseg.checkpoints.format import FORMAT_KEY, load_plain, parse_checkpoint
from semseg.config.schema import EARLY_STOPPING, TrainerConfig, config_to_plain
from semseg.data.batch import Batch
from semseg.data.classes import ClassTable
from semseg.data.loaders import parse_taken
from semseg.data.overlap import file_length
from semseg.data.records import Record
from semseg.data.seeding import Stream, number_for
from semseg.errors import CheckpointError, first_line
from semseg.training.loggers.csv import CSVLog
from semseg.training.training_state import DATA_STATE, check_training_state

RUN_KEY = "semseg_run"  # in a checkpoint: RunConditions


class SeedEveryStep(Callback):
    """Seeds torch's generators before every step, so that dropout depends on the step and the rank only."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        position = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx
        torch.manual_seed(number_for(self.seed, Stream.DROPOUT, position, trainer.global_rank))


class DropRepeatedSteps(Callback):
    """Removes what a resumed run repeats from the log and from Lightning's counts."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step, is_pending = trainer.global_step, is_validation_pending(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, CSVLog):
                logger.drop_from(step, trainer.current_epoch)
                if is_pending:
                    logger.drop_columns(step - 1, "val/")
        loop = trainer.fit_loop.epoch_loop
        if is_pending:
            loop.val_loop.batch_progress.reset()  # see Position.apply_to
        elif not trainer.fit_loop.restarted_mid_epoch:
            loop.restarting = False  # the next epoch starts from its beginning, also with trainer.max_steps

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loop, limit = trainer.fit_loop.epoch_loop, self.max_steps
        if 0 < limit < loop.max_steps:
            loop.max_steps = limit  # see resume_at


def is_validation_pending(trainer: pl.Trainer) -> bool:
    """Whether training resumes at the end of an epoch whose validation was cut short."""
    loop = trainer.fit_loop.epoch_loop
    return loop.restarting and loop.batch_progress.is_last_batch and loop.val_loop.batch_progress.current.completed == 0


# ---- the position of a run


class Position(NamedTuple):
    """How far a run has come."""

    epochs: int  # epochs whose steps are all done
    batches: int = 0  # sub-batches done in the next epoch, on every device
    is_validation_pending: bool = False  # whether the last of `epochs` is still to be validated

    @classmethod
    def from_loops(cls, loops: dict[str, Any], validation_interval: int) -> Position:
        """The position at which a checkpoint was written.

        Where trainer.max_steps ends a run inside an epoch, Lightning counts that epoch as done; this does not.

        Args:
            loops: the entry "fit_loop" of a checkpoint's "loops".
            validation_interval: epochs from one validation to the next; 0: no validation.
        """
        batch = loops["epoch_loop.batch_progress"]
        started, batches = loops["epoch_progress"]["current"]["started"], batch["current"]["ready"]
        if batches and not batch["is_last_batch"]:
            return cls(started - 1, batches)
        # After the last batch of an epoch there are two checkpoints: one before validation, when the batch is not yet
        # counted as completed, and one after it.
        is_pending = batch["total"]["completed"] < batch["total"]["processed"]
        return cls(started, 0, is_pending and validation_interval > 0 and started % validation_interval == 0)

    def rescale(self, before: int, now: int, accumulate: int) -> Position:
        """The same fraction of an epoch of `now` sub-batches instead of `before`, rounded down to a whole step."""
        batches = self.batches * now // before
        return self._replace(batches=batches - batches % accumulate)

    def count_steps(self, batches_per_epoch: int, accumulate: int) -> int:
        """Steps of the optimiser up to here. The last one of an epoch takes the remaining sub-batches."""
        return self.epochs * -(-batches_per_epoch // accumulate) + self.batches // accumulate

    def apply_to(self, loops: dict[str, Any], batches_per_epoch: int, steps: int) -> None:
        """Change the saved state of Lightning's loops so that training resumes here.

        Lightning derives the position from differences between its counts, which takes a step too many at the end of
        an epoch without validation, and skips to the next epoch if a validation was interrupted. With the counts of a
        run in the middle of a validation, it validates first.

        Args:
            loops: the entry "fit_loop" of a checkpoint's "loops"; changed in place.
            batches_per_epoch: on every device.
            steps: steps of the optimiser up to here.
        """
        is_inside, is_pending = self.batches > 0, self.is_validation_pending
        started, done = self.epochs + is_inside, self.epochs - is_pending
        for counts in loops["epoch_progress"].values():
            counts.update(ready=started, started=started, processed=done, completed=done)
        batch = loops["epoch_loop.batch_progress"]
        taken = self.epochs * batches_per_epoch + self.batches
        batch["total"].update(ready=taken, started=taken, processed=taken, completed=taken - is_inside)
        current = batches_per_epoch if is_pending else self.batches
        batch["current"].update(ready=current, started=current, processed=current, completed=current - is_inside)
        batch["is_last_batch"] = is_pending
        loops["epoch_loop.scheduler_progress"]["total"].update(ready=steps, completed=steps)
        optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        optimizer["step"]["total"].update(ready=steps, completed=steps)
        # Lightning adds 1 itself for the step at which it resumes.
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - (is_inside or is_pending)
        loops["state_dict"]["combined_loader"] = []  # SegmentationData restores the loader
        if is_pending:
            validation = loops["epoch_loop.val_loop.batch_progress"]
            validation["total"] = {"ready": 1, "completed": 0, "started": 1, "processed": 0}
            validation["current"] = {"ready": 0, "completed": 0, "started": 0, "processed": 0}
            validation["is_last_batch"] = False


def get_validation_interval(trainer: TrainerConfig, *, has_val: bool) -> int:
    """Epochs from one validation to the next; 0: no validation."""
    return trainer.check_val_every_n_epoch if has_val and trainer.limit_val_batches != 0 else 0


def resume_at(trainer: pl.Trainer, config: dict[str, Any], checkpoint: dict[str, Any], batches_per_epoch: int) -> None:
    """Change a checkpoint that is about to be loaded so that the run resumes at the right step.

    If an epoch has another number of steps now (resume_force=true), finished epochs stay finished, and the schedule
    resumes at the same fraction of the epoch.

    Args:
        config: the configuration of this run as plain data, like the one in the checkpoint.
        checkpoint: the content of the file; changed in place.
        batches_per_epoch: sub-batches of an epoch of this run, on every device.
    """
    loops = checkpoint["loops"]["fit_loop"]
    interval = trainer.check_val_every_n_epoch if trainer.enable_validation else 0
    position, steps = Position.from_loops(loops, interval or 0), int(checkpoint["global_step"])
    accumulated, accumulate = (
        plain["trainer"]["accumulate_grad_batches"] for plain in (checkpoint[FORMAT_KEY]["config"], config)
    )
    conditions = RunConditions.from_checkpoint(checkpoint)
    rescaled = rescale_position(position, conditions, accumulated, accumulate, batches_per_epoch)
    if rescaled is not None:
        position = rescaled
        steps = checkpoint["global_step"] = position.count_steps(batches_per_epoch, accumulate)
        for scheduler in checkpoint["lr_schedulers"]:
            scheduler["last_epoch"] = steps
    position.apply_to(loops, batches_per_epoch, steps)
    if position.is_validation_pending and 0 < trainer.max_steps <= steps:
        trainer.fit_loop.epoch_loop.max_steps = steps + 1  # otherwise Lightning ends without it
    restore_early_stopping(trainer, config["callbacks"], checkpoint)


def rescale_position(
    position: Position, conditions: RunConditions | None, accumulated: int, accumulate: int, batches_per_epoch: int
) -> Position | None:
    """Where a run resumes if its epochs have another number of steps now; None if they have the same.

    Args:
        conditions: those of the run so far.
        accumulated: its trainer.accumulate_grad_batches.
        accumulate: trainer.accumulate_grad_batches now.
    """
    if conditions is None or (conditions.batches_per_epoch, accumulated) == (batches_per_epoch, accumulate):
        return None
    return position.rescale(conditions.batches_per_epoch, batches_per_epoch, accumulate)


# ---- early stopping


class EarlyStop(NamedTuple):
    """Why a callback of the configuration ended a run."""

    name: str  # its key in `callbacks`
    reason: str  # Lightning's message

    @classmethod
    def from_checkpoint(cls, content: dict[str, Any], callbacks: Mapping[str, Any]) -> EarlyStop | None:
        """What ended the run of a checkpoint, if the section `callbacks` still has the same callback; else None."""
        saved = content[FORMAT_KEY]["config"].get("callbacks", {})
        for name in list_early_stopping(callbacks):
            section = callbacks[name]
            if saved.get(name) != section:
                continue
            key = EarlyStopping(section.get("monitor", ""), mode=section.get("mode", "min")).state_key
            state = content["callbacks"].get(key, {})
            if state.get("stopping_reason"):
                return cls.from_message(name, str(state.get("stopping_reason_message")))
        return None

    @classmethod
    def from_trainer(cls, trainer: pl.Trainer, callbacks: Mapping[str, Any]) -> EarlyStop | None:
        """What ended a run now; None if it ended otherwise."""
        for name, callback in zip(list_early_stopping(callbacks), trainer.early_stopping_callbacks, strict=False):
            if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
                return cls.from_message(name, callback.stopping_reason_message)
        return None

    @classmethod
    def from_message(cls, name: str, message: str) -> EarlyStop:
        return cls(name, message.removesuffix(" Signaling Trainer to stop."))


def list_early_stopping(callbacks: Mapping[str, Any]) -> list[str]:
    """The keys of the early stopping callbacks in the section `callbacks`."""
    return [name for name, section in callbacks.items() if section.get("_target_") == EARLY_STOPPING]


def restore_early_stopping(trainer: pl.Trainer, callbacks: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
    """Keep a run that ended early finished, or let it continue if its section in `callbacks` has changed."""
    trainer.should_stop = EarlyStop.from_checkpoint(checkpoint, callbacks) is not None
    for callback in trainer.early_stopping_callbacks:
        state = checkpoint["callbacks"].get(callback.state_key)
        if isinstance(callback, EarlyStopping) and state is not None:
            state["patience"] = callback.patience  # Lightning would restore the saved one
            if not trainer.should_stop:
                state.update(stopping_reason=EarlyStoppingReason.NOT_STOPPED.value, stopping_reason_message=None)


# ---- conditions


class RunConditions(NamedTuple):
    """What decides the steps of a run besides its settings; saved in every checkpoint."""

    world_size: int  # devices on all machines
    batches_per_epoch: int  # on every device
    total_steps: int  # steps of the optimiser, and the length of the schedule
    records: dict[str, list[Any]]  # per split: the number of records and a digest
    accelerator: str  # cpu, gpu
    threads: int  # PyTorch's threads

    @classmethod
    def from_checkpoint(cls, content: dict[str, Any]) -> RunConditions | None:
        """The conditions in a checkpoint; None for one of the first release, which has none.

        Raises:
            TypeError, ValueError: if they are damaged.
        """
        if RUN_KEY not in content:
            return None
        conditions = cls(**content[RUN_KEY])
        if min(conditions[:3]) < 1 or not all(len(entry) == 2 for entry in conditions.records.values()):
            raise ValueError(f"{RUN_KEY}: {conditions}")
        return conditions


def limit_batches(batches: int, limit: float | None) -> int:
    """Batches under trainer.limit_train_batches or limit_val_batches: a number, or as a float a fraction.

    >>> limit_batches(9, None), limit_batches(9, 4), limit_batches(9, 0.5), limit_batches(9, 1.0)
    (9, 4, 4, 9)
    """
    if limit is None:
        return batches
    return int(batches * limit) if isinstance(limit, float) else min(batches, limit)


def apply_fast_dev_run(limits: TrainerConfig) -> TrainerConfig:
    """The limits of a run, with those that Lightning sets for trainer.fast_dev_run: one epoch of a few sub-batches."""
    if not limits.fast_dev_run:
        return limits
    count = int(limits.fast_dev_run)
    return replace(limits, max_epochs=1, max_steps=count, limit_train_batches=count)


def count_run_steps(trainer: TrainerConfig, batches_per_epoch: int) -> int:
    """Steps of the optimiser in a whole run."""
    trainer = apply_fast_dev_run(trainer)
    steps = trainer.max_epochs * math.ceil(batches_per_epoch / trainer.accumulate_grad_batches)
    return min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps


def digest_records(records: Sequence[Record], root: Path) -> list[Any]:
    """The number of records, and a digest of their order, paths below `root`, and sizes in pixels and bytes."""
    digest, base = hashlib.sha256(), f"{os.path.abspath(root)}{os.sep}"  # noqa: PTH100 - pathlib takes seconds here
    for record in records:
        files = [path for path in (record.image, record.label) if path]
        paths = [os.path.abspath(path).removeprefix(base) for path in files]  # noqa: PTH100
        line = (*record.size, *paths, *map(file_length, files))
        digest.update(repr(line).encode("utf-8", "surrogateescape"))
    return [len(records), digest.hexdigest()]


# ---- state


class RunState(NamedTuple):
    """The state of a run, read from one of its checkpoints."""

    path: Path
    config: dict[str, Any]  # the configuration of the run so far as plain data
    position: Position
    step: int  # optimiser steps since the start
    classes: ClassTable
    conditions: RunConditions | None  # None in a checkpoint of the first release
    early_stop: EarlyStop | None
    taken: int  # sub-batches of all ranks so far, which never falls, as the step may (see `resume_at`)

    @property
    def num_classes(self) -> int:
        return self.classes.num_classes

    def compute_resume_step(self, accumulate: int, batches_per_epoch: int) -> int:
        """The step at which `resume_at` resumes with this trainer.accumulate_grad_batches."""
        accumulated = self.config["trainer"]["accumulate_grad_batches"]
        position = rescale_position(self.position, self.conditions, accumulated, accumulate, batches_per_epoch)
        return self.step if position is None else position.count_steps(batches_per_epoch, accumulate)

    def describe_end(self, limits: TrainerConfig) -> str | None:
        """Why a run with these limits is finished, and what to change; None if steps are left to take."""
        if self.position.is_validation_pending:
            return None
        if self.early_stop is not None:
            name, reason = self.early_stop
            return (
                f"already finished at epoch {self.position.epochs}: callbacks.{name} ended it ({reason}). To continue, "
                f"change its settings, or remove it with {removal_override(name)}"
            )
        if limits.fast_dev_run and find_reached_limits(apply_fast_dev_run(limits), self.position.epochs, self.step):
            value = str(limits.fast_dev_run).lower()
            return (
                f"already finished at step {self.step}: trainer.fast_dev_run={value} allows no more. To continue, give "
                f"{' '.join(end_fast_dev_run(limits))}"
            )
        keys = find_reached_limits(limits, self.position.epochs, self.step)
        if not keys:
            return None
        end = f"epoch {self.position.epochs}" if "trainer.max_epochs" in keys else f"step {self.step}"
        return f"already finished at {end}; raise {' and '.join(keys)} to continue"


def find_reached_limits(limits: TrainerConfig, epochs: int, step: int) -> list[str]:
    """The keys of the limits that a run has reached after so many whole epochs and steps."""
    reached = {
        "trainer.max_epochs": epochs >= limits.max_epochs,
        "trainer.max_steps": 0 < limits.max_steps <= step,
    }
    return [key for key, is_reached in reached.items() if is_reached]


def end_fast_dev_run(limits: TrainerConfig) -> list[str]:
    """Overrides with which a run of trainer.fast_dev_run continues, with epochs as long as that one."""
    words = ["trainer.fast_dev_run=false", f"trainer.limit_train_batches={int(limits.fast_dev_run)}"]
    if limits.max_epochs == 1:
        words.append("trainer.max_epochs=2")
    return words


def removal_override(name: str) -> str:
    """The override that removes a callback from the configuration."""
    return f"~callbacks.{name}"


def count_taken(content: dict[str, Any], conditions: RunConditions | None) -> int:
    """The sub-batches that all ranks of a run had taken when it wrote a checkpoint."""
    return parse_taken(content[DATA_STATE], 1 if conditions is None else conditions.world_size)


def read_run_state(path: Path, trainer: TrainerConfig, callbacks: Mapping[str, Any], *, has_val: bool) -> RunState:
    """Read the state of a run from a checkpoint.

    Args:
        trainer, callbacks: the sections of the run that is about to resume.
        has_val: whether it has validation images.

    Raises:
        CheckpointError: if the file is damaged, not one of ours, or holds a network without its optimiser.
    """
    content = load_plain(path)
    saved = parse_checkpoint(path, content)
    if "optimizer_states" not in content:
        raise CheckpointError(
            f"{path}: holds a network without its optimiser, so no run can resume from it. "
            f"Start a new one from its weights: init_from={path}."
        )
    check_training_state(path, content)
    try:
        position = Position.from_loops(content["loops"]["fit_loop"], get_validation_interval(trainer, has_val=has_val))
        conditions, early_stop = RunConditions.from_checkpoint(content), EarlyStop.from_checkpoint(content, callbacks)
        taken = count_taken(content, conditions)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:  # tensors raise any
        raise CheckpointError(
            f"{path}: its description of the run is damaged ({first_line(error)}). Resume from another checkpoint, or "
            f"start a new run from its weights: init_from={path}."
        ) from None
    config = config_to_plain(saved.config)
    return RunState(path, config, position, saved.step, saved.classes, conditions, early_stop, taken)
