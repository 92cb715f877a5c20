"""mode=compare: compare finished evaluations; writes compare.json, compare.csv and compare.html. No torch."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from semseg.config.schema import Config
from semseg.reports.compare_page import write_compare_page
from semseg.reports.comparison import (
    Comparison,
    ScoreRow,
    build_csv_rows,
    change_sort_key,
    compare_runs,
    comparison_to_dict,
    read_evaluations,
)
from semseg.reports.templates import format_percent, format_points
from semseg.storage.atomic import atomic_write
from semseg.system.text import escape_csv_row, escape_unprintable

MAX_COMPARED_CLASSES = 15  # on the console; the files hold all classes


def run(config: Config, overrides: list[str]) -> None:
    """Compare the evaluations in `runs`; the first is the base.

    Raises:
        SemsegError: if there is no evaluation, a file is broken, or the classes differ.
    """
    comparison = compare_runs(read_evaluations(config.runs))
    files = write_comparison_files(Path(config.run_dir), comparison)
    console = Console()
    console.print(build_comparison_table(comparison))
    for note in comparison.notes:
        console.print(f"note: {escape_unprintable(note)}", highlight=False, markup=False)
    console.print(f"written to {', '.join(map(str, files))}", soft_wrap=True, highlight=False, markup=False)


def build_comparison_table(comparison: Comparison) -> Table:
    """Build a table of the headline scores and the classes with the largest changes, in percent."""
    table = Table(
        title=Text(escape_unprintable(f"comparison with {comparison.runs[0].name}")),
        caption="percent; differences in percentage points",
    )
    table.add_column("")
    table.add_column(Text(escape_unprintable(comparison.runs[0].name)), justify="right")
    for other in comparison.runs[1:]:
        table.add_column(Text(escape_unprintable(other.name)), justify="right")
        table.add_column("+/-", justify="right")
    for row in comparison.headline:
        table.add_row(*format_cells(row), style="bold")
    table.add_section()
    changed = sorted((row for row in comparison.classes if row.change), key=change_sort_key)
    for row in changed[:MAX_COMPARED_CLASSES]:
        table.add_row(*format_cells(row))
    return table


def format_cells(row: ScoreRow) -> list[Text]:
    """Format a row: name, value of the base, then value and difference of each other run."""
    texts = [row.name, format_percent(row.values[0])]
    for value, difference in zip(row.values[1:], row.differences, strict=True):
        texts += [format_percent(value), format_points(difference)]
    return [Text(escape_unprintable(text)) for text in texts]  # a class may be called "[b]"


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
