"""An ONNX network with its convolutions in 8-bit integers, and what that costs in scores. Needs semseg[export].

Weights are int8 or uint8 with a scale for each (static: for each output channel), the rest of the graph stays float32.
- dynamic: the range of every input of a convolution is found for each image while it runs; no images are needed here.
  Convolutions with groups stay float32.
- static: the ranges are those seen on sample images (Jacob et al. 2018, section 3), which is faster to run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
from semseg.evaluation.inference import predict
from semseg.evaluation.metrics import Scores, confusion_counts, scores_from
from semseg.export.onnx_runtime import IMAGE
from semseg.nets.segmenter import Segmenter

QUANTIZED = ["Conv"]  # kinds of operators; a network spends its time in them


class Images(CalibrationDataReader):
    """Hands images (3, H, W) uint8 to onnxruntime, one at a time."""

    def __init__(self, images: Iterable[Tensor]) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, Any] | None:  # pyright: ignore[reportIncompatibleMethodOverride] - None ends it
        image = next(self.images, None)
        return None if image is None else {IMAGE: image[None].float().numpy()}


def quantize_onnx(path: Path, images: Iterable[Tensor] | None) -> None:
    """Quantise the float32 network in `path`, in place; its metadata stay.

    Args:
        images: RGB (3, H, W) uint8, H and W multiples of the network's size_divisor, whose values set the ranges
            (static); None: dynamic.
    """
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # advice to run steps that torch.onnx has done already
    try:
        with TemporaryDirectory(dir=path.parent) as folder:
            target = Path(folder) / path.name
            if images is None:
                # Signed weights are three times as slow: onnxruntime's kernel is for unsigned ones.
                quantize_dynamic(
                    path,
                    target,
                    op_types_to_quantize=QUANTIZED,
                    nodes_to_exclude=grouped_convolutions(path),
                    weight_type=QuantType.QUInt8,
                )
            else:
                quantize_static(
                    path,
                    target,
                    Images(images),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=QUANTIZED,
                    per_channel=True,
                    reduce_range=True,  # 7 bits: 8 overflow on processors without VNNI instructions
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                )
            target.replace(path)
    finally:
        logging.root.setLevel(level)


def grouped_convolutions(path: Path) -> list[str]:
    """Names of the convolutions with several groups, depthwise ones among them.

    One scale for all of their weights spoils them: a MobileNetV2 with dynamic quantisation went from 32 to 2 % mean IoU
    with them, and stayed at 32 % without. They hold few of the weights.
    """
    nodes = onnx.load(path).graph.node
    return [node.name for node in nodes if any(item.name == "group" and item.i > 1 for item in node.attribute)]


def sampled(dataset: EvalDataset, count: int) -> list[int]:
    """Indices of at most `count` images, spread evenly over the data set."""
    length = len(dataset)
    count = min(count, length)
    return [index * length // count for index in range(count)]


def score(net: Segmenter, dataset: EvalDataset, count: int, options: EvalConfig, miou_rule: str) -> Scores:
    """Scores on `count` images of a data set with labels, by the settings of mode=eval."""
    matrix = torch.zeros(net.num_classes, net.num_classes, dtype=torch.int64)
    for index in sampled(dataset, count):
        sample = dataset[index]
        height, width = sample.label.shape
        found = predict(
            net,
            sample.scales,
            (height, width),
            net.convention,
            flip=options.flip,
            window=options.window,
            stride=options.stride,
            memory_limit_mb=options.memory_limit_mb,
        )
        matrix += confusion_counts(found.ids, sample.label, net.num_classes)
    return scores_from(matrix, miou_rule)
