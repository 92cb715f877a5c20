"""Stage 8: a comparison of runs as one HTML file that opens from disk. No torch."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import NamedTuple

from semseg.reports.comparison import Comparison, Evaluation, Row, by_change
from semseg.reports.pictures import thumbnail_of_file
from semseg.reports.templates import render_template
from semseg.storage.atomic import replacing

NUM_IMAGES = 12  # of those that differ most
PANELS = ("{stem}.png", "{stem}_panel.png")  # what a panel of an image may be called in <evaluation>/panels


class Tally(NamedTuple):
    """On how many images a run is better or worse than the base."""

    name: str
    better: int
    worse: int
    equal: int


class Shown(NamedTuple):
    """One image with the panel of every run that kept one."""

    row: Row
    panels: list[tuple[str, str]]  # name of the run, data: URI


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the page, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(render(comparison), encoding="utf-8")


def render(comparison: Comparison) -> str:
    """The page as one self-contained HTML text."""
    ids = comparison.class_ids or range(len(comparison.classes))
    return render_template(
        "compare.html",
        comparison=comparison,
        classes=sorted(zip(ids, comparison.classes, strict=True), key=lambda numbered: by_change(numbered[1])),
        tallies=tallies(comparison),
        images=[shown(row, comparison.runs) for row in comparison.images[:NUM_IMAGES] if row.change],
    )


def tallies(comparison: Comparison) -> list[Tally]:
    """One for every run but the base; none if no images were compared."""
    if not comparison.images:
        return []
    return [tally(run, number, comparison.images) for number, run in enumerate(comparison.runs[1:])]


def tally(run: Evaluation, number: int, images: tuple[Row, ...]) -> Tally:
    """Count the images by the sign of run `number`'s difference to the base."""
    found = [row.differences[number] for row in images]
    differences = [value for value in found if value is not None]
    better, worse = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    return Tally(run.name, better, worse, len(differences) - better - worse)


def shown(row: Row, runs: tuple[Evaluation, ...]) -> Shown:
    """An image with its panels as thumbnails."""
    panels = [(run.name, panel_of(run, row.name)) for run in runs]
    return Shown(row, [(name, thumbnail_of_file(path)) for name, path in panels if path])


def panel_of(run: Evaluation, file: str) -> Path | None:
    """The panel that an evaluation kept of an image, if it did."""
    stem = PurePath(file).stem
    places = [run.folder / "panels" / name.format(stem=stem) for name in PANELS]
    return next((path for path in places if path.is_file()), None)
