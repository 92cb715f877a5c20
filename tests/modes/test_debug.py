"""The debug presets, run as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.in_process import TINY_RUN, configured, fit, logged_losses
from semseg.build import build_trainer
from semseg.config.schema import Config
from semseg.data.sources import DataSource

RUN = [*TINY_RUN, "data.make.num_train=8", "data.make.num_val=3"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "scenes"


def debugged(preset: str, root: Path, run_dir: Path, *words: str) -> Config:
    return configured("data=scenes", *RUN, f"debug={preset}", f"data.root={root}", f"run_dir={run_dir}", *words)


@pytest.mark.slow
def test_overfit_learns_four_images_by_heart_and_scores_them(root: Path, tmp_path: Path) -> None:
    config = debugged("overfit", root, tmp_path, "data.steps_per_epoch=60", "trainer.max_epochs=2", "optim.lr=0.1")
    source = DataSource(config.data)
    assert source.records("train") == source.records("val") and len(source.records("train")) == 4
    fit(config)
    losses = list(logged_losses(tmp_path).values())
    assert sum(losses[-10:]) / 10 < 0.7 * losses[0]


@pytest.mark.parametrize("experiment", ["own_data", "finetune_vit"])
def test_overfit_leaves_nothing_in_the_way_of_learning_by_heart(experiment: str, tmp_path: Path) -> None:
    folds = tmp_path / "folds.yaml"
    folds.write_text("num_classes: 2\nfolds: 3\nfold: 0\n")
    config = configured(f"data={folds}", f"experiment={experiment}", "debug=overfit")
    assert config.augment.scale == [1, 1] and not config.augment.brightness
    assert config.schedule.warmup_steps == 0 and config.ema.decay is None
    assert config.trainer.accumulate_grad_batches == 1 and config.data.folds is None


@pytest.mark.long
def test_limit_uses_the_first_records_of_each_split(root: Path, tmp_path: Path) -> None:
    config = debugged("limit", root, tmp_path, "data.limit=2", "data.steps_per_epoch=2")
    source = DataSource(config.data)
    assert [len(source.records(split)) for split in ("train", "val")] == [2, 2]
    assert (
        source.records("train") == DataSource(configured("data=scenes", f"data.root={root}").data).records("train")[:2]
    )
    fit(config)
    assert list(logged_losses(tmp_path)) == ["0", "1", "2", "3"]


def test_fast_takes_one_step_and_logs_nothing(root: Path, tmp_path: Path) -> None:
    saved = fit(debugged("fast", root, tmp_path))
    assert saved["global_step"] == 1
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_profile_tells_where_the_time_went(root: Path, tmp_path: Path) -> None:
    fit(debugged("profile", root, tmp_path, "data.steps_per_epoch=2"))
    assert "run_training_batch" in (tmp_path / "fit-profile.txt").read_text()


def test_a_fast_run_is_one_of_training_and_evaluates_all_images(tmp_path: Path) -> None:
    for mode, is_fast in (("train", True), ("eval", False)):
        words = [f"mode={mode}", "debug=fast", *TINY_RUN, f"data.root={tmp_path}", f"run_dir={tmp_path}"]
        config = configured(*words, *(["ckpt=x"] if mode == "eval" else []))
        assert bool(build_trainer(config, DataSource(config.data)).fast_dev_run) == is_fast  # pyright: ignore[reportAttributeAccessIssue]
