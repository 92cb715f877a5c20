"""mode=export: the network of a checkpoint as a file for other programs, checked against it at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from semseg.build import open_network, require_export_extra, restore_net
from semseg.checkpoints.format import SavedNetwork, refuse_nonfinite_weights
from semseg.config.schema import EXPORT_SUFFIXES, Config
from semseg.data.datasets import EvalDataset, ReadOptions
from semseg.data.sources import DataSource
from semseg.errors import DataError
from semseg.evaluation.metrics import Scores
from semseg.nets.segmenter import Segmenter
from semseg.storage.atomic import atomic_write

log = logging.getLogger(__name__)


def run(config: Config, overrides: list[str]) -> None:
    """Write the network of `ckpt` to `output`, in 8-bit integers if `export.quantize` says so.

    Raises:
        SemsegError: for anything the user can mend; `output` is as it was then.
    """
    assert config.output, "config.check asks for it"
    require_export_extra()
    from semseg.export.onnx import WRITERS  # noqa: PLC0415 - the packages of an extra
    from semseg.export.onnx_runtime import description, read_exported  # noqa: PLC0415

    output = Path(config.output).expanduser()
    saved, config = open_network(config, overrides)
    net = restore_net(saved)
    refuse_nonfinite_weights(net.state_dict(), saved.source)
    options = config.export
    with atomic_write(output) as temporary:
        write = WRITERS[EXPORT_SUFFIXES[output.suffix]]
        found = write(temporary, net, description(saved, net, options.quantize))
        print(f"checked at 5 sizes: the largest difference is {found.largest:.2g}, the largest logit {found.scale:.2g}")
        if options.quantize != "none":
            from semseg.export.quantize import quantize_onnx  # noqa: PLC0415

            quantize_onnx(temporary, calibration_images(config, net) if options.quantize == "static" else None)
            print_loss(config, saved, net, restore_net(read_exported(temporary)))
        size = temporary.stat().st_size
    print(f"written {output} ({size / 1e6:.1f} MB)")


def calibration_images(config: Config, net: Segmenter) -> Iterator[Tensor]:
    """export.calibration_images of the split export.calibration_split, at every scale of eval.scales.

    Raises:
        DataError: if they are not there.
    """
    from semseg.export.quantize import sampled  # noqa: PLC0415 - the packages of an extra

    dataset = scaled_images(config, DataSource(config.data), config.export.calibration_split, net)
    for index in sampled(dataset, config.export.calibration_images):
        yield from dataset[index].scales


def scaled_images(config: Config, source: DataSource, split: str, net: Segmenter) -> EvalDataset:
    """The images of a split as mode=eval reads them."""
    return EvalDataset(
        source.records(split),
        source.label_map,
        ReadOptions(config.data.max_long_edge, config.model.size_divisor or net.size_divisor),
        short_edges=config.eval.scales,
        antialias=net.convention.antialias,
    )


def print_loss(config: Config, saved: SavedNetwork, net: Segmenter, quantized: Segmenter) -> None:
    """Tell the scores of both networks on export.score_images of eval.split; or why there are none."""
    from semseg.export.quantize import score  # noqa: PLC0415 - the packages of an extra

    count, split = config.export.score_images, config.eval.split
    if not count:
        return
    try:
        source = DataSource(config.data)
        dataset = scaled_images(config, source, split, net)
        if source.classes.num_classes != saved.classes.num_classes:
            raise DataError(f"data={config.data.name} has {source.classes.num_classes} classes.")
        before, after = (score(one, dataset, count, config.eval, config.data.miou_rule) for one in (net, quantized))
    except DataError as error:
        log.warning("what the quantisation costs was not measured: %s", error)
        return
    print(f"scores on {min(count, len(dataset))} images of {config.data.name} {split}:")
    for name, scores in (("float32", before), ("int8", after)):
        print(f"  {name:8} {in_words(scores)}")
    if before.mean_iou is not None and after.mean_iou is not None:
        print(f"  mean IoU changes by {100 * (after.mean_iou - before.mean_iou):+.2f} points")


def in_words(scores: Scores) -> str:
    """Mean IoU and pixel accuracy in percent."""
    shares = {"mean IoU": scores.mean_iou, "pixel accuracy": scores.pixel_accuracy}
    return ", ".join(f"{name} {'n/a' if share is None else f'{100 * share:.2f} %'}" for name, share in shares.items())
