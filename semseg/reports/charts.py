"""Draw histograms, curves, scatter plots and heat maps as inline SVG. The style sheet sets the colours. No torch.

Lengths are in units of the drawing's own coordinates, about one pixel each on a wide screen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from semseg.reports.draw import format_share

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40
MAX_POINTS = 400  # per line; longer lines are averaged
NUM_BINS = 20
CELL_SIZE = 26  # width and height of a cell of the heat map
LETTER_WIDTH = 6.6  # average, in the labels of the heat map
MAX_LABEL_LENGTH = 22  # letters
NUM_LINE_COLOURS = 8  # that the style sheet defines


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    x: tuple[float, ...]  # ascending
    y: tuple[float, ...]  # as many, finite
    has_dots: bool = False  # whether every point is marked
    colour: int | None = None  # number in the style sheet; None: its place among the lines of the chart


class Mark(NamedTuple):
    """A vertical line in a chart."""

    x: float
    name: str  # shown as a tooltip


class Point(NamedTuple):
    """One point of a draw_scatter_plot plot."""

    name: str
    x: float
    y: float
    colour: int = 0  # number in the style sheet


class Bar(NamedTuple):
    """A bar of a histogram."""

    name: str
    low: float  # edges of the bin
    high: float
    start: int  # images below the bar
    images: int
    colour: int  # number in the style sheet


class Axis(NamedTuple):
    """Maps values to positions along one direction of the drawing."""

    low: float
    high: float
    start: float  # position of `low`
    end: float  # position of `high`

    def position(self, value: float) -> float:
        """The coordinate at which `value` is drawn."""
        span = (self.high - self.low) or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


def svg_element(tag: str, *children: str | Markup, **attributes: object) -> Markup:
    """Return an XML element with escaped content; `class_` becomes class, and `stroke_width` becomes stroke-width.

    >>> svg_element("text", "a < b", class_="label", x=1.5)
    Markup('<text class="label" x="1.5">a &lt; b</text>')
    """
    attribute_text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(tag, Markup(attribute_text), Markup("").join(children))  # noqa: S704 - escaped


def draw_histogram(values: Sequence[float], title: str) -> Markup:
    """Draw the number of images in each of 20 equal bins of `values` (0..1); a line marks the median."""
    return draw_distribution({"": [100 * value for value in values]}, title, "% of one image", "%", (0, 100))


def draw_distribution(
    groups: Mapping[str, Sequence[float]],
    title: str,
    x_name: str,
    unit: str,
    limits: tuple[float, float] | None = None,
) -> Markup:
    """Draw the number of images in each bin of the values, with the groups on top of each other.

    A line marks the median of all. There are 20 equal bins, or one for each value if these are few whole numbers.

    Args:
        groups: name and values of each group, in the order of the colours.
        limits: range of the bins; None means from the smallest to the largest value.
    """
    values = [value for group in groups.values() for value in group]
    low, high = limits or (min(values, default=0.0), max(values, default=1.0))
    num_bins, marks = NUM_BINS, None
    if limits is None and high - low < NUM_BINS and all(value == int(value) for value in values):
        marks = {float(value): str(value) for value in range(int(low), int(high) + 1)}
        num_bins, low, high = len(marks), low - 0.5, high + 0.5
    high = high if high > low else low + 1
    counts = np.array([np.histogram(group, bins=num_bins, range=(low, high))[0] for group in groups.values()])
    edges = np.linspace(low, high, num_bins + 1).tolist()
    x = Axis(low, high, LEFT, WIDTH - RIGHT)
    y = Axis(0, max(1, int(counts.sum(0).max())), HEIGHT - BOTTOM, TOP)
    bottoms = np.cumsum(counts, axis=0) - counts
    bars = []
    for colour, name in enumerate(groups):
        for low, high, start, count in zip(edges, edges[1:], bottoms[colour], counts[colour], strict=False):
            where = f"{low:.4g} to {high:.4g} {unit}" if marks is None else f"{(low + high) / 2:.0f} {unit}"
            bar = Bar(f"{name}, {where}" if name else where, low, high, int(start), int(count), colour)
            bars += [_draw_bar(bar, x, y)] if count else []
    median = [_draw_median(x, float(np.median(values)), unit)] if values else []
    return _svg(title, *_draw_grid(x, y, x_name, whole=True, marks=marks), *bars, *median)


def _draw_bar(bar: Bar, x: Axis, y: Axis) -> Markup:
    label = svg_element("title", f"{bar.name}: {bar.images} image{'s' if bar.images > 1 else ''}")
    left, top = x.position(bar.low) + 0.5, y.position(bar.start + bar.images)
    size = {"width": _format(x.position(bar.high) - left - 0.5), "height": _format(y.position(bar.start) - top)}
    style = f"bar line-{bar.colour % NUM_LINE_COLOURS}"
    return svg_element("rect", label, class_=style, x=_format(left), y=_format(top), **size)


def _draw_median(x: Axis, value: float, unit: str) -> Markup:
    position = _format(x.position(value))
    label = svg_element("title", f"median: {value:.4g} {unit}")
    return svg_element("line", label, class_="median", x1=position, x2=position, y1=TOP, y2=HEIGHT - BOTTOM)


def draw_line_chart(
    lines: Sequence[Line],
    title: str,
    x_name: str,
    *,
    limits: tuple[float, float] | None = None,
    mark: Mark | None = None,
) -> Markup:
    """Draw the lines over one pair of axes; the style sheet numbers their colours line-0, line-1, ...

    Args:
        limits: range of x; None means from the first to the last point of all lines.
    """
    lines = [average_points(line) for line in lines]
    low, high = limits or (min(line.x[0] for line in lines), max(line.x[-1] for line in lines))
    x = Axis(low, high, LEFT, WIDTH - RIGHT)
    y = _vertical_axis([value for line in lines for value in line.y])
    marks = [] if mark is None else [_draw_mark(mark, x)]
    drawn = [part for index, line in enumerate(lines) for part in _draw_line(line, x, y, index)]
    return _svg(title, *_draw_grid(x, y, x_name), *marks, *drawn)


def _draw_mark(mark: Mark, x: Axis) -> Markup:
    position = _format(x.position(mark.x))
    label = svg_element("title", mark.name)
    return svg_element("line", label, class_="best", x1=position, x2=position, y1=TOP, y2=HEIGHT - BOTTOM)


def _vertical_axis(values: Sequence[float]) -> Axis:
    """Return the vertical axis of a drawing of `values`, with a margin above and below them."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    floor = max(0.0, low - margin) if low >= 0 else low - margin
    return Axis(floor, high + margin, HEIGHT - BOTTOM, TOP)


def draw_scatter_plot(
    points: Sequence[Point],
    title: str,
    x_name: str,
    marks: Mapping[float, str] | None = None,
    margin: float = 0.05,
    *,
    lines: Sequence[Line] = (),
) -> Markup:
    """Draw a dot for each of `points`, of which there is at least one.

    Args:
        marks: labels of x values on the axis; by default round numbers.
        margin: free space at both ends of x, as a fraction of its range.
        lines: are drawn below the dots.
    """
    values = [*(point.x for point in points), *(marks or ())]
    space = margin * (max(values) - min(values)) or 0.5
    x = Axis(min(values) - space, max(values) + space, LEFT, WIDTH - RIGHT)
    y = _vertical_axis([point.y for point in points])
    drawn = [part for index, line in enumerate(lines) for part in _draw_line(line, x, y, index)]
    return _svg(title, *_draw_grid(x, y, x_name, marks=marks), *drawn, *(_draw_point(point, x, y) for point in points))


def _draw_point(point: Point, x: Axis, y: Axis) -> Markup:
    label = svg_element("title", f"{point.name}: {point.y:.4g}")
    colour = point.colour % NUM_LINE_COLOURS
    position = {"cx": _format(x.position(point.x)), "cy": _format(y.position(point.y))}
    return svg_element("circle", label, class_=f"dot line-{colour}", **position, r=4)


def average_points(line: Line, max_points: int = MAX_POINTS) -> Line:
    """Average neighbouring points in groups of equal size, so that at most `max_points` remain."""
    size = math.ceil(len(line.x) / max_points)
    starts = range(0, len(line.x), size)
    x, y = (tuple(math.fsum(part[s : s + size]) / len(part[s : s + size]) for s in starts) for part in (line.x, line.y))
    return line._replace(x=x, y=y)


def _draw_line(line: Line, x: Axis, y: Axis, index: int) -> list[Markup]:
    colour = (index if line.colour is None else line.colour) % NUM_LINE_COLOURS
    points = [(_format(x.position(a)), _format(y.position(b))) for a, b in zip(line.x, line.y, strict=True)]
    parts = []
    if len(points) > 1:
        label = svg_element("title", f"{line.name}: {line.y[-1]:.4g} at the end")
        coordinates = " ".join(f"{a},{b}" for a, b in points)
        parts.append(svg_element("polyline", label, class_=f"line line-{colour}", points=coordinates))
    if line.has_dots or len(points) == 1:
        for (centre_x, centre_y), step, value in zip(points, line.x, line.y, strict=True):
            label = svg_element("title", f"{line.name}: {value:.4g} at {step:g}")
            parts.append(svg_element("circle", label, class_=f"dot line-{colour}", cx=centre_x, cy=centre_y, r=3.5))
    return parts


def draw_heat_map(fractions: NDArray[np.float64], names: Sequence[str], title: str) -> Markup:
    """Draw a row-normalised confusion matrix: (n, n) fractions 0..1, rows are labels, columns are predictions."""
    margin = max(min(MAX_LABEL_LENGTH, len(name)) for name in names) * LETTER_WIDTH + 12
    side = len(names) * CELL_SIZE
    parts = [_draw_row_label(name, index, margin) for index, name in enumerate(names)]
    parts += [_draw_column_label(name, index, margin) for index, name in enumerate(names)]
    parts += [
        _draw_cell(float(fractions[row, column]), (names[row], names[column]), (row, column), margin)
        for row in range(len(names))
        for column in range(len(names))
    ]
    # The tilted labels of the last columns extend to the right.
    width, height = margin + side + 0.7 * margin, margin + side + 2
    return _svg(title, *parts, size=(width, height), class_="heat", width=_format(1.15 * width))


def _draw_row_label(name: str, index: int, margin: float) -> Markup:
    y = margin + (index + 0.5) * CELL_SIZE
    return svg_element(
        "text", svg_element("title", name), _shorten_label(name), class_="end", x=_format(margin - 8), y=_format(y + 4)
    )


def _draw_column_label(name: str, index: int, margin: float) -> Markup:
    x, y = _format(margin + (index + 0.5) * CELL_SIZE), _format(margin - 8)
    return svg_element(
        "text", svg_element("title", name), _shorten_label(name), x=x, y=y, transform=f"rotate(-50 {x} {y})"
    )


def _draw_cell(fraction: float, names: tuple[str, str], position: tuple[int, int], margin: float) -> Markup:
    (label, predicted), (row, column) = names, position
    is_correct = row == column
    tooltip = f"{label} predicted as {predicted}: {format_share(fraction)} of its pixels"
    x, y = margin + column * CELL_SIZE, margin + row * CELL_SIZE
    # The square root makes small confusions visible.
    paint = {"class_": "right" if is_correct else "wrong", "fill_opacity": _format(math.sqrt(fraction))}
    square = svg_element(
        "rect", x=_format(x + 0.5), y=_format(y + 0.5), width=CELL_SIZE - 1, height=CELL_SIZE - 1, **paint
    )
    background = svg_element(
        "rect", class_="empty", x=_format(x + 0.5), y=_format(y + 0.5), width=CELL_SIZE - 1, height=CELL_SIZE - 1
    )
    parts = [svg_element("title", tooltip), background, square]
    if fraction >= 0.03:
        style = "number strong" if fraction > 0.3 else "number"
        parts.append(
            svg_element("text", f"{100 * fraction:.0f}", class_=style, x=_format(x + CELL_SIZE / 2), y=_format(y + 17))
        )
    return svg_element("g", *parts)


def round_ticks(low: float, high: float, max_steps: int = 5) -> list[float]:
    """Return round numbers from `low` to `high`, with at most `max_steps` steps between them.

    >>> round_ticks(0, 0.93)
    [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / max_steps))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (power * factor) <= max_steps)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _draw_grid(
    x: Axis, y: Axis, x_name: str, *, whole: bool = False, marks: Mapping[float, str] | None = None
) -> list[Markup]:
    """Draw grid lines and tick labels.

    Args:
        whole: only whole numbers along y.
        marks: labels of x values, in place of round numbers.
    """
    parts = []
    for value in round_ticks(y.low, y.high, 4):
        if whole and value % 1:
            continue
        height = _format(y.position(value))
        parts.append(svg_element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height))
        parts.append(
            svg_element("text", format_tick(value), class_="end", x=LEFT - 6, y=_format(y.position(value) + 4))
        )
    marks = {value: format_tick(value) for value in round_ticks(x.low, x.high, 5)} if marks is None else marks
    for value, label in marks.items():
        parts.append(svg_element("text", label, class_="middle", x=_format(x.position(value)), y=HEIGHT - BOTTOM + 16))
    parts.append(svg_element("text", x_name, class_="middle", x=(LEFT + WIDTH - RIGHT) // 2, y=HEIGHT - 6))
    return parts


def format_tick(value: float) -> str:
    """Format a number at an axis.

    >>> format_tick(150000), format_tick(0.0004), format_tick(20.0)
    ('150k', '4e-4', '20')
    """
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    if 0 < abs(value) < 0.001:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def _svg(title: str, *parts: Markup, size: tuple[float, float] = (WIDTH, HEIGHT), **attributes: object) -> Markup:
    box = f"0 0 {_format(size[0])} {_format(size[1])}"
    return svg_element("svg", *parts, viewBox=box, role="img", aria_label=title, **attributes)


def _shorten_label(name: str) -> str:
    return name if len(name) <= MAX_LABEL_LENGTH else name[: MAX_LABEL_LENGTH - 1] + "…"


def _format(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
