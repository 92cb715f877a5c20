"""mode=eval: score a checkpoint on a split, print the table, write metrics.json and per_class.csv."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console

from semseg.build import build_trainer, restore_net
from semseg.checkpoint import find_checkpoint, inherit, read_checkpoint
from semseg.config import Config
from semseg.data.sources import DataSource
from semseg.datamodule import SegmentationData
from semseg.errors import ConfigError
from semseg.lit_module import SegmentationModule
from semseg.report import score_table, write_scores

log = logging.getLogger(__name__)


def run(config: Config, overrides: list[str]) -> float | None:
    """Evaluate; returns the mean IoU (None if nothing was scored).

    Raises:
        SemsegError: for anything the user can mend.
    """
    assert config.ckpt is not None, "config.check asks for ckpt"
    saved = read_checkpoint(find_checkpoint(config.ckpt, Path(config.runs_dir)))
    config = inherit(saved.config, config, overrides)
    source = DataSource(config.data)
    if source.classes.num_classes != saved.classes.num_classes:
        raise ConfigError(
            f"data={config.data.name} has {source.classes.num_classes} classes, but {saved.path} was trained "
            f"for {saved.classes.num_classes}."
        )
    if source.classes.names != saved.classes.names:
        log.warning(
            "class names of data=%s differ from those in %s: is this the same task?", config.data.name, saved.path
        )
    net = restore_net(saved)
    trainer = build_trainer(config, source)
    module = SegmentationModule(net, config, source.classes)
    data = SegmentationData(source, config, net)
    trainer.test(module, datamodule=data, verbose=False)
    scores, matrix = module.scores, module.matrix
    assert scores is not None and matrix is not None, "the test loop ends with scores"
    if not trainer.is_global_zero:
        return scores.mean_iou
    evaluation = config.eval
    facts = {
        "checkpoint": str(saved.path),
        "data": config.data.name,
        "split": evaluation.split,
        "images": data.num_images("test"),
        "scales": list(evaluation.scales),
        "flip": evaluation.flip,
        "confusion": matrix.tolist(),  # rows are labels
    }
    files = write_scores(Path(config.run_dir), scores, source.classes, facts)
    console = Console()
    title = f"{config.data.name} {evaluation.split}, {facts['images']} images, scales {evaluation.scales}"
    console.print(score_table(scores, source.classes, title))
    console.print(
        f"checkpoint {saved.path}\nwritten to {' and '.join(map(str, files))}", soft_wrap=True, highlight=False
    )
    return scores.mean_iou
