"""mode=export: write the network of a checkpoint to a file for other programs, and compare the two."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from semseg.build import choose_evaluation_layout, open_network, require_export_extra, restore_network
from semseg.checkpoints.format import SavedNetwork, refuse_nonfinite_weights
from semseg.config.schema import EXPORT_SUFFIXES, Config, EvalConfig, ExportConfig
from semseg.data.crops import NATIVE
from semseg.data.datasets import EvalDataset, ReadOptions
from semseg.data.sources import DataSource
from semseg.errors import DataError, ExportError
from semseg.evaluation.metrics import Scores
from semseg.nets.bands import adopt_ranges, expect_trained_type
from semseg.nets.interfaces import SegmentationNetwork, choose_size_divisor
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import format_command, relative_to_cwd

_log = logging.getLogger(__name__)


def run(config: Config, overrides: list[str]) -> None:
    """Write the network of `ckpt` to `output`, with 8-bit integers or preprocessing if `export` asks for them.

    Raises:
        SemsegError: for any error that the user can fix; `output` is then unchanged.
    """
    assert config.output, "find_mode_problems asks for it"
    require_export_extra()
    from semseg.export.onnx import EXPORT_WRITERS, ONNX_SIZES  # noqa: PLC0415 - the packages of an extra
    from semseg.export.onnx_runtime import build_description, read_exported  # noqa: PLC0415

    output = Path(config.output).expanduser()
    saved, config = open_network(config, overrides)
    config = fix_scales(config)
    saved = saved._replace(config=follow_given_keys(saved.config, config))
    net = restore_network(saved)
    refuse_nonfinite_weights(net.state_dict(), saved.source)
    options = config.export
    check_one_size(net, options)
    if options.preprocessing and not net.convention.takes_pictures:
        raise ExportError(
            "export.preprocessing=true: the graph would take pictures of 8-bit RGB, this network takes the bands "
            f"{', '.join(net.convention.bands)}. Leave it out."
        )
    if options.preprocessing and config.data.resize == NATIVE:
        raise ExportError(
            "export.preprocessing=true: the graph would bring pictures to a short edge, this network takes windows of "
            "them as they are (data.resize=native). Leave it out: mode=predict goes by windows."
        )
    with atomic_write(output) as temporary:
        write = EXPORT_WRITERS[EXPORT_SUFFIXES[output.suffix]]
        deviation = write(temporary, net, build_description(saved, net, options.quantize))
        compared = f"{len(ONNX_SIZES)} sizes" if net.image_size is None else "its one size"
        print(
            f"compared at {compared}: the largest difference is {deviation.largest:.2g}, "
            f"the largest logit {deviation.scale:.2g}"
        )
        if options.quantize != "none":
            from semseg.export.quantize import quantize_onnx  # noqa: PLC0415

            images = read_calibration_images(config, net) if options.quantize == "static" else None
            quantize_onnx(temporary, images)
            print_quantisation_loss(config, saved, net, restore_network(read_exported(temporary)))
        if options.preprocessing:
            from semseg.export.picture_graph import write_picture_model  # noqa: PLC0415

            equal = write_picture_model(temporary)
            print(f"compared with mode=predict on 2 pictures: {100 * equal:.4g} % of the pixels have the same class")
        size = temporary.stat().st_size
    print(f"written {output} ({size / 1e6:.1f} MB)")
    print(describe_use(output, takes_pictures=options.preprocessing))


def check_one_size(net: SegmentationNetwork, options: ExportConfig) -> None:
    """Refuse what needs images of any size, if the network takes only one.

    Raises:
        ExportError: with the key.
    """
    for key, is_given in (
        ("preprocessing=true", options.preprocessing),
        ("quantize=static", options.quantize == "static"),
    ):
        if net.image_size is not None and is_given:
            raise ExportError(
                f"export.{key}: not for this network, which takes images of {net.image_size.height} x "
                f"{net.image_size.width} pixels only. Leave it out: mode=predict goes by windows."
            )


def describe_use(output: Path, *, takes_pictures: bool) -> str:
    """How to use the written file, in lines to copy."""
    output = relative_to_cwd(output)
    if takes_pictures:
        call = f'onnxruntime.InferenceSession("{output}").run(None, {{"image": <uint8 (H, W, 3) RGB>}})[0]'
        return f"in Python: {call}\nhere: {format_command(['mode=predict', f'ckpt={output}'])} input=<image or folder>"
    if EXPORT_SUFFIXES[output.suffix] == "torch_export":
        return f'in Python: torch.export.load("{output}").module()(<float32 (N, C, H, W): RGB, 0..255, or bands>)'
    command = format_command(["mode=predict", f"ckpt={output}"])
    return f"to predict: {command} input=<image or folder>\nin other programs: docs/export.md, with the arithmetic"


def fix_scales(config: Config) -> Config:
    """The configuration with the scales of prediction in eval.scales, where all modes that read the file find them."""
    if config.predict.scales is None:
        return config
    return replace(config, eval=replace(config.eval, scales=config.predict.scales, also_scales=[]))


def follow_given_keys(saved: Config, given: Config) -> Config:
    """The configuration to store in the file: that of the run, with what the command line says about prediction."""
    data = replace(saved.data, max_long_edge=given.data.max_long_edge)
    return replace(saved, data=data, eval=given.eval, predict=given.predict)


def read_calibration_images(config: Config, net: SegmentationNetwork) -> Iterator[Tensor]:
    """export.calibration_images images of export.calibration_split, at every scale of eval.scales.

    Of images at native resolution these are windows, as in evaluation.

    Raises:
        DataError: if the data set is missing.
    """
    from semseg.export.quantize import sample_positions, sample_windows  # noqa: PLC0415 - the packages of an extra

    source = DataSource(adopt_ranges(config.data, net.convention))
    layout = choose_evaluation_layout(config, net)
    size_divisor = choose_size_divisor(net, config.model.size_divisor)
    dataset = open_split(source, config.export.calibration_split, config.eval, size_divisor, net)
    for position in sample_positions(dataset, config.export.calibration_images):
        scales = dataset[position].scales
        yield from scales if layout is None else sample_windows(scales[0], layout)


def open_split(
    source: DataSource, split: str, options: EvalConfig, size_divisor: int, net: SegmentationNetwork
) -> EvalDataset:
    """The images of a split as mode=eval reads them."""
    return EvalDataset(
        source.records(split),
        source.label_map,
        ReadOptions(
            source.config.max_long_edge,
            size_divisor,
            max_pixels=source.config.max_pixels,
            bands=expect_trained_type(source.bands_of(split), net.convention),
        ),
        short_edges=() if source.config.resize == NATIVE else options.scales,
        antialias=net.convention.antialias,
    )


def print_quantisation_loss(
    config: Config, saved: SavedNetwork, net: SegmentationNetwork, quantized: SegmentationNetwork
) -> None:
    """Print the scores of both networks on export.score_images images of eval.split, or why there are none."""
    from semseg.export.quantize import score_network  # noqa: PLC0415 - the packages of an extra

    count, split, rule = config.export.score_images, config.eval.split, config.data.miou_rule
    if not count:
        return
    try:
        source = DataSource(adopt_ranges(config.data, net.convention))
        dataset = open_split(source, split, config.eval, choose_size_divisor(net, config.model.size_divisor), net)
        if source.classes.num_classes != saved.classes.num_classes:
            raise DataError(
                f"data={config.data.name} has {source.classes.num_classes} classes, the network has "
                f"{saved.classes.num_classes}."
            )
        layout = choose_evaluation_layout(config, net)
        before, after = (
            score_network(network, dataset, count, config.eval, rule, layout=layout) for network in (net, quantized)
        )
    except DataError as error:
        _log.warning("the loss by quantisation was not measured: %s", error)
        return
    print(f"scores on {min(count, len(dataset))} images of {config.data.name} {split}:")
    for name, scores in (("float32", before), ("int8", after)):
        print(f"  {name:8} {format_scores(scores)}")
    if before.mean_iou is not None and after.mean_iou is not None:
        print(f"  mean IoU changes by {100 * (after.mean_iou - before.mean_iou):+.2f} points")


def format_scores(scores: Scores) -> str:
    """Mean IoU and pixel accuracy in percent."""
    values = {"mean IoU": scores.mean_iou, "pixel accuracy": scores.pixel_accuracy}
    return ", ".join(f"{name} {'n/a' if value is None else f'{100 * value:.2f} %'}" for name, value in values.items())
