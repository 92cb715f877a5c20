"""Training curves out of the logs of a run folder. No torch."""

from __future__ import annotations

import csv
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from semseg.reports.charts import Line

# Which columns of the log belong to which chart; a pattern must match the whole name.
CHARTS = {
    "loss": r"(train|val)/loss",
    "pixel accuracy": r"train/accuracy|val/pixel_accuracy",
    "mean IoU": r"val/miou",
    "learning rate": r"lr[-/].+",
}


class Curves(NamedTuple):
    """The lines of one chart over the training steps."""

    title: str
    lines: tuple[Line, ...]


def training_curves(run_dir: str | Path) -> tuple[Curves, ...]:
    """The charts that the logs below `run_dir`/logs allow; none if there is no log.

    A resumed run writes a further version folder: from its first step on it replaces what the earlier ones hold.
    """
    columns: dict[str, dict[int, float]] = {}
    for log in sorted((Path(run_dir) / "logs").rglob("metrics.csv"), key=_number):
        _join(columns, read_log(log))
    charts = []
    for title, pattern in CHARTS.items():
        lines = [
            _line(name, points) for name, points in sorted(columns.items()) if points and re.fullmatch(pattern, name)
        ]
        if lines:
            charts.append(Curves(title, tuple(_different(lines))))
    return tuple(charts)


def run_folder_of(checkpoint: str | Path) -> Path:
    """The run folder that a checkpoint lies in: <run folder>/checkpoints/<file>."""
    return Path(checkpoint).absolute().parent.parent


def read_log(path: Path) -> dict[str, dict[int, float]]:
    """Lightning's metrics.csv as column -> step -> value; empty cells and what is no finite number are left out.

    A file that is no table is reported by a warning, and has no columns.
    """
    columns: dict[str, dict[int, float]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = _finite(row.pop("step", None))
                for name, text in row.items():
                    value = _finite(text)
                    if step is not None and value is not None and name is not None:
                        columns.setdefault(name, {})[int(step)] = value
    except (OSError, ValueError, csv.Error) as error:
        warnings.warn(f"{path}: this log is damaged ({error}), so its curves are left out", stacklevel=1)
        return {}
    return columns


def _join(columns: dict[str, dict[int, float]], later: dict[str, dict[int, float]]) -> None:
    first = min((step for points in later.values() for step in points), default=math.inf)
    for points in columns.values():
        for step in [step for step in points if step >= first]:
            del points[step]
    for name, points in later.items():
        columns.setdefault(name, {}).update(points)


def _line(name: str, points: dict[int, float]) -> Line:
    steps = sorted(points)
    return Line(name, tuple(map(float, steps)), tuple(points[step] for step in steps))


def _different(lines: list[Line]) -> list[Line]:
    """Without lines that lie on top of one before: learning rates of parameter groups are often equal."""
    return [line for at, line in enumerate(lines) if not any(line[1:] == other[1:] for other in lines[:at])]


def _number(path: Path) -> tuple[int, float, str]:
    """Order of version folders: by number, so that version_10 follows version_9."""
    found = re.fullmatch(r"version_(\d+)", path.parent.name)
    return (int(found[1]) if found else -1, path.stat().st_mtime, str(path))


def _finite(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
