"""The LightningModule: steps, optimiser, logging. The maths lives in the modules it calls."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from semseg.checkpoint import FORMAT_KEY, describe
from semseg.collate import Batch
from semseg.config import Config
from semseg.data.classes import ClassTable
from semseg.data.convention import CONVENTIONS
from semseg.data.datasets import EvalSample
from semseg.inference import predict_probabilities
from semseg.losses import segmentation_loss
from semseg.metrics import ConfusionMatrix, Scores, scores_from
from semseg.nets.normalise import normalise
from semseg.nets.segmenter import Segmenter
from semseg.optim import build_optimizer, build_scheduler
from semseg.syncbn.layer import convert, revert


class SegmentationModule(pl.LightningModule):
    """Trains and evaluates one network.

    Args:
        net: the network; its classes are those of `classes`.
        config: the whole configuration; it travels into the checkpoints.
        classes: names and colours; they travel into the checkpoints.
    """

    def __init__(self, net: Segmenter, config: Config, classes: ClassTable) -> None:
        super().__init__()
        self.net = net
        self.config = config
        self.classes = classes
        self.convention = CONVENTIONS[config.model.convention]
        self.confusion = ConfusionMatrix(len(classes.names))
        self.scores: Scores | None = None  # of the last validation or test
        self.matrix: Tensor | None = None  # (K, K) int64, what they were computed from
        if config.model.channels_last:
            self.net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if config.model.compile:
            # In place, so that the names in the state dict stay as they are.
            self.net.compile(dynamic=True)

    def on_fit_start(self) -> None:
        self.train()  # Lightning takes the modes as it finds them, and freeze_bn sets some
        # With several ranks the LayerSync plugin does this; with one Lightning never calls it.
        syncbn = self.config.syncbn
        if self.trainer.world_size == 1 and (syncbn.name, syncbn.convention) == ("reduce", "published"):
            convert(self.net, "published")

    def on_fit_end(self) -> None:
        revert(self.net)

    def train(self, mode: bool = True) -> SegmentationModule:
        """Training mode, in which freeze_bn leaves normalisation statistics alone (and only those)."""
        super().train(mode)
        if mode and self.config.model.freeze_bn:
            for layer in self.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()
        return self

    def input(self, image: Tensor, size: Tensor | None = None) -> Tensor:
        """(N, 3, H, W) uint8 RGB -> normalised, of the network's type; outside `size` exactly 0."""
        if self.config.model.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return normalise(image, self.convention, size).to(self.dtype)  # trainer.precision=64-true, bf16-true

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.net(self.input(batch.image, batch.size))
        model = self.config.model
        loss = segmentation_loss(logits, batch.label, model.deepsup_weight, self.config.loss.average)
        count = len(batch.paths)
        self.log("train/loss", loss.total.detach(), prog_bar=True, batch_size=count)
        self.log("train/accuracy", loss.correct / loss.scored.clamp(min=1), prog_bar=True, batch_size=count)
        return loss.total

    def validation_step(self, sample: EvalSample, batch_idx: int) -> None:
        self.count_image(sample)

    def test_step(self, sample: EvalSample, batch_idx: int) -> None:
        self.count_image(sample)

    def count_image(self, sample: EvalSample) -> None:
        """Predict one image and add it to the confusion matrix."""
        if sample.index % self.trainer.world_size != self.trainer.global_rank:
            return  # a rank without an image of its own runs one for company, and counts none
        height, width = sample.label.shape
        evaluation = self.config.eval
        probabilities = predict_probabilities(
            self.net, sample.scales, (height, width), self.convention, flip=evaluation.flip
        )
        self.confusion.update(probabilities.argmax(0), sample.label)

    def on_validation_epoch_end(self) -> None:
        self.finish_scores("val")

    def on_test_epoch_end(self) -> None:
        self.finish_scores("test")

    def finish_scores(self, stage: str) -> None:
        """Scores of all ranks' images from one matrix; the same numbers are logged on every rank."""
        counts = self.confusion.compute()
        self.confusion.reset()
        self.check_images(counts.images, stage)
        self.matrix = counts.matrix.cpu()
        self.scores = scores_from(self.matrix, self.config.data.miou_rule)
        for name, value in (
            ("miou", self.scores.mean_iou),
            ("pixel_accuracy", self.scores.pixel_accuracy),
            ("overall", self.scores.overall),
        ):
            self.log(f"{stage}/{name}", float("nan") if value is None else value, prog_bar=name == "miou")

    def check_images(self, counted: int, stage: str) -> None:
        """Every image exactly once, whatever the number of ranks."""
        trainer, data = self.trainer, getattr(self.trainer, "datamodule", None)
        limits = trainer.limit_val_batches if stage == "val" else trainer.limit_test_batches
        if data is None or limits != 1.0 or trainer.sanity_checking:
            return
        assert counted == data.num_images(stage), f"scored {counted} images of {data.num_images(stage)}"

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build_optimizer(self.net, self.config.optim)
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = build_scheduler(optimizer, self.config.schedule, total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[FORMAT_KEY] = describe(self.config, self.classes)
