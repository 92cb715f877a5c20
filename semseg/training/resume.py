"""A resumed run takes exactly the steps that the stopped one would have taken.

The order of the images is a pure function of the sub-batch's number (semseg/data/plan.py). This file covers what
Lightning's checkpoints do not: the random numbers of dropout, the position of a run in its epochs, whether it is
finished, and a command line or data that do not fit the run.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason

from semseg.checkpoints.format import FORMAT_KEY, first_line, load_plain, parse_checkpoint
from semseg.config.hints import EXTENDING
from semseg.config.schema import ScheduleConfig, TrainerConfig, config_to_plain, flatten_sections
from semseg.config.tables import is_missing_key
from semseg.config.validate import iterate_leaves
from semseg.data.batch import Batch
from semseg.data.classes import ClassTable, find_moved_class
from semseg.data.overlap import file_length
from semseg.data.records import Record
from semseg.data.seeding import number_for
from semseg.errors import CheckpointError, ConfigError
from semseg.training.loggers.csv import CSVLog
from semseg.training.optim import build_schedule
from semseg.training.training_state import check_training_state

RUN_KEY = "semseg_run"  # in a checkpoint: RunConditions
EARLY_STOPPING = "pytorch_lightning.callbacks.EarlyStopping"
_DROPOUT = 2  # number of the random stream, different from those of the plan


class SeedEveryStep(Callback):
    """Seeds torch's generators before every step, so that dropout depends on the step and the rank only."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        position = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx
        torch.manual_seed(number_for(self.seed, _DROPOUT, position, trainer.global_rank))


class DropRepeatedSteps(Callback):
    """Removes what a resumed run repeats from the log and from Lightning's counts."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step, is_pending = trainer.global_step, is_validation_pending(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, CSVLog):
                logger.drop_from(step)
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
                return cls(name, str(state.get("stopping_reason_message")).removesuffix(" Signaling Trainer to stop."))
        return None


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
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:  # tensors raise any
        raise CheckpointError(
            f"{path}: its description of the run is damaged ({first_line(error)}). Resume from another checkpoint, or "
            f"start a new run from its weights: init_from={path}."
        ) from None
    config = config_to_plain(saved.config)
    return RunState(path, config, position, saved.step, saved.classes, conditions, early_stop)


# ---- whether it is the same run


# Sections that decide the steps of a run; the rest (folders, loggers, number of workers, ...) may change.
STEP_SECTIONS = ("seed", "model", "data", "augment", "optim", "schedule", "loss", "ema", "syncbn")
CHANGEABLE_KEYS = (
    "data.num_workers", "data.worker_timeout_s", "data.label_cache", "data.on_bad", "data.max_bad", "data.max_pixels",
    "data.name", "data.root", "data.hint", "data.test", "data.miou_rule", "data.archive",
    "model.name", "model.config", "model.channels_last", "model.winograd", "model.compile", "model.encoder.weights",
    "optim.fused", "optim.lr_images",
)  # fmt: skip
# Keys that decide which checkpoint is the best; with others, the next one would replace it.
BEST_KEYS = ("checkpoint.monitor", "checkpoint.mode")
# Keys that decide how validation scores a network.
SCORE_KEYS = ("eval.scales", "eval.flip", "eval.window", "eval.stride", "data.miou_rule")
# Keys that decide which weights and which state of the optimiser a checkpoint holds.
FIXED_KEYS = (
    "model.library", "model.arch", "model.options", "model.encoder.name", "model.encoder.library",
    "model.encoder.frozen", "model.decoder.", "data.num_classes", "data.classes.order",
    "optim.name", "optim.layer_decay",
)  # fmt: skip
NEW_RUN_ADVICE = "For a new run give another run_dir, with init_from=<checkpoint> to start from these weights"
STEP_TRAINER_KEYS = ("trainer.accumulate_grad_batches", "trainer.gradient_clip_val", "trainer.precision")


def find_differing_keys(
    saved: dict[str, Any], given: dict[str, Any], is_compared: Callable[[str], bool] | None = None
) -> dict[str, tuple[Any, Any]]:
    """Keys that differ between two plain configurations, with the saved and the given value.

    Args:
        is_compared: whether a key counts; None: those that decide the steps.
    """
    is_compared = is_compared or decides_steps
    before, after = (dict(flatten_sections(config)) for config in (saved, given))
    return {
        key: (before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if is_compared(key) and before.get(key) != after.get(key)
    }


def decides_steps(key: str) -> bool:
    """Whether another value of `key` changes the steps of a run.

    >>> decides_steps("data.batch_size"), decides_steps("data.num_workers")
    (True, False)
    """
    is_free = any(key == free or key.startswith(f"{free}.") for free in CHANGEABLE_KEYS)
    return (key.partition(".")[0] in STEP_SECTIONS and not is_free) or key in STEP_TRAINER_KEYS


def check_same_run(
    state: RunState,
    config: dict[str, Any],
    *,
    classes: ClassTable,
    decodes_colours: bool = False,
    force: bool = False,
) -> str | None:
    """None if the settings are those of the run so far; a report of the differences if `force` allows them.

    Args:
        config: the configuration of the run that is about to resume as plain data.
        classes: those of its data set.
        decodes_colours: whether its masks hold the colours of the classes.
        force: resume_force.

    Raises:
        ConfigError: if keys differ that decide the steps, and resuming is not forced; or, in any case, if they decide
            which weights and statistics a checkpoint holds.
    """
    rows = {
        key: f"{key}: {before} in the checkpoint, {after} now"
        + (f" (added by a program, which can resume the run: {EXTENDING})" if is_missing_key(key) else "")
        for key, (before, after) in find_differing_keys(state.config, config).items()
    }
    for key, values in find_differing_keys(state.config, config, BEST_KEYS.__contains__).items():
        if values[0] is None:  # of a version without the key
            continue
        rows[key] = f"{format_difference(key, *values)}. The next validation would replace best.ckpt"
    if classes.num_classes != state.num_classes:
        rows["data.num_classes"] = f"data.num_classes: {state.num_classes} in the checkpoint, {classes.num_classes} now"
    moved = find_moved_class(classes.names, state.classes.names)
    if moved is not None:
        before, after = (table.names[moved] for table in (state.classes, classes))
        rows["data.classes.order"] = f"data.classes: class {moved} is {before} in the checkpoint, {after} now"
    elif decodes_colours and classes.palette != state.classes.palette:
        rows["data.classes.colours"] = "data.classes: other colours, by which masks are read, than in the checkpoint"
    if any(key.startswith(FIXED_KEYS) for key in rows):
        listed = "\n  ".join(rows.values())
        raise ConfigError(
            f"{state.path}: its weights or the state of its optimiser do not fit this run:\n  {listed}\n"
            f"{NEW_RUN_ADVICE}."
        )
    return report_or_refuse(state.path, list(rows.values()), force=force)


def check_same_conditions(
    state: RunState, config: dict[str, Any], now: RunConditions, *, force: bool = False
) -> list[str]:
    """Reports of the differences between the run so far and now that are not in the settings.

    Args:
        config: the configuration of the run that is about to resume as plain data.
        force: resume_force.

    Raises:
        ConfigError: if they decide the steps, and resuming is not forced.
    """
    before = state.conditions
    if before is None:  # a checkpoint of the first release: only its settings are known
        keys = ("trainer.devices", "trainer.num_nodes", "trainer.limit_train_batches")
        saved, given = (dict(iterate_leaves(plain)) for plain in (state.config, config))
        rows = [format_difference(key, saved.get(key), given.get(key)) for key in keys]
    else:
        rows = [
            format_difference("number of devices", before.world_size, now.world_size),
            format_difference(
                "sub-batches of an epoch, on each device", before.batches_per_epoch, now.batches_per_epoch
            ),
            format_records_difference("train", before, now),
        ]
    report = report_or_refuse(state.path, [row for row in rows if row], force=force)
    return [line for line in (report, *find_warnings(state, config, now)) if line]


def find_warnings(state: RunState, config: dict[str, Any], now: RunConditions) -> Iterator[str]:
    """Warnings about differences with which a run may resume, but which the user should know."""
    before = state.conditions
    if before is None:
        return
    differing = find_differing_keys(state.config, config, SCORE_KEYS.__contains__)
    is_validated = "val" in now.records and config["trainer"]["limit_val_batches"] != 0
    rows = [format_difference(key, *differing[key]) for key in SCORE_KEYS if key in differing and is_validated]
    for row in (format_records_difference("val", before, now), "; ".join(rows)):
        if row:
            yield f"warning: {row}. Scores before and after are not comparable, and best.ckpt is chosen by both."
    for name in ("accelerator", "threads"):
        if row := format_difference(name, getattr(before, name), getattr(now, name)):
            yield f"warning: {row}. The order of floating-point sums changes: the run does not resume exactly."
    step = state.compute_resume_step(config["trainer"]["accumulate_grad_batches"], now.batches_per_epoch)
    positions = ((before.total_steps, state.step), (now.total_steps, step))
    schedule = ScheduleConfig(**config["schedule"])
    rates = [build_schedule(schedule, total)(position) for total, position in positions]
    if before.total_steps != now.total_steps and not math.isclose(*rates, rel_tol=1e-9):
        yield (
            f"the schedule ends at step {now.total_steps} now, {before.total_steps} in the checkpoint: at step {step} "
            f"the rate is {rates[1]:.4g} of the base rate, not {rates[0]:.4g}"
        )


def format_difference(name: str, before: object, now: object) -> str:
    """A line about two values; empty if they are equal."""
    return "" if before == now else f"{name}: {before} in the checkpoint, {now} now"


def format_records_difference(split: str, before: RunConditions, now: RunConditions) -> str:
    """A line about the images of a split; empty if they are the same."""
    (count, digest), (count_now, digest_now) = (run.records.get(split, [0, ""]) for run in (before, now))
    if count == count_now and digest != digest_now:
        return f"data.{split}: other files, sizes or order than in the checkpoint ({count} images in both)"
    return format_difference(f"data.{split}", f"{count} images", f"{count_now} images")


def report_or_refuse(source: Path, rows: Sequence[str], *, force: bool) -> str | None:
    """None without rows; a report of all of them if the run is forced to resume.

    Raises:
        ConfigError: if it is not.
    """
    if not rows:
        return None
    listed = "\n  ".join(rows)
    if force:
        return f"{source}: resuming with other settings or data, so not exactly (resume_force=true):\n  {listed}"
    raise ConfigError(
        f"{source}: this run differs from the one that wrote it, so it would not resume exactly:\n  {listed}\n"
        f"{NEW_RUN_ADVICE}; or resume anyway with resume_force=true."
    )
