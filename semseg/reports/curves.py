"""Read training curves from the logs of a run folder. No torch."""

from __future__ import annotations

import csv
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from semseg.reports.charts import Line, Mark

# The columns of the log that each chart shows; a pattern must match the whole column name.
CHART_COLUMNS = {
    "loss": r"(train|val)/loss",
    "pixel accuracy": r"train/accuracy|val/pixel_accuracy",
    "mean IoU": r"val/miou",
    "learning rate": r"lr[-/].+",
}
VALIDATION = "val/"  # prefix of the columns that are measured at each validation
MEAN_IOU = "val/miou"
OVERALL = "val/overall"  # the mean of two scores that have charts of their own


class Curves(NamedTuple):
    """A chart of logged values over the training steps."""

    title: str
    lines: tuple[Line, ...]
    best: Mark | None = None  # the validation that chose best.ckpt
    last_step: float | None = None  # of the whole log


def read_training_curves(run_dir: str | Path, monitor: str = MEAN_IOU, mode: str = "max") -> tuple[Curves, ...]:
    """Read the charts from the logs below `run_dir`/logs; empty if there is no log.

    Steps are counted as in the log, from 0. A resumed run that writes another version folder replaces the values of
    earlier folders from its first step on.

    Args:
        monitor: the column by which the best validation is chosen.
        mode: whether the best value is the largest ("max") or the smallest ("min").
    """
    columns: dict[str, dict[int, float]] = {}
    for log in sorted((Path(run_dir) / "logs").rglob("metrics.csv"), key=_version_key):
        _merge_columns(columns, read_metrics_log(log))
    best = _find_best(columns, monitor, mode)
    last_step = max((step for points in columns.values() for step in points), default=None)
    charts = []
    for title, pattern in {**CHART_COLUMNS, **_find_own_scores(columns)}.items():
        lines = [
            _build_line(name, points)
            for name, points in sorted(columns.items())
            if points and re.fullmatch(pattern, name)
        ]
        if lines:
            charts.append(Curves(title, tuple(_drop_duplicate_lines(lines)), best, last_step))
    return tuple(charts)


def _find_own_scores(columns: Iterable[str]) -> dict[str, str]:
    """A chart for each score of the validations that a program has added: its title and pattern."""
    own = [name for name in sorted(columns) if name.startswith(VALIDATION) and name != OVERALL]
    return {
        name.removeprefix(VALIDATION): re.escape(name)
        for name in own
        if not any(re.fullmatch(pattern, name) for pattern in CHART_COLUMNS.values())
    }


def run_folder_of_checkpoint(checkpoint: str | Path) -> Path:
    """Return the run folder of a checkpoint at <run folder>/checkpoints/<file>."""
    return Path(checkpoint).absolute().parent.parent


def read_metrics_log(path: Path) -> dict[str, dict[int, float]]:
    """Read Lightning's metrics.csv as column -> step -> value, without empty cells, NaN and infinite values.

    A file that is not a table gives a warning and no columns.
    """
    columns: dict[str, dict[int, float]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = _parse_finite(row.pop("step", None))
                for name, text in row.items():
                    value = _parse_finite(text)
                    if step is not None and value is not None and name is not None:
                        columns.setdefault(name, {})[int(step)] = value
    except (OSError, ValueError, csv.Error) as error:
        warnings.warn(f"{path}: this log is damaged ({error}), so its curves are omitted", stacklevel=1)
        return {}
    return columns


def _merge_columns(columns: dict[str, dict[int, float]], later: dict[str, dict[int, float]]) -> None:
    first_step = min((step for points in later.values() for step in points), default=math.inf)
    for points in columns.values():
        for step in [step for step in points if step >= first_step]:
            del points[step]
    for name, points in later.items():
        columns.setdefault(name, {}).update(points)


def _find_best(columns: dict[str, dict[int, float]], monitor: str, mode: str) -> Mark | None:
    """The first of the validations with the best score; None without validation."""
    scores = columns.get(monitor)
    if not scores:
        return None
    sign = -1 if mode == "max" else 1
    step = min(scores, key=lambda step: (sign * scores[step], step))
    epoch = columns.get("epoch", {}).get(step)
    where = f"step {step}" if epoch is None else f"epoch {int(epoch) + 1}, step {step}"
    score = f"mean IoU {100 * scores[step]:.2f} %" if monitor == MEAN_IOU else f"{monitor} {scores[step]:.4g}"
    return Mark(step, f"best validation: {score}, {where}")


def _build_line(name: str, points: dict[int, float]) -> Line:
    steps = sorted(points)
    values = tuple(points[step] for step in steps)
    return Line(name, tuple(map(float, steps)), values, has_dots=name.startswith(VALIDATION))


def _drop_duplicate_lines(lines: list[Line]) -> list[Line]:
    """Drop lines that equal an earlier one: learning rates of parameter groups are often equal."""
    return [line for index, line in enumerate(lines) if not any(line[1:3] == other[1:3] for other in lines[:index])]


def _version_key(path: Path) -> tuple[int, float, str]:
    """Sort version folders by number, so that version_10 follows version_9."""
    match = re.fullmatch(r"version_(\d+)", path.parent.name)
    return (int(match[1]) if match else -1, path.stat().st_mtime, str(path))


def _parse_finite(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
