"""The page of a run in training, <run folder>/report.html: curves, scores and pictures of the last validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn

from semseg.data.sources import DataSource
from semseg.evaluation.evaluator import Speed, SplitCounts
from semseg.evaluation.metrics import Counts, confusion_counts, scores_from
from semseg.evaluation.result import EvaluationResult, ImageScore, build_result, relative_name
from semseg.reports.curves import Curves, read_training_curves
from semseg.reports.evaluation_page import EvaluationReport, Example, encode_example, write_evaluation_page
from semseg.reports.run_card import RunCard, build_run_card
from semseg.storage.commands import list_this_command
from semseg.training.callbacks.panels import PredictedImage, ValidationImages
from semseg.training.loggers.csv import CSVLog
from semseg.training.trainer import describe_device

REPORT_FILE = "report.html"
PICTURE_EDGE = 320  # pixels; they are encoded during training
GROUP = "validation images"


class WriteReport(ValidationImages):
    """Rewrites <run folder>/report.html after every validation, or after every epoch if there is no validation.

    The curves are those of the CSV log; without that logger the page has none. A page that cannot be written gives one
    warning, and training continues.

    Args:
        run_dir: the folder of the run.
        source: the data set.
        num_images: the number of validation images that the page shows.
        network: its name, for the title.
        config: the configuration of the run as plain data.
    """

    def __init__(
        self, run_dir: Path, source: DataSource, num_images: int, *, network: str, config: dict[str, Any]
    ) -> None:
        super().__init__(source, num_images)
        self.run_dir, self.network, self.config = run_dir, network, config
        self._examples: list[Example] = []
        self._card: RunCard | None = None
        self._has_warned = False

    def needs_images(self, trainer: pl.Trainer) -> bool:
        return not trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._examples = []

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._try(lambda: super(WriteReport, self).on_validation_batch_end(*args, **kwargs))

    def take_image(self, trainer: pl.Trainer, predicted: PredictedImage) -> None:
        classes = self.source.classes
        label, prediction = (torch.from_numpy(ids) for ids in (predicted.label, predicted.prediction))
        scores = scores_from(confusion_counts(prediction, label, classes.num_classes))
        name = relative_name(predicted.path, self.source.root)
        self._examples.append(
            encode_example(
                GROUP,
                ImageScore(name, scores.pixel_accuracy, scores.mean_iou),
                predicted.image,
                predicted.label,
                predicted.prediction,
                classes=classes,
                edge=PICTURE_EDGE,
            )
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, pl_module.counts)  # pyright: ignore[reportArgumentType]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.enable_validation:
            self._write(trainer, None)

    def _write(self, trainer: pl.Trainer, counts: Counts | None) -> None:
        if trainer.is_global_zero and self.needs_images(trainer):
            self._try(lambda: write_evaluation_page(self.run_dir / REPORT_FILE, self._describe(trainer, counts)))

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # no page is worth a training
            if not self._has_warned:
                self._has_warned = True
                rank_zero_warn(
                    f"{self.run_dir / REPORT_FILE} cannot be written ({type(error).__name__}: {error}). Training goes "
                    "on; the next validation tries again."
                )

    def _describe(self, trainer: pl.Trainer, counts: Counts | None) -> EvaluationReport:
        """The page of the run at this moment."""
        source = self.source
        epoch = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}, step {trainer.global_step}"
        scored = "" if counts is None else f"; scores of the last validation, {source.config.name} val"
        return EvaluationReport(
            title=f"Training of {self.network} on {source.config.name}",
            subtitle=f"after {epoch}{scored}. Reload the page for newer values.",
            result=None if counts is None else self._score(counts),
            num_images=0 if counts is None else counts.images,
            examples=tuple(sorted(self._examples, key=lambda example: example.score.file)),
            curves=self._read_curves(trainer),
            card=self._describe_run(trainer),
            is_training=True,
        )

    def _score(self, counts: Counts) -> EvaluationResult:
        source = self.source
        return build_result(
            SplitCounts([counts], None, [], Speed(0.0, {})),
            source.classes,
            source.label_map.class_ids,
            rule=source.config.miou_rule,
            root=source.root,
        )

    def _read_curves(self, trainer: pl.Trainer) -> tuple[Curves, ...]:
        logs = [logger for logger in trainer.loggers if isinstance(logger, CSVLog)]
        for log in logs:
            log.save()
        settings = self.config["checkpoint"]
        return read_training_curves(self.run_dir, settings["monitor"], settings["mode"]) if logs else ()

    def _describe_run(self, trainer: pl.Trainer) -> RunCard:
        if self._card is None:  # once, because it asks git
            net: Any = trainer.lightning_module.net
            device = describe_device(trainer)
            self._card = build_run_card(self.config, list_this_command(), device, origins=[net.origin])
        return self._card
