"""mode=check: the data doctor. Reads every mask, tells what would stop or spoil a run, writes check.json and a page."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from os.path import relpath
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from semseg.build import build_net, without_weights
from semseg.checks.dataset import (
    NOT_READY,
    WARNING,
    Diagnosis,
    Known,
    Lengths,
    Notice,
    ScannedSplit,
    SplitSummary,
    diagnose,
    ordered,
    padding_share,
    ranges,
)
from semseg.config.schema import SPLITS, Config, DataConfig
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size, largest_canvas
from semseg.data.label_map import LabelMap
from semseg.data.labels import read_label
from semseg.data.overlap import Overlap, find_overlap
from semseg.data.pairs import read_pair
from semseg.data.plan import TrainPlan
from semseg.data.records import Record
from semseg.data.scan import first_pixel, scan_pairs
from semseg.data.sources import DataSource, describe_split_folders
from semseg.errors import DataError
from semseg.nets.step_memory import estimate_step_memory
from semseg.reports.check_page import CheckedSample, CheckReport, PlanSummary, write_check_page
from semseg.reports.draw import format_share
from semseg.storage.atomic import atomic_write, entry_command
from semseg.system.text import escape_lines, escape_unprintable

PLANNED = 500  # sub-batches whose padding is counted
NUM_CLASSES = 20  # rows on the console; the files hold all


def run(config: Config, overrides: list[str]) -> None:
    """Scan all splits and tell what was found.

    Raises:
        DataError: in the end, if a run would not work.
        SemsegError: for anything else the user can mend.
    """
    folder = Path(config.run_dir)
    source, known = open_data(config.data)
    splits = [scanned(source, split) for split in SPLITS if source.has(split)]
    diagnosis = diagnose(splits, config.data, known, shared_images(splits), partial(pixel_of, source))
    if keys := source.find_split_folders():
        diagnosis.notices[:] = ordered([*diagnosis.notices, Notice(WARNING, describe_split_folders(keys))])
        diagnosis.suggestions.update(keys)
    if config.check.fix == "list":
        diagnosis.suggestions.update(write_lists(folder, source.root, splits, known))
    checked = CheckReport(
        config.data.name,
        diagnosis,
        splits,
        plan_facts(config, splits[0], source.classes.num_classes),
        list(
            pictures(
                splits[0], config.check.samples, config.data.max_pixels, *explained(config.data, source, diagnosis)
            )
        ),
        command(overrides, diagnosis.suggestions),
    )
    files = write_files(folder, checked)
    tell(checked, files)
    if diagnosis.verdict == NOT_READY:
        raise DataError(f"the data are not ready for training: see above, and {files[-1]}.")


def open_data(data: DataConfig) -> tuple[DataSource, Known | None]:
    """The data set, and what its ids mean; that is not known yet if neither data.classes nor data.num_classes is set.

    Raises:
        SemsegError: if anything else is missing.
    """
    if data.num_classes is None and data.classes is None:
        return DataSource(replace(data, num_classes=2)), None
    source = DataSource(data)
    return source, Known(source.label_map, source.classes)


def scanned(source: DataSource, split: str) -> ScannedSplit:
    """All that is in a split, with a bar while it is read.

    Raises:
        DataError: if a folder or list is missing.
    """
    records, problems = source.survey(split)
    colours = source.label_map.colours
    findings = scan_pairs(records, source.root, max_pixels=source.config.max_pixels, colours=colours)
    bar = track(findings, f"reading {split}", len(records), disable=not sys.stdout.isatty())
    return ScannedSplit(split, records, list(bar), problems, source.orientations[split], source.describe_unused(split))


def pixel_of(source: DataSource, record: Record, raw_id: int) -> tuple[int, int]:
    """(row, column) of the first pixel of an id in the mask of a record."""
    colours, limit = source.label_map.colours, source.config.max_pixels
    return first_pixel(read_label(record.label or "", colours=colours, max_pixels=limit), raw_id)


def plan_facts(config: Config, train: ScannedSplit, num_classes: int) -> PlanSummary | None:
    """What the plan makes of the images of train, and the memory its largest sub-batch takes; None without images."""
    data = config.data
    sizes = [Size(found.height, found.width) for _, found in train.sound]
    if not sizes:
        return None
    with torch.device("meta"):
        net = build_net(without_weights(config.model), num_classes).train()
    divisor = config.model.size_divisor or net.size_divisor
    plan = TrainPlan(sizes, seed=config.seed, batch_size=data.batch_size, short_edges=data.short_edges, flip=data.flip)
    padding = padding_share(plan, sizes, data.max_long_edge, divisor, PLANNED)
    canvas = largest_canvas(sizes, max(data.short_edges), data.max_long_edge, divisor)
    memory = estimate_step_memory(net, canvas, data.batch_size)
    return PlanSummary(padding, canvas, data.batch_size, config.model.name, memory.activations + 3 * memory.weights)


def shared_images(splits: Sequence[ScannedSplit]) -> Overlap | None:
    """Images that are in train and in val."""
    records = {split.name: split.records for split in splits}
    return find_overlap(records["train"], records["val"]) if {"train", "val"} <= set(records) else None


def explained(data: DataConfig, source: DataSource, diagnosis: Diagnosis) -> tuple[LabelMap, ClassTable]:
    """What the ids mean, by the suggestions where the configuration does not say it."""
    advice = diagnosis.suggestions
    if diagnosis.classes or "data.num_classes" not in advice:
        return source.label_map, source.classes
    settled = replace(
        data,
        num_classes=int(advice["data.num_classes"]),
        first_id=int(advice["data.first_id"]),
        ignore=json.loads(advice["data.ignore"]),
        map={"0": 0, "255": 1} if "data.map" in advice else None,
    )
    assumed = DataSource(settled)
    return assumed.label_map, assumed.classes


def pictures(
    split: ScannedSplit, count: int, max_pixels: int, label_map: LabelMap, classes: ClassTable
) -> Iterator[CheckedSample]:
    """Images spread evenly over a split, with their masks; those with ids that have no meaning are left out."""
    records = [record for record, _ in split.sound]
    for place in range(min(count, len(records))):
        record = records[place * len(records) // min(count, len(records))]
        try:
            image, label = read_pair(record, label_map, max_pixels=max_pixels)
        except DataError:
            continue
        assert label is not None
        yield CheckedSample(record.image, image, label, classes)


def write_lists(folder: Path, root: Path, splits: Sequence[ScannedSplit], known: Known | None) -> dict[str, str]:
    """An odgt list of the sound pairs of each split, and the keys that use it."""
    meaning = known.label_map.class_index if known else None
    keys = {}
    for split in splits:
        path = folder / f"{split.name}.odgt"
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for record, found in split.sound:
                if meaning is None or all(meaning(raw) is not None for raw in found.ids):
                    file.write(json.dumps(line_of(record, found.height, found.width, root)) + "\n")
        keys[f"data.{split.name}.list"] = str(path.absolute())
    return keys


def line_of(record: Record, height: int, width: int, root: Path) -> dict[str, str | int]:
    """A line of an odgt list."""
    image, label = (relpath(path, root) for path in (record.image, record.label or ""))
    return {"fpath_img": image, "fpath_segm": label, "width": width, "height": height}


def command(overrides: Sequence[str], suggestions: dict[str, str]) -> str:
    """The command to train with all suggestions."""
    given = [word for word in overrides if not word.startswith(("mode=", "check.", "run_dir="))]
    kept = [word for word in given if word.partition("=")[0].lstrip("+~") not in suggestions]
    return shlex.join([*entry_command().split(), *kept, *(f"{key}={value}" for key, value in suggestions.items())])


def write_files(folder: Path, checked: CheckReport) -> list[Path]:
    """Write check.json and check.html, and return their paths."""
    content, page = folder / "check.json", folder / "check.html"
    with atomic_write(content) as temporary:
        temporary.write_text(json.dumps(as_plain(checked), indent=1) + "\n", encoding="utf-8")
    write_check_page(page, checked)
    return [content, page]


def as_plain(checked: CheckReport) -> dict[str, Any]:
    """What check.json holds: words, numbers, lists and mappings."""
    diagnosis = checked.diagnosis
    return {
        "verdict": diagnosis.verdict,
        "notices": [notice._asdict() for notice in diagnosis.notices],
        "splits": [plain_split(split) for split in diagnosis.splits],
        "classes": [row._asdict() for row in diagnosis.classes],
        "class_weights": diagnosis.class_weights,
        "plan": checked.plan._asdict() if checked.plan else None,
        "suggestions": diagnosis.suggestions,
        "command": checked.command,
    }


def plain_split(split: SplitSummary) -> dict[str, Any]:
    """One split of check.json."""
    lengths = {name: getattr(split, name)._asdict() for name in ("heights", "widths", "aspects")}
    return split._asdict() | lengths


# ---- console


def tell(checked: CheckReport, files: Sequence[Path]) -> None:
    """What was found, in words."""
    diagnosis, console = checked.diagnosis, Console(soft_wrap=True, highlight=False)
    console.print(split_table(diagnosis.splits))
    if diagnosis.classes:
        console.print(class_table(diagnosis))
    if checked.plan:
        console.print(Text(escape_lines(checked.plan.describe())))
    for notice in diagnosis.notices:
        style = {"error": "bold red", "warning": "yellow"}.get(notice.level, "")
        console.print(Text(f"{notice.level}: ", style), Text(escape_lines(notice.text)), sep="")
    console.print(Text(f"\n{escape_lines(diagnosis.verdict)}", "bold"))
    console.print(Text(f"to train{' as suggested' if diagnosis.suggestions else ''}: {checked.command}"))
    console.print(Text(f"written {', '.join(map(str, files))}"))


def split_table(splits: Sequence[SplitSummary]) -> Table:
    """One row for each split."""
    table = Table()
    for name in ("split", "pairs", "wrong", "height", "width", "images", "masks", "ids", "ignored"):
        table.add_column(name, justify="right" if name in ("pairs", "wrong", "ignored") else "left")
    for split in splits:
        ids = ranges(list(split.ids))
        row = [split.name, str(split.pairs), str(split.wrong), in_words(split.heights), in_words(split.widths)]
        row += [", ".join(split.image_kinds), ", ".join(split.mask_kinds), ids, format_share(split.ignored)]
        table.add_row(*(Text(escape_unprintable(text)) for text in row))
    return table


def class_table(diagnosis: Diagnosis) -> Table:
    """The classes with the most pixels, and the rarest."""
    names = [split.name for split in diagnosis.splits]
    table = Table("class", *(f"{name}: pixels, images" for name in names), "weight")
    rows = sorted(diagnosis.classes, key=lambda row: -row.share)
    shown = rows if len(rows) <= NUM_CLASSES else rows[: NUM_CLASSES // 2] + rows[-NUM_CLASSES // 2 :]
    totals = {name: sum(row.pixels[name] for row in rows) or 1 for name in names}
    for row in shown:
        counts = [f"{format_share(row.pixels[name] / totals[name])}, {row.images[name]}" for name in names]
        table.add_row(*(Text(escape_unprintable(text)) for text in (row.name, *counts, f"{row.weight:g}")))
    if len(shown) < len(rows):
        table.caption = f"the first and last of {len(rows)} classes by pixels; all are in check.json"
    return table


def in_words(lengths: Lengths) -> str:
    """Smallest, median and largest."""
    low, middle, high = lengths
    return f"{low:g}" if low == high else f"{low:g} .. {middle:g} .. {high:g}"
