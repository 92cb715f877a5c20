"""Means of loss and accuracy: the rows of a log, and the running mean of the progress."""

from __future__ import annotations

import csv
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from helpers.in_process import logged_losses, prepare_run
from semseg.training.step_means import WINDOW, IntervalMean, LastSteps, StepSums, compute_means, get_step_mean


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "scenes"


class OneRank:
    """A trainer of one device, as far as a reduction needs it."""

    class Strategy:
        root_device = torch.device("cpu")

        def reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
            return tensor

    strategy = Strategy()


def summed(values: list[float], start: StepSums | None = None) -> StepSums:
    interval = IntervalMean()
    if start is not None:
        interval.restart(start)
    for value in values:
        interval.add(torch.tensor([value, 0.5]))
    return interval.reduce(OneRank())  # pyright: ignore[reportArgumentType]


def test_the_sums_do_not_depend_on_where_a_run_was_stopped_or_on_the_order_of_the_ranks() -> None:
    draw = random.Random(0)
    values = [draw.uniform(1e-3, 30) for _ in range(160)]
    whole = summed(values)
    for stop in range(len(values)):
        assert summed(values[stop:], start=summed(values[:stop])) == whole
    assert summed(values[::-1]) == whole


def test_a_step_without_a_finite_loss_is_left_out() -> None:
    assert summed([1.0, math.nan, math.inf, 3.0]) == StepSums(4.0, 1.0, 2)
    assert all(math.isnan(value) for value in compute_means(summed([math.nan])).values())


def test_the_running_mean_covers_the_last_steps_and_says_how_many() -> None:
    last = LastSteps()
    assert last.compute_mean() is None
    for step in range(3):
        last.add(torch.tensor([float(step), 0.25]))
    assert last.compute_mean() == (1.0, 0.25, 3)
    for step in range(WINDOW):
        last.add(torch.tensor([100.0 + step, 0.75]))
    assert last.compute_mean() == (100 + (WINDOW - 1) / 2, 0.75, WINDOW)


class Watch(Callback):
    """Notes the loss of every step, and what a callback that monitors it would see."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.monitored: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(get_step_mean(pl_module)[0]))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.monitored.append(float(trainer.callback_metrics["train/loss"]))


def test_a_row_is_the_mean_since_the_row_before_and_every_epoch_ends_with_one(root: Path, tmp_path: Path) -> None:
    run = prepare_run(
        root, tmp_path, "trainer.log_every_n_steps=4", "data.steps_per_epoch=5", "trainer.max_epochs=3",
        "trainer.max_steps=12",
    )  # fmt: skip
    watch = Watch()
    run.trainer.callbacks.append(watch)  # pyright: ignore[reportAttributeAccessIssue]
    run.fit()
    logged = {int(step): loss for step, loss in logged_losses(tmp_path).items()}
    assert list(logged) == [0, 3, 4, 7, 9, 11]  # the first, every fourth, the last of each epoch, the last
    for before, step in pairwise([-1, *logged]):
        steps = watch.losses[before + 1 : step + 1]
        assert math.isclose(logged[step], sum(steps) / len(steps), rel_tol=1e-6), step
    assert all(
        math.isclose(logged[step], value, rel_tol=1e-6) for step, value in zip((4, 9), watch.monitored[:2], strict=True)
    )


@pytest.mark.slow
def test_the_times_of_a_resumed_run_begin_when_it_resumes(root: Path, tmp_path: Path) -> None:
    words = ["data.steps_per_epoch=4", "trainer.log_images=0", "trainer.log_every_n_steps=20"]
    prepare_run(root, tmp_path, *words, "trainer.max_steps=2").fit()
    prepare_run(root, tmp_path, *words).fit(tmp_path / "checkpoints" / "last.ckpt")
    with (tmp_path / "logs" / "speed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "3"]
    # Not the time since the machine was started, which was the start of the clock.
    assert all(0 <= float(row[name]) < 20 for row in rows for name in ("time/data", "time/step"))
