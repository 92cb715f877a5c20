"""Stage 8: the findings of mode=check as one HTML file that opens from disk. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from semseg.checks.dataset import Diagnosis, ScannedSplit
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.data.scan import PairFacts
from semseg.reports.charts import draw_distribution
from semseg.reports.draw import ClassShare, Pixels, class_shares, draw_overlay, format_share
from semseg.reports.pictures import MAX_EDGE, encode_jpeg_uri, resize_nearest, shrink
from semseg.reports.templates import render_template
from semseg.storage.atomic import atomic_write


class PlanSummary(NamedTuple):
    """The sub-batches that the plan makes of the training images."""

    padding: float  # fraction of a sub-batch, 0..1
    largest: Size  # canvas of the largest sub-batch, pixels
    batch_size: int  # images
    model: str
    memory: int | None  # bytes of a training step on the largest sub-batch, in float32; None: cannot be estimated

    def describe(self) -> str:
        """Summarise the plan in one sentence."""
        plan = (
            f"padding {format_share(self.padding)} of a sub-batch; the largest sub-batch is {self.batch_size} images "
            f"of {self.largest} pixels"
        )
        if self.memory is None:
            return f"{plan}; how much memory {self.model} needs for them cannot be estimated."
        return (
            f"{plan}, which take about {self.memory / 1e9:.1f} GB to train {self.model} in float32, in addition to the "
            "working memory of the device."
        )


class CheckedSample(NamedTuple):
    """An image with its mask."""

    file: str
    image: Pixels  # (H, W, 3) RGB
    label: NDArray[np.integer]  # (H, W) class indices, -1 = not scored
    classes: ClassTable


class CheckReport(NamedTuple):
    """Everything that the page of a check shows."""

    name: str  # name of the data set
    diagnosis: Diagnosis
    splits: Sequence[ScannedSplit]
    plan: PlanSummary | None
    samples: Sequence[CheckedSample]
    command: str  # trains, or checks again, with all suggestions
    purpose: str  # of the command: "to train", "to check as suggested"


class SamplePictures(NamedTuple):
    """A sample, encoded for the page."""

    file: str
    image: str  # data: URI
    overlay: str  # data: URI
    shares: list[ClassShare]
    classes: ClassTable


def write_check_page(path: Path, report: CheckReport) -> None:
    """Write the page, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(render_check_page(report), encoding="utf-8")


def render_check_page(report: CheckReport) -> str:
    """Render the page as one self-contained HTML text."""
    return render_template(
        "check.html",
        report=report,
        diagnosis=report.diagnosis,
        charts=list(draw_image_histograms(report.splits)),
        pictures=[encode_sample(sample) for sample in report.samples],
        largest_share=max((row.share for row in report.diagnosis.classes), default=1.0) or 1.0,
    )


def draw_image_histograms(splits: Sequence[ScannedSplit]) -> list[tuple[str, Markup]]:
    """Draw a histogram, with its title, of each property that differs between the images of all splits."""
    readable = {split.name: [found for found in split.findings if found.height] for split in splits}
    measures: list[tuple[str, str, Callable[[PairFacts], float]]] = [
        ("Short side", "pixels", lambda found: min(found.height, found.width)),
        ("Width / height", "width / height", lambda found: found.width / found.height),
        ("Ids in a mask", "different ids", lambda found: len(found.ids)),
    ]
    charts = []
    for title, unit, measure in measures:
        # A mask without ids could not be read.
        groups = {name: [value for image in found if (value := measure(image))] for name, found in readable.items()}
        if len({value for values in groups.values() for value in values}) > 1:
            charts.append((title, draw_distribution(groups, f"histogram: {title.lower()}", unit, unit)))
    return charts


def encode_sample(sample: CheckedSample) -> SamplePictures:
    """Shrink a sample and encode it for the page."""
    small = shrink(sample.image, MAX_EDGE)
    label = resize_nearest(sample.label, *small.shape[:2])
    blended = draw_overlay(small, label, sample.classes)
    shares = class_shares(label, sample.classes)
    return SamplePictures(sample.file, encode_jpeg_uri(small), encode_jpeg_uri(blended), shares, sample.classes)
