"""mode=eval: score a checkpoint on a split; prints tables, writes numbers, a page, and pictures if wanted."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback
from rich.console import Console

from semseg.build import build_trainer, open_network, restore_net, tell
from semseg.checkpoints.format import FOLDER, SavedNetwork, refuse_nonfinite
from semseg.config.schema import Config
from semseg.data.datasets import EvalDataset, EvalSample
from semseg.data.images import read_pair
from semseg.data.records import Record
from semseg.data.seeding import generator_for
from semseg.data.sources import DataSource, require_masks
from semseg.datamodule import SegmentationData
from semseg.errors import ConfigError
from semseg.evaluation.evaluator import ImageRecord, Intervals, bootstrap
from semseg.evaluation.tables import (
    Findings,
    class_table,
    findings_of,
    place_of,
    scales_table,
    speed_line,
    summary_table,
    write_findings,
)
from semseg.lit_module import SegmentationModule
from semseg.reports.curves import read_training_curves, run_folder_of_checkpoint
from semseg.reports.draw import Pixels, draw_comparison
from semseg.reports.evaluation_page import (
    EvaluationReport,
    Example,
    ImageScore,
    build_class_scores,
    build_headline_tiles,
    build_rule_scores,
    choose_examples,
    write_evaluation_page,
)
from semseg.reports.run_card import build_run_card, compute_data_fingerprint
from semseg.storage.atomic import replacing
from semseg.storage.run_results import Result, write_result
from semseg.system.text import escape_lines, escape_unprintable

log = logging.getLogger(__name__)


def run(config: Config, overrides: list[str]) -> float | None:
    """Evaluate; returns the mean IoU (None if nothing was scored).

    Raises:
        SemsegError: for anything the user can mend.
    """
    saved, config = open_network(config, overrides)
    source = matching_source(config, saved)
    require_masks(config.eval.split, source.records(config.eval.split))
    tell(source.unused(config.eval.split))
    net = restore_net(saved)
    refuse_nonfinite(net.state_dict(), saved.source)
    trainer = build_trainer(config, source)
    module = SegmentationModule(net, config, source.classes)
    data = SegmentationData(source, config, net)
    if config.eval.visualize:
        trainer.callbacks.append(PanelWriter(source, config.eval.split, Path(config.run_dir)))  # pyright: ignore[reportAttributeAccessIssue]
    trainer.test(module, datamodule=data, verbose=False)
    assert module.scores is not None and module.evaluation is not None, "the test loop ends with scores"
    if not trainer.is_global_zero:
        return module.scores.mean_iou
    findings = findings_of(
        module.evaluation,
        source.classes,
        config.data.miou_rule,
        config.eval.also_scales,
        confidence(config, module.evaluation.images),
        class_ids=source.label_map.class_ids,
    )
    folder = Path(config.run_dir)
    files = write_findings(folder, findings, source.root, facts(config, saved, findings))
    pictures = tuple(examples(findings, trainer, module, data))
    report = page(config, saved, source, findings, pictures=pictures, device=device_in_words(trainer))
    write_evaluation_page(folder / "report.html", report)
    print_tables(findings, config)
    write_result(folder, Result(findings.scores.mean_iou, "mean IoU"))
    written = ", ".join(map(str, [*files, folder / "report.html"]))
    print(escape_lines(f"checkpoint {saved.source}\nwritten to {written}"))
    return findings.scores.mean_iou


def matching_source(config: Config, saved: SavedNetwork) -> DataSource:
    """The data set, whose classes must be as many as the network's.

    Raises:
        ConfigError: if they are not.
    """
    source = DataSource(config.data)
    if source.classes.num_classes != saved.classes.num_classes:
        raise ConfigError(
            f"data={config.data.name} has {source.classes.num_classes} classes, but {saved.source} was trained "
            f"for {saved.classes.num_classes}."
        )
    if source.classes.names != saved.classes.names:
        log.warning(
            "class names of data=%s differ from those in %s: is this the same task?",
            config.data.name,
            escape_unprintable(saved.source),
        )
    return source


def confidence(config: Config, images: Sequence[ImageRecord]) -> Intervals | None:
    """Confidence intervals, if eval.bootstrap asks for them."""
    if not config.eval.bootstrap:
        return None
    margins = [image.margins for image in images if image.margins is not None]
    return bootstrap(margins, config.data.miou_rule, config.eval.bootstrap, generator_for(config.seed))


# ---- on the console and in metrics.json


def title_of(config: Config, findings: Findings) -> str:
    """What was scored, in one line."""
    settings = config.eval
    flip = ", mirrored too" if settings.flip else ""
    left_out = f" ({len(findings.left_out)} left out)" if findings.left_out else ""
    return (
        f"{config.data.name} {settings.split}, {len(findings.images)} images{left_out}, scales {settings.scales}{flip}"
    )


def print_tables(findings: Findings, config: Config) -> None:
    """All tables and the speed."""
    console = Console()
    console.print(class_table(findings, title_of(config, findings)))
    if findings.parts:
        console.print(scales_table(findings, config.eval.scales))
    console.print(summary_table(findings))
    console.print(speed_line(findings.speed), soft_wrap=True, highlight=False)


def facts(config: Config, saved: SavedNetwork, findings: Findings) -> dict[str, Any]:
    """What metrics.json says of how the scores came about."""
    settings = config.eval
    found = {
        "checkpoint": saved.source,
        "data": config.data.name,
        "split": settings.split,
        "images": len(findings.images),
        "scales": settings.scales,
        "flip": settings.flip,
    }
    return found | {"boundary_ratio": settings.boundary_ratio} if settings.boundary_iou else found


# ---- the page


def page(
    config: Config,
    saved: SavedNetwork,
    source: DataSource,
    findings: Findings,
    *,
    pictures: tuple[Example, ...],
    device: str,
) -> EvaluationReport:
    """All that report.html shows."""
    fingerprint = compute_data_fingerprint(source.records(config.eval.split), source.root)
    checkpoint = Path(saved.source)
    return EvaluationReport(
        title=f"{config.model.name} on {config.data.name}",
        subtitle=title_of(config, findings),
        headline=build_headline_tiles(findings.scores, findings.intervals and findings.intervals.mean_iou),
        rules=build_rule_scores(findings.by_rule, source.classes.names),
        classes=source.classes,
        rows=build_class_scores(findings.scores, source.classes, source.label_map.class_ids),
        confusion=findings.confusion,
        images=tuple(image_scores(findings, source.root)),
        examples=pictures,
        curves=read_training_curves(run_folder_of_checkpoint(checkpoint)) if checkpoint.parent.name == FOLDER else (),
        card=build_run_card(config, ["python", *sys.argv], device, fingerprint),
    )


def image_scores(findings: Findings, root: Path) -> list[ImageScore]:
    """The images as the page names and ranks them."""
    return [ImageScore(place_of(image.path, root), image.pixel_accuracy, image.mean_iou) for image in findings.images]


def device_in_words(trainer: pl.Trainer) -> str:
    """Such as "2 x NVIDIA H200", or "cpu"."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{trainer.world_size} x {name}" if trainer.world_size > 1 else name


def examples(
    findings: Findings, trainer: pl.Trainer, module: SegmentationModule, data: SegmentationData
) -> Iterator[Example]:
    """The best, median and worst images, predicted once more: no one could know before that these are the ones."""
    scores = image_scores(findings, data.source.root)
    dataset, device = data.test_dataloader().dataset, trainer.strategy.root_device
    assert isinstance(dataset, EvalDataset), "of the whole split"
    module.to(device).eval()  # Lightning has taken it to the CPU
    for group, position in choose_examples(scores):
        sample = dataset[findings.images[position].index]
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            ((prediction,),) = module.predict([module.transfer_batch_to_device(sample, device, 0)])
        record = dataset.records[sample.index]
        image = read_pair(record, dataset.label_map, max_pixels=dataset.max_pixels).image
        yield Example(group, scores[position], image, sample.label.numpy(), prediction.cpu().numpy())


# ---- panels


class PanelWriter(Callback):
    """Writes image | ground truth | prediction of every image as `<run_dir>/panels/<place below data.root>.png`.

    Raises:
        ConfigError: if a picture would take the place of a file of the data set.
    """

    def __init__(self, source: DataSource, split: str, run_dir: Path) -> None:
        self.source = source
        self.records = source.records(split)
        self.targets = [panel_path(record, source.root, run_dir) for record in self.records]
        check_targets(self.targets, self.records)

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
            record, limit = self.records[sample.index], self.source.config.max_pixels
            image = read_pair(record, self.source.label_map, max_pixels=limit).image
            label, prediction = (ids.cpu().numpy() for ids in (sample.label, outputs[sample.path]))
            write_png(self.targets[sample.index], draw_comparison(image, label, prediction, self.source.classes))


def panel_path(record: Record, root: Path, run_dir: Path) -> Path:
    """Where the panel of an image goes. The suffix stays, so that a.jpg and a.png, or b/a.jpg, never meet."""
    place = place_of(record.image, root).lstrip("/")  # a split lies below the root as a whole, or elsewhere
    return run_dir / "panels" / f"{place}.png"


def check_targets(targets: Sequence[Path], records: Sequence[Record]) -> None:
    """Nothing that is read may be written.

    Raises:
        ConfigError: naming the first file that would be.
    """
    inputs = {Path(path).resolve() for record in records for path in (record.image, record.label) if path}
    lost = next((path for path in targets if path.resolve() in inputs), None)
    if lost is not None:
        raise ConfigError(f"eval.visualize=true would overwrite {lost}, a file of the data set. Set another run_dir.")


def write_png(path: Path, pixels: Pixels) -> None:
    """Write a picture, whole or not at all."""
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, "png", compress_level=1)
