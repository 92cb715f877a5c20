"""The LightningModule: steps, optimiser, logging. The maths lives in the modules it calls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from semseg.checkpoints.format import FORMAT_KEY, NET_PREFIX, TRAINED_WEIGHTS, describe_network
from semseg.checkpoints.initialise import find_differences
from semseg.config.origin import WeightsOrigin
from semseg.config.preprocessing import Preprocessing
from semseg.config.schema import EvalConfig, LossConfig, ModelConfig, OptimConfig, ScheduleConfig, SyncBNConfig
from semseg.data.batch import Batch, EvalSample
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.data.records import check_bad_fraction
from semseg.data.windows import RowSink, WindowReader
from semseg.errors import CheckpointError, ConfigError, DataError
from semseg.evaluation.evaluator import Evaluator, SplitCounts
from semseg.evaluation.inference import ClassMap, batch_logits, merge_subsets
from semseg.evaluation.metrics import Counts, Scores, require_memory, scores_from
from semseg.evaluation.own_scores import check_measures
from semseg.evaluation.split_counter import SplitCounter
from semseg.evaluation.thresholds import find_best_threshold
from semseg.evaluation.tiled import ArraySink, WindowLayout, predict_by_windows
from semseg.evaluation.unsure import UNDEFINED
from semseg.evaluation.window_counts import CountingSink, WindowCounts
from semseg.nets.compilation import compile_network
from semseg.nets.interfaces import Logits, SegmentationNetwork
from semseg.nets.normalise import normalise
from semseg.nets.precision import choose_weight_type
from semseg.nets.segmenter import is_convolutional
from semseg.syncbn.layer import convert_batch_norms, revert_batch_norms
from semseg.system.text import format_quantity
from semseg.training.callbacks.bad_images import report_bad_image
from semseg.training.callbacks.label_warnings import describe_odd_predictions
from semseg.training.callbacks.out_of_memory import report_out_of_memory, report_out_of_memory_in_evaluation
from semseg.training.determinism import check_determinism
from semseg.training.losses import Loss, build_terms, count_correct, move_terms, segmentation_loss
from semseg.training.optim import apply_settings, build_optimizer, build_scheduler, choose_fused
from semseg.training.resume import RUN_KEY, resume_at
from semseg.training.single_value import report_single_value
from semseg.training.step_means import TRAIN_METRICS
from semseg.training.training_state import METRICS_KEY
from semseg.training.unused import compute_probe_loss, freeze_unused, summarise_modules

HALF_PRECISION = "bf16-true"  # weights and buffers alike


class SegmentationModule(pl.LightningModule):
    """Trains and evaluates one network; semseg/build.py:build_module takes the arguments from the configuration.

    Args:
        net: the network; its classes are those of `classes`.
        classes: names and colours; they are saved in the checkpoints.
        model_config: how the network is trained and run; it has been built already.
        miou_rule: as in data.miou_rule.
        max_bad: the fraction of unreadable images up to which a split is scored.
        saved_config: the configuration of the run as plain data, which is saved in the checkpoints. No setting is read
            from it, but a run resumes only from a checkpoint whose saved configuration fits it.
        window_layout: the windows in which images are evaluated at their own resolution; None: at eval.scales.
    """

    def __init__(
        self,
        net: SegmentationNetwork,
        classes: ClassTable,
        *,
        model_config: ModelConfig,
        loss_config: LossConfig,
        optim_config: OptimConfig,
        schedule_config: ScheduleConfig,
        syncbn_config: SyncBNConfig,
        eval_config: EvalConfig,
        miou_rule: str,
        max_bad: float,
        saved_config: dict[str, Any],
        window_layout: WindowLayout | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.classes = classes
        self.model_config, self.loss_config, self.eval_config = model_config, loss_config, eval_config
        self.optim_config, self.schedule_config, self.syncbn_config = optim_config, schedule_config, syncbn_config
        self.miou_rule, self.max_bad = miou_rule, max_bad
        self.saved_config, self.window_layout = saved_config, window_layout
        self.is_frozen = bool(model_config.encoder.get("frozen", False))
        if self.is_frozen:
            net.backbone.requires_grad_(False)
        self.unused: dict[str, Parameter] = {}  # frozen, because the loss does not depend on them
        self.batch_idx = 0
        self.total_steps = 0  # of the run; known when the optimiser is built
        self.step_metrics: list[Tensor] = []  # (2): loss and accuracy of the sub-batches of the current step
        if net.has_own_loss and model_config.compile:
            raise ConfigError(
                f"model.compile=true: {model_config.title} cannot be compiled, because its loss matches masks on the "
                "host. Leave it out."
            )
        self.terms = build_terms(loss_config, len(classes.names))
        require_memory(len(classes.names))
        check_measures(len(classes.names))
        self.threshold: float | None = None  # two classes: the best one of the last validation
        self.scores: Scores | None = None  # those of the last validation or test
        self.counts: Counts | None = None  # those of the last validation
        self.evaluation: SplitCounts | None = None  # that of the last test
        self.metrics_to_restore: dict[str, Tensor] = {}  # those of the last row of the log before a run was stopped
        self.is_channels_last = model_config.channels_last and is_convolutional(net)
        if self.is_channels_last:
            self.net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if model_config.compile:
            compile_network(self.net)

    # ---- training

    def setup(self, stage: str) -> None:
        """Before training: refuse a precision in which statistics do not move, and freeze unused parameters.

        A network of trainer.precision=64-true gets its type here: Lightning gives it only after a checkpoint is loaded,
        which would round the weights of a run that resumes.

        Lightning gives the network to DistributedDataParallel next, which needs to know what is trainable.

        Raises:
            ConfigError: for a precision that keeps normalisation statistics in half precision, and for a network that
                cannot be trained on a GPU with trainer.deterministic=true.
        """
        if stage != "fit":
            return
        self.train()
        check_precision(str(self.trainer.precision), self.net)
        self.unused |= freeze_unused(self.net, self.compute_total)
        if self.unused:
            report_frozen(summarise_modules(self.unused, self.net), len(self.unused))
        if torch.are_deterministic_algorithms_enabled() and self.trainer.strategy.root_device.type == "cuda":
            probe = partial(compute_probe_loss, self.net, self.compute_total)
            check_determinism(self.net, probe, self.model_config.title, self.net.backbone)
        if choose_weight_type(str(self.trainer.precision)) == torch.float64:
            self.double()

    def compute_total(self, logits: Logits, label: Tensor) -> Tensor:
        """The loss that is minimised, of one sub-batch."""
        return segmentation_loss(logits, label, self.model_config.deepsup_weight, terms=self.terms).total

    def prepare_training(self, world_size: int = 1) -> None:
        """Set the modes and the normalisation of the layers, and move the loss to the device of the network."""
        self.train()  # Lightning keeps the modes as they are, and freeze_bn sets some
        self.terms = move_terms(self.terms, self.device)
        # With several ranks the LayerSync plugin does this; with one Lightning never calls it.
        syncbn = self.syncbn_config
        if world_size == 1 and (syncbn.name, syncbn.convention) == ("reduce", "published"):
            convert_batch_norms(self.net, "published")

    def on_fit_start(self) -> None:
        self.prepare_training(self.trainer.world_size)

    def on_train_start(self) -> None:
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        apply_settings(self.trainer.optimizers[0], scheduler, self.group_settings)
        self.trainer.callback_metrics.update(self.metrics_to_restore)

    def on_fit_end(self) -> None:
        revert_batch_norms(self.net)

    def train(self, mode: bool = True) -> SegmentationModule:
        """Training mode, in which freeze_bn leaves normalisation statistics alone (and only those).

        A frozen backbone stays in evaluation mode altogether: its maps of an image are always the same.
        """
        super().train(mode)
        if mode and self.is_frozen:
            self.net.backbone.eval()
        if mode and self.model_config.freeze_bn:
            for layer in self.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()
        return self

    def prepare_input(self, image: Tensor, size: Tensor | None = None) -> Tensor:
        """(N, 3, H, W) uint8 RGB -> normalised, in the type of the network; outside `size` exactly 0."""
        if self.is_channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return normalise(image, self.net.convention, size).to(self.dtype)  # trainer.precision=64-true, bf16-true

    def compute_loss(self, batch: Batch, average: str) -> Loss:
        """The loss of one sub-batch, averaged over the ranks as `average` says, with the counts behind the accuracy."""
        image = self.prepare_input(batch.image, batch.size)
        own = self.net.compute_own_loss(image, batch.label)
        if own is not None:
            return Loss(own[0], *count_correct(own[1].main, batch.label))
        logits, weight = self.net(image), self.model_config.deepsup_weight
        return segmentation_loss(logits, batch.label, weight, average, self.terms)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.batch, self.batch_idx = batch, batch_idx
        self.net.set_progress(self.trainer.global_step, self.total_steps)
        with report_out_of_memory(batch), report_single_value(batch):
            loss = self.compute_loss(batch, self.loss_config.average)
            self.keep_metrics(loss)
        batches = int(self.trainer.num_training_batches)
        return loss.total * loss_factor(batch_idx, batches, self.trainer.accumulate_grad_batches)

    def backward(self, loss: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        with report_out_of_memory(self.batch):
            loss.backward()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of all gradients, without waiting for the device.

        Lightning's own clipping rejects fused optimisers under mixed precision, because those divide by the factor of a
        gradient scaler later. There is none: trainer.precision=16-mixed, which has one, takes no fused optimiser.
        """
        if gradient_clip_val:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def keep_metrics(self, loss: Loss) -> None:
        """Keep loss and accuracy of the sub-batches of the current step, which callbacks log and show."""
        accuracy = loss.correct / loss.scored.clamp(min=1)
        position = self.batch_idx % self.trainer.accumulate_grad_batches
        self.step_metrics[position:] = [torch.stack([loss.total.detach(), accuracy.to(loss.total)])]

    @property
    def step_mean(self) -> Tensor:
        """(2) loss and accuracy of the current step on this device, averaged over its sub-batches so far."""
        return torch.stack(self.step_metrics).mean(0)

    # ---- evaluation

    def on_validation_start(self) -> None:
        self.counter = SplitCounter(len(self.classes.names), self.device)

    def validation_step(self, samples: list[EvalSample], batch_idx: int) -> dict[str, Tensor]:
        return self.score_images(samples, self.counter)

    def on_test_start(self) -> None:
        self.evaluator = Evaluator(self.eval_config, len(self.classes.names), self.device)

    def on_test_batch_start(self, batch: list[EvalSample], batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx:
            self.evaluator.stopwatch.lap("reading")
        else:
            self.evaluator.stopwatch.restart()  # the first wait is the start of the workers

    def test_step(self, samples: list[EvalSample], batch_idx: int) -> dict[str, Tensor]:
        return self.score_images(samples, self.evaluator)

    def on_test_batch_end(self, outputs: Any, batch: list[EvalSample], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluator.stopwatch.restart()  # drawing, and looking for label errors, are not part of the measured speed

    def score_images(self, samples: list[EvalSample], counter: SplitCounter) -> dict[str, Tensor]:
        """Predict and count some images; returns the class indices (H, W) of each by its path, to be drawn.

        Of images that are read by window there are none.
        """
        samples, counted = self.count_by_window(self.drop_duplicate_images(samples))
        for sample, counts in counted:
            counter.add_counted(sample, counts)
        readable = [sample for sample in samples if not sample.bad]
        predictions = self.predict(readable, counter.subsets, with_labels=counter.takes_label_confidence)
        counter.add(readable, predictions)
        for sample in samples:
            if sample.bad:
                report_bad_image(sample.bad)
                counter.add_unreadable(sample)
        return {sample.path: class_map.ids for sample, (class_map, *_) in zip(readable, predictions, strict=True)}

    def drop_duplicate_images(self, samples: list[EvalSample]) -> list[EvalSample]:
        """`samples`, or none on a rank that received the first image of the split as a placeholder.

        Lightning needs at least one batch on every rank (see SegmentationData.eval_loader).
        """
        is_placeholder = samples[0].position == 0 and not self.trainer.is_global_zero
        return [] if is_placeholder else samples

    def count_by_window(
        self, samples: Sequence[EvalSample]
    ) -> tuple[list[EvalSample], list[tuple[EvalSample, WindowCounts]]]:
        """Score the images that are read by window; returns the others with those that are damaged, and the counts.

        Raises:
            DataError: for a damaged image or label, with data.on_bad=error.
        """
        others, counted = [], []
        for sample in samples:
            if not sample.is_by_window:
                others.append(sample)
                continue
            try:
                counts = self.count_windows(sample)
            except DataError as error:
                if not self.trainer.datamodule.skips_bad:  # pyright: ignore[reportAttributeAccessIssue]
                    raise
                others.append(sample._replace(bad=str(error)))
                continue
            counted.append((sample, counts))
        return others, counted

    def count_windows(self, sample: EvalSample) -> WindowCounts:
        """Read, predict and score an image by windows, from top to bottom, in memory that its height does not change.

        Raises:
            DataError: if the image or its label is damaged.
        """
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert self.window_layout is not None, "images are read by window at native resolution"
        with report_out_of_memory_in_evaluation([sample]), data.open_pair(self.stage, sample.position) as pair:
            sink = CountingSink(pair, len(self.classes.names), self.device)
            self.predict_windows(pair.image, self.window_layout, sink)
            return sink.finish()

    @property
    def stage(self) -> str:
        """The stage whose images are evaluated: "val" or "test"."""
        return "test" if self.trainer.testing else "val"

    def predict(
        self, samples: Sequence[EvalSample], subsets: Sequence[Sequence[int]] = (), *, with_labels: bool = False
    ) -> list[list[ClassMap]]:
        """Per image: the class map (H, W) at label resolution, for all of eval.scales and then for each subset.

        Args:
            with_labels: the first class map gets the probabilities of the classes in the label.
        """
        options = self.eval_config
        with report_out_of_memory_in_evaluation(samples):
            if self.window_layout is not None:
                return [
                    [self.predict_in_windows(sample, self.window_layout, with_labels=with_labels)] for sample in samples
                ]
            logits = batch_logits(
                self.net,
                [sample.scales for sample in samples],
                self.net.convention,
                flip=options.flip,
                window=options.window,
                stride=options.stride,
            )
            return [
                merge_subsets(
                    maps,
                    options.scales,
                    subsets,
                    (sample.label.shape[0], sample.label.shape[1]),
                    memory_limit_mb=options.memory_limit_mb,
                    label=sample.label if with_labels else None,
                )
                for sample, maps in zip(samples, logits, strict=True)
            ]

    def predict_in_windows(self, sample: EvalSample, layout: WindowLayout, *, with_labels: bool = False) -> ClassMap:
        """The prediction for an image at its own resolution, on the device of the network."""
        (pixels,) = sample.scales
        sink = ArraySink(Size(*pixels.shape[1:]))
        self.predict_windows(pixels, layout, sink, sample.label if with_labels else None)
        return sink.to_class_map(self.device)

    def predict_windows(
        self, image: WindowReader | Tensor, layout: WindowLayout, sink: RowSink, label: Tensor | None = None
    ) -> None:
        """Hand the rows of the prediction for an image to `sink`, with the keys of `eval`; see `predict_by_windows`."""
        options = self.eval_config
        predict_by_windows(
            self.net,
            image,
            self.net.convention,
            layout,
            sink,
            label=label,
            flip=options.flip,
            batch_size=options.batch_size,
            memory_limit_mb=options.memory_limit_mb,
        )

    def on_validation_epoch_end(self) -> None:
        threshold = find_best_threshold(self.counter.sum_threshold_counts())
        if threshold is not None and not self.trainer.sanity_checking:
            self.threshold = threshold
        self.counts = self.counter.sum_counts()
        self.log_scores(self.counts, self.counter, "val")

    def on_test_epoch_end(self) -> None:
        self.evaluation = self.evaluator.result()
        self.log_scores(self.evaluation.counts[0], self.evaluator, "test")

    def log_scores(self, counts: Counts, counter: SplitCounter, stage: str) -> None:
        """Log the scores of the images of all ranks, the same numbers on every rank.

        Args:
            counts: of all ranks.
            counter: of this rank; says which of its images could not be read or predicted.
        """
        on_this_rank = torch.stack([torch.tensor(counter.num_unreadable, device=self.device), counter.num_undefined])
        num_unreadable, num_undefined = self.trainer.strategy.reduce(on_this_rank, reduce_op="sum").tolist()
        if num_undefined:
            rank_zero_warn(f"{stage}: {format_quantity(num_undefined, 'image')}: {UNDEFINED}")
        self.check_image_count(counts.images + num_unreadable, stage)
        check_bad_fraction(num_unreadable, counts.images + num_unreadable, self.max_bad)
        self.scores = scores_from(counts.matrix, self.miou_rule)._replace(own=counts.own)
        if counts.images and not counts.matrix.any() and not self.trainer.sanity_checking:
            rank_zero_warn(
                f"{stage}: nothing is scored, because no pixel of the labels has a class. Look at data.first_id, "
                "data.ignore and data.map (mode=check)."
            )
        warning = describe_odd_predictions(counts.matrix, self.classes.names)
        if warning is not None and not self.trainer.sanity_checking:
            rank_zero_warn(f"{stage}: {warning}")
        for name, value in (
            ("miou", self.scores.mean_iou),
            ("pixel_accuracy", self.scores.pixel_accuracy),
            ("overall", self.scores.overall),
            *((score.name, score.value) for score in counts.own),
        ):
            self.log(f"{stage}/{name}", float("nan") if value is None else value, prog_bar=name == "miou")

    def check_image_count(self, count: int, stage: str) -> None:
        """Assert that every image was scored exactly once, whatever the number of ranks."""
        trainer, data = self.trainer, getattr(self.trainer, "datamodule", None)
        limits = trainer.limit_val_batches if stage == "val" else trainer.limit_test_batches
        is_whole = isinstance(limits, float) and limits == 1  # the int 1 is one batch, the float 1.0 all of them
        if data is None or not is_whole or trainer.sanity_checking or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        assert count == data.num_images(stage), f"scored {count} images of {data.num_images(stage)}"

    # ---- optimisers and checkpoints

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        is_fused = choose_fused(self.optim_config, self.device, str(self.trainer.precision))
        optimizer = build_optimizer(self.net, self.optim_config, self.unused.values(), is_fused=is_fused)
        self.total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = build_scheduler(optimizer, self.schedule_config, self.total_steps)
        self.group_settings = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        is_averaged = any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
        if not is_averaged and TRAINED_WEIGHTS in checkpoint:  # a resumed run that gives up its average (resume_force)
            checkpoint["state_dict"] = checkpoint[TRAINED_WEIGHTS]
        found = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith(NET_PREFIX)}
        own = {f"{NET_PREFIX}{name}": value for name, value in self.net.state_dict().items()}
        problems = find_differences(found, own)
        if problems:
            raise CheckpointError(f"{self.trainer.ckpt_path}: its weights do not fit this run: {'; '.join(problems)}.")
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        resume_at(self.trainer, self.saved_config, checkpoint, data.batches_per_epoch())
        # A callback may monitor them at the end of an epoch whose steps are all done.
        self.metrics_to_restore = checkpoint.get(METRICS_KEY, {})
        # A resumed run does not load the initial weights, which determine the preprocessing.
        self.net.convention = Preprocessing.from_plain(checkpoint[FORMAT_KEY]["convention"])
        self.net.origin = WeightsOrigin.from_plain(checkpoint[FORMAT_KEY].get("origin"))
        self.threshold = checkpoint[FORMAT_KEY].get("threshold")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        net = self.net
        checkpoint[FORMAT_KEY] = describe_network(
            self.saved_config, self.classes, net.convention, net.origin, self.threshold
        )
        checkpoint[RUN_KEY] = self.trainer.datamodule.run_conditions()._asdict()  # pyright: ignore[reportAttributeAccessIssue]
        metrics = self.trainer.callback_metrics
        checkpoint[METRICS_KEY] = {name: metrics[name] for name in TRAIN_METRICS if name in metrics}


def check_precision(precision: str, net: SegmentationNetwork) -> None:
    """Raises a ConfigError if running statistics would be rounded to half precision after every step."""
    moving = [layer for layer in net.modules() if isinstance(layer, _BatchNorm) and layer.training]
    if precision == HALF_PRECISION and moving:
        raise ConfigError(
            f"trainer.precision={precision}: the statistics of batch normalisation would be kept in half "
            "precision, where they stop moving. Use trainer.precision=bf16-mixed, or model.freeze_bn=true."
        )


def loss_factor(batch_idx: int, num_batches: int, accumulate: int) -> float:
    """The factor that makes the loss of a step the mean over its sub-batches.

    Lightning divides every loss by trainer.accumulate_grad_batches, but the last step of an epoch takes the remaining
    sub-batches, which may be fewer.

    >>> loss_factor(0, 3, accumulate=2), loss_factor(2, 3, accumulate=2)
    (1.0, 2.0)
    """
    return accumulate / min(accumulate, num_batches - batch_idx // accumulate * accumulate)


@rank_zero_only
def report_frozen(modules: Sequence[str], num_parameters: int) -> None:
    """Name what is frozen because the loss does not depend on it, once whatever the number of processes."""
    print(
        f"frozen, because the loss does not depend on them: {', '.join(modules)} ({num_parameters} tensors)", flush=True
    )
