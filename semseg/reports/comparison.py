"""Finished evaluations side by side, out of the files they left. No torch.

The first run is the base; every difference is another run's score less the base's.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from semseg.errors import ConfigError, DataError
from semseg.storage.atomic import program
from semseg.system.text import printable, shortened

HEADLINES = {
    "mean_iou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "overall_score": "overall score",
    "mean_accuracy": "mean accuracy",
    "frequency_weighted_iou": "frequency-weighted IoU",
    "mean_dice": "mean Dice",
}
# What two evaluations should have in common for their scores to mean the same.
CONDITIONS = ("data", "split", "scales", "flip", "mean_iou_rule")


class Evaluation(NamedTuple):
    """What one evaluation left behind."""

    name: str  # told apart from the other runs
    folder: Path  # where metrics.json is
    metrics: dict[str, Any]  # metrics.json
    images: dict[str, float | None] | None  # file -> mean IoU, 0..1; None: there is no per_image.csv


class Row(NamedTuple):
    """One score in every run."""

    name: str
    values: tuple[float | None, ...]  # one for each run, 0..1

    @property
    def differences(self) -> tuple[float | None, ...]:
        """Of every run but the first, to the first."""
        base = self.values[0]
        return tuple(None if base is None or value is None else value - base for value in self.values[1:])

    @property
    def change(self) -> float | None:
        """The largest difference without its sign; None if nothing can be compared."""
        return max((abs(value) for value in self.differences if value is not None), default=None)


class Comparison(NamedTuple):
    """Several runs side by side; the first is the base."""

    runs: tuple[Evaluation, ...]
    notes: tuple[str, ...]  # what keeps the numbers from being comparable
    headline: tuple[Row, ...]
    classes: tuple[Row, ...]  # IoU, in the order of the classes
    images: tuple[Row, ...]  # mean IoU of the images in all runs, the largest change first

    @property
    def class_ids(self) -> list[Any] | None:
        """The numbers of the classes in the base's label files; None where an older evaluation does not say them."""
        ids = [entry.get("id") for entry in self.runs[0].metrics["classes"]]
        return None if None in ids else ids


def read_evaluations(folders: Sequence[str]) -> tuple[Evaluation, ...]:
    """The evaluations in `folders`, each an evaluation's folder or a run folder with eval/ below it.

    Raises:
        ConfigError: if a folder holds no evaluation, or two mean the same one.
        DataError: if a file of an evaluation cannot be read.
    """
    found = [find_evaluation(folder) for folder in folders]
    for at, folder in enumerate(found):
        if folder.resolve() in [other.resolve() for other in found[:at]]:
            raise ConfigError(f"runs: {folders[at]} stands there twice. Name runs that differ.")
    names = distinct_names([Path(folder).expanduser() for folder in folders])
    return tuple(
        Evaluation(name, folder, read_metrics(folder / "metrics.json"), read_images(folder / "per_image.csv"))
        for name, folder in zip(names, found, strict=True)
    )


def find_evaluation(folder: str) -> Path:
    """Where the metrics.json of a run lies.

    Raises:
        ConfigError: if there is none.
    """
    path = Path(folder).expanduser()
    for place in (path, path / "eval"):
        if (place / "metrics.json").is_file():
            return place
    raise ConfigError(
        f"runs: {folder} holds no evaluation (neither metrics.json nor eval/metrics.json). "
        f"Make one: {program()} mode=eval ckpt={folder}"
    )


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Short names: as many last parts of the paths as tell them apart.

    >>> distinct_names([Path("runs/a/eval"), Path("runs/b/eval")])
    ['a/eval', 'b/eval']
    """
    parts = [folder.absolute().parts for folder in folders]
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def read_metrics(path: Path) -> dict[str, Any]:
    """metrics.json of an evaluation.

    Raises:
        DataError: if it is none.
    """
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as the scores of an evaluation ({error}).") from error
    classes = metrics.get("classes") if isinstance(metrics, dict) else None
    if not isinstance(classes, list) or not classes:
        raise DataError(f"{path}: holds no scores of classes. Was it written by mode=eval?")
    for entry in classes:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not is_score(entry.get("iou")):
            raise DataError(f"{path}: the scores of a class are damaged: {shortened(entry)}.")
    for key in HEADLINES:
        if not is_score(metrics.get(key)):
            raise DataError(f"{path}: {key} is damaged: {shortened(metrics[key])}.")
    return metrics


def is_score(value: object) -> bool:
    """Whether `value` is a share, or None where nothing was scored."""
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)  # pyright: ignore[reportOperatorIssue]


def read_images(path: Path) -> dict[str, float | None] | None:
    """The mean IoU of each image; None if there is no such table.

    Raises:
        DataError: if the table lacks a column or holds something else than numbers.
    """
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = {row["file"]: float(row["mean_iou"]) if row["mean_iou"] else None for row in csv.DictReader(file)}
        if not all(isinstance(file, str) and is_score(score) for file, score in rows.items()):
            raise ValueError("a mean IoU is a share")
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: not the table of images of an evaluation ({error!r}).") from error
    return rows


def compare(runs: Sequence[Evaluation]) -> Comparison:
    """Put the runs side by side.

    Raises:
        ConfigError: if their classes differ.
    """
    names = [class_names(run) for run in runs]
    for run, others in zip(runs[1:], names[1:], strict=True):
        if others != names[0]:
            raise ConfigError(f"runs: {different_classes(runs[0].name, names[0], run.name, others)}")
    rows = [
        Row(name, tuple(run.metrics["classes"][index].get("iou") for run in runs))
        for index, name in enumerate(names[0])
    ]
    images = image_rows(runs)
    return Comparison(
        tuple(runs),
        (*condition_notes(runs), *image_notes(runs, len(images))),
        headline_rows(runs),
        tuple(rows),
        images,
    )


def class_names(run: Evaluation) -> list[str]:
    """Names of the classes in the order of their indices."""
    return [printable(entry["name"]) for entry in run.metrics["classes"]]


def different_classes(base: str, base_names: list[str], other: str, other_names: list[str]) -> str:
    """A sentence on the first difference between two lists of classes."""
    if len(base_names) != len(other_names):
        return f"{base} has {len(base_names)} classes, but {other} has {len(other_names)}; they cannot be compared."
    index = next(at for at, (a, b) in enumerate(zip(base_names, other_names, strict=True)) if a != b)
    return (
        f"class {index} is {base_names[index]!r} in {base}, but {other_names[index]!r} in {other}; "
        "runs with different classes cannot be compared."
    )


def headline_rows(runs: Sequence[Evaluation]) -> tuple[Row, ...]:
    """The headline scores that all runs have."""
    return tuple(
        Row(name, tuple(run.metrics[key] for run in runs))
        for key, name in HEADLINES.items()
        if all(key in run.metrics for run in runs)
    )


def image_rows(runs: Sequence[Evaluation]) -> tuple[Row, ...]:
    """The images that all runs scored, the largest change first."""
    tables = [run.images for run in runs if run.images is not None]
    if len(tables) < len(runs):
        return ()
    common = [file for file in tables[0] if all(file in table for table in tables[1:])]
    rows = [Row(file, tuple(table[file] for table in tables)) for file in common]
    return tuple(sorted(rows, key=by_change))


def by_change(row: Row) -> tuple[bool, float]:
    """Sorts the largest change first and what cannot be compared last."""
    return (row.change is None, -(row.change or 0.0))


def condition_notes(runs: Sequence[Evaluation]) -> list[str]:
    """A sentence for everything about how the runs were scored that differs."""
    notes = []
    for key in CONDITIONS:
        values = [run.metrics.get(key) for run in runs]
        if any(value != values[0] for value in values):
            told = ", ".join(f"{run.name}: {words(value)}" for run, value in zip(runs, values, strict=True))
            notes.append(f"{key} differs ({told}), so the scores do not mean the same.")
    return notes


def image_notes(runs: Sequence[Evaluation], in_common: int) -> list[str]:
    """A sentence if images are compared in part or not at all."""
    without = [run.name for run in runs if run.images is None]
    if without:
        return [f"no per_image.csv in {', '.join(without)}: images are not compared."]
    counts = [len(run.images or ()) for run in runs]
    if all(number == in_common for number in counts):
        return []
    told = ", ".join(f"{run.name}: {number}" for run, number in zip(runs, counts, strict=True))
    return [
        f"the runs have {in_common} images in common ({told}). Only those are compared image by image; "
        "all other scores are over each run's own images."
    ]


def words(value: object) -> str:
    """A value of metrics.json in a sentence."""
    return "not told" if value is None else str(value)


def as_plain(comparison: Comparison) -> Mapping[str, Any]:
    """Words, numbers and lists only, for compare.json."""
    return {
        "runs": [{"name": run.name, "folder": str(run.folder)} for run in comparison.runs],
        "base": comparison.runs[0].name,
        "notes": list(comparison.notes),
        "headline": [plain_row(row) for row in comparison.headline],
        "classes": [plain_row(row) for row in comparison.classes],
        "images": [plain_row(row) for row in comparison.images],
    }


def plain_row(row: Row) -> dict[str, Any]:
    """One row with its differences."""
    return {"name": row.name, "values": list(row.values), "differences": list(row.differences)}


def csv_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The IoU of each class in every run and the differences to the base, for compare.csv."""
    names, ids = [run.name for run in comparison.runs], comparison.class_ids
    return [
        {"index": index}
        | ({} if ids is None else {"id": ids[index]})
        | {"name": row.name}
        | {f"iou {name}": value for name, value in zip(names, row.values, strict=True)}
        | {f"difference {name}": value for name, value in zip(names[1:], row.differences, strict=True)}
        for index, row in enumerate(comparison.classes)
    ]
