"""A sweep as one HTML file that opens from disk: the ranked jobs, and the score against each parameter. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from semseg.reports.charts import Point, draw_scatter_plot, format_tick
from semseg.reports.templates import NOT_AVAILABLE, render_template
from semseg.storage.atomic import atomic_write
from semseg.storage.run_results import Ranking

LOG_FACTOR = 10  # a parameter whose values differ by at least this factor is drawn on a logarithmic scale
MAX_LOG_MARKS = 6
MAX_AXIS_LETTERS = 54  # in all names below a plot


def write_sweep_page(path: Path, ranking: Ranking, command: str) -> None:
    """Write the page, whole or not at all; `command` continues the sweep."""
    with atomic_write(path) as temporary:
        temporary.write_text(render_sweep_page(ranking, command), encoding="utf-8")


def render_sweep_page(ranking: Ranking, command: str) -> str:
    """Render the page as one self-contained HTML text."""
    rows = [
        (rank, job, ranking.values_of(job), format_job_score(job.result.score), format_duration(job.seconds))
        for rank, job in enumerate(ranking.jobs, start=1)
    ]
    charts = draw_parameter_charts(ranking)
    return render_template("sweep.html", ranking=ranking, rows=rows, charts=charts, command=command)


def draw_parameter_charts(ranking: Ranking) -> list[tuple[str, Markup]]:
    """Draw the score against each parameter that varies among the jobs with a score; returns key and drawing."""
    scored = [(job, job.result.score) for job in ranking.jobs if job.result.score is not None]
    charts = []
    for column, key in enumerate(ranking.varying):
        values = [ranking.values_of(job)[column] for job, _ in scored]
        if len(set(values)) > 1:
            scores = [score for _, score in scored]
            charts.append((key, draw_parameter_chart(values, scores, key, ranking.monitor)))
    return charts


def draw_parameter_chart(values: Sequence[str], scores: Sequence[float], key: str, monitor: str) -> Markup:
    """Draw the score against one parameter, which has two values or more.

    The axis is linear or logarithmic; if a value is not a number, each value has a position of its own.
    """
    numbers = [number for value in values if (number := parse_finite_number(value)) is not None]
    marks: Mapping[float, str] | None = None
    margin = 0.05
    if len(numbers) < len(values):
        names = sorted(set(values))
        positions = [float(names.index(value)) for value in values]
        max_letters = MAX_AXIS_LETTERS // len(names)
        marks = {float(index): shorten_start(name or "default", max_letters) for index, name in enumerate(names)}
        margin = 0.5 / (len(names) - 1)
    elif min(numbers) > 0 and max(numbers) / min(numbers) >= LOG_FACTOR:
        positions = [math.log10(number) for number in numbers]
        marks = choose_log_marks(min(numbers), max(numbers))
    else:
        positions = numbers
    points = [
        Point(f"{key}={value}", position, score)
        for value, position, score in zip(values, positions, scores, strict=True)
    ]
    return draw_scatter_plot(points, f"{monitor} against {key}", key, marks, margin)


def parse_finite_number(text: str) -> float | None:
    """Return the finite number that `text` holds, or None.

    >>> parse_finite_number("1e-4"), parse_finite_number("resnet18"), parse_finite_number("nan")
    (0.0001, None, None)
    """
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def choose_log_marks(low: float, high: float) -> dict[float, str]:
    """Return positions (decadic logarithms) and labels of powers of ten around `low` and `high`, both above 0.

    >>> list(choose_log_marks(0.003, 0.2).values())
    ['0.001', '0.01', '0.1', '1']
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = math.ceil((last - first) / MAX_LOG_MARKS)
    return {float(power): format_tick(10.0**power) for power in range(first, last + step, step)}


def shorten_start(name: str, max_letters: int) -> str:
    """Replace the start of a long name by an ellipsis: names usually differ at their end.

    >>> shorten_start("resnet50_dilated8", 9)
    '…dilated8'
    """
    return name if len(name) <= max_letters else f"…{name[len(name) - max_letters + 1 :]}"


def format_job_score(score: float | None) -> str:
    """Format a score with four digits, or as n/a.

    >>> format_job_score(0.43216), format_job_score(None)
    ('0.4322', 'n/a')
    """
    return NOT_AVAILABLE if score is None else f"{score:.4f}"


def format_duration(seconds: float) -> str:
    """Format hours, minutes and seconds.

    >>> format_duration(3725.4)
    '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
