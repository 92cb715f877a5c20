"""Whatever way a run took to its end, its steps are those of the definition: which images, which rate, which scale."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import pytorch_lightning as pl
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from helpers.in_process import TINY_RUN, configured, fit, read_state
from semseg.config.schema import Config, SplitConfig
from semseg.data.batch import Batch
from semseg.datamodule import SegmentationData
from semseg.system.process import STOP_SIGNALS
from semseg.training.callbacks.stop import StoppedError
from semseg.training.optim import poly
from semseg.training.step_means import get_step_mean

RATE, POWER = 0.02, 0.9


class Setting(NamedTuple):
    """What decides the steps of a run."""

    batches: int  # sub-batches in an epoch
    epochs: int
    max_steps: int  # -1: as many as the epochs have
    accumulate: int
    interval: int  # epochs from one validation to the next; 0: no validation set

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches // self.accumulate)

    @property
    def total(self) -> int:
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps < 0 else min(steps, self.max_steps)

    def numbers(self, step: int) -> list[int]:
        """The sub-batches of a step: the last one of an epoch takes what is left."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start, end = place * self.accumulate, min((place + 1) * self.accumulate, self.batches)
        return [epoch * self.batches + number for number in range(start, end)]


class Stop(NamedTuple):
    """One way to end a run before its end."""

    how: str  # crash, crash in validation, signal, max_steps, max_epochs
    at: int  # step or epoch


class CrashError(Exception):
    pass


class Watch(Callback):
    """Notes what every step does, and forgets what is done again; stops the run where it is asked to."""

    def __init__(self) -> None:
        self.images: dict[int, list[list[str]]] = {}
        self.scales: dict[int, list[float]] = {}
        self.rates: dict[int, float] = {}
        self.expected_rates: dict[int, float] = {}
        self.logged = 0.0  # sum of the losses of the step so far
        self.total = 0  # steps of the run as it is configured now
        self.stop: Stop | None = None
        self.data: SegmentationData | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        for notes in (self.images, self.scales, self.rates, self.expected_rates):
            for step in [step for step in notes if step >= trainer.global_step]:
                del notes[step]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.images.setdefault(trainer.global_step, []).append(batch.paths)
        self.rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]
        self.expected_rates[trainer.global_step] = RATE * poly(trainer.global_step, total_steps=self.total, power=POWER)
        if self.stop is not None and self.stop.how == "signal" and trainer.global_step >= self.stop.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        notes = self.scales.setdefault(trainer.global_step, [])
        # The module has the mean of the step so far; the loss of this sub-batch alone is the newest of the sums.
        logged = float(get_step_mean(pl_module)[0]) * (len(notes) + 1)
        notes.append(loss.item() / (logged - self.logged if notes else logged))
        self.logged = logged

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        if self.stop is not None and self.stop.how == "crash" and trainer.global_step >= self.stop.at:
            raise CrashError

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.stop is not None and self.stop.how == "crash in validation" and trainer.global_step >= self.stop.at:
            raise CrashError


@pytest.fixture(scope="module", autouse=True)
def signals_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("data") / "scenes"
    return configured(
        "data=scenes", "data.make.num_train=3", "data.make.num_val=1", *TINY_RUN, f"data.root={root}",
        "data.batch_size=1", "data.short_edges=[32]", "checkpoint.every_n_steps=2", "trainer.log_images=0",
    )  # fmt: skip


def configuration(base: Config, run_dir: Path, setting: Setting) -> Config:
    trainer = replace(
        base.trainer, max_epochs=setting.epochs, max_steps=setting.max_steps,
        accumulate_grad_batches=setting.accumulate, check_val_every_n_epoch=setting.interval or 1,
    )  # fmt: skip
    data = replace(base.data, steps_per_epoch=setting.batches)
    if not setting.interval:
        data = replace(data, val=SplitConfig())
    logger = {"csv": base.logger["csv"] | {"folder": str(run_dir / "logs")}}
    return replace(base, run_dir=str(run_dir), trainer=trainer, data=data, logger=logger)


SETTINGS = st.builds(
    Setting, st.integers(1, 4), st.integers(1, 3), st.sampled_from([-1, -1, 1, 3, 5]), st.integers(1, 3),
    st.integers(0, 2),
)  # fmt: skip
STOPS = st.builds(
    Stop, st.sampled_from(["crash", "crash in validation", "signal", "max_steps", "max_epochs"]), st.integers(1, 8)
)


@pytest.mark.reliability
@pytest.mark.slow
@settings(
    max_examples=6, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(SETTINGS, st.lists(STOPS, min_size=1, max_size=2))
@example(Setting(2, 3, -1, 1, 2), [Stop("crash", 3)])  # after an epoch that no validation follows
@example(Setting(2, 2, -1, 1, 0), [Stop("crash", 3), Stop("signal", 4)])  # no validation at all
@example(Setting(3, 2, -1, 1, 1), [Stop("max_steps", 2)])  # inside an epoch
@example(Setting(3, 2, 3, 1, 1), [Stop("crash in validation", 3)])  # the last one, with trainer.max_steps
@example(Setting(3, 2, -1, 2, 0), [Stop("max_steps", 3), Stop("max_epochs", 1)])  # a step with one sub-batch
@example(Setting(2, 3, 5, 1, 2), [Stop("max_epochs", 1), Stop("max_epochs", 2)])  # prolonged twice
def test_a13_a14_the_steps_are_those_of_the_definition_whatever_the_way_there(
    base: Config, setting: Setting, stops: list[Stop]
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, watch = Path(temporary), Watch()
        last = folder / "checkpoints" / "last.ckpt"
        for stop in (*stops, None):
            run = setting
            if stop is not None and stop.how in ("max_steps", "max_epochs"):
                limits = {"max_steps": stop.at} if stop.how == "max_steps" else {"epochs": stop.at}
                run = setting._replace(**limits)
            if run.total > setting.total:
                continue
            watch.stop, watch.total = stop, run.total
            config = configuration(base, folder, run)
            resumed = last if last.is_file() else None
            if resumed is not None:
                state = read_state(resumed, config, has_val=setting.interval > 0)
                if state.describe_end(config.trainer) is not None:
                    assert state.step >= run.total
                    continue
            with contextlib.suppress(CrashError, StoppedError):
                fit(config, watch, resume=resumed)
        config = configuration(base, folder, setting)
        check_steps(setting, watch)
        check_end(setting, config)


def check_steps(setting: Setting, watch: Watch) -> None:
    """Images, rate and scale of every step."""
    assert watch.data is not None
    plan, records = watch.data.plan(), watch.data.source.records("train")
    assert sorted(watch.images) == list(range(setting.total))
    for step in range(setting.total):
        numbers = setting.numbers(step)
        expected = [[records[index].image for index in plan.sub_batch(number).records] for number in numbers]
        assert watch.images[step] == expected, step
        assert watch.scales[step] == pytest.approx([1 / len(numbers)] * len(numbers)), step
    assert watch.rates == pytest.approx(watch.expected_rates)


def check_end(setting: Setting, config: Config) -> None:
    """The log has every step and every validation once, and the run is known to be finished."""
    folder = Path(config.run_dir)
    with (folder / "logs" / "metrics.csv").open(newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    assert list(rows) == list(range(setting.total))
    assert [int(row["epoch"]) for row in rows.values()] == [step // setting.steps_per_epoch for step in rows]
    ends = [(epoch + 1) * setting.steps_per_epoch - 1 for epoch in range(setting.epochs)]
    validated = [step for epoch, step in enumerate(ends, 1) if setting.interval and epoch % setting.interval == 0]
    assert [step for step in rows if rows[step].get("val/miou")] == [step for step in validated if step < setting.total]
    state = read_state(folder / "checkpoints" / "last.ckpt", config, has_val=setting.interval > 0)
    assert state.step == setting.total and "already finished" in str(state.describe_end(config.trainer))
