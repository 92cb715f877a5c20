"""The LightningModule: steps, optimiser, logging. The maths lives in the modules it calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import SumMetric

from semseg.checkpoints.format import FORMAT_KEY, NET_PREFIX, describe_network
from semseg.checkpoints.initialise import find_differences
from semseg.config.preprocessing import Preprocessing
from semseg.config.schema import Config
from semseg.data.batch import Batch
from semseg.data.classes import ClassTable
from semseg.data.datasets import EvalSample
from semseg.errors import CheckpointError, ConfigError
from semseg.evaluation.evaluator import Evaluator, SplitCounts
from semseg.evaluation.inference import batch_logits, merge_scales
from semseg.evaluation.metrics import ConfusionMatrix, Counts, Scores, confusion_counts, scores_from
from semseg.nets.interfaces import Logits
from semseg.nets.normalise import normalise
from semseg.nets.segmenter import Segmenter
from semseg.syncbn.layer import convert, revert
from semseg.training.callbacks.bad_images import check_share, tell_bad
from semseg.training.callbacks.guards import out_of_memory_in_evaluation_told, out_of_memory_told
from semseg.training.callbacks.label_warnings import odd_predictions
from semseg.training.losses import Loss, build_terms, segmentation_loss
from semseg.training.optim import apply_settings, build_optimizer, build_scheduler
from semseg.training.resume import RUN_KEY, resume_at
from semseg.training.unused import freeze_unused, modules_of

METRICS_KEY = "semseg_metrics"  # of a checkpoint: TRAIN_METRICS of the last step
TRAIN_METRICS = ("train/loss", "train/accuracy")
HALF_PRECISIONS = ("bf16-true", "16-true")  # of weights and buffers alike


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
        self.is_frozen = bool(config.model.encoder.get("frozen", False))
        if self.is_frozen:
            net.encoder.requires_grad_(False)
        self.unused: dict[str, Parameter] = {}  # frozen, since the loss does not reach them
        self.batch_idx = 0
        self.step_metrics: list[Tensor] = []  # (2): loss and accuracy of the sub-batches of the present step
        self.terms = build_terms(config.loss, len(classes.names))
        self.confusion = ConfusionMatrix(len(classes.names))
        self.left_out = SumMetric()  # images of the present evaluation that could not be read
        self.scores: Scores | None = None  # of the last validation or test
        self.evaluation: SplitCounts | None = None  # of the last test, in full
        self.share = 1.0  # see share_of
        self.metrics_to_restore: dict[str, Tensor] = {}  # of the last step before a run was stopped
        if config.model.channels_last:
            self.net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if config.model.compile:
            # In place, so that the names in the state dict stay as they are.
            self.net.compile(dynamic=True)

    def setup(self, stage: str) -> None:
        """Before training: refuse types in which statistics do not move, and freeze what the loss does not reach.

        Here, since Lightning gives the network to DistributedDataParallel next.

        Raises:
            ConfigError: for a precision that keeps normalisation statistics in half precision.
        """
        if stage != "fit":
            return
        self.train()
        self.check_precision()
        self.unused |= freeze_unused(self.net, lambda logits, label: self.loss_from(logits, label, "ranks").total)
        if self.unused:
            tell_unused(modules_of(self.unused, self.net), len(self.unused))

    def check_precision(self) -> None:
        """Raises a ConfigError where running statistics would be rounded to half precision after every step."""
        precision = str(self.trainer.precision)
        moving = [layer for layer in self.net.modules() if isinstance(layer, _BatchNorm) and layer.training]
        if precision in HALF_PRECISIONS and moving:
            raise ConfigError(
                f"trainer.precision={precision}: the statistics of batch normalisation would be kept in half "
                "precision, where they stop moving. Use trainer.precision=bf16-mixed, or model.freeze_bn=true."
            )

    def on_fit_start(self) -> None:
        self.train()  # Lightning takes the modes as it finds them, and freeze_bn sets some
        # With several ranks the LayerSync plugin does this; with one Lightning never calls it.
        syncbn = self.config.syncbn
        if self.trainer.world_size == 1 and (syncbn.name, syncbn.convention) == ("reduce", "published"):
            convert(self.net, "published")

    def on_train_start(self) -> None:
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        apply_settings(self.trainer.optimizers[0], scheduler, self.group_settings)
        self.trainer.callback_metrics.update(self.metrics_to_restore)

    def on_fit_end(self) -> None:
        revert(self.net)

    def train(self, mode: bool = True) -> SegmentationModule:
        """Training mode, in which freeze_bn leaves normalisation statistics alone (and only those).

        A frozen encoder stays in evaluation mode altogether: its maps of an image are always the same.
        """
        super().train(mode)
        if mode and self.is_frozen:
            self.net.encoder.eval()
        if mode and self.config.model.freeze_bn:
            for layer in self.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()
        return self

    def input(self, image: Tensor, size: Tensor | None = None) -> Tensor:
        """(N, 3, H, W) uint8 RGB -> normalised, of the network's type; outside `size` exactly 0."""
        if self.config.model.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return normalise(image, self.net.convention, size).to(self.dtype)  # trainer.precision=64-true, bf16-true

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.batch = batch
        self.share = self.share_of(batch_idx)
        self.batch_idx = batch_idx
        with out_of_memory_told(batch):
            return self.loss_of(batch)

    def share_of(self, batch_idx: int) -> float:
        """The factor that makes a step the mean over its sub-batches.

        Lightning divides every loss by trainer.accumulate_grad_batches, and the last step of an epoch takes what is
        left, which may be fewer.
        """
        accumulate, batches = self.trainer.accumulate_grad_batches, int(self.trainer.num_training_batches)
        return accumulate / min(accumulate, batches - batch_idx // accumulate * accumulate)

    def backward(self, loss: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        with out_of_memory_told(self.batch):
            loss.backward()

    def loss_of(self, batch: Batch) -> Tensor:
        """The loss of one sub-batch; that of its step so far and the accuracy go to the progress line."""
        loss = self.losses(batch, self.config.loss.average)
        accuracy = loss.correct / loss.scored.clamp(min=1)
        position = self.batch_idx % self.trainer.accumulate_grad_batches
        self.step_metrics[position:] = [torch.stack([loss.total.detach(), accuracy.to(loss.total)])]
        metrics = torch.stack(self.step_metrics).mean(0)
        if self.trainer.world_size > 1 and step_is_logged(self.trainer, self.batch_idx):
            # Not at every step: ranks wait for each other here.
            metrics = self.trainer.strategy.reduce(metrics, reduce_op="mean")
        # To the progress line only: LogSteps brings them to the loggers, before checkpoints are written.
        for name, value in zip(TRAIN_METRICS, metrics, strict=True):
            self.log(name, value, prog_bar=True, logger=False, batch_size=len(batch.paths))
        return loss.total * self.share

    def losses(self, batch: Batch, average: str) -> Loss:
        """The loss of one sub-batch, over the ranks as `average` says, with the counts behind the accuracy."""
        return self.loss_from(self.net(self.input(batch.image, batch.size)), batch.label, average)

    def loss_from(self, logits: Logits, label: Tensor, average: str) -> Loss:
        """What `losses` gives, of the logits of a sub-batch."""
        return segmentation_loss(logits, label, self.config.model.deepsup_weight, average, self.terms)

    def validation_step(self, samples: list[EvalSample], batch_idx: int) -> dict[str, Tensor]:
        """Count some images; returns the class indices (H, W) of each by its path, to be drawn."""
        readable = self.readable(self.own(samples))
        predictions = {}
        for sample, (prediction,) in zip(readable, self.predict(readable), strict=True):
            self.confusion.update(confusion_counts(prediction, sample.label, self.confusion.num_classes))
            predictions[sample.path] = prediction
        return predictions

    def on_test_start(self) -> None:
        self.evaluator = Evaluator(self.config.eval, self.confusion.num_classes, self.device)

    def on_test_batch_start(self, batch: list[EvalSample], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluator.stopwatch.lap("reading")

    def test_step(self, samples: list[EvalSample], batch_idx: int) -> dict[str, Tensor]:
        """Score some images; returns what `validation_step` does."""
        samples = self.own(samples)
        readable = self.readable(samples)
        predictions = self.predict(readable, self.config.eval.also_scales)
        self.evaluator.add(readable, predictions)
        for sample in samples:
            if sample.bad:
                self.evaluator.record_unreadable(sample)
        return {sample.path: maps[0] for sample, maps in zip(readable, predictions, strict=True)}

    def on_test_batch_end(self, outputs: Any, batch: list[EvalSample], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluator.stopwatch.restart()  # drawing is no part of the speed

    def own(self, samples: list[EvalSample]) -> list[EvalSample]:
        """Those to be counted: none where a rank without images of its own has the first of the split as company."""
        is_company = samples[0].index == 0 and not self.trainer.is_global_zero
        return [] if is_company else samples

    def readable(self, samples: Sequence[EvalSample]) -> list[EvalSample]:
        """Those that have pixels; what is wrong with the others is told."""
        for sample in samples:
            self.left_out.update(bool(sample.bad))
            if sample.bad:
                tell_bad(sample.bad)
        return [sample for sample in samples if not sample.bad]

    def predict(self, samples: Sequence[EvalSample], parts: Sequence[Sequence[int]] = ()) -> list[list[Tensor]]:
        """Of each image, class indices (H, W) at its label's size: of all of eval.scales, then of each part of them."""
        options = self.config.eval
        with out_of_memory_in_evaluation_told(samples):
            logits = batch_logits(
                self.net,
                [sample.scales for sample in samples],
                self.net.convention,
                flip=options.flip,
                window=options.window,
                stride=options.stride,
            )
            return [
                self.merge(sample, dict(zip(options.scales, maps, strict=True)), (options.scales, *parts))
                for sample, maps in zip(samples, logits, strict=True)
            ]

    def merge(self, sample: EvalSample, logits: dict[int, Tensor], parts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Class indices (H, W) at the label's size, of each of some parts of the scales; logits by scale."""
        height, width = sample.label.shape
        limit = self.config.eval.memory_limit_mb
        sets = [[logits[edge] for edge in part] for part in parts]
        return [merge_scales(one, (height, width), memory_limit_mb=limit).ids for one in sets]

    def on_validation_epoch_end(self) -> None:
        self.finish_scores(self.confusion.compute(), "val")
        self.confusion.reset()

    def on_test_epoch_end(self) -> None:
        self.evaluation = self.evaluator.result()
        self.finish_scores(self.evaluation.counts[0], "test")

    def finish_scores(self, counts: Counts, stage: str) -> None:
        """Scores of all ranks' images from one matrix; the same numbers are logged on every rank."""
        left_out = int(self.left_out.compute())
        self.left_out.reset()
        self.check_images(counts.images + left_out, stage)
        check_share(left_out, counts.images + left_out, self.config.data.max_bad)
        self.scores = scores_from(counts.matrix, self.config.data.miou_rule)
        told = odd_predictions(counts.matrix, self.classes.names)
        if told is not None and not self.trainer.sanity_checking:
            rank_zero_warn(f"{stage}: {told}")
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
        is_whole = isinstance(limits, float) and limits == 1  # the int 1 is one batch, the float 1.0 all of them
        if data is None or not is_whole or trainer.sanity_checking or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        assert counted == data.num_images(stage), f"scored {counted} images of {data.num_images(stage)}"

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build_optimizer(self.net, self.config.optim, self.unused.values())
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = build_scheduler(optimizer, self.config.schedule, total_steps)
        self.group_settings = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        found = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith(NET_PREFIX)}
        own = {f"{NET_PREFIX}{name}": value for name, value in self.net.state_dict().items()}
        problems = find_differences(found, own)
        if problems:
            raise CheckpointError(f"{self.trainer.ckpt_path}: its weights do not fit this run: {'; '.join(problems)}.")
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        resume_at(self.trainer, self.config, checkpoint, data.batches_per_epoch())
        # A callback may monitor them at the end of an epoch whose steps are all done.
        self.metrics_to_restore = checkpoint.get(METRICS_KEY, {})
        # A resumed run does not load the weights that the convention came with.
        self.net.convention = Preprocessing.from_plain(checkpoint[FORMAT_KEY]["convention"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[FORMAT_KEY] = describe_network(self.config, self.classes, self.net.convention)
        checkpoint[RUN_KEY] = self.trainer.datamodule.facts()._asdict()  # pyright: ignore[reportAttributeAccessIssue]
        metrics = self.trainer.callback_metrics
        checkpoint[METRICS_KEY] = {name: metrics[name] for name in TRAIN_METRICS if name in metrics}


def step_is_logged(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether the loss of the step is read after this sub-batch: by LogSteps, or at the end of an epoch."""
    num_done, step = batch_idx + 1, trainer.global_step + 1
    if num_done == trainer.num_training_batches or step == trainer.max_steps:
        return True
    is_taken = num_done % trainer.accumulate_grad_batches == 0
    return is_taken and step % trainer.log_every_n_steps == 0  # pyright: ignore[reportAttributeAccessIssue]


@rank_zero_only
def tell_unused(modules: Sequence[str], num_parameters: int) -> None:
    """Name what is frozen since the loss does not reach it, once whatever the number of processes."""
    print(
        f"frozen, since the loss does not depend on them: {', '.join(modules)} ({num_parameters} tensors)", flush=True
    )
