"""The rows of accuracy.py as tables in Markdown, and a picture of the predictions side by side.

    python benchmarks/accuracy_report.py                                            # tables of benchmarks/accuracy.csv
    python benchmarks/accuracy_report.py --camvid <folder> --minutes 30 --picture docs/images/results.png

The picture needs the folder of work that accuracy.py has filled. It shows class maps only, because the photographs and
labels of CamVid are not ours to publish: one row for each of a few images, spread evenly over the split, one column for
each side.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from accuracy import TABLE, list_pairs, read_label
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from semseg.data.classes import built_in_classes
from semseg.reports.draw import colour_class_map

TITLE_HEIGHT = 18  # pixels
GAP = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--camvid", type=Path, help="folder of CamVid, for the picture")
    parser.add_argument("--work", type=Path, default=Path("accuracy"), help="folder of runs and predictions")
    parser.add_argument("--minutes", default="30", help="of the rows in the picture")
    parser.add_argument("--seed", default="1", help="of the rows in the picture")
    parser.add_argument("--picture", type=Path, help="PNG file to write")
    parser.add_argument("--images", type=int, default=3)
    options = parser.parse_args()
    with options.table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    print_tables(rows)
    if options.picture:
        chosen = [row for row in rows if row["minutes"] == options.minutes and row["seed"] == options.seed]
        draw_picture([row for row in chosen if row["data"] == options.camvid.name], options)


def print_tables(rows: list[dict[str, str]]) -> None:
    """Two tables for each data set, split, encoder and number of minutes: scores and costs, and the IoU of classes."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[row["data"], row["split"], row["encoder"], row["minutes"]].append(row)
    for (data, split, encoder, minutes), members in groups.items():
        print(f"\n{data} {split}, {encoder}, {minutes} CPU minutes\n")
        print("| side | seed | mIoU | by torchmetrics | pixel accuracy | steps | images | images / CPU s | peak MB |")
        print("|---|---|---|---|---|---|---|---|---|")
        ordered = sorted(members, key=lambda row: -float(row["miou"]))
        columns = (
            "side", "seed", "miou", "miou_torchmetrics", "pixel_accuracy", "steps", "images", "images_per_cpu_s",
            "peak_memory_mb",
        )  # fmt: skip
        for row in ordered:
            print("| " + " | ".join(row[column] for column in columns) + " |")
        for line in summarise_seeds(ordered):
            print(f"\n{line}")
        names = [entry.rpartition(" ")[0] for entry in ordered[0]["iou"].split("; ")]
        print("\n| side | seed | " + " | ".join(names) + " |")
        print("|---" * (len(names) + 2) + "|")
        for row in ordered:
            values = [entry.rpartition(" ")[2] for entry in row["iou"].split("; ")]
            print(f"| {row['side']} | {row['seed']} | " + " | ".join(values) + " |")


def summarise_seeds(rows: list[dict[str, str]]) -> Iterator[str]:
    """A line for every side with several seeds: mean and standard deviation of its mean IoU."""
    for side in dict.fromkeys(row["side"] for row in rows):
        scores = [float(row["miou"]) for row in rows if row["side"] == side]
        if len(scores) > 1:
            yield f"{side}: {mean(scores):.2f} +- {stdev(scores):.2f} over {len(scores)} seeds"


def draw_picture(rows: list[dict[str, str]], options: argparse.Namespace) -> None:
    """Write the class maps of these rows, each at half its size, with titles."""
    classes = built_in_classes("camvid")
    ordered = sorted(rows, key=lambda row: -float(row["miou"]))
    pairs = list_pairs(options.camvid, ordered[0]["split"])
    chosen = [pairs[(2 * index + 1) * len(pairs) // (2 * options.images)][0] for index in range(options.images)]
    columns = []
    for row in ordered:
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
