"""Compare finished evaluations by the files that they wrote. No torch.

The first run is the base; a difference is the score of another run minus the score of the base.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from semseg.errors import ConfigError, DataError
from semseg.storage.atomic import entry_command
from semseg.system.text import escape_unprintable, shorten_repr

HEADLINE_NAMES = {
    "mean_iou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "overall_score": "overall score",
    "mean_accuracy": "mean accuracy",
    "frequency_weighted_iou": "frequency-weighted IoU",
    "mean_dice": "mean Dice",
}
# The settings that evaluations must have in common for their scores to be comparable.
CONDITIONS = ("data", "split", "scales", "flip", "mean_iou_rule")


class ComparedRun(NamedTuple):
    """The files of one evaluation."""

    name: str  # distinct from the names of the other runs
    folder: Path  # holds metrics.json
    metrics: dict[str, Any]  # metrics.json
    images: dict[str, float | None] | None  # file -> mean IoU, 0..1; None if there is no per_image.csv


class ScoreRow(NamedTuple):
    """One score of every run."""

    name: str
    values: tuple[float | None, ...]  # one for each run, 0..1

    @property
    def differences(self) -> tuple[float | None, ...]:
        """The differences of all runs but the first to the first."""
        base = self.values[0]
        return tuple(None if base is None or value is None else value - base for value in self.values[1:])

    @property
    def change(self) -> float | None:
        """The largest absolute difference; None if no scores can be compared."""
        return max((abs(value) for value in self.differences if value is not None), default=None)


class Comparison(NamedTuple):
    """Several runs side by side; the first is the base."""

    runs: tuple[ComparedRun, ...]
    notes: tuple[str, ...]  # why numbers may not be comparable
    headline: tuple[ScoreRow, ...]
    classes: tuple[ScoreRow, ...]  # IoU, in the order of the classes
    images: tuple[ScoreRow, ...]  # mean IoU of the images that are in all runs, the largest change first

    @property
    def class_ids(self) -> list[Any] | None:
        """The ids of the classes in the base's label files; None if an older evaluation did not store them."""
        ids = [entry.get("id") for entry in self.runs[0].metrics["classes"]]
        return None if None in ids else ids


def read_evaluations(folders: Sequence[str]) -> tuple[ComparedRun, ...]:
    """Read the evaluations in `folders`, each an evaluation folder or a run folder with eval/ below it.

    Raises:
        ConfigError: if a folder holds no evaluation, or two folders are the same evaluation.
        DataError: if a file of an evaluation cannot be read.
    """
    paths = [find_evaluation_folder(folder) for folder in folders]
    for index, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:index]]:
            raise ConfigError(f"runs: {folders[index]} is listed twice. List each evaluation once.")
    names = choose_distinct_names([Path(folder).expanduser() for folder in folders])
    return tuple(
        ComparedRun(name, path, read_metrics(path / "metrics.json"), read_image_scores(path / "per_image.csv"))
        for name, path in zip(names, paths, strict=True)
    )


def find_evaluation_folder(folder: str) -> Path:
    """Return the folder that holds the metrics.json of a run.

    Raises:
        ConfigError: if there is none.
    """
    path = Path(folder).expanduser()
    for candidate in (path, path / "eval"):
        if (candidate / "metrics.json").is_file():
            return candidate
    raise ConfigError(
        f"runs: {folder} holds no evaluation (neither metrics.json nor eval/metrics.json). "
        f"Evaluate it first: {entry_command()} mode=eval ckpt={folder}"
    )


def choose_distinct_names(folders: Sequence[Path]) -> list[str]:
    """Shorten the paths to the last parts that are needed to distinguish them.

    >>> choose_distinct_names([Path("runs/a/eval"), Path("runs/b/eval")])
    ['a/eval', 'b/eval']
    """
    parts = [folder.absolute().parts for folder in folders]
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def read_metrics(path: Path) -> dict[str, Any]:
    """Read and check metrics.json of an evaluation.

    Raises:
        DataError: if the file is not the metrics.json of an evaluation.
    """
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as the scores of an evaluation ({error}).") from error
    classes = metrics.get("classes") if isinstance(metrics, dict) else None
    if not isinstance(classes, list) or not classes:
        raise DataError(f"{path}: holds no class scores. Only files that mode=eval wrote can be compared.")
    for entry in classes:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not is_score(entry.get("iou")):
            raise DataError(f"{path}: the scores of a class are damaged: {shorten_repr(entry)}. Evaluate again.")
    for key in HEADLINE_NAMES:
        if not is_score(metrics.get(key)):
            raise DataError(f"{path}: {key} is damaged: {shorten_repr(metrics[key])}. Evaluate again.")
    return metrics


def is_score(value: object) -> bool:
    """Whether `value` is a fraction from 0 to 1, or None (nothing was scored)."""
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)  # pyright: ignore[reportOperatorIssue]


def read_image_scores(path: Path) -> dict[str, float | None] | None:
    """Read the mean IoU of each image; None if there is no such table.

    Raises:
        DataError: if a column is missing or holds anything but numbers.
    """
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = {row["file"]: float(row["mean_iou"]) if row["mean_iou"] else None for row in csv.DictReader(file)}
        if not all(isinstance(file, str) and is_score(score) for file, score in rows.items()):
            raise ValueError("a mean IoU must be from 0 to 1")
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: is not the per-image table of an evaluation ({error!r}). Evaluate again.") from error
    return rows


def compare_runs(runs: Sequence[ComparedRun]) -> Comparison:
    """Put the runs side by side.

    Raises:
        ConfigError: if their classes differ.
    """
    names = [class_names(run) for run in runs]
    for run, others in zip(runs[1:], names[1:], strict=True):
        if others != names[0]:
            raise ConfigError(f"runs: {describe_class_difference(runs[0].name, names[0], run.name, others)}")
    rows = [
        ScoreRow(name, tuple(run.metrics["classes"][index].get("iou") for run in runs))
        for index, name in enumerate(names[0])
    ]
    images = build_image_rows(runs)
    return Comparison(
        tuple(runs),
        (*note_different_conditions(runs), *note_missing_images(runs, len(images))),
        build_headline_rows(runs),
        tuple(rows),
        images,
    )


def class_names(run: ComparedRun) -> list[str]:
    """Return the names of the classes in the order of their indices."""
    return [escape_unprintable(entry["name"]) for entry in run.metrics["classes"]]


def describe_class_difference(base: str, base_names: list[str], other: str, other_names: list[str]) -> str:
    """Describe the first difference between two lists of classes."""
    if len(base_names) != len(other_names):
        return f"{base} has {len(base_names)} classes, but {other} has {len(other_names)}; they cannot be compared."
    index = next(index for index, (a, b) in enumerate(zip(base_names, other_names, strict=True)) if a != b)
    return (
        f"class {index} is {base_names[index]!r} in {base}, but {other_names[index]!r} in {other}; "
        "runs with different classes cannot be compared."
    )


def build_headline_rows(runs: Sequence[ComparedRun]) -> tuple[ScoreRow, ...]:
    """Return the headline scores that all runs have."""
    return tuple(
        ScoreRow(name, tuple(run.metrics[key] for run in runs))
        for key, name in HEADLINE_NAMES.items()
        if all(key in run.metrics for run in runs)
    )


def build_image_rows(runs: Sequence[ComparedRun]) -> tuple[ScoreRow, ...]:
    """Return the images that all runs scored, the largest change first."""
    tables = [run.images for run in runs if run.images is not None]
    if len(tables) < len(runs):
        return ()
    common = [file for file in tables[0] if all(file in table for table in tables[1:])]
    rows = [ScoreRow(file, tuple(table[file] for table in tables)) for file in common]
    return tuple(sorted(rows, key=change_sort_key))


def change_sort_key(row: ScoreRow) -> tuple[bool, float]:
    """Sort key: the largest change first, rows that cannot be compared last."""
    return (row.change is None, -(row.change or 0.0))


def note_different_conditions(runs: Sequence[ComparedRun]) -> list[str]:
    """Write a sentence for each setting of the evaluations that differs."""
    notes = []
    for key in CONDITIONS:
        values = [run.metrics.get(key) for run in runs]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"{run.name}: {format_setting(value)}" for run, value in zip(runs, values, strict=True))
            notes.append(f"{key} differs ({listed}), so the scores are not comparable.")
    return notes


def note_missing_images(runs: Sequence[ComparedRun], num_common: int) -> list[str]:
    """Write a sentence if only some images are compared, or none."""
    without = [run.name for run in runs if run.images is None]
    if without:
        return [f"no per_image.csv in {', '.join(without)}: images are not compared."]
    counts = [len(run.images or ()) for run in runs]
    if all(count == num_common for count in counts):
        return []
    listed = ", ".join(f"{run.name}: {count}" for run, count in zip(runs, counts, strict=True))
    return [
        f"the runs have {num_common} images in common ({listed}). Only those are compared image by image; "
        "all other scores are over each run's own images."
    ]


def format_setting(value: object) -> str:
    """Format a value of metrics.json for a sentence."""
    return "not stored" if value is None else str(value)


def comparison_to_dict(comparison: Comparison) -> Mapping[str, Any]:
    """Return the content of compare.json."""
    return {
        "runs": [{"name": run.name, "folder": str(run.folder)} for run in comparison.runs],
        "base": comparison.runs[0].name,
        "notes": list(comparison.notes),
        "headline": [row_to_dict(row) for row in comparison.headline],
        "classes": [row_to_dict(row) for row in comparison.classes],
        "images": [row_to_dict(row) for row in comparison.images],
    }


def row_to_dict(row: ScoreRow) -> dict[str, Any]:
    """Return a row with its differences."""
    return {"name": row.name, "values": list(row.values), "differences": list(row.differences)}


def build_csv_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the rows of compare.csv: the IoU of each class in every run, and the differences to the base."""
    names, ids = [run.name for run in comparison.runs], comparison.class_ids
    return [
        {"index": index}
        | ({} if ids is None else {"id": ids[index]})
        | {"name": row.name}
        | {f"iou {name}": value for name, value in zip(names, row.values, strict=True)}
        | {f"difference {name}": value for name, value in zip(names[1:], row.differences, strict=True)}
        for index, row in enumerate(comparison.classes)
    ]
