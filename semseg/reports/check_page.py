"""Stage 8: what the data doctor found, as one HTML file that opens from disk. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from semseg.checks.dataset import Diagnosis, ScannedSplit
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.reports.charts import distribution
from semseg.reports.draw import Pixels, Share, class_shares, overlay, percent
from semseg.reports.pictures import MAX_EDGE, jpeg_uri, nearest_pixels, shrunk
from semseg.reports.templates import render_template
from semseg.storage.atomic import replacing


class PlanFacts(NamedTuple):
    """What the plan makes of the training images."""

    padding: float  # share of a sub-batch, 0..1
    largest: Size  # canvas of a sub-batch, pixels
    batch_size: int  # images
    model: str
    memory: int  # bytes of a training step on it, in float32

    @property
    def words(self) -> str:
        """One sentence."""
        return (
            f"padding {percent(self.padding)} of a sub-batch; the largest one is {self.batch_size} images of "
            f"{self.largest} pixels, which take about {self.memory / 1e9:.1f} GB to train {self.model} in float32, "
            "besides what the device needs for work in progress."
        )


class Sample(NamedTuple):
    """One image with its mask."""

    file: str
    image: Pixels  # (H, W, 3) RGB
    label: NDArray[np.integer]  # (H, W) class indices, -1 = not scored
    classes: ClassTable


class Checked(NamedTuple):
    """Everything a check has found."""

    name: str  # of the data set
    diagnosis: Diagnosis
    splits: Sequence[ScannedSplit]
    plan: PlanFacts | None
    samples: Sequence[Sample]
    command: str  # to train with all suggestions


class Picture(NamedTuple):
    """A sample as the page shows it."""

    file: str
    image: str  # data: URI
    overlay: str
    shares: list[Share]
    classes: ClassTable


def write_check_page(path: Path, checked: Checked) -> None:
    """Write the page, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(render(checked), encoding="utf-8")


def render(checked: Checked) -> str:
    """The page as one self-contained HTML text."""
    return render_template(
        "check.html",
        checked=checked,
        diagnosis=checked.diagnosis,
        charts=list(charts(checked.splits)),
        pictures=[picture(sample) for sample in checked.samples],
        largest_share=max((row.share for row in checked.diagnosis.classes), default=1.0) or 1.0,
    )


def charts(splits: Sequence[ScannedSplit]) -> list[tuple[str, Markup]]:
    """Titles and drawings of what differs from image to image, all splits together."""
    seen = [found for split in splits for found in split.findings if found.height]
    measures = [
        ("Short side", "pixels", [min(found.height, found.width) for found in seen]),
        ("Width / height", "width / height", [found.width / found.height for found in seen]),
        ("Ids of a mask", "different ids", [len(found.ids) for found in seen if found.ids]),
    ]
    return [
        (title, distribution(values, f"histogram: {title.lower()}", unit, unit))
        for title, unit, values in measures
        if len(set(values)) > 1
    ]


def picture(sample: Sample) -> Picture:
    """A sample, small."""
    small = shrunk(sample.image, MAX_EDGE)
    label = nearest_pixels(sample.label, *small.shape[:2])
    mixed = overlay(small, label, sample.classes)
    return Picture(sample.file, jpeg_uri(small), jpeg_uri(mixed), class_shares(label, sample.classes), sample.classes)
