"""What people's own data is trained with: experiment=own_data, and the defaults of data=folder."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest

from helpers.in_process import configured, fit
from semseg.config.groups import CONFIG_DIR, list_options


@pytest.mark.slow
def test_the_recipe_for_own_data_trains(tmp_path: Path) -> None:
    config = configured(
        "experiment=own_data", "data=scenes", f"data.root={tmp_path / 'scenes'}", "data.make.num_train=4",
        "data.make.num_val=1", f"run_dir={tmp_path / 'run'}", "trainer=cpu", "model.encoder.weights=none",
        "model.encoder.name=mobilenetv3_small_050", "data.short_edges=[32]", "data.num_workers=0",
        "data.steps_per_epoch=2", "trainer.max_epochs=1", "eval.scales=[32]", "trainer.enable_progress_bar=false",
        "checkpoint.every_n_minutes=null",
    )  # fmt: skip
    assert fit(config)["global_step"] == 2


def test_the_recipe_for_own_data_leaves_the_data_to_the_user() -> None:
    own = configured("experiment=own_data", "data=folder", "data.root=x", "data.num_classes=5")
    plain = configured("data=folder", "data.root=x", "data.num_classes=5")
    assert (own.data.short_edges, own.eval) == (plain.data.short_edges, plain.eval)
    assert own.loss.terms.factors["dice"] == 1


def measure_gain(base: str, minutes: str, chosen: str, change: str) -> float:
    """Points of mean IoU that a change loses to another on CamVid, over the seeds that the table has of both.

    Rows are compared with that of the same commit, if there is one: machines of other days make other numbers of steps.
    """
    scores: defaultdict[str, list[tuple[str, str, float]]] = defaultdict(list)
    with (CONFIG_DIR.parent / "benchmarks" / "ablations.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["base"], row["minutes"], row["data"]) == (base, minutes, "camvid"):
                scores[row["change"]].append((row["seed"], row["commit"], float(row["miou"])))

    def find_chosen(seed: str, commit: str) -> float:
        rows = [(its_commit == commit, miou) for its_seed, its_commit, miou in scores[chosen] if its_seed == seed]
        return max(rows, key=lambda row: row[0])[1]  # the first of the best

    return fmean(find_chosen(seed, commit) - miou for seed, commit, miou in scores[change])


CHOSEN = "Dice, AdamW 0.003, encoder 0.0005"  # what the first rows led to


@pytest.mark.parametrize(
    ("comment", "base", "minutes", "chosen", "change"),
    [
        ("{} over cross entropy", "own_data", "15", "none", "cross entropy"),
        ("{} over OHEM", "own_data", "15", "none", "OHEM, Dice"),
        ("{} over strong", "own_data", "15", "none", "strong crops"),
        ("{} over none:", "own_data", "15", "none", "no colours"),
        ("{} over one size", "own_data", "15", "none", "one size"),
        ("{} over whole images.", "own_data", "15", "none", "whole images"),
        ("label_stride: 2 # {} over 4", "own_data", "15", "none", "label stride 4"),
        ("{} over 1,", "own_data", "15", "none", "label stride 1"),
        ("{} over 64,", "own_data", "15", "none", "width 64"),
        ("{} over 256\n", "own_data", "15", "none", "width 256"),
        ("{} over SGD 0.05", "own_data", "15", "none", "SGD 0.05"),
        ("({} over SGD 0.02)", "segformer", "3", CHOSEN, "Dice"),
        ("{} over AdamW 0.001 for both", "own_data", "15", "none", "AdamW 0.001"),
        ("({} over 0.001)", "segformer", "3", CHOSEN, "Dice, AdamW 0.001"),
        ("{} over [0.75, 1.5]", "own_data", "15", "none", "sizes of 0.75 to 1.5"),
        ("{} over no warm-up:", "own_data", "15", "none", "no warm-up"),
        ("{} over 0.05.", "own_data", "15", "none", "weight decay 0.05"),
        ("{} over 2,", "own_data", "15", "none", "batch 2"),
        ("{} over 0.5\n", "own_data", "15", "none", "oversampling"),
        ("{} over 8 (", "own_data", "15", "none", "batch 8"),
        ("({} over eight)", "own_data_whole", "6", "none", "batch 8"),
        ("{} over no average", "own_data", "15", "none", "no EMA"),
    ],
)
def test_a_gain_in_the_recipe_for_own_data_is_the_one_measured(
    comment: str, base: str, minutes: str, chosen: str, change: str
) -> None:
    recipe = (CONFIG_DIR / "experiment" / "own_data.yaml").read_text()
    found = re.findall(re.escape(comment).replace(r"\{\}", r"([+-]?\d+\.\d)"), recipe)
    assert [float(gain) for gain in found] == [pytest.approx(measure_gain(base, minutes, chosen, change), abs=0.051)]


def test_every_gain_in_the_recipe_for_own_data_is_compared_with_a_measurement() -> None:
    test = test_a_gain_in_the_recipe_for_own_data_is_the_one_measured
    recipe = (CONFIG_DIR / "experiment" / "own_data.yaml").read_text()
    gains = re.findall(r"[+-]?\d+\.\d over ", recipe)
    assert len(gains) == len(test.pytestmark[0].args[1])


DICE, PLAIN = {"cross_entropy": 1, "dice": 1}, {"cross_entropy": 1}
PUBLISHED = [name for name in list_options("experiment") if name.startswith("published_")]


@pytest.mark.parametrize(
    ("words", "terms"),
    [
        (["data=folder"], DICE),
        (["data={file}"], DICE),  # a data set that starts from data=folder
        (["experiment=finetune", "data=folder"], DICE),
        (["data=folder", "loss=cross_entropy"], PLAIN),
        (["data=folder", "loss=ohem"], {"ohem": 1}),
        *((["data=folder", f"experiment={name}"], PLAIN) for name in PUBLISHED),
        (["data=camvid"], PLAIN),
        ([], PLAIN),
    ],
)
def test_own_data_is_trained_with_dice_and_published_recipes_are_not(
    words: list[str], terms: dict[str, float], tmp_path: Path
) -> None:
    file = tmp_path / "plants.yaml"
    file.write_text("root: .\nnum_classes: 3\n")
    config = configured(*(word.format(file=file) for word in words), "data.num_classes=3")
    assert {name: factor for name, factor in config.loss.terms.factors.items() if factor} == terms


def test_there_are_published_recipes() -> None:
    assert "published_upernet50" in PUBLISHED
