"""Numbers as inline SVG: histogram, curves, scatter plot, heat map. Colours come from the style sheet. No torch.

Lengths are units of the drawing's own coordinates, about one pixel each on a wide screen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from semseg.reports.draw import percent

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40
MAX_POINTS = 400  # of one line; more are averaged
NUM_BINS = 20
CELL = 26  # width and height of a cell of the heat map
LETTER = 6.6  # average width of a letter of the heat map's labels
MAX_LABEL = 22  # letters
NUM_COLOURS = 4  # of lines, in the style sheet


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    x: tuple[float, ...]  # ascending
    y: tuple[float, ...]  # as many, finite


class Point(NamedTuple):
    """One point of a scatter plot."""

    name: str
    x: float
    y: float


class Axis(NamedTuple):
    """From values to places along one direction of the drawing."""

    low: float
    high: float
    start: float  # place of `low`
    end: float  # place of `high`

    def place(self, value: float) -> float:
        """Where `value` is drawn."""
        span = (self.high - self.low) or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


def element(tag: str, *children: str | Markup, **attributes: object) -> Markup:
    """An XML element with escaped content; `class_` means class, and `stroke_width` stroke-width.

    >>> element("text", "a < b", class_="label", x=1.5)
    Markup('<text class="label" x="1.5">a &lt; b</text>')
    """
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Markup("<{0}{1}>{2}</{0}>").format(tag, Markup(written), Markup("").join(children))  # noqa: S704 - escaped


def histogram(values: Sequence[float], title: str) -> Markup:
    """How many images have a share (`values`, 0..1) in each of 20 equal bins; a line marks the median."""
    return distribution([100 * value for value in values], title, "% of one image", "%", (0, 100))


def distribution(
    values: Sequence[float], title: str, x_name: str, unit: str, limits: tuple[float, float] | None = None
) -> Markup:
    """How many images have a value in each of 20 equal bins; a line marks the median.

    Args:
        limits: of the bins; None: the smallest and the largest value.
    """
    low, high = limits or (min(values, default=0.0), max(values, default=1.0))
    high = high if high > low else low + 1
    counts, edges = np.histogram(values, bins=NUM_BINS, range=(low, high))
    x = Axis(low, high, LEFT, WIDTH - RIGHT)
    y = Axis(0, max(1, int(counts.max())), HEIGHT - BOTTOM, TOP)
    bars = [
        _bar(x, y, (float(left), float(right)), int(number), unit)
        for left, right, number in zip(edges, edges[1:], counts, strict=False)
        if number
    ]
    marks = [_median(x, float(np.median(values)), unit)] if len(values) else []
    return _drawing(title, *_grid(x, y, x_name, whole=True), *bars, *marks)


def _bar(x: Axis, y: Axis, edges: tuple[float, float], number: int, unit: str) -> Markup:
    low, high = edges
    words = f"{low:.4g} to {high:.4g} {unit}: {number} image{'s' if number > 1 else ''}"
    left, top = x.place(low) + 0.5, y.place(number)
    size = {"width": _short(x.place(high) - left - 0.5), "height": _short(y.start - top)}
    return element("rect", element("title", words), class_="bar", x=_short(left), y=_short(top), **size)


def _median(x: Axis, value: float, unit: str) -> Markup:
    place = _short(x.place(value))
    label = element("title", f"median: {value:.4g} {unit}")
    return element("line", label, class_="median", x1=place, x2=place, y1=TOP, y2=HEIGHT - BOTTOM)


def line_chart(lines: Sequence[Line], title: str, x_name: str) -> Markup:
    """The lines over one pair of axes; the style sheet numbers their colours line-0, line-1, ..."""
    lines = [thinned(line) for line in lines]
    x = Axis(min(line.x[0] for line in lines), max(line.x[-1] for line in lines), LEFT, WIDTH - RIGHT)
    y = _upwards([value for line in lines for value in line.y])
    drawn = [_path(line, x, y, number) for number, line in enumerate(lines)]
    return _drawing(title, *_grid(x, y, x_name), *drawn)


def _upwards(values: Sequence[float]) -> Axis:
    """The vertical axis of a drawing of `values`, with some room around them."""
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    floor = max(0.0, low - room) if low >= 0 else low - room
    return Axis(floor, high + room, HEIGHT - BOTTOM, TOP)


def scatter(
    points: Sequence[Point], title: str, x_name: str, marks: Mapping[float, str] | None = None, room: float = 0.05
) -> Markup:
    """One dot for each of `points`, at least one.

    Args:
        marks: the places that are named along x; by default round numbers.
        room: at both ends of x, as a share of what lies between.
    """
    places = [*(point.x for point in points), *(marks or ())]
    margin = room * (max(places) - min(places)) or 0.5
    x = Axis(min(places) - margin, max(places) + margin, LEFT, WIDTH - RIGHT)
    y = _upwards([point.y for point in points])
    return _drawing(title, *_grid(x, y, x_name, marks=marks), *(_dot(point, x, y) for point in points))


def _dot(point: Point, x: Axis, y: Axis) -> Markup:
    label = element("title", f"{point.name}: {point.y:.4g}")
    return element("circle", label, class_="dot line-0", cx=_short(x.place(point.x)), cy=_short(y.place(point.y)), r=4)


def thinned(line: Line, most: int = MAX_POINTS) -> Line:
    """At most `most` points: neighbours are averaged in groups of equal size."""
    size = math.ceil(len(line.x) / most)
    starts = range(0, len(line.x), size)
    x, y = (tuple(math.fsum(part[s : s + size]) / len(part[s : s + size]) for s in starts) for part in (line.x, line.y))
    return Line(line.name, x, y)


def _path(line: Line, x: Axis, y: Axis, number: int) -> Markup:
    places = [f"{_short(x.place(a))},{_short(y.place(b))}" for a, b in zip(line.x, line.y, strict=True)]
    label = element("title", f"{line.name}: {line.y[-1]:.4g} at the end")
    if len(places) == 1:
        at, up = places[0].split(",")
        return element("circle", label, class_=f"dot line-{number % NUM_COLOURS}", cx=at, cy=up, r=3.5)
    return element("polyline", label, class_=f"line line-{number % NUM_COLOURS}", points=" ".join(places))


def heat_map(shares: NDArray[np.float64], names: Sequence[str], title: str) -> Markup:
    """Row-normalised confusion: rows are labels, columns predictions; (n, n) shares 0..1 and n names."""
    margin = max(min(MAX_LABEL, len(name)) for name in names) * LETTER + 12
    side = len(names) * CELL
    parts = [_row_label(name, index, margin) for index, name in enumerate(names)]
    parts += [_column_label(name, index, margin) for index, name in enumerate(names)]
    parts += [
        _cell(float(shares[row, column]), (names[row], names[column]), (row, column), margin)
        for row in range(len(names))
        for column in range(len(names))
    ]
    # Tilted labels of the last columns reach out to the right.
    width, height = margin + side + 0.7 * margin, margin + side + 2
    return _drawing(title, *parts, size=(width, height), class_="heat", width=_short(1.15 * width))


def _row_label(name: str, index: int, margin: float) -> Markup:
    y = margin + (index + 0.5) * CELL
    return element("text", element("title", name), _cut(name), class_="end", x=_short(margin - 8), y=_short(y + 4))


def _column_label(name: str, index: int, margin: float) -> Markup:
    x, y = _short(margin + (index + 0.5) * CELL), _short(margin - 8)
    return element("text", element("title", name), _cut(name), x=x, y=y, transform=f"rotate(-50 {x} {y})")


def _cell(share: float, names: tuple[str, str], place: tuple[int, int], margin: float) -> Markup:
    (label, predicted), (row, column) = names, place
    is_right = row == column
    words = f"{label} predicted as {predicted}: {percent(share)} of its pixels"
    x, y = margin + column * CELL, margin + row * CELL
    # The square root lets small confusions be seen.
    paint = {"class_": "right" if is_right else "wrong", "fill_opacity": _short(math.sqrt(share))}
    square = element("rect", x=_short(x + 0.5), y=_short(y + 0.5), width=CELL - 1, height=CELL - 1, **paint)
    back = element("rect", class_="empty", x=_short(x + 0.5), y=_short(y + 0.5), width=CELL - 1, height=CELL - 1)
    parts = [element("title", words), back, square]
    if share >= 0.03:
        shade = "number strong" if share > 0.3 else "number"
        parts.append(element("text", f"{100 * share:.0f}", class_=shade, x=_short(x + CELL / 2), y=_short(y + 17)))
    return element("g", *parts)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about so many.

    >>> ticks(0, 0.93)
    [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (power * factor) <= about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _grid(
    x: Axis, y: Axis, x_name: str, *, whole: bool = False, marks: Mapping[float, str] | None = None
) -> list[Markup]:
    """Lines and numbers of both axes; `whole`: no broken numbers along y; `marks`: other words than numbers along x."""
    parts = []
    for value in ticks(y.low, y.high, 4):
        if whole and value % 1:
            continue
        up = _short(y.place(value))
        parts.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=up, y2=up))
        parts.append(element("text", tick_words(value), class_="end", x=LEFT - 6, y=_short(y.place(value) + 4)))
    marks = {value: tick_words(value) for value in ticks(x.low, x.high, 5)} if marks is None else marks
    for value, words in marks.items():
        at = _short(x.place(value))
        parts.append(element("text", words, class_="middle", x=at, y=HEIGHT - BOTTOM + 16))
    parts.append(element("text", x_name, class_="middle", x=(LEFT + WIDTH - RIGHT) // 2, y=HEIGHT - 6))
    return parts


def tick_words(value: float) -> str:
    """A number at an axis, short.

    >>> tick_words(150000), tick_words(0.0004), tick_words(20.0)
    ('150k', '4e-4', '20')
    """
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    if 0 < abs(value) < 0.001:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def _drawing(title: str, *parts: Markup, size: tuple[float, float] = (WIDTH, HEIGHT), **attributes: object) -> Markup:
    box = f"0 0 {_short(size[0])} {_short(size[1])}"
    return element("svg", *parts, viewBox=box, role="img", aria_label=title, **attributes)


def _cut(name: str) -> str:
    return name if len(name) <= MAX_LABEL else name[: MAX_LABEL - 1] + "…"


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
