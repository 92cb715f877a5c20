"""mode=compare: put finished evaluations side by side; writes compare.json, compare.csv and compare.html. No torch."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from semseg.config.schema import Config
from semseg.reports.compare_page import write_comparison
from semseg.reports.comparison import Comparison, Row, as_plain, by_change, compare, csv_rows, read_evaluations
from semseg.reports.templates import percent, points
from semseg.storage.atomic import replacing
from semseg.system.text import printable, row_of_cells

NUM_CLASSES = 15  # rows on the console; the files hold all


def run(config: Config, overrides: list[str]) -> None:
    """Compare the evaluations in `runs`; the first is the base.

    Raises:
        SemsegError: if there is no evaluation, a file is broken, or the classes differ.
    """
    comparison = compare(read_evaluations(config.runs))
    files = write_files(Path(config.run_dir), comparison)
    console = Console()
    console.print(side_by_side(comparison))
    for note in comparison.notes:
        console.print(f"note: {printable(note)}", highlight=False, markup=False)
    console.print(f"written to {', '.join(map(str, files))}", soft_wrap=True, highlight=False, markup=False)


def side_by_side(comparison: Comparison) -> Table:
    """The headline scores and the classes that changed most, in percent."""
    table = Table(
        title=Text(printable(f"comparison with {comparison.runs[0].name}")), caption="percent; differences in points"
    )
    table.add_column("")
    table.add_column(Text(printable(comparison.runs[0].name)), justify="right")
    for other in comparison.runs[1:]:
        table.add_column(Text(printable(other.name)), justify="right")
        table.add_column("+/-", justify="right")
    for row in comparison.headline:
        table.add_row(*cells(row), style="bold")
    table.add_section()
    changed = sorted((row for row in comparison.classes if row.change), key=by_change)
    for row in changed[:NUM_CLASSES]:
        table.add_row(*cells(row))
    return table


def cells(row: Row) -> list[Text]:
    """Name, the base's value, then value and difference of each other run."""
    texts = [row.name, percent(row.values[0])]
    for value, difference in zip(row.values[1:], row.differences, strict=True):
        texts += [percent(value), points(difference)]
    return [Text(printable(text)) for text in texts]  # a class may be called "[b]"


def write_files(folder: Path, comparison: Comparison) -> list[Path]:
    """Write the three files and return their paths."""
    content, table, page = (folder / f"compare.{suffix}" for suffix in ("json", "csv", "html"))
    with replacing(content) as temporary:
        temporary.write_text(json.dumps(as_plain(comparison), indent=1) + "\n", encoding="utf-8")
    rows = csv_rows(comparison)
    with replacing(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(map(row_of_cells, rows))
    write_comparison(page, comparison)
    return [content, table, page]
