"""What people's own data is trained with: experiment=own_data, and the defaults of data=folder."""

from __future__ import annotations

import csv
from pathlib import Path

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


def test_the_gains_in_the_recipe_for_own_data_are_those_of_the_measurements() -> None:
    with (CONFIG_DIR.parent / "benchmarks" / "ablations.csv").open(newline="") as file:
        rows = {row["change"]: float(row["miou"]) for row in csv.DictReader(file) if row["base"] == "segformer"}
    recipe = (CONFIG_DIR / "experiment" / "own_data.yaml").read_text()
    split, common = rows["Dice, AdamW 0.003, encoder 0.0005"], rows["Dice, AdamW 0.001"]
    assert f"{rows['Dice'] - rows['none']:+.1f} over cross entropy" in recipe
    assert f"{split - rows['Dice']:+.1f} over SGD 0.02, {split - common:+.1f} over AdamW 0.001" in recipe


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
