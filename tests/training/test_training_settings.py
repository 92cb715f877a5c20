"""Settings of losses and optimisation, each in a short run on five drawn scenes: every one changes what it names."""

from __future__ import annotations

import csv
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_resume import copies_of_every_save

from helpers.in_process import TINY_RUN, assert_equal, configured, fit, logged_losses
from semseg.config.schema import Config
from semseg.data.sources import DataSource
from semseg.errors import ConfigError
from semseg.modes.train_start import resolve_start

# One epoch of three steps of two images.
RUN = [
    *TINY_RUN, "data.make.num_train=5", "data.make.num_val=2", "data.steps_per_epoch=3", "trainer.max_epochs=1",
    "data.val.list=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "scenes"  # drawn by the first run


def run_of(root: Path, run_dir: Path, *words: str) -> Config:
    return configured("data=scenes", *RUN, f"data.root={root}", f"run_dir={run_dir}", *words)


def test_class_weights_of_another_number_of_classes_are_refused_before_anything_is_read(
    root: Path, tmp_path: Path
) -> None:
    config = run_of(root, tmp_path, "loss.class_weights=[1,2]")
    source = DataSource(replace(config.data, make=None, classes=None, num_classes=3))
    with pytest.raises(ConfigError, match=r"loss\.class_weights.*3"):
        resolve_start(config, [], source)


@pytest.mark.slow
def test_the_loss_of_a_run_is_the_sum_of_its_terms(root: Path, tmp_path: Path) -> None:
    first = {}
    for name, terms in (
        ("one", "{cross_entropy: 1}"),
        ("other", "{cross_entropy: 0, dice: 1}"),
        ("sum", "{cross_entropy: 1, dice: 0.5}"),
    ):
        fit(run_of(root, tmp_path / name, "data.steps_per_epoch=1", f"loss.terms={terms}"))
        first[name] = logged_losses(tmp_path / name)["0"]
    assert first["sum"] == pytest.approx(first["one"] + 0.5 * first["other"], rel=1e-6)
    assert first["one"] > 1.5 and first["other"] < 1  # the logarithm of the number of classes; a fraction


FROZEN = ("model.encoder.frozen=true", "optim.layer_decay=0.5")


@pytest.mark.slow
def test_a_frozen_run_resumes_exactly(root: Path, tmp_path: Path) -> None:
    words = (*FROZEN, "checkpoint.every_n_steps=1", "checkpoint.keep=1")
    whole = fit(run_of(root, tmp_path / "whole", *words))
    stopped = tmp_path / "whole" / "checkpoints" / "step_00000002.ckpt"
    resumed = fit(run_of(root, tmp_path / "resumed", *words), resume=stopped)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(resumed[key], whole[key], key)


# Two epochs of two steps, each of two sub-batches, and validation after both.
AVERAGED = (
    "ema.decay=0.3", "data.steps_per_epoch=4", "trainer.accumulate_grad_batches=2", "trainer.max_epochs=2",
    "data.val.list=validation.odgt", "checkpoint.every_n_steps=1",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("64-true", torch.float64)])
def test_training_does_not_notice_that_there_is_an_average(
    root: Path, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    words = (*AVERAGED, f"trainer.precision={precision}")
    end = fit(run_of(root, tmp_path / "averaged", *words))
    plain = fit(run_of(root, tmp_path / "plain", *words, "ema.decay=null"))
    assert_equal(end["current_model_state"], plain["state_dict"])
    assert_equal(end["optimizer_states"], plain["optimizer_states"])
    assert end["state_dict"]["net.decoder.conv_last.weight"].dtype == dtype


STILL = (
    "optim.lr=1e-12", "model.freeze_bn=true", "data.steps_per_epoch=1", "trainer.max_epochs=9",
    "callbacks=early_stopping", "callbacks.early_stopping.patience=2",
)  # fmt: skip


@pytest.mark.slow
def test_early_stopping_ends_a_run_that_gets_no_better_resumed_or_not(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(root, tmp_path / "run", *STILL, "data.val.list=validation.odgt")
    with monkeypatch.context() as patched:
        copies = copies_of_every_save(patched, tmp_path / "copies")
        assert fit(config)["global_step"] == 3  # the first epoch sets the score, two do not better it
    assert [copy.name for copy in copies][2:4] == ["2_step2", "3_step2"]  # before and after validation
    for copy in copies[2:4]:
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(copy, tmp_path / "run")
        assert fit(config, resume=tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 3, copy.name


def test_early_stopping_on_a_score_that_never_comes_is_reported_before_training(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"early_stopping\.monitor=val/miuo: not known.*mean.*val/miou"):
        configured("callbacks=early_stopping", "callbacks.early_stopping.monitor=val/miuo")
    with pytest.raises(ConfigError, match=r"early_stopping\.monitor=val/miou: there is no validation"):
        fit(run_of(root, tmp_path, *STILL))
    validated = (*STILL, "data.val.list=validation.odgt")
    with pytest.raises(ConfigError, match=r"monitor=val/miou: there is no validation, trainer\.limit_val_batches is 0"):
        fit(run_of(root, tmp_path, *validated, "trainer.limit_val_batches=0"))
    by_epoch = "callbacks.early_stopping.check_on_train_epoch_end=true"
    with pytest.raises(ConfigError, match=r"end=true: val/miou is known after validation only\. Set it to false"):
        fit(run_of(root, tmp_path, *validated, by_epoch, "trainer.check_val_every_n_epoch=2"))
    loss = ("callbacks.early_stopping.monitor=train/loss", "callbacks.early_stopping.mode=min")
    with pytest.raises(ConfigError, match=r"end: there is no validation, after which train/loss would be checked"):
        fit(run_of(root, tmp_path, *STILL, *loss))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["callbacks.early_stopping.monitor=train/loss"],
            r"mode=max: the best train/loss is the lowest\. Set callbacks",
        ),
        (
            ["callbacks.early_stopping.mode=min"],
            r"callbacks\.early_stopping\.mode=min: the best val/miou is the highest",
        ),
        (["~callbacks.early_stopping.mode"], r"mode=min: the best val/miou is the highest"),  # Lightning's default
        (["checkpoint.mode=min"], r"checkpoint\.mode=min: the best val/miou is the highest\. Set checkpoint\.mode=max"),
    ],
)
def test_a_score_whose_best_value_would_be_taken_for_the_worst_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured("callbacks=early_stopping", *words)


@pytest.mark.slow
@pytest.mark.parametrize("has_val", [False, True])
def test_early_stopping_on_the_loss_ends_a_run(has_val: bool, root: Path, tmp_path: Path) -> None:
    words = ["callbacks.early_stopping.monitor=train/loss", "callbacks.early_stopping.mode=min",
             "+callbacks.early_stopping.min_delta=100"]  # fmt: skip
    words += (
        ["data.val.list=validation.odgt"] if has_val else ["callbacks.early_stopping.check_on_train_epoch_end=true"]
    )
    assert fit(run_of(root, tmp_path, *STILL, *words))["global_step"] == 3


@pytest.mark.slow
def test_the_rates_of_a_run_rise_linearly_and_fall_by_the_cosine(root: Path, tmp_path: Path) -> None:
    words = ("schedule=cosine", "schedule.warmup_steps=2", "schedule.warmup_factor=0", "data.steps_per_epoch=4")
    fit(run_of(root, tmp_path, *words, "optim.lr=0.1", "optim.layer_decay=0.5"))
    with (tmp_path / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    fractions = [0, (1 + math.cos(math.pi / 4)) / 4, 1 / 2, (1 + math.cos(3 * math.pi / 4)) / 2]
    for name, rate in (("decoder", 0.1), ("encoder", 0.1), ("encoder_-1", 0.05)):
        assert [float(row[f"lr/{name}"]) for row in rows] == pytest.approx([rate * fraction for fraction in fractions])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss=dice", "loss.class_weights=[1,2]"], "loss.class_weights="),
        (["loss=focal", "loss.label_smoothing=0.1"], "loss.label_smoothing=0.1"),
        (["loss.class_weights=[0,0]"], "loss.class_weights="),
    ],
)
def test_settings_that_none_of_the_losses_knows_are_reported(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(*words)
    assert message in str(caught.value)
