"""Stage 8: a comparison of runs as one HTML file that opens from disk. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from semseg.reports.comparison import ComparedRun, Comparison, ScoreRow, change_sort_key
from semseg.reports.pictures import encode_thumbnail
from semseg.reports.templates import render_template
from semseg.storage.atomic import atomic_write

MAX_IMAGES = 12  # that the page shows, those with the largest changes
PANEL_NAMES = ("{stem}.png", "{stem}_panel.png")  # possible names of an image's panel in <evaluation>/panels


class ImageTally(NamedTuple):
    """The numbers of images on which a run is better than the base, worse, or equal."""

    name: str
    better: int
    worse: int
    equal: int


class ComparedImage(NamedTuple):
    """An image with the panel of every run that kept one."""

    row: ScoreRow
    panels: list[tuple[str, str]]  # name of the run, data: URI


def write_compare_page(path: Path, comparison: Comparison) -> None:
    """Write the page, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(render_compare_page(comparison), encoding="utf-8")


def render_compare_page(comparison: Comparison) -> str:
    """Render the page as one self-contained HTML text."""
    ids = comparison.class_ids or range(len(comparison.classes))
    changed = [row for row in comparison.images[:MAX_IMAGES] if row.change]
    return render_template(
        "compare.html",
        comparison=comparison,
        classes=sorted(zip(ids, comparison.classes, strict=True), key=lambda numbered: change_sort_key(numbered[1])),
        tallies=tally_images(comparison),
        images=[ComparedImage(row, load_panels(comparison.runs, row.name)) for row in changed],
    )


def tally_images(comparison: Comparison) -> list[ImageTally]:
    """Count the better and worse images of every run but the base; empty if no images were compared."""
    if not comparison.images:
        return []
    return [count_changes(run.name, index, comparison.images) for index, run in enumerate(comparison.runs[1:])]


def count_changes(name: str, index: int, images: Sequence[ScoreRow]) -> ImageTally:
    """Count the images by the sign of their difference number `index` to the base."""
    differences = [value for row in images if (value := row.differences[index]) is not None]
    better, worse = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    return ImageTally(name, better, worse, len(differences) - better - worse)


def load_panels(runs: Sequence[ComparedRun], file: str) -> list[tuple[str, str]]:
    """Load the panels of an image as thumbnails, each with the name of its run."""
    panels = [(run.name, find_panel(run.folder, file)) for run in runs]
    return [(name, encode_thumbnail(path)) for name, path in panels if path]


def find_panel(folder: Path, file: str) -> Path | None:
    """Return the panel of an image in an evaluation folder, or None."""
    stem = PurePath(file).stem
    paths = [folder / "panels" / name.format(stem=stem) for name in PANEL_NAMES]
    return next((path for path in paths if path.is_file()), None)
