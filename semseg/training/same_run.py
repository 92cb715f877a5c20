"""Whether a command line and its data continue the run of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from semseg.config.hints import EXTENDING
from semseg.config.schema import ScheduleConfig, flatten_sections
from semseg.config.tables import is_missing_key
from semseg.config.validate import iterate_leaves
from semseg.data.classes import ClassTable, find_moved_class
from semseg.errors import ConfigError
from semseg.training.optim import build_schedule
from semseg.training.resume import RunConditions, RunState

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
