"""What a training run prints: its configuration, its progress, and its scores after every validation."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ProgressBar, RichProgressBar
from pytorch_lightning.callbacks.progress.rich_progress import (
    BatchesProcessedColumn,
    CustomBarColumn,
)
from rich.console import Console, Group
from rich.progress import ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from semseg.config.override_keys import list_given_keys
from semseg.config.schema import flatten_sections
from semseg.data.batch import Batch
from semseg.data.classes import ClassTable
from semseg.evaluation.metrics import Scores
from semseg.system.text import escape_unprintable, format_quantity
from semseg.training.step_means import LastSteps, get_step_mean, is_step_complete

REST_WIDTH = 95  # characters of a progress bar beside the bar itself, with the accuracy
MIN_BAR_WIDTH, MAX_BAR_WIDTH = 4, 20
SECONDS_BETWEEN_LINES = 10  # of progress in a log or pipe
READ_SECONDS = 0.5  # between readings of the loss; each waits for the device
NUM_WEAKEST = 5  # classes named after every validation
OTHER_SECTIONS = ("predict", "serve", "export", "check", "bench", "download")  # sections that training does not read


@runtime_checkable
class HasScores(Protocol):
    """A module that scores a validation; this file needs to know no more about semseg/lit_module.py."""

    scores: Scores | None  # those of the last validation or test
    classes: ClassTable


def build_config_tree(config: dict[str, Any], overrides: Sequence[str]) -> Tree:
    """The values of every section that training reads, one branch each; those of the command line are in bold.

    Args:
        config: the configuration of the run as plain data.
        overrides: the overrides of the command line, which are listed at the end.
    """
    given = list_given_keys(overrides)
    sections: dict[str, dict[str, Any]] = {"": {}}
    for key, value in flatten_sections(config):
        section, _, name = key.partition(".")
        inside = sections.setdefault(section, {}) if name else sections[""]
        if value is not None and value not in ([], {}, ""):
            inside[key] = value
    tree = Tree(Text("configuration", "bold"), guide_style="dim")
    for section, inside in sections.items():
        if section in OTHER_SECTIONS or not inside:
            continue
        branch = Text()
        branch.append(f"{section or 'run'}  ", "bold cyan")
        for key, value in inside.items():
            style = "bold" if key in given else "default"
            branch.append(f"{key.removeprefix(f'{section}.')}=", "dim")
            branch.append(f"{str(value).lower() if isinstance(value, bool) else value}  ", style)
        tree.add(branch)
    if overrides:
        branch = Text()
        branch.append("given  ", "bold cyan")
        branch.append("  ".join(overrides), "bold")
        tree.add(branch)
    return tree


class TimeLeft:
    """The remaining time of a run at its speed so far, validations included."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._start, self._first_step = time.monotonic(), trainer.global_step
        self._num_steps = trainer.estimated_stepping_batches

    def format(self, trainer: pl.Trainer) -> str:
        """Hours, minutes and seconds, "0:04:10"; "-:--:--" while nothing is known, or if the run has no end."""
        done, left = trainer.global_step - self._first_step, self._num_steps - trainer.global_step
        if done <= 0 or math.isinf(left):
            return "-:--:--"
        return str(timedelta(seconds=round(max(left, 0) * (time.monotonic() - self._start) / done)))


class ImagesPerSecond(ProgressColumn):
    """Images per second over all devices, in the last seconds."""

    max_refresh = 0.5

    def __init__(self, bar: BarProgress, trainer: pl.Trainer) -> None:
        super().__init__()
        self.bar, self.devices = bar, trainer.world_size

    def render(self, task: Task) -> Text:
        is_training = task.id == self.bar.train_progress_bar_id
        images = self.devices * (self.bar.batch_size if is_training else self.bar.eval_batch_size)
        return Text("" if task.speed is None else f"{images * task.speed:.1f} images/s")


class RemainingTime(ProgressColumn):
    """The remaining time of the run, in the bar of training."""

    max_refresh = 0.5

    def __init__(self, bar: BarProgress, trainer: pl.Trainer) -> None:
        super().__init__()
        self.bar, self.trainer = bar, trainer

    def render(self, task: Task) -> Text:
        left = self.bar.time_left
        is_training = task.id == self.bar.train_progress_bar_id
        return Text("" if left is None or not is_training else f"{left.format(self.trainer)} left", "dim")


class BarProgress(RichProgressBar):
    """Lightning's bar with images per second, the remaining time of the whole run, and the loss of the last steps.

    Args:
        batch_size: images of a sub-batch, per device.
        eval_batch_size: images that are evaluated together at most, per device.
    """

    def __init__(self, batch_size: int, eval_batch_size: int) -> None:
        super().__init__(refresh_rate=10)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.time_left: TimeLeft | None = None
        self._last_steps = LastSteps()
        self._metrics: dict[str, float] = {}
        self._last_read = float("-inf")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.time_left = TimeLeft(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if is_step_complete(trainer, batch_idx):
            self._last_steps.add(get_step_mean(pl_module))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        return [
            TextColumn("[progress.description]{task.description}"),
            CustomBarColumn(bar_width=min(max(self._get_width() - REST_WIDTH, MIN_BAR_WIDTH), MAX_BAR_WIDTH)),
            BatchesProcessedColumn(""),
            ImagesPerSecond(self, trainer),
            RemainingTime(self, trainer),
        ]

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        now = time.monotonic()
        if now - self._last_read >= READ_SECONDS and (mean := self._last_steps.compute_mean()) is not None:
            self._last_read = now
            self._metrics = {f"loss (mean of {mean.num_steps})": mean.loss}
            if self._get_width() >= REST_WIDTH + MIN_BAR_WIDTH:
                self._metrics["accuracy"] = mean.accuracy
        return self._metrics  # the scores of a validation are in its table

    def _get_width(self) -> int:
        """The width of the terminal in characters."""
        return 80 if self._console is None else self._console.width

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"  # Lightning's starts with 0


class LineProgress(ProgressBar):
    """A line every few seconds instead of a bar: for logs and pipes."""

    def __init__(self) -> None:
        super().__init__()
        self._last_line = 0.0
        self._images = 0
        self._epoch_start = 0.0
        self._is_enabled = True
        self._last_steps = LastSteps()

    def enable(self) -> None:
        self._is_enabled = True

    def disable(self) -> None:
        """Called by Lightning on every rank but the first."""
        self._is_enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._left = TimeLeft(trainer)
        self._restart_clock()  # a run that resumes inside an epoch does not start one

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._last_line = self._epoch_start = time.monotonic()
        self._images = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._images += len(batch.paths) * trainer.world_size
        if is_step_complete(trainer, batch_idx):
            self._last_steps.add(get_step_mean(pl_module))
        now = time.monotonic()
        is_last = batch_idx + 1 == trainer.num_training_batches
        if not self._is_enabled or (now - self._last_line < SECONDS_BETWEEN_LINES and not is_last):
            return
        self._last_line = now
        rate = self._images / max(now - self._epoch_start, 1e-9)
        mean = self._last_steps.compute_mean()
        loss = (
            f"  loss {mean.loss:.3f}  accuracy {mean.accuracy:.3f} (mean of {format_quantity(mean.num_steps, 'step')})"
            if mean
            else ""
        )
        print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            f"  step {batch_idx + 1}/{trainer.num_training_batches}{loss}"
            f"  {rate:.1f} images/s  {self._left.format(trainer)} left",
            flush=True,
        )


class ReportValidation(Callback):
    """Prints the scores of every validation on rank 0: a table in a terminal, else one line."""

    def __init__(self) -> None:
        self.best: float | None = None

    @property
    def state_key(self) -> str:
        return "TellValidation"  # its name in checkpoints of earlier releases

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, HasScores) or pl_module.scores is None or trainer.sanity_checking:
            return
        scores = pl_module.scores
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        best, score = self.best, scores.mean_iou
        self.best = max((value for value in (best, score) if value is not None), default=None)
        if not trainer.is_global_zero:
            return
        if sys.stdout.isatty():
            console = Console()
            console.print(validation_table(scores, best, pl_module.classes.names, f"validation after {epoch}"))
        else:
            values = {"mean IoU": score, "pixel accuracy": scores.pixel_accuracy}
            values |= {own.name: own.value for own in scores.own}
            listed = "".join(f"  {name} {format_fraction(value)}" for name, value in values.items())
            print(f"{epoch}  validation{listed}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


def validation_table(scores: Scores, best: float | None, names: Sequence[str], title: str) -> Group:
    """The scores of a validation beside the best mean IoU before it, and the weakest classes.

    Args:
        scores: as fractions of 1.
        best: mean IoU; None before the first validation.
        names: the names of the classes.
        title: the title of the table.
    """
    table = Table(title=title, title_justify="left", min_width=len(title))
    row = {
        "mean IoU": format_fraction(scores.mean_iou),
        "best before": format_fraction(best),
        "pixel accuracy": format_fraction(scores.pixel_accuracy),
        "overall": format_fraction(scores.overall),
        **{score.name: format_fraction(score.value) for score in scores.own},
    }
    for heading in row:
        table.add_column(heading, justify="right")
    is_best = scores.mean_iou is not None and (best is None or scores.mean_iou > best)
    table.add_row(*row.values(), style="green" if is_best else None)
    known = sorted((iou, name) for iou, name in zip(scores.iou, names, strict=True) if iou is not None)
    weakest = Text(
        f"weakest: {', '.join(f'{escape_unprintable(name)} {iou:.3f}' for iou, name in known[:NUM_WEAKEST])}", "dim"
    )
    return Group(table, weakest)


def format_fraction(score: float | None) -> str:
    """Four decimals, or a dash if there is no score."""
    return "-" if score is None else f"{score:.4f}"
