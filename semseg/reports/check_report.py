"""The report of mode=check: check.json, its page, and the tables on the console."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from semseg.checks.dataset import Diagnosis, SplitSummary, Spread, format_ranges
from semseg.reports.check_page import CheckReport, write_check_page
from semseg.reports.draw import format_share
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import relative_to_cwd
from semseg.system.text import escape_lines, escape_unprintable

MAX_CLASS_ROWS = 20  # rows on the console; the files have all classes


def write_check_report(folder: Path, report: CheckReport) -> list[Path]:
    """Write check.json and check.html, and return their paths."""
    content, page = folder / "check.json", folder / "check.html"
    with atomic_write(content) as temporary:
        temporary.write_text(json.dumps(report_to_json(report), indent=1) + "\n", encoding="utf-8")
    write_check_page(page, report)
    return [content, page]


def report_to_json(report: CheckReport) -> dict[str, Any]:
    """The content of check.json."""
    diagnosis = report.diagnosis
    return {
        "verdict": diagnosis.verdict,
        "notices": [notice._asdict() for notice in diagnosis.notices],
        "splits": [split_to_json(split) for split in diagnosis.splits],
        "classes": [row._asdict() for row in diagnosis.classes],
        "class_weights": diagnosis.class_weights,
        "plan": report.plan._asdict() if report.plan else None,
        "suggestions": diagnosis.suggestions,
        "command": report.command,
    }


def split_to_json(split: SplitSummary) -> dict[str, Any]:
    """The entry of a split in check.json."""
    spreads = {name: getattr(split, name)._asdict() for name in ("heights", "widths", "aspects")}
    return split._asdict() | spreads


def print_check_report(report: CheckReport, files: Sequence[Path]) -> None:
    """Print the tables, the notices and the verdict."""
    diagnosis, console = report.diagnosis, Console(soft_wrap=True, highlight=False)
    console.print(render_splits(diagnosis.splits))
    if diagnosis.classes:
        console.print(render_classes(diagnosis))
    if report.plan:
        console.print(Text(escape_lines(report.plan.describe())))
    for notice in diagnosis.notices:
        style = {"error": "bold red", "warning": "yellow"}.get(notice.level, "")
        console.print(Text(f"{notice.level}: ", style), Text(escape_lines(notice.text)), sep="")
    console.print(Text(f"\n{escape_lines(diagnosis.verdict)}", "bold"))
    console.print(Text(escape_lines(f"written to {', '.join(str(relative_to_cwd(file)) for file in files)}")))


def render_splits(splits: Sequence[SplitSummary]) -> Table:
    """A table with one row for each split."""
    table = Table()
    for name in ("split", "pairs", "wrong", "height", "width", "images", "masks", "ids", "ignored"):
        table.add_column(name, justify="right" if name in ("pairs", "wrong", "ignored") else "left")
    for split in splits:
        ids = format_ranges(list(split.ids))
        row = [
            split.name,
            str(split.pairs),
            str(split.wrong),
            format_spread(split.heights),
            format_spread(split.widths),
        ]
        row += [", ".join(split.image_kinds), ", ".join(split.mask_kinds), ids, format_share(split.ignored)]
        table.add_row(*(Text(escape_unprintable(text)) for text in row))
    return table


def render_classes(diagnosis: Diagnosis) -> Table:
    """A table of the classes; of many, the most frequent and the rarest."""
    names = [split.name for split in diagnosis.splits]
    table = Table("class", *(f"{name}: pixels, images" for name in names), "weight")
    rows = sorted(diagnosis.classes, key=lambda row: -row.share)
    listed = rows if len(rows) <= MAX_CLASS_ROWS else rows[: MAX_CLASS_ROWS // 2] + rows[-MAX_CLASS_ROWS // 2 :]
    totals = {name: sum(row.pixels[name] for row in rows) or 1 for name in names}
    for row in listed:
        counts = [f"{format_share(row.pixels[name] / totals[name])}, {row.images[name]}" for name in names]
        table.add_row(*(Text(escape_unprintable(text)) for text in (row.name, *counts, f"{row.weight:g}")))
    if len(listed) < len(rows):
        table.caption = f"the most frequent and the rarest of {len(rows)} classes; all are in check.json"
    return table


def format_spread(spread: Spread) -> str:
    """Smallest, median and largest value."""
    low, median, high = spread
    return f"{low:g}" if low == high else f"{low:g} .. {median:g} .. {high:g}"
