"""A sweep as one HTML file that opens from disk: the ranked jobs, and the score against each parameter. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from semseg.reports.charts import Point, scatter, tick_words
from semseg.reports.templates import NOT_SCORED, render_template
from semseg.storage.atomic import replacing
from semseg.storage.run_results import Ranking

LOG_FACTOR = 10  # a parameter whose largest value is so many times its smallest is drawn on a logarithmic scale
MAX_MARKS = 6  # names below a logarithmic scale
LETTERS = 54  # below a plot


def write_sweep_page(path: Path, ranking: Ranking, command: str) -> None:
    """Write the page, whole or not at all; `command` goes on with the sweep."""
    with replacing(path) as temporary:
        temporary.write_text(render(ranking, command), encoding="utf-8")


def render(ranking: Ranking, command: str) -> str:
    """The page as one self-contained HTML text."""
    rows = [
        (place, job, ranking.values(job), score_words(job.result.score), duration(job.seconds))
        for place, job in enumerate(ranking.jobs, start=1)
    ]
    return render_template("sweep.html", ranking=ranking, rows=rows, charts=charts(ranking), command=command)


def charts(ranking: Ranking) -> list[tuple[str, Markup]]:
    """For each parameter that varies among the jobs with a score: its name, and the score against it."""
    scored = [(job, job.result.score) for job in ranking.jobs if job.result.score is not None]
    drawn = []
    for column, key in enumerate(ranking.varying):
        values = [ranking.values(job)[column] for job, _ in scored]
        if len(set(values)) > 1:
            scores = [score for _, score in scored]
            drawn.append((key, chart(values, scores, key, ranking.monitor)))
    return drawn


def chart(values: Sequence[str], scores: Sequence[float], key: str, monitor: str) -> Markup:
    """The score against one parameter, which has two values or more.

    On a number line, on a logarithmic one, or with a place for each value if one of them is no number.
    """
    numbers = [as_number(value) for value in values]
    given = [number for number in numbers if number is not None]
    marks: Mapping[float, str] | None = None
    room = 0.05
    if len(given) < len(values):
        names = sorted(set(values))
        places = [float(names.index(value)) for value in values]
        marks = {float(place): shortened(name or "default", LETTERS // len(names)) for place, name in enumerate(names)}
        room = 0.5 / (len(names) - 1)
    elif min(given) > 0 and max(given) / min(given) >= LOG_FACTOR:
        places = [math.log10(number) for number in given]
        marks = log_marks(min(given), max(given))
    else:
        places = given
    points = [Point(f"{key}={value}", place, score) for value, place, score in zip(values, places, scores, strict=True)]
    return scatter(points, f"{monitor} against {key}", key, marks, room)


def as_number(text: str) -> float | None:
    """The finite number that a value is, or None.

    >>> as_number("1e-4"), as_number("resnet18"), as_number("nan")
    (0.0001, None, None)
    """
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def log_marks(low: float, high: float) -> dict[float, str]:
    """Places (decadic logarithms) and names of round numbers around `low` and `high`, both above 0.

    >>> list(log_marks(0.003, 0.2).values())
    ['0.001', '0.01', '0.1', '1']
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = math.ceil((last - first) / MAX_MARKS)
    return {float(power): tick_words(10.0**power) for power in range(first, last + step, step)}


def shortened(name: str, letters: int) -> str:
    """`name` with its end if it is too long, for that is where names differ.

    >>> shortened("resnet50_dilated8", 9)
    '…dilated8'
    """
    return name if len(name) <= letters else f"…{name[len(name) - letters + 1 :]}"


def score_words(score: float | None) -> str:
    """A score with four digits, or n/a.

    >>> score_words(0.43216), score_words(None)
    ('0.4322', 'n/a')
    """
    return NOT_SCORED if score is None else f"{score:.4f}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(3725.4)
    '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
