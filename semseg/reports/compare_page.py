"""Stage 8: a comparison of runs as one HTML file that opens from disk. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from semseg.data.classes import ClassTable
from semseg.evaluation.paired_bootstrap import MIN_INTERVAL_IMAGES, NUM_RESAMPLES
from semseg.reports.charts import NUM_LINE_COLOURS, Axis, Line, draw_line_chart, svg_element
from semseg.reports.compared_runs import ComparedRun
from semseg.reports.comparison import Comparison, Difference, ScoreRow, change_sort_key
from semseg.reports.configurations import list_run_folders
from semseg.reports.curves import read_training_curves
from semseg.reports.differing_images import (
    BASE_COLOUR,
    OTHER_COLOUR,
    ComparedPicture,
    DifferingImage,
    draw_pictures,
    find_differing_images,
    load_photograph,
)
from semseg.reports.evaluation_page import LegendEntry, build_example_legend
from semseg.reports.pictures import encode_thumbnail
from semseg.reports.templates import render_template
from semseg.storage.atomic import atomic_write
from semseg.system.text import escape_csv_cell

MAX_IMAGES = 8  # that the page shows, those with the largest differences
# Possible names of an image's panel in <evaluation>/panels, which eval.visualize=true writes.
PANEL_NAMES = ("{file}.png", "{stem}.png", "{stem}_panel.png")
CURVES = {"validation mean IoU": "val/miou", "training loss": "train/loss", "validation loss": "val/loss"}  # by title
INTERVAL_WIDTH, INTERVAL_HEIGHT = 150, 18  # of the drawing of an interval


class ImageTally(NamedTuple):
    """The numbers of images on which a run is better than the base, worse, or equal."""

    name: str
    better: int
    worse: int
    equal: int


class ComparedImage(NamedTuple):
    """An image with its pictures."""

    row: ScoreRow
    share: float | None  # of the scored pixels that the runs predict differently; None without class maps
    pictures: list[ComparedPicture]
    legend: list[LegendEntry]


class OverlaidCurves(NamedTuple):
    """One logged value of all runs in one chart."""

    title: str
    chart: Markup
    lines: list[Line]  # named after the runs, whose positions are their colours


def write_compare_page(path: Path, comparison: Comparison) -> None:
    """Write the page, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(render_compare_page(comparison), encoding="utf-8")


def render_compare_page(comparison: Comparison) -> str:
    """Render the page as one self-contained HTML text.

    Raises:
        DataError: if a picture of an evaluation is damaged.
    """
    colours = class_table(comparison).palette
    ids = comparison.class_ids or range(len(comparison.classes))
    rows = sorted(zip(ids, comparison.classes, colours, strict=True), key=lambda numbered: change_sort_key(numbered[1]))
    charts, without_log = overlay_curves(comparison.runs)
    differing = find_differing_images(comparison.runs, MAX_IMAGES)
    return render_template(
        "compare.html",
        comparison=comparison,
        headline_intervals=draw_intervals(comparison.headline),
        class_intervals=draw_intervals(comparison.classes),
        changed=[row for row in rows if row[1].change],
        unchanged=[row for row in rows if not row[1].change],
        major=[row for row in comparison.configuration if not row.is_minor],
        minor=[row for row in comparison.configuration if row.is_minor],
        tallies=tally_images(comparison),
        images=choose_images(comparison, differing),
        has_maps=differing is not None,
        charts=charts,
        without_log=without_log,
        losses_differ=any(row.key.startswith("loss.") for row in comparison.configuration),
        winner_colours=[(*map(int, colour),) for colour in (BASE_COLOUR, OTHER_COLOUR)],
        resamples=NUM_RESAMPLES,
        min_images=MIN_INTERVAL_IMAGES,
        num_line_colours=NUM_LINE_COLOURS,
    )


def class_table(comparison: Comparison) -> ClassTable:
    """Return the names and colours of the classes; generated colours if an earlier version stored none."""
    metrics = comparison.runs[0].metrics
    names = [row.name for row in comparison.classes]
    try:
        return ClassTable.from_plain({"names": names, "palette": metrics["palette"]})
    except (KeyError, ValueError):
        return ClassTable.from_names(names)


# ---- intervals


def draw_intervals(rows: Sequence[ScoreRow]) -> dict[ScoreRow, Markup]:
    """Draw the intervals of the rows of a comparison of two runs, all on one axis; empty for more runs."""
    differences = {row: row.judged_differences[0] for row in rows if len(row.values) == 2}
    bounds = chain.from_iterable(
        difference.interval for difference in differences.values() if difference.interval is not None
    )
    extent = max(map(abs, bounds), default=0.0) or 1.0
    return {
        row: draw_interval(difference, extent)
        for row, difference in differences.items()
        if difference.interval is not None and difference.value is not None
    }


def draw_interval(difference: Difference, extent: float) -> Markup:
    """Draw an interval as a line with a dot at the difference; the axis is from -extent to extent, with a mark at 0."""
    assert difference.interval is not None and difference.value is not None, "there is something to draw"
    axis, middle = Axis(-extent, extent, 4, INTERVAL_WIDTH - 4), INTERVAL_HEIGHT / 2
    low, value, high = (
        f"{axis.position(x):.1f}" for x in (difference.interval[0], difference.value, difference.interval[1])
    )
    zero = f"{axis.position(0):.1f}"
    return svg_element(
        "svg",
        svg_element("line", class_="zero", x1=zero, x2=zero, y1=0, y2=INTERVAL_HEIGHT),
        svg_element("line", class_="whisker", x1=low, x2=high, y1=middle, y2=middle),
        svg_element("circle", class_="estimate", cx=value, cy=middle, r=4),
        viewBox=f"0 0 {INTERVAL_WIDTH} {INTERVAL_HEIGHT}",
        class_="interval",
        aria_hidden="true",
    )


# ---- curves


def overlay_curves(runs: Sequence[ComparedRun]) -> tuple[list[OverlaidCurves], list[str]]:
    """Draw the curves of all runs over each other; also returns the names of the runs without a log."""
    logged = [read_lines(run) for run in runs]
    charts = []
    for title, column in CURVES.items():
        lines = [
            own[column]._replace(name=run.name, colour=position)
            for position, (run, own) in enumerate(zip(runs, logged, strict=True))
            if column in own
        ]
        if lines:
            charts.append(OverlaidCurves(title, draw_line_chart(lines, f"{title} of all runs", "step"), lines))
    return charts, [run.name for run, own in zip(runs, logged, strict=True) if not own]


def read_lines(run: ComparedRun) -> dict[str, Line]:
    """Read the logged values of the training of a run, by column; empty if its folder is gone."""
    for folder in list_run_folders(run.metrics, run.folder):
        charts = read_training_curves(folder)
        if charts:
            return {line.name: line for chart in charts for line in chart.lines}
    return {}


# ---- images


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


def choose_images(comparison: Comparison, differing: Sequence[DifferingImage] | None) -> list[ComparedImage]:
    """Draw the images on which predictions differ; without class maps, choose those whose mean IoU differs most."""
    if differing is None:
        changed = [row for row in comparison.images[:MAX_IMAGES] if row.change]
        return [ComparedImage(row, None, load_panels(comparison.runs, row.name), []) for row in changed]
    rows, classes = {row.name: row for row in comparison.images}, class_table(comparison)
    # Tables have a ' before names that spreadsheets would run as formulas.
    found = [(image, rows.get(escape_csv_cell(image.file))) for image in differing]
    return [show_image(image, row, comparison.runs, classes) for image, row in found if row is not None]


def show_image(image: DifferingImage, row: ScoreRow, runs: Sequence[ComparedRun], classes: ClassTable) -> ComparedImage:
    """Draw the pictures of an image."""
    height, width = image.label.shape
    photographs = (load_photograph(run, image.file, (height, width)) for run in runs)
    photograph = next((pixels for pixels in photographs if pixels is not None), None)
    pictures = draw_pictures(image, [run.name for run in runs], classes, photograph)
    legend = build_example_legend(image.label, np.concatenate(image.predictions), classes)
    return ComparedImage(row, image.share, pictures, legend)


def load_panels(runs: Iterable[ComparedRun], file: str) -> list[ComparedPicture]:
    """Load the panels of an image as thumbnails, each with the name of its run."""
    panels = [(run.name, find_panel(run.folder, file)) for run in runs]
    return [ComparedPicture(name, encode_thumbnail(path), is_map=False) for name, path in panels if path]


def find_panel(folder: Path, file: str) -> Path | None:
    """Return the panel of an image in an evaluation folder, or None."""
    stem, file = PurePath(file).stem, file.lstrip("/")
    paths = [folder / "panels" / name.format(file=file, stem=stem) for name in PANEL_NAMES]
    return next((path for path in paths if path.is_file()), None)
