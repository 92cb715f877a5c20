"""A sweep as one HTML file that opens from disk: the ranked jobs, and the score against each parameter. No torch."""

from __future__ import annotations

import itertools
import math
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from markupsafe import Markup

from semseg.config.overrides import quote_value
from semseg.reports.charts import NUM_LINE_COLOURS, Line, Point, draw_scatter_plot, format_tick
from semseg.reports.templates import NOT_AVAILABLE, render_template
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import entry_command, relative_to_cwd
from semseg.storage.run_results import Job, Ranking

LOG_FACTOR = 10  # a parameter whose values differ by at least this factor is drawn on a logarithmic scale
RATES = ("lr", "lr_encoder", "lr_decoder", "weight_decay")  # keys that always are: their factor is what matters
MAX_VALUE_MARKS = 5  # values that are marked themselves, in place of powers of ten
MIN_MARK_DISTANCE = 0.12  # of two marks, as a fraction of the axis
MAX_LOG_MARKS = 6
MAX_AXIS_LETTERS = 54  # in all names below a plot
NUM_RANGES = 3  # groups of a number that has too many values for a colour each
MAX_NUMBER_LENGTH = 8  # letters of a number in the table
REPORTS = ("eval/report.html", "report.html", "crossval.html")  # in the folder of a job, the first that exists


class Row(NamedTuple):
    """One job in the table."""

    rank: int
    job: Job
    name: str  # the overrides that not all jobs have in common
    link: str | None  # from the page to its report, or to its folder; None if that does not exist
    values: list[tuple[str, str]]  # of the parameters that vary: as given, and shortened
    score: str
    duration: str


class Groups(NamedTuple):
    """The jobs with a score, grouped by a parameter."""

    key: str
    names: tuple[str, ...]  # at most NUM_LINE_COLOURS
    members: tuple[int, ...]  # the group of each job


class HorizontalAxis(NamedTuple):
    """The positions of the jobs in a plot."""

    positions: list[float]
    marks: dict[float, str] | None  # labels on the axis; None: round numbers
    margin: float


class ParameterChart(NamedTuple):
    """The score against one parameter."""

    key: str
    drawing: Markup
    groups: Groups | None  # what the colours mean


def write_sweep_page(path: Path, ranking: Ranking, command: str) -> None:
    """Write the page, whole or not at all; `command` continues the sweep."""
    with atomic_write(path) as temporary:
        temporary.write_text(render_sweep_page(ranking, command), encoding="utf-8")


def render_sweep_page(ranking: Ranking, command: str) -> str:
    """Render the page as one self-contained HTML text, which links to the reports of the jobs beside it."""
    rows = [
        Row(
            rank,
            job,
            name_job(ranking, job),
            find_link(job.folder),
            [(value, shorten_number(value)) for value in ranking.values_of(job)],
            format_job_score(job.result.score),
            format_duration(job.seconds),
        )
        for rank, job in enumerate(ranking.jobs, start=1)
    ]
    return render_template(
        "sweep.html",
        ranking=ranking,
        rows=rows,
        charts=draw_parameter_charts(ranking),
        command=command,
        comparison=suggest_comparison(ranking),
    )


def suggest_comparison(ranking: Ranking) -> str | None:
    """Return the command that compares the best job with the second best; None if fewer than two were evaluated."""
    best = [job.folder for job in ranking.jobs if (job.folder / "eval" / "metrics.json").is_file()][:2]
    if len(best) < 2:
        return None
    names = [str(relative_to_cwd(folder)) for folder in reversed(best)]
    is_plain = all(re.fullmatch(r"[\w./-]+", name) for name in names)
    folders = ",".join(names if is_plain else map(quote_value, names))
    return f"{entry_command()} mode=compare {shlex.quote(f'runs=[{folders}]')}"


def name_job(ranking: Ranking, job: Job) -> str:
    """Name a job by the overrides that not all jobs have in common; by its folder if there are none."""
    settings = ranking.differing_settings_of(job)
    return " ".join(f"{key}={shorten_number(value)}" for key, value in settings.items()) or job.folder.name


def shorten_number(text: str) -> str:
    """Round a long number, as random searches draw them, to four digits; other texts stay.

    >>> shorten_number("0.00011773449705"), shorten_number("0.02"), shorten_number("resnet50_dilated8")
    ('0.0001177', '0.02', 'resnet50_dilated8')
    """
    number = parse_finite_number(text)
    return text if number is None or len(text) <= MAX_NUMBER_LENGTH else f"{number:.4g}"


def find_link(folder: Path) -> str | None:
    """Return the address of a job's report relative to the sweep; of its folder if it has none."""
    report = next((name for name in REPORTS if (folder / name).is_file()), None)
    if report is None and not folder.is_dir():
        return None
    return quote(f"{folder.name}/{report or ''}")


# ---- plots


def draw_parameter_charts(ranking: Ranking) -> list[ParameterChart]:
    """Draw the score against each parameter that varies among the jobs with a score."""
    scored = [(job, job.result.score) for job in ranking.jobs if job.result.score is not None]
    names, scores = [name_job(ranking, job) for job, _ in scored], [score for _, score in scored]
    columns = {
        key: values
        for column, key in enumerate(ranking.varying)
        if len(set(values := [ranking.values_of(job)[column] for job, _ in scored])) > 1
    }
    charts = []
    for key, values in columns.items():
        groups = choose_groups({other: columns[other] for other in columns if other != key}, scores)
        axis = place_values(key, values)
        colours = groups.members if groups else [0] * len(scores)
        points = [Point(*point) for point in zip(names, axis.positions, scores, colours, strict=True)]
        title = f"{ranking.monitor} against {key}"
        drawing = draw_scatter_plot(points, title, key, axis.marks, axis.margin, lines=connect_means(points, groups))
        charts.append(ParameterChart(key, drawing, groups))
    return charts


def choose_groups(columns: dict[str, list[str]], scores: Sequence[float]) -> Groups | None:
    """Group the jobs by the parameter that explains most of the variation of the scores; None without parameters."""
    groups = [group_values(key, values) for key, values in columns.items()]
    return max(groups, key=lambda group: explained_variation(group, scores), default=None)


def group_values(key: str, values: Sequence[str]) -> Groups:
    """Group the jobs by value; numbers with too many values by ranges, and rare ones of too many names together."""
    distinct = sort_values(set(values))
    if len(distinct) <= NUM_LINE_COLOURS:
        names = tuple(shorten_number(value) or "default" for value in distinct)
        return Groups(key, names, tuple(map(distinct.index, values)))
    numbers = [number for value in values if (number := parse_finite_number(value)) is not None]
    if len(numbers) == len(values):
        return group_numbers(key, numbers)
    frequent = [value for value, _ in Counter(values).most_common(NUM_LINE_COLOURS - 1)]
    members = tuple(frequent.index(value) if value in frequent else len(frequent) for value in values)
    return Groups(key, (*(value or "default" for value in frequent), "others"), members)


def group_numbers(key: str, numbers: Sequence[float]) -> Groups:
    """Group numbers, of which more than NUM_RANGES differ, into ranges with about as many different ones in each."""
    distinct = sorted(set(numbers))
    parts = [
        distinct[len(distinct) * n // NUM_RANGES : len(distinct) * (n + 1) // NUM_RANGES] for n in range(NUM_RANGES)
    ]
    names = tuple(f"{part[0]:.2g} to {part[-1]:.2g}" for part in parts)
    return Groups(key, names, tuple(sum(number >= part[0] for part in parts[1:]) for number in numbers))


def sort_values(values: set[str]) -> list[str]:
    """Sort by number if all values are numbers, else by name."""
    numbers = {value: parse_finite_number(value) for value in values}
    return sorted(values) if None in numbers.values() else sorted(values, key=lambda value: (float(value), value))


def explained_variation(groups: Groups, scores: Sequence[float]) -> float:
    """Return the sum of squares of the scores between the groups."""
    mean = statistics.fmean(scores)
    parts = [
        [score for score, member in zip(scores, groups.members, strict=True) if member == index]
        for index in set(groups.members)
    ]
    return sum(len(part) * (statistics.fmean(part) - mean) ** 2 for part in parts)


def connect_means(points: Sequence[Point], groups: Groups | None) -> list[Line]:
    """Connect the mean scores of each group from position to position; nothing if few positions have several jobs."""
    positions = {point.x for point in points}
    if groups is None or 2 * len(positions) > len(points):
        return []
    lines = []
    for index, name in enumerate(groups.names):
        own = [point for point in points if point.colour == index]
        x = sorted({point.x for point in own})
        means = tuple(statistics.fmean(point.y for point in own if point.x == position) for position in x)
        if len(x) > 1:
            lines.append(Line(f"mean of {groups.key}={name}", tuple(x), means, colour=index))
    return lines


def place_values(key: str, values: Sequence[str]) -> HorizontalAxis:
    """Place values on an axis, of which there are two or more.

    The axis is linear or logarithmic; if a value is not a number, each value has a position of its own.
    """
    numbers = [number for value in values if (number := parse_finite_number(value)) is not None]
    if len(numbers) < len(values):
        names = sorted(set(values))
        max_letters = MAX_AXIS_LETTERS // len(names)
        marks = {float(index): shorten_start(name or "default", max_letters) for index, name in enumerate(names)}
        return HorizontalAxis([float(names.index(value)) for value in values], marks, 0.5 / (len(names) - 1))
    low, high = min(numbers), max(numbers)
    is_rate = key.rpartition(".")[2] in RATES
    if low <= 0 or (high / low < LOG_FACTOR * (1 - 1e-9) and not is_rate) or low == high:
        return HorizontalAxis(numbers, mark_values(numbers, numbers), 0.05)
    positions = [math.log10(number) for number in numbers]
    return HorizontalAxis(positions, mark_values(numbers, positions) or choose_log_marks(low, high), 0.05)


def mark_values(numbers: Sequence[float], positions: Sequence[float]) -> dict[float, str] | None:
    """Label the values themselves; None if there are too many of them, or two are too close."""
    marks = dict(sorted(zip(positions, map(format_tick, numbers), strict=True)))
    places = list(marks)
    gaps = [after - before for before, after in itertools.pairwise(places)]
    is_crowded = len(places) > MAX_VALUE_MARKS or min(gaps, default=0) < MIN_MARK_DISTANCE * (places[-1] - places[0])
    return None if is_crowded else marks


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
