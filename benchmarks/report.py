"""The rows of accuracy.csv and ablations.csv as the tables of a page, and a picture of the predictions side by side.

    python benchmarks/report.py docs/results.md                          # write its tables again
    python benchmarks/report.py --camvid <folder> --minutes 30 --picture docs/images/results.png

The page says which rows it shows, by entries that they have in common: what stands between a line such as
`<!-- costs data=camvid split=test minutes=30 -->` and `<!-- end -->` is replaced. Kinds of tables: `costs` and
`classes` (scores and costs, and IoU of classes, of every side), `seeds` (mean and standard deviation of every side),
and `changes` (of ablations.csv).

The picture needs the folder of work that accuracy.py has filled. It shows class maps only, because the photographs and
labels of CamVid are not ours to publish: one row for each of a few images, spread evenly over the split, one column for
each side.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from accuracy import TABLE, list_pairs, read_label
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from semseg.data.classes import built_in_classes
from semseg.reports.draw import colour_class_map

BENCHMARKS = Path(__file__).resolve().parent
MARKED = re.compile(r"(<!-- (?P<kind>\w+) (?P<entries>[^\n]+?) -->\n).*?(?=<!-- end -->)", re.DOTALL)
TITLES = {
    "ours": "semseg, `experiment=own_data`",
    "ours_whole": "semseg, own_data with whole images",
    "ours_defaults": "semseg, defaults of `data=folder`",
    "ours_2018": "semseg, the recipe of 2018",
    "smp_deeplabv3plus": "segmentation-models-pytorch, DeepLabV3+",
    "smp_unet": "segmentation-models-pytorch, U-Net",
    "transformers_segformer_b0": "transformers, SegFormer-B0 from random weights",
}
RARE_CLASSES = ("Pole", "SignSymbol", "Fence", "Pedestrian", "Bicyclist")  # of CamVid
TITLE_HEIGHT = 18  # pixels
GAP = 4

Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", help="Markdown file with marked tables")
    parser.add_argument("--camvid", type=Path, help="folder of CamVid, for the picture")
    parser.add_argument("--work", type=Path, default=Path("accuracy"), help="folder of runs and predictions")
    parser.add_argument("--minutes", default="30", help="of the rows in the picture")
    parser.add_argument("--seed", default="1", help="of the rows in the picture")
    parser.add_argument("--picture", type=Path, help="PNG file to write")
    parser.add_argument("--images", type=int, default=3)
    options = parser.parse_args()
    if options.picture and not options.camvid:
        parser.error("--picture needs --camvid.")
    if options.page:
        options.page.write_text(fill_tables(options.page.read_text()))
    if options.picture:
        rows = select_rows(TABLE, {"data": options.camvid.name, "minutes": options.minutes, "seed": options.seed})
        draw_picture(rows, options)


def fill_tables(page: str) -> str:
    """The page with the tables that its marks describe.

    Raises:
        SystemExit: if a mark has an unknown kind, or no row has its entries.
    """
    return MARKED.sub(lambda mark: f"{mark[1]}\n{make_table(mark['kind'], mark['entries'])}\n", page)


def make_table(kind: str, entries: str) -> str:
    """A table of the rows with these entries, such as "data=camvid minutes=30"."""
    if kind not in KINDS:
        raise SystemExit(f"<!-- {kind} {entries} -->: the kinds of tables are {', '.join(KINDS)}.")
    table, format_rows = KINDS[kind]
    rows = select_rows(table, dict(entry.split("=", 1) for entry in entries.split()))
    if not rows:
        raise SystemExit(f"<!-- {kind} {entries} -->: no row of {table.name} has these entries.")
    header, *lines = (f"| {' | '.join(cells)} |\n" for cells in format_rows(rows))
    return "".join([header, "|---" * (header.count("|") - 1) + "|\n", *lines])


def select_rows(table: Path, entries: Row) -> list[Row]:
    """The rows of a CSV file that have these entries, the highest mean IoU first."""
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row[name] == value for name, value in entries.items())]
    return sorted(rows, key=lambda row: -float(row["miou"]))


def format_costs(rows: Sequence[Row]) -> Iterable[Sequence[str]]:
    yield (
        "side", "seed", "machine", "mIoU", "by torchmetrics", "pixel accuracy", "CPU minutes", "steps", "images",
        "images a CPU second", "peak memory",
    )  # fmt: skip
    for row in rows:
        machine = "Xeon" if "Xeon" in row["machine"] else "EPYC"
        percents = shorten(row["miou_torchmetrics"]), shorten(row["pixel_accuracy"])
        yield (
            TITLES[row["side"]], row["seed"], machine, f"**{shorten(row['miou'])}**", *percents,
            shorten(row["cpu_minutes"]), row["steps"], row["images"], row["images_per_cpu_s"] or "n/a",
            format_memory(row),
        )  # fmt: skip


def format_classes(rows: Sequence[Row]) -> Iterable[Sequence[str]]:
    yield ("IoU", "seed", *(name.lower() for name in read_ious(rows[0])))
    for row in rows:
        yield (TITLES[row["side"]], row["seed"], *(f"{iou:.1f}" for iou in read_ious(row).values()))


def format_seeds(rows: Sequence[Row]) -> Iterable[Sequence[str]]:
    yield "side", "mIoU, mean and standard deviation", "seeds", "steps", "images a CPU second", "peak memory"
    for side, runs in group_rows(rows, "side"):
        scores = [float(row["miou"]) for row in runs]
        speed = fmean(float(row["images_per_cpu_s"]) for row in runs)
        deviation = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
        yield (
            TITLES[side], f"**{fmean(scores):.1f}**{deviation}", list_scores(runs), list_steps(runs), f"{speed:.1f}",
            format_memory(*runs),
        )  # fmt: skip


def format_changes(rows: Sequence[Row]) -> Iterable[Sequence[str]]:
    classes = [name for name in RARE_CLASSES if name in read_ious(rows[0])]
    yield ("change", "overrides", "mIoU", "mean", "steps", *(name.lower() for name in classes))
    for change, runs in group_rows(rows, "change"):
        overrides = f"`{runs[0]['overrides']}`" if runs[0]["overrides"] else ""
        ious = [f"{fmean(read_ious(row)[name] for row in runs):.1f}" for name in classes]
        yield (change, overrides, list_scores(runs), f"{mean_score(runs):.1f}", list_steps(runs), *ious)


def group_rows(rows: Sequence[Row], column: str) -> list[tuple[str, list[Row]]]:
    """The rows by their entry in a column, in the order of their seeds; the highest mean of their mean IoU first."""
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        groups[row[column]].append(row)
    return sorted(groups.items(), key=lambda group: -mean_score(group[1]))


def mean_score(rows: Sequence[Row]) -> float:
    return fmean(float(row["miou"]) for row in rows)


def list_scores(rows: Sequence[Row]) -> str:
    return ", ".join(shorten(row["miou"]) for row in rows)


def list_steps(rows: Sequence[Row]) -> str:
    steps = [int(row["steps"]) for row in rows]
    return " to ".join(map(str, sorted({min(steps), max(steps)})))


def format_memory(*rows: Row) -> str:
    """The highest peak of these runs."""
    peaks = [float(row["peak_memory_mb"]) for row in rows if row["peak_memory_mb"]]
    return f"{max(peaks) / 1024:.1f} GiB" if peaks else "n/a"


def read_ious(row: Row) -> dict[str, float]:
    """IoU of every class in percent."""
    return {name: float(iou) for name, _, iou in (entry.rpartition(" ") for entry in row["iou"].split("; "))}


def shorten(number: str) -> str:
    return f"{float(number):.1f}" if number else "n/a"


KINDS: dict[str, tuple[Path, Callable[[Sequence[Row]], Iterable[Sequence[str]]]]] = {
    "costs": (TABLE, format_costs),
    "classes": (TABLE, format_classes),
    "seeds": (TABLE, format_seeds),
    "changes": (BENCHMARKS / "ablations.csv", format_changes),
}


def draw_picture(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Write the class maps of these rows, each at half its size, with titles."""
    classes = built_in_classes("camvid")
    pairs = list_pairs(options.camvid, rows[0]["split"])
    chosen = [pairs[(2 * index + 1) * len(pairs) // (2 * options.images)][0] for index in range(options.images)]
    columns = []
    for row in rows:
        key = (row[name] for name in ("data", "split", "side", "encoder", "minutes", "seed"))
        folder = options.work / "-".join(key) / "predictions"
        maps = [colour_class_map(read_label(folder / f"{image.stem}_ids.png"), classes)[::2, ::2] for image in chosen]
        columns.append(stack_column(f"{row['side']}  {row['miou']}", maps))
    picture = np.concatenate([part for column in columns for part in (column, white(column.shape[0], GAP))][:-1], 1)
    Image.fromarray(picture).quantize(64, dither=Image.Dither.NONE).save(options.picture, optimize=True)


def stack_column(title: str, maps: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """A title above pictures."""
    width = maps[0].shape[1]
    heading = Image.new("RGB", (width, TITLE_HEIGHT), "white")
    ImageDraw.Draw(heading).text((2, 2), title, "black", ImageFont.load_default(12))
    parts = [np.asarray(heading)]
    for picture in maps:
        parts += [picture, white(GAP, width)]
    return np.concatenate(parts[:-1])


def white(height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), 255, np.uint8)


if __name__ == "__main__":
    main()
