"""Mean and deviation of the scores of all folds of a cross-validation: a table, a CSV file and a page. No torch."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from semseg.errors import DataError
from semseg.reports.templates import format_percent, render_template
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import relative_to_cwd
from semseg.system.text import escape_csv_cell, escape_lines

SCORES = {"mean_iou": "mean IoU", "pixel_accuracy": "pixel accuracy", "overall_score": "overall score"}


class Fold(NamedTuple):
    """The evaluation of one fold."""

    number: int  # from 0
    metrics: Path  # metrics.json


class FoldSpread(NamedTuple):
    """A score over the folds that have one."""

    name: str
    values: tuple[float | None, ...]  # of each fold; None: the class does not occur there

    @property
    def known(self) -> list[float]:
        """The scores that there are."""
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float | None:
        """The mean over the folds with a score."""
        return statistics.fmean(self.known) if self.known else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation of a single fold (n - 1 in the denominator); None for fewer than two."""
        return statistics.stdev(self.known) if len(self.known) > 1 else None

    @property
    def error(self) -> float | None:
        """The standard error of the mean, as if the folds were independent; None for fewer than two."""
        return None if self.deviation is None else self.deviation / math.sqrt(len(self.known))


class FoldScores(NamedTuple):
    """All scores of the folds that are finished."""

    numbers: tuple[int, ...]
    totals: tuple[FoldSpread, ...]
    classes: tuple[FoldSpread, ...]  # IoU


def read_folds(folds: Sequence[Fold]) -> FoldScores:
    """Read the scores of folds.

    Raises:
        DataError: if a file is missing or damaged, or the folds have other classes.
    """
    contents: list[dict[str, Any]] = []
    for fold in folds:
        try:
            content = json.loads(fold.metrics.read_text(encoding="utf-8"))
            names = [row["name"] for row in content["classes"]]
            # Without a pixel of the class, its IoU is 0 as soon as it is predicted, which says nothing about it.
            content["iou"] = [row["iou"] if row["pixels"] else None for row in content["classes"]]
            float(content["mean_iou"] or 0)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = type(error).__name__
            raise DataError(
                f"{fold.metrics}: cannot be read ({reason}). Remove its folder, and the evaluation is repeated."
            ) from None
        if contents and names != [row["name"] for row in contents[0]["classes"]]:
            raise DataError(f"{fold.metrics}: has other classes than {folds[0].metrics}. Use another run_dir.")
        contents.append(content)
    names = [row["name"] for row in contents[0]["classes"]] if contents else []
    return FoldScores(
        tuple(fold.number for fold in folds),
        tuple(FoldSpread(title, tuple(content[key] for content in contents)) for key, title in SCORES.items()),
        tuple(
            FoldSpread(name, tuple(content["iou"][index] for content in contents)) for index, name in enumerate(names)
        ),
    )


def report_folds(run_dir: Path, folds: Sequence[Fold], num_folds: int, command: str) -> float | None:
    """Print the table of the folds that are finished, and write crossval.csv, crossval.json and crossval.html.

    Args:
        num_folds: of the cross-validation.
        command: continues it.

    Returns:
        The mean of the mean IoU of these folds; None without any.

    Raises:
        DataError: if the scores of a fold cannot be read.
    """
    if not folds:
        print("no fold is finished")
        return None
    scores = read_folds(folds)
    title = f"{len(folds)} of {num_folds} folds"
    Console().print(render_fold_table(scores, title))
    write_csv(run_dir / "crossval.csv", scores)
    content = {
        "folds": list(scores.numbers),
        "num_folds": num_folds,
        "scores": {total.name: summarise_spread(total) for total in scores.totals},
        "iou": {row.name: summarise_spread(row) for row in scores.classes},
    }
    with atomic_write(run_dir / "crossval.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    pages = {fold.number: f"fold_{fold.number}/{fold.metrics.parent.name}/report.html" for fold in folds}
    page = render_template("crossval.html", scores=scores, pages=pages, title=title, command=command)
    with atomic_write(run_dir / "crossval.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    folder = relative_to_cwd(run_dir)
    print(escape_lines(f"written to {folder}/crossval.csv, {folder}/crossval.json, {folder}/crossval.html"))
    return scores.totals[0].mean


def summarise_spread(spread: FoldSpread) -> dict[str, Any]:
    """A score as plain data."""
    return {"values": list(spread.values), "mean": spread.mean, "deviation": spread.deviation, "error": spread.error}


def render_fold_table(scores: FoldScores, title: str) -> Table:
    """Mean, deviation and every fold, in percent."""
    table = Table(title=Text(title))
    table.add_column("")
    for name in ("mean", "deviation", *(f"fold {number}" for number in scores.numbers)):
        table.add_column(Text(name), justify="right")
    for index, spread in enumerate((*scores.totals, *scores.classes)):
        values = (spread.mean, spread.deviation, *spread.values)
        is_last = index == len(scores.totals) - 1
        table.add_row(Text(escape_lines(spread.name)), *map(format_percent, values), end_section=is_last)
    return table


def write_csv(path: Path, scores: FoldScores) -> None:
    """Write a row for each score and each class: mean, deviation, standard error, and every fold, as fractions."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["score", "mean", "deviation", "error", *(f"fold {number}" for number in scores.numbers)])
        for kind, spreads in (("", scores.totals), ("IoU of ", scores.classes)):
            for spread in spreads:
                values = (spread.mean, spread.deviation, spread.error, *spread.values)
                cells = ["" if value is None else value for value in values]
                writer.writerow([escape_csv_cell(f"{kind}{spread.name}"), *cells])
