"""Checks of the training state in a checkpoint, which Lightning would load without validation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from semseg.checkpoints.atomic_io import AtomicCheckpointIO
from semseg.checkpoints.format import is_count, is_dense_tensor
from semseg.errors import CheckpointError, SemsegError, first_line
from semseg.system.text import shorten_repr
from semseg.training.step_means import NO_STEPS, StepSums

DATA_STATE = "SegmentationData"  # Lightning names the state of a data module after its class
# Without these counters Lightning would silently count from 0.
COUNTERS = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.automatic_optimization.optim_progress")
# Entries of callbacks, Lightning's and ours, by the kind of their values.
COUNT_ENTRIES = ("skipped", "overflows", "seen", "left_out", "wait_count", "stopped_epoch", "patience")
SCORE_ENTRIES = ("best", "best_score", "best_model_score", "current_score", "kth_value")
METRICS_KEY = "semseg_metrics"  # in a checkpoint: the training metrics of the last row of the log
SUMS_KEY = "semseg_sums"  # in a checkpoint: StepSums since that row; not in those of earlier releases
TEXT_ENTRIES = ("monitor", "dirpath", "best_model_path", "kth_best_model_path", "last_model_path")


def check_training_state(path: Path, content: dict[str, Any]) -> None:
    """Refuse a checkpoint whose training state is not one that a training run writes.

    Raises:
        CheckpointError: with the first invalid entry.
    """
    wrong = next(find_invalid_entries(content), None)
    if wrong is not None:
        raise CheckpointError(
            f"{path}: its training state is damaged at {wrong}, so no run can resume from it. Resume from another "
            f"checkpoint, or start a new run from its weights: init_from={path}."
        )


def find_invalid_entries(content: dict[str, Any]) -> Iterator[str]:
    """The entries of a checkpoint that are missing or of a wrong kind, as `path=value`."""
    loops = content.get("loops")
    fit_loop = loops.get("fit_loop") if isinstance(loops, dict) else None
    for name in COUNTERS:
        counter = fit_loop.get(name) if isinstance(fit_loop, dict) else None
        if not isinstance(counter, dict) or not counter:
            yield f"loops.fit_loop.{name}={shorten_repr(counter)}"
    for path, value in iterate_values(loops, "loops"):
        if not is_count(value) and not isinstance(value, bool) and value not in ({}, []):
            yield f"{path}={shorten_repr(value)}"
    position = content.get(DATA_STATE)
    if not isinstance(position, dict) or not is_count(position.get("taken", position.get("position"))):
        yield f"{DATA_STATE}={shorten_repr(position)}"
    yield from find_invalid_metrics(content)
    for key in ("optimizer_states", "lr_schedulers"):
        states = content.get(key)
        if not isinstance(states, list) or not all(isinstance(state, dict) for state in states):
            yield f"{key}={shorten_repr(states)}"
    callbacks = content.get("callbacks")
    if not isinstance(callbacks, dict) or not callbacks:  # every run has some
        yield f"callbacks={shorten_repr(callbacks)}"
        return
    for name, state in callbacks.items():
        for key, value in state.items() if isinstance(state, dict) else [(state, None)]:
            if not is_valid_entry(key, value):
                yield f"callbacks.{shorten_repr(name)}.{shorten_repr(key)}={shorten_repr(value)}"


def find_invalid_metrics(content: dict[str, Any]) -> Iterator[str]:
    """The entries about the log that are of a wrong kind; they may be missing."""
    metrics, sums = content.get(METRICS_KEY, {}), content.get(SUMS_KEY, NO_STEPS._asdict())
    if not isinstance(metrics, dict) or not all(isinstance(k, str) and is_number(v) for k, v in metrics.items()):
        yield f"{METRICS_KEY}={shorten_repr(metrics)}"
    if not is_valid_sums(sums):
        yield f"{SUMS_KEY}={shorten_repr(sums)}"


def is_valid_sums(sums: Any) -> bool:
    """Whether `sums` are the sums of some steps."""
    return (
        isinstance(sums, dict)
        and set(sums) == set(StepSums._fields)
        and all(type(value) in (int, float) and math.isfinite(value) for value in sums.values())
        and is_count(sums["num_steps"])
    )


def iterate_values(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All values in nested dicts and lists with their dotted paths."""
    items: Any = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    if not items:
        yield path, node
    for key, value in items:
        yield from iterate_values(value, f"{path}.{key}")


def is_valid_entry(key: Any, value: Any) -> bool:
    """Whether `value` can be the entry `key` of a callback's state."""
    if key in COUNT_ENTRIES:
        return is_count(value)
    if key in SCORE_ENTRIES:
        return value is None or is_number(value)
    if key in TEXT_ENTRIES:
        return isinstance(value, str) or (key in ("monitor", "dirpath") and value is None)
    if key == "best_k_models":
        return isinstance(value, dict) and all(isinstance(k, str) and is_number(v) for k, v in value.items())
    return isinstance(key, str)


def is_number(value: Any) -> bool:
    """Whether `value` is a real number or a tensor of one; it may be NaN."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and is_dense_tensor(value)
    return type(value) in (int, float) and (math.isnan(value) or abs(value) < 1e20)


class CheckRestoredState(Callback):
    """Checks, before the first step of a resumed run, that the optimiser and the schedule fit the network.

    Raises:
        CheckpointError: if they do not.
    """

    def __init__(self) -> None:
        self.is_restored = False

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        wrong = None if self.is_restored or trainer.ckpt_path is None else next(find_misfits(trainer), None)
        self.is_restored = True
        if wrong is not None:
            raise CheckpointError(f"{trainer.ckpt_path}: its training state is damaged at {wrong}.")


def find_misfits(trainer: pl.Trainer) -> Iterator[str]:
    """Entries of the restored optimisers and schedules that cannot belong to this network."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            name, rate = group.get("name"), group.get("initial_lr", 0.0)
            if not isinstance(name, str) or not is_number(rate):
                yield f"optimizer_states: a group with name={shorten_repr(name)} and initial_lr={shorten_repr(rate)}"
            for key, default in optimizer.defaults.items():
                if key not in group or not is_of_same_kind(group[key], default):
                    yield f"optimizer_states: {key}={shorten_repr(group.get(key))}"
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                fits = value.shape in (parameter.shape, ()) if isinstance(value, Tensor) else is_number(value)
                if not fits or (isinstance(value, Tensor) and not value.is_floating_point()):
                    yield f"optimizer_states: {key}, which does not fit a weight {tuple(parameter.shape)}"
    yield from find_schedule_misfits(trainer)


def find_schedule_misfits(trainer: pl.Trainer) -> Iterator[str]:
    for schedule in (config.scheduler for config in trainer.lr_scheduler_configs):
        number = len(schedule.optimizer.param_groups)
        for key in ("base_lrs", "_last_lr"):
            rates = getattr(schedule, key, None)
            if not isinstance(rates, list) or len(rates) != number or not all(map(is_number, rates)):
                yield f"lr_schedulers: {key}={shorten_repr(rates)}"
        for key in ("last_epoch", "_step_count"):
            if not is_count(getattr(schedule, key, None)):
                yield f"lr_schedulers: {key}={shorten_repr(getattr(schedule, key, None))}"


def is_of_same_kind(value: Any, default: Any) -> bool:
    """Whether an option of an optimiser is of the kind of its default."""
    if isinstance(default, bool) or default is None:
        return value is None or isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and len(value) == len(default) and all(map(is_number, value))
    return is_number(value) and float(value) >= 0


@contextmanager
def report_restore_errors(trainer: pl.Trainer, path: Path | None) -> Iterator[None]:
    """Within this context, errors of Lightning while it restores the training state of `path` name that file."""
    try:
        yield
    except SemsegError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        io = trainer.strategy.checkpoint_io
        checks = [callback for callback in trainer.callbacks if isinstance(callback, CheckRestoredState)]  # pyright: ignore[reportAttributeAccessIssue]
        is_restored = not checks or checks[0].is_restored
        if path is None or is_restored or not (isinstance(io, AtomicCheckpointIO) and io.has_loaded):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{path}: its training state cannot be restored ({reason}).") from error
