"""mode=eval: score a checkpoint on a split; prints tables and writes numbers, a page and, if requested, panels."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback
from rich.console import Console

from semseg.build import (
    build_data,
    build_module,
    build_trainer,
    format_other_classes,
    open_network,
    resolve_layout,
    resolve_reading,
    restore_network,
)
from semseg.checkpoints.format import SavedNetwork, refuse_nonfinite_weights
from semseg.checkpoints.network import check_class_names
from semseg.config.schema import Config, DataConfig, EvalConfig, config_to_plain
from semseg.data.batch import EvalSample
from semseg.data.classes import ClassTable
from semseg.data.datasets import EvalDataset
from semseg.data.geometry import Size
from semseg.data.open_pairs import open_pair
from semseg.data.pairs import read_shown
from semseg.data.records import Record
from semseg.data.seeding import generator_for
from semseg.data.sources import DataSource, require_masks
from semseg.data.windows import pick_pixels
from semseg.datamodule import SegmentationData
from semseg.errors import ConfigError, DataError
from semseg.evaluation.bootstrap import ConfidenceIntervals, bootstrap, choose_resamples
from semseg.evaluation.evaluator import ImageRecord
from semseg.evaluation.image_files import decode_maps
from semseg.evaluation.result import EvaluationResult, ImageScore, build_result, relative_name
from semseg.evaluation.result_files import LABEL_ERRORS_FILE, write_result_files
from semseg.evaluation.tables import class_score_table, format_speed, scales_table, summary_table
from semseg.evaluation.thresholds import POSITIVE
from semseg.evaluation.tiled import WindowLayout
from semseg.evaluation.window_counts import plan_shrinking
from semseg.lit_module import SegmentationModule
from semseg.nets.bands import adopt_ranges
from semseg.reports.curves import Curves, read_training_curves, run_folder_of_checkpoint
from semseg.reports.draw import draw_comparison
from semseg.reports.evaluation_page import (
    EvaluationReport,
    Example,
    choose_examples,
    encode_example,
    write_evaluation_page,
)
from semseg.reports.label_error_pictures import (
    MAX_SHOWN_ERRORS,
    LabelErrorPictures,
    choose_crop_window,
    draw_label_error,
)
from semseg.reports.photographs import describe_reading, draw_photograph
from semseg.reports.run_card import build_run_card, compute_data_fingerprint, mask_secrets
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import list_this_command, relative_to_cwd
from semseg.storage.ranks import print_once
from semseg.storage.run_folders import CHECKPOINT_FOLDER, METRICS_FILE, expand_path
from semseg.storage.run_results import RunResult, write_result
from semseg.system.text import escape_lines, escape_unprintable, format_quantity
from semseg.training.trainer import describe_device

CUT_KEYS = ("val_fraction", "folds", "fold", "group")  # of data: which images of train are val
PANELS_FOLDER = "panels"  # in the run folder, for eval.visualize


def run(config: Config, overrides: list[str]) -> float | None:
    """Evaluate; returns the mean IoU (None if nothing was scored).

    Raises:
        SemsegError: for any error that the user can fix.
    """
    saved, config = open_network(config, overrides)
    return evaluate_network(saved, config)


def describe_cut_split(data: DataConfig, trained: DataConfig, source: DataSource) -> str:
    """A line about a val that is cut from train otherwise than in the run, or from other data; empty for others.

    Args:
        data: of the evaluation.
        trained: of the run.
    """
    if data.val.list or data.val.images or data.val.stems or not (data.val_fraction or data.folds):
        return ""
    if expand_path(data.root).resolve() != expand_path(trained.root).resolve():
        scored = len(source.records("val"))
        cut = f"data.folds={data.folds}" if data.folds else f"data.val_fraction={data.val_fraction:g}"
        images, masks = (getattr(data, name) or getattr(data.train, name) for name in ("images", "masks"))
        words = f"data.val.images={images} data.val.masks={masks}" if images else f"data.val.list={data.train.list}"
        return f"{cut}: {format_quantity(scored, 'image')} of data.train are val. To score all: {words}"
    changed = [key for key in CUT_KEYS if getattr(data, key) != getattr(trained, key)]
    if not changed or (changed == ["val_fraction"] and data.val_fraction < trained.val_fraction):
        return ""  # fewer images of the same
    given = ", ".join(f"data.{key}={getattr(data, key)}" for key in changed)
    return f"warning: {given}: val is not that of the run, which has trained on some of these images"


def evaluate_network(saved: SavedNetwork, config: Config) -> float | None:
    """Score a network on eval.split and write the results into the run folder; returns the mean IoU.

    Raises:
        SemsegError: for any error that the user can fix.
    """
    source = open_source(config.data, saved)
    split, folder = config.eval.split, Path(config.run_dir)
    require_masks(split, source.records(split))
    resamples = choose_resamples(config.eval.bootstrap, len(source.records(split)))
    print_once(source.describe_unused(split))
    print_once(describe_cut_split(config.data, saved.config.data, source) if split == "val" else "")
    net = restore_network(saved)
    config = resolve_layout(resolve_reading(config, source.root), net)
    refuse_nonfinite_weights(net.state_dict(), saved.source)
    trainer = build_trainer(config, source)
    module, data = build_module(config, net, source.classes), build_data(config, source, net)
    panels: list[Path] = []
    if config.eval.visualize:
        writer = PanelWriter(source, split, folder)
        trainer.callbacks.append(writer)  # pyright: ignore[reportAttributeAccessIssue]
        panels = writer.targets
    trainer.test(module, datamodule=data, verbose=False)
    assert module.scores is not None and module.evaluation is not None, "the test loop ends with scores"
    if not trainer.is_global_zero:
        return module.scores.mean_iou
    images = module.evaluation.images
    if not images:
        raise DataError(f"eval.split={split}: none of its images could be read, so there is no score; see above.")
    result = build_result(
        module.evaluation,
        source.classes,
        source.label_map.class_ids,
        rule=config.data.miou_rule,
        root=source.root,
        subsets=config.eval.also_scales,
        intervals=confidence_intervals(images, config.data.miou_rule, resamples, config.seed),
    )
    title = describe_evaluation(config.data.name, config.eval, result, module.window_layout)
    remove_earlier_panels(folder, set(panels))
    files = write_result_files(
        folder, result, describe_settings(source, config.eval, saved, result, module.window_layout)
    )
    report = EvaluationReport(
        title=f"{saved.title} on {config.data.name}",
        subtitle=title,
        result=result,
        num_images=len(result.images),
        examples=tuple(predict_examples(result, images, trainer, module, data)),
        label_errors=tuple(draw_label_errors(result, source, split)),
        curves=read_curves(saved),
        card=build_run_card(
            config_to_plain(config),
            list_this_command(),
            describe_device(trainer),
            compute_data_fingerprint(source.records(split), source.root),
            [member.origin for member in saved.members or (saved,)],
        ),
    )
    write_evaluation_page(folder / "report.html", report)
    print_tables(result, title, config.eval.scales)
    write_result(folder, RunResult(result.scores.mean_iou, "mean IoU"))
    written = ", ".join(str(relative_to_cwd(path)) for path in [*files, folder / "report.html"])
    networks = ", ".join(str(relative_to_cwd(Path(member.source))) for member in saved.members or (saved,))
    print(escape_lines(f"checkpoint {networks}\nwritten to {written}"))
    return result.scores.mean_iou


def open_source(config: DataConfig, saved: SavedNetwork) -> DataSource:
    """The data set, which must have as many classes as the network, and has its ranges of values if none are given.

    Raises:
        ConfigError: if it has not, or if it has the same classes in another order.
    """
    source = DataSource(adopt_ranges(config, saved.convention))
    if source.classes.num_classes != saved.classes.num_classes:
        raise ConfigError(format_other_classes(config, source.classes.num_classes, saved))
    check_class_names(source.classes, config.name, saved)
    return source


def confidence_intervals(
    images: Sequence[ImageRecord], rule: str, resamples: int, seed: int
) -> ConfidenceIntervals | None:
    """Confidence intervals from `resamples` resamples; None for 0, and for less than two images."""
    if not resamples or len(images) < 2:
        return None
    return bootstrap([image.class_counts for image in images], rule, resamples, generator_for(seed))


def describe_evaluation(
    data_name: str, settings: EvalConfig, result: EvaluationResult, layout: WindowLayout | None = None
) -> str:
    """What was scored, in one line."""
    flip = ", mirrored too" if settings.flip else ""
    unreadable = f" ({len(result.unreadable)} unreadable)" if result.unreadable else ""
    view = f"scales {settings.scales}"
    if layout is not None:
        view = f"native resolution, windows of {layout.side} pixels every {layout.step}"
    return f"{data_name} {settings.split}, {len(result.images)} images{unreadable}, {view}{flip}"


def describe_settings(
    source: DataSource, settings: EvalConfig, saved: SavedNetwork, result: EvaluationResult, layout: WindowLayout | None
) -> dict[str, Any]:
    """The entries of metrics.json that say what was evaluated, how, and how the network was trained.

    Args:
        layout: the windows of an evaluation at native resolution, which has no scales.
    """
    files = [Path(member.source) for member in saved.members or (saved,)]
    sources = [str(file.absolute()) if file.is_file() else str(file) for file in files]
    entries = {
        "checkpoint": ", ".join(sources) if saved.members else (sources[0] if files[0].is_file() else saved.source),
        "step": None if saved.members else saved.step,
        "data": source.config.name,
        "root": str(source.root.absolute()),
        "split": settings.split,
        "images": len(result.images),
        "scales": settings.scales if layout is None else None,
        "flip": settings.flip,
        "window": settings.window if layout is None else layout.side,
        "stride": settings.stride if layout is None else layout.step,
        **describe_reading(source.config),
    }
    if saved.members:
        entries |= {"checkpoints": sources, "steps": [member.step for member in saved.members]}
    if not saved.note and not saved.members:  # files of other programs do not say how they were trained
        entries["trained_with"] = mask_secrets(config_to_plain(saved.config))
    return entries | {"boundary_ratio": settings.boundary_ratio} if settings.boundary_iou else entries


def print_tables(result: EvaluationResult, title: str, scales: list[int]) -> None:
    """Print all tables and the speed."""
    console = Console()
    console.print(class_score_table(result, title))
    if result.subsets:
        console.print(scales_table(result, scales))
    console.print(summary_table(result))
    best = result.best_threshold
    if best is not None and best.f1 is not None:
        plain = result.thresholds[len(result.thresholds) // 2]
        console.print(
            f"best threshold of {result.classes.names[POSITIVE]}: {best.threshold:g} with F1 {best.f1:.2%} (precision "
            f"{best.precision or 0:.2%}, recall {best.recall or 0:.2%}); at 0.5: F1 {plain.f1 or 0:.2%}",
            soft_wrap=True, highlight=False, markup=False,
        )  # fmt: skip
    if result.label_errors is not None:
        console.print(describe_label_errors(result), soft_wrap=True, highlight=False, markup=False)
    console.print(format_speed(result.speed), soft_wrap=True, highlight=False)


def describe_label_errors(result: EvaluationResult) -> str:
    """How many regions may be labelled wrongly, and which is the most likely."""
    if not result.label_errors:
        return "label errors: no region where the network is sure that the label is wrong"
    first, names = result.label_errors[0], result.classes.names
    return escape_unprintable(
        f"label errors: {format_quantity(len(result.label_errors), 'region')} in {LABEL_ERRORS_FILE}; the first: "
        f"{first.file}, row {first.box.top}, column {first.box.left}: labelled {names[first.label]}, predicted "
        f"{names[first.predicted]}"
    )


# ---- the page


def read_curves(saved: SavedNetwork) -> tuple[Curves, ...]:
    """The training curves of a checkpoint that is in the folder of its run; none otherwise."""
    if not is_in_run_folder(saved):
        return ()
    settings = saved.config.checkpoint
    return read_training_curves(run_folder_of_checkpoint(Path(saved.source)), settings.monitor, settings.mode)


def is_in_run_folder(saved: SavedNetwork) -> bool:
    """Whether the network is a checkpoint in the folder of its run, beside the training curves."""
    return not saved.members and Path(saved.source).parent.name == CHECKPOINT_FOLDER


def predict_examples(
    result: EvaluationResult,
    images: Sequence[ImageRecord],
    trainer: pl.Trainer,
    module: SegmentationModule,
    data: SegmentationData,
) -> Iterator[Example]:
    """The best, median and worst images, predicted again because they are known only after the evaluation."""
    dataset, device = data.test_dataloader().dataset, trainer.strategy.root_device
    assert isinstance(dataset, EvalDataset), "the loader reads the whole split"
    module.to(device).eval()  # Lightning has moved it to the CPU
    for group, index in choose_examples(result.images):
        position = images[index].position
        sample = dataset[position]
        if sample.is_by_window:
            example = draw_small_example(group, result.images[index], images[index], data, result.classes)
            if example is not None:
                yield example
            continue
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            ((class_map,),) = module.predict([module.transfer_batch_to_device(sample, device, 0)])
        record = dataset.records[position]
        image = read_shown(record, dataset.label_map, data.data_config)
        label = sample.label.numpy()
        yield encode_example(
            group, result.images[index], image, label, class_map.ids.cpu().numpy(), classes=result.classes
        )


def draw_label_errors(result: EvaluationResult, source: DataSource, split: str) -> list[LabelErrorPictures]:
    """The first regions whose label may be wrong, for the page; each image is opened once."""
    shown = list(enumerate((result.label_errors or ())[:MAX_SHOWN_ERRORS], start=1))
    by_image = itertools.groupby(
        sorted(shown, key=lambda entry: entry[1].position), key=lambda entry: entry[1].position
    )
    records, bands = source.records(split), source.bands_of(split)
    drawn = []
    for position, entries in by_image:
        with open_pair(records[position], source.label_map, max_pixels=source.config.max_pixels, bands=bands) as pair:
            for rank, error in entries:
                window = choose_crop_window(error.box, pair.size)
                read = pair.read(window)
                image = draw_photograph(read.image, bands, source.config)
                drawn.append(draw_label_error(rank, error, image, read.label, window=window, classes=source.classes))
    return sorted(drawn, key=lambda picture: picture.rank)


def draw_small_example(
    group: str, score: ImageScore, image: ImageRecord, data: SegmentationData, classes: ClassTable
) -> Example | None:
    """An image that was scored by window, from its small maps; None if they were not kept."""
    if image.maps is None:
        return None
    maps = decode_maps(image.maps, classes.num_classes)
    rows, columns = plan_shrinking(Size(image.height, image.width))
    with data.open_pair("test", image.position) as pair:
        pixels = pick_pixels(pair.image, rows.numpy(), columns.numpy())
    picture = draw_photograph(pixels, data.source.bands, data.data_config)
    return encode_example(group, score, picture, maps.label, maps.prediction, classes=classes)


# ---- panels


class PanelWriter(Callback):
    """Writes image | ground truth | prediction of every image to `<run_dir>/panels/<path below data.root>.png`.

    Raises:
        ConfigError: if a panel would overwrite a file of the data set.
    """

    def __init__(self, source: DataSource, split: str, run_dir: Path) -> None:
        self.source = source
        self.records = source.records(split)
        self.targets = [panel_path(record, source.root, run_dir) for record in self.records]
        refuse_overwriting(self.targets, self.records)

    def on_test_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: list[EvalSample],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for sample in batch:
            if sample.path not in outputs:
                continue  # another rank's image, or one that cannot be read
            record = self.records[sample.position]
            image = read_shown(record, self.source.label_map, self.source.config)
            label, prediction = (ids.cpu().numpy() for ids in (sample.label, outputs[sample.path]))
            panel = draw_comparison(image, label, prediction, self.source.classes)
            with atomic_write(self.targets[sample.position]) as temporary:
                Image.fromarray(panel).save(temporary, "png", compress_level=1)


def panel_path(record: Record, root: Path, run_dir: Path) -> Path:
    """The file of an image's panel. The suffix of the image is kept, so that a.jpg and a.png do not collide."""
    name = relative_name(record.image, root).lstrip("/")  # a split may be outside of the root as a whole
    return run_dir / PANELS_FOLDER / f"{name}.png"


def remove_earlier_panels(run_dir: Path, panels: Collection[Path]) -> None:
    """Remove the panels of an earlier evaluation in this folder other than `panels`, and folders left empty by that."""
    if not (run_dir / METRICS_FILE).exists():
        return
    for folder, _, files in os.walk(run_dir / PANELS_FOLDER, topdown=False):
        for path in (Path(folder, file) for file in files):
            if path.suffix == ".png" and path not in panels:
                path.unlink()
        with contextlib.suppress(OSError):  # it still holds files
            Path(folder).rmdir()


def refuse_overwriting(targets: Sequence[Path], records: Sequence[Record]) -> None:
    """Check that no panel overwrites a file of the data set.

    Raises:
        ConfigError: naming the first file that would be overwritten.
    """
    inputs = {Path(path).resolve() for record in records for path in (record.image, record.label) if path}
    overwritten = next((path for path in targets if path.resolve() in inputs), None)
    if overwritten is not None:
        raise ConfigError(
            f"eval.visualize=true would overwrite {overwritten}, a file of the data set. Set another run_dir."
        )
