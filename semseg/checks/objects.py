"""Whether small objects survive until the labels of training (mode=check). Reads no files, no torch.

An object is resized with its image, and the label of training keeps every s-th pixel of every s-th row. Of a square of
side a after resizing, a pixel is left with the probability min(1, a / s) ** 2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from semseg.checks.dataset import NOTE, WARNING, ClassOf, Notice, ScannedSplit
from semseg.config.schema import FINE_STRIDE, DataConfig
from semseg.data.geometry import Size
from semseg.data.objects import bin_side

LOST_WARNING, LOST_NOTE = 0.5, 0.1  # fraction of the objects of a class that is lost, from which on it is reported
MIN_OBJECTS = 10  # of a class, to say something about it
MAX_NAMED = 4  # classes in a notice
EVERY_PIXEL = 1  # the finest model.label_stride


class View(NamedTuple):
    """What of an image training sees."""

    short_edges: Sequence[int]  # none: the resolution of the image
    max_long_edge: int
    stride: int  # of the labels, pixels

    def factors(self, size: Size) -> list[float]:
        """By which an image is resized."""
        longest = self.max_long_edge / max(size)
        return [min(edge / min(size), longest) for edge in self.short_edges] or [1.0]


class ObjectSizes(NamedTuple):
    """The objects of a class in the masks of train: numbers for people, and for choosing a recipe."""

    name: str
    num_objects: int  # in the masks that were measured
    median_side: float  # pixels of the mask
    kept: float  # expected fraction of them that leaves a pixel in the labels of training


def kept_fraction(side: float, stride: int) -> float:
    """The probability that a square keeps a pixel, drawn over its position.

    >>> kept_fraction(8, 16), kept_fraction(8, 8)
    (0.25, 1.0)
    """
    return min(1.0, side / stride) ** 2


def view_of(data: DataConfig, stride: int) -> View:
    """What training sees with these settings."""
    return View([] if data.resize == "native" else data.short_edges, data.max_long_edge, stride)


def measure_kept(split: ScannedSplit, class_of: ClassOf, view: View) -> dict[int, float]:
    """The expected fraction of the objects of each class that keeps a pixel."""
    counts, kept = Counter[int](), Counter[int]()
    for _, facts in split.usable_pairs:
        factors = view.factors(Size(facts.height, facts.width))
        for raw_id, sides in facts.objects.items():
            index = class_of(raw_id)
            if index is None or index < 0:
                continue
            for number, count in sides.items():
                shares = [kept_fraction(factor * bin_side(number), view.stride) for factor in factors]
                counts[index] += count
                kept[index] += count * sum(shares) / len(shares)  # pyright: ignore[reportArgumentType] - a fraction
    return {index: kept[index] / count for index, count in counts.items()}


def summarise_objects(split: ScannedSplit, class_of: ClassOf, names: Sequence[str], view: View) -> list[ObjectSizes]:
    """The objects of every class that has some, in the order of the classes."""
    bins: dict[int, Counter[int]] = {}
    for _, facts in split.usable_pairs:
        for raw_id, sides in facts.objects.items():
            index = class_of(raw_id)
            if index is not None and index >= 0:
                bins.setdefault(index, Counter()).update(sides)
    kept = measure_kept(split, class_of, view)
    return [
        ObjectSizes(
            names[index],
            counts.total(),
            bin_side(find_quantile(counts, 0.5)),
            kept[index],
        )
        for index, counts in sorted(bins.items())
    ]


def find_quantile(counts: Counter[int], share: float) -> int:
    """The smallest number up to which there are at least `share` of all.

    >>> find_quantile(Counter({1: 5, 7: 4, 9: 1}), 0.5), find_quantile(Counter({1: 5, 7: 4, 9: 1}), 0.6)
    (1, 7)
    """
    seen = 0
    for number in sorted(counts):
        seen += counts[number]
        if seen >= share * counts.total():
            return number
    raise ValueError("there are no numbers")


def check_objects(
    split: ScannedSplit, class_of: ClassOf, names: Sequence[str], data: DataConfig, stride: int
) -> list[Notice]:
    """A notice about classes many of whose objects leave no pixel in the labels of training, with keys that keep them.

    Args:
        stride: of the labels with the present settings, in pixels.
    """
    view = view_of(data, stride)
    rows = [row for row in summarise_objects(split, class_of, names, view) if row.num_objects >= MIN_OBJECTS]
    lost = sorted((row for row in rows if row.kept <= 1 - LOST_NOTE), key=lambda row: row.kept)
    if not lost:
        return []
    worst = lost[0]
    listed = ", ".join(
        f"{row.name} {1 - row.kept:.0%} of {row.num_objects} (median side {row.median_side:.0f} px)"
        for row in lost[:MAX_NAMED]
    )
    more = f" and {len(lost) - MAX_NAMED} more classes" if lost[MAX_NAMED:] else ""
    ways = []
    for words, other in list_ways(view):
        kept = measure_kept(split, class_of, other)[names.index(worst.name)]
        if kept > worst.kept + 0.01:
            ways.append(f"{words} keeps {kept:.0%}")
    seen = f"short edges {'/'.join(map(str, view.short_edges))}" if view.short_edges else "native resolution"
    text = (
        f"{split.name}: objects that leave no pixel in the labels of training ({seen}, label stride {stride}): "
        f"{listed}{more}."
    )
    if ways:
        text = f"{text} Of {worst.name}, {'; '.join(ways)}."
    return [Notice(WARNING if worst.kept <= 1 - LOST_WARNING else NOTE, text)]


def list_ways(view: View) -> list[tuple[str, View]]:
    """Settings that lose less, with their words on the command line, the cheapest first."""
    ways = []
    if view.stride > FINE_STRIDE:
        ways.append((f"model.label_stride={FINE_STRIDE}", view._replace(stride=FINE_STRIDE)))
    if view.stride > EVERY_PIXEL:
        ways.append((f"model.label_stride={EVERY_PIXEL}", view._replace(stride=EVERY_PIXEL)))
    if view.short_edges:
        native = view._replace(short_edges=(), stride=min(view.stride, FINE_STRIDE))
        ways.append(("data.resize=native", native))
    return ways
