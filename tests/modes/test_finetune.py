"""The fine-tuning recipes, on published files with random weights."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from helpers.command_line import TINY, run_here
from helpers.in_process import configured
from helpers.published_files import write_files
from helpers.random_checkpoints import write_random_checkpoints
from semseg.checkpoints.format import read_checkpoint
from semseg.modes.train_start import chooses_network

MINE = "# @package _global_\noptim: {lr: 0.002}\nmodel: {label_stride: 2}\n"  # a recipe without a network
SMALL = [word for word in TINY if not word.startswith(("model", "~model"))]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["finetune", pytest.param("finetune_decoder", marks=pytest.mark.long)])
def test_a_published_network_learns_other_classes(recipe: str, tmp_path: Path) -> None:
    whole = configured(f"experiment={recipe}", "data=scenes")
    assert whole.init_from == f"zoo:{whole.model.name}"
    write_files(tmp_path / "published", "resnet18_dilated8", "c1_deepsup")
    printed = run_here(
        tmp_path, f"experiment={recipe}", *SMALL, "model=resnet18_dilated8_c1_deepsup", "init_from=published",
        "run_dir=run", "trainer.log_every_n_steps=1",
    )  # fmt: skip
    assert "decoder.conv_last.weight" in printed  # among the layers with fresh weights: 11 classes instead of 150
    with (tmp_path / "run" / "logs" / "metrics.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    decoder = float(first["lr/decoder"])
    assert decoder == pytest.approx(0.01 * 0.0025)  # the warm-up starts there
    if recipe == "finetune":
        assert float(first["lr/encoder"]) == pytest.approx(decoder / 10)
    else:
        assert "lr/encoder" not in first


@pytest.mark.slow
def test_a_classifier_is_not_kept_for_the_same_classes_in_another_order(tmp_path: Path) -> None:
    write_random_checkpoints(tmp_path)
    names = read_checkpoint(tmp_path / "a.ckpt").classes.names
    (tmp_path / "reversed.txt").write_text("\n".join(reversed(names)))
    (tmp_path / "renamed.txt").write_text("\n".join(["heaven", *names[1:]]))
    words = [*SMALL, "init_from=a.ckpt", "data.root=scenes", "data.num_classes=null"]
    printed = run_here(tmp_path, *words, f"data.classes={tmp_path}/reversed.txt", "run_dir=reversed", code=2)
    assert f"in another order: class 0 is {names[-1]} here and {names[0]} there" in printed
    assert not (tmp_path / "reversed" / "checkpoints").exists()
    printed = run_here(
        tmp_path, *words, f"data.classes={tmp_path}/renamed.txt", "run_dir=renamed", "trainer.max_steps=1"
    )
    assert "differ from those in" in printed and "is this the same task?" in printed


@pytest.mark.parametrize(
    ("words", "is_chosen"),
    [
        (["experiment=mine.yaml"], False),
        (["experiment=null", "model.encoder.frozen=true", "model.encoder.weights=none"], False),
        (["experiment=own_data"], True),  # an encoder and a decoder
        (["experiment=published_upernet50"], True),
        (["++model.encoder.output_stride=8"], True),
        (["model.encoder.weights=none", "experiment=other.yaml"], False),  # as in Hydra, whatever the order of words
    ],
)
def test_init_from_brings_its_network_unless_the_words_or_their_recipe_choose_one(
    words: list[str], is_chosen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(MINE, encoding="utf-8")
    Path("other.yaml").write_text("model: {encoder: {weights: imagenet}}\n", encoding="utf-8")
    assert chooses_network(words) == is_chosen
