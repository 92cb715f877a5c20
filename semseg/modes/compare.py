"""mode=compare: compare finished evaluations; writes compare.json, compare.csv and compare.html. No torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from semseg.config.schema import Config, config_to_plain
from semseg.reports.compare_page import write_compare_page
from semseg.reports.compared_runs import read_evaluations
from semseg.reports.comparison import (
    BETTER,
    UNCLEAR,
    WORSE,
    Comparison,
    Difference,
    ScoreRow,
    build_csv_rows,
    change_sort_key,
    compare_runs,
    comparison_to_dict,
)
from semseg.reports.templates import NOT_AVAILABLE, format_percent, format_points
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import relative_to_cwd
from semseg.system.text import escape_csv_row, escape_unprintable, format_quantity

MAX_COMPARED_CLASSES = 15  # on the console; the files hold all classes
MAX_KEYS = 10  # that differ, on the console
STYLES = {BETTER: "green", WORSE: "red", UNCLEAR: "dim"}


def run(config: Config, overrides: list[str]) -> None:
    """Compare the evaluations in `runs`; the first is the base.

    Raises:
        SemsegError: if there is no evaluation, a file is broken, or the classes differ.
    """
    comparison = compare_runs(read_evaluations(config.runs), config.seed, config_to_plain(Config()))
    files = write_comparison_files(Path(config.run_dir), comparison)
    console = Console()
    console.print(build_comparison_table(comparison))
    for line in describe_comparison(comparison):
        console.print(escape_unprintable(line), highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"written to {', '.join(str(relative_to_cwd(file)) for file in files)}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def describe_comparison(comparison: Comparison) -> Iterator[str]:
    """Yield the lines below the table: the notes, what differs in the configuration, and the verdicts."""
    yield from (f"note: {note}" for note in comparison.notes)
    major = [row for row in comparison.configuration if not row.is_minor]
    for row in major[:MAX_KEYS]:
        yield f"differs: {row.key}: {' | '.join(row.values)}"
    if len(major) > MAX_KEYS:
        yield f"differs: {len(major) - MAX_KEYS} further keys, see compare.html"
    if not major:
        yield comparison.configuration_summary
    yield from comparison.verdicts


def build_comparison_table(comparison: Comparison) -> Table:
    """Build a table of the headline scores and the classes with the largest changes, in percent."""
    base, *others = comparison.runs
    changes = sorted(comparison.classes, key=change_sort_key)
    num_hidden = max(0, len(changes) - MAX_COMPARED_CLASSES)
    hidden = f"; {num_hidden} more, with smaller changes, in compare.html" if num_hidden else ""
    over = "" if comparison.num_images is None else f", {format_quantity(comparison.num_images, 'image')}"
    shows_intervals = comparison.has_intervals and len(others) == 1
    meaning = "with 95 % intervals" if shows_intervals else "in brackets: the images cannot tell which is better"
    table = Table(
        title=Text(escape_unprintable(f"{', '.join(run.name for run in others)} against {base.name}{over}")),
        caption=f"percent; differences in percentage points, {meaning}{hidden}",
    )
    table.add_column("", overflow="fold")
    table.add_column(Text(escape_unprintable(base.name)), justify="right", overflow="fold")
    for other in others:
        table.add_column(Text(escape_unprintable(other.name)), justify="right", overflow="fold")
        table.add_column("+/-", justify="right", no_wrap=True)
    if shows_intervals:
        table.add_column("interval", justify="right")
    for row in comparison.headline:
        table.add_row(*format_cells(row, shows_intervals), style="bold")
    table.add_section()
    for row in changes[:MAX_COMPARED_CLASSES]:
        table.add_row(*format_cells(row, shows_intervals))
    return table


def format_cells(row: ScoreRow, shows_interval: bool) -> list[Text]:
    """Format a row: name and value of the base, value and difference of each other run, and the interval of the first.

    Without the interval, a difference that may be due to the choice of images is in brackets.
    """
    # Not parsed as markup: a class may be called "[b]".
    cells = [Text(escape_unprintable(row.name)), Text(format_percent(row.values[0]))]
    for value, difference in zip(row.values[1:], row.judged_differences, strict=True):
        points = format_points(difference.value)
        is_bracketed = not shows_interval and difference.verdict == UNCLEAR and difference.value is not None
        text = f"({points})" if is_bracketed else points
        cells += [Text(format_percent(value)), Text(text, style=STYLES[difference.verdict])]
    if shows_interval:
        first = row.judged_differences[0]
        cells.append(Text(format_interval(first), style=STYLES[first.verdict]))
    return cells


def format_interval(difference: Difference) -> str:
    """Format an interval in percentage points.

    >>> format_interval(Difference(0.01, (-0.002, 0.022)))
    '-0.20 to +2.20'
    """
    return NOT_AVAILABLE if difference.interval is None else " to ".join(map(format_points, difference.interval))


def write_comparison_files(folder: Path, comparison: Comparison) -> list[Path]:
    """Write compare.json, compare.csv and compare.html; returns their paths."""
    scores, table, page = (folder / f"compare.{suffix}" for suffix in ("json", "csv", "html"))
    with atomic_write(scores) as temporary:
        temporary.write_text(json.dumps(comparison_to_dict(comparison), indent=1) + "\n", encoding="utf-8")
    rows = build_csv_rows(comparison)
    with atomic_write(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(map(escape_csv_row, rows))
    write_compare_page(page, comparison)
    return [scores, table, page]
