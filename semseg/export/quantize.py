"""Quantise the convolutions of an ONNX network to 8-bit integers, and score the result. Needs semseg[export].

Weights become int8 or uint8 with one scale per tensor (static: per output channel); the rest stays float32.
- dynamic: the range of every input of a convolution is computed for each image at run time, so that no sample images
  are needed. Convolutions with groups stay float32.
- static: the ranges are those on sample images (Jacob et al. 2018, section 3), which is faster at run time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from torch import Tensor

from semseg.config.schema import EvalConfig
from semseg.data.datasets import EvalDataset
from semseg.data.geometry import Size, round_up
from semseg.data.windows import spread_windows
from semseg.evaluation.inference import predict_class_map
from semseg.evaluation.metrics import Scores, confusion_counts, scores_from
from semseg.evaluation.tiled import ArraySink, WindowLayout, cut_window, predict_by_windows
from semseg.export.onnx_runtime import INPUT_NAME
from semseg.nets.interfaces import SegmentationNetwork

NUM_CALIBRATION_WINDOWS = 4  # of each sample image at native resolution
QUANTIZED_OPERATORS = ["Conv"]  # where a network spends its time


class CalibrationImages(CalibrationDataReader):
    """Passes images (C, H, W) to onnxruntime, one at a time."""

    def __init__(self, images: Iterable[Tensor]) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, Any] | None:  # pyright: ignore[reportIncompatibleMethodOverride] - None at the end
        image = next(self.images, None)
        return None if image is None else {INPUT_NAME: image[None].float().numpy()}


def quantize_onnx(path: Path, images: Iterable[Tensor] | None) -> None:
    """Quantise the float32 network in `path`, in place; its metadata are kept.

    Args:
        images: sample images (C, H, W), uint8 RGB or bands, for static quantisation, H and W multiples of the
            network's size_divisor; None: dynamic.
    """
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises steps that torch.onnx has done already
    try:
        with TemporaryDirectory(dir=path.parent) as folder:
            target = Path(folder) / path.name
            if images is None:
                # Signed weights are three times as slow, because onnxruntime's kernel is for unsigned ones.
                quantize_dynamic(
                    path,
                    target,
                    op_types_to_quantize=QUANTIZED_OPERATORS,
                    nodes_to_exclude=find_grouped_convolutions(path),
                    weight_type=QuantType.QUInt8,
                )
            else:
                quantize_static(
                    path,
                    target,
                    CalibrationImages(images),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=QUANTIZED_OPERATORS,
                    per_channel=True,
                    reduce_range=True,  # to 7 bits, because 8 bits overflow on processors without VNNI instructions
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                )
            target.replace(path)
    finally:
        logging.root.setLevel(level)


def find_grouped_convolutions(path: Path) -> list[str]:
    """Names of the convolutions with several groups, such as depthwise ones.

    One scale for all of their weights is too coarse: dynamic quantisation of a MobileNetV2 reduced its mean IoU from 32
    to 2 % with them, and left it at 32 % without them. They have few of the weights.
    """
    nodes = onnx.load(path).graph.node
    return [node.name for node in nodes if any(item.name == "group" and item.i > 1 for item in node.attribute)]


def sample_positions(dataset: EvalDataset, count: int) -> list[int]:
    """Positions of at most `count` images, spread evenly over the data set."""
    length = len(dataset)
    count = min(count, length)
    return [index * length // count for index in range(count)]


def sample_windows(image: Tensor, layout: WindowLayout) -> list[Tensor]:
    """NUM_CALIBRATION_WINDOWS of an image (C, H, W), spread over it, whose sides are multiples of the size divisor.

    An image that is smaller than a window is one window, whose edge is repeated up to such a multiple.
    """
    size = Size(*image.shape[1:])
    places = dict.fromkeys(spread_windows(size, NUM_CALIBRATION_WINDOWS, layout.side))
    return [pad_to_multiple(cut_window(image, place), layout.divisor) for place in places]


def pad_to_multiple(pixels: Tensor, divisor: int) -> Tensor:
    """Pixels (C, H, W) with the last row and column repeated until both sides are multiples of `divisor`."""
    missing = [(0, round_up(length, divisor) - length) for length in pixels.shape[1:]]
    return torch.from_numpy(np.pad(pixels.numpy(), [(0, 0), *missing], mode="edge"))


def score_network(
    net: SegmentationNetwork,
    dataset: EvalDataset,
    count: int,
    options: EvalConfig,
    miou_rule: str,
    *,
    layout: WindowLayout | None = None,
) -> Scores:
    """Score a network on `count` images of a data set with labels, with the settings of mode=eval.

    Args:
        layout: the windows of images at native resolution; None: they are at eval.scales.
    """
    matrix = torch.zeros(net.num_classes, net.num_classes, dtype=torch.int64)
    for index in sample_positions(dataset, count):
        sample = dataset[index]
        size = Size(*sample.label.shape)
        if layout is not None:
            sink = ArraySink(size)
            predict_by_windows(
                net,
                sample.scales[0],
                net.convention,
                layout,
                sink,
                flip=options.flip,
                batch_size=options.batch_size,
                memory_limit_mb=options.memory_limit_mb,
            )
            ids = torch.from_numpy(sink.ids)
        else:
            ids = predict_class_map(
                net,
                sample.scales,
                size,
                net.convention,
                flip=options.flip,
                window=options.window,
                stride=options.stride,
                memory_limit_mb=options.memory_limit_mb,
            ).ids
        matrix += confusion_counts(ids, sample.label, net.num_classes)
    return scores_from(matrix, miou_rule)
