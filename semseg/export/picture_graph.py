"""Wrap an ONNX network in the steps of prediction around it: a picture of any size in, a class map out.

The graph computes what semseg.data.images.resize_image and semseg.evaluation.inference compute, with the same rounding,
so that the class map is that of mode=predict. Needs semseg[export].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from semseg.data.datasets import resize_to_scales
from semseg.errors import ExportError, first_line
from semseg.evaluation.inference import predict_class_map
from semseg.export.onnx_runtime import (
    IDS_NAME,
    INPUT_NAME,
    METADATA_KEY,
    NETWORK_IMAGE,
    NETWORK_LOGITS,
    PictureRule,
    build_graph_network,
    picture_rule,
    read_exported,
)
from semseg.nets.interfaces import SegmentationNetwork

INT64_MIN = np.iinfo(np.int64).min
PICTURE_SIZES = ((97, 131), (150, 64))  # (height, width) of the pictures for the comparison
MIN_EQUAL_PIXELS = 0.999  # differences are classes that are equally probable up to rounding
CV2_ONE = 2**11  # OpenCV's weights are multiples of 1 / 2048
Value = str | ArrayLike  # the name of a value, or a constant


class GraphBuilder:
    """Collects operators and constants. Every operator has one result, which gets a name of its own.

    Args:
        prefix: start of all names.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix, self.numbers = prefix, count()
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def add(self, operator: str, *inputs: Value, **attributes: Any) -> str:
        """Add an operator; the name of its result. Constants have the type that numpy gives them."""
        name = self.create_name()
        names = [value if isinstance(value, str) else self.add_constant(value) for value in inputs]
        self.nodes.append(helper.make_node(operator, names, [name], **attributes))
        return name

    def add_constant(self, value: ArrayLike) -> str:
        name = self.create_name()
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def create_name(self) -> str:
        return f"{self.prefix}{next(self.numbers)}"

    def cast(self, value: str, to: int) -> str:
        return self.add("Cast", value, to=to)

    def count_from_zero(self, length: str, to: int) -> str:
        """0, 1, ... length - 1 in the type `to`, for an int64 scalar `length`."""
        return self.cast(self.add("Range", np.int64(0), length, np.int64(1)), to)

    def extent(self, value: str, axis: int) -> str:
        """The length of an axis: an int64 scalar."""
        return self.add("Gather", self.add("Shape", value), np.int64(axis))

    def give_name(self, value: str, name: str) -> str:
        """Another name for a value, which no other operator has."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        return name

    def mirror(self, value: str) -> str:
        """Reverse the last axis."""
        backwards = np.array([-1])
        return self.add("Slice", value, backwards, np.array([INT64_MIN]), np.array([-1]), backwards)


def build_picture_model(network: ModelProto, rule: PictureRule, label_ids: Sequence[int]) -> ModelProto:
    """A model from a picture to class ids.

    Args:
        network: from pixels float32 (1, 3, H, W) 0..255 to logits (1, K, h, w), as `write_onnx` writes it.
        rule: how the picture is scaled; the network is in the graph once for each scale, with the same weights.
        label_ids: the id of each class, by class index.

    Returns:
        A model from `image`, uint8 (H, W, 3) RGB, to `ids` (H, W), uint8 if all ids fit, otherwise int64.
    """
    graph = GraphBuilder("picture_")
    planes = graph.add("Transpose", INPUT_NAME, perm=[2, 0, 1])  # (3, H, W) uint8
    height, width = graph.extent(planes, 1), graph.extent(planes, 2)
    resize = resize_antialiased if rule.antialias else resize_like_opencv
    maps: list[UpsampledLogits] = []
    for short_edge in rule.scales:
        rows, columns = add_scaled_sides(graph, height, width, short_edge, rule)
        pixels = graph.cast(resize(graph, planes, rows, columns), TensorProto.FLOAT)
        image = graph.add("Unsqueeze", pixels, np.array([0]))
        for is_mirrored in (False, True)[: 1 + rule.flip]:
            if not maps:  # read_exported takes this copy of the network out of the graph
                image = graph.give_name(image, NETWORK_IMAGE)
            logits = add_network(graph, network.graph, graph.mirror(image) if is_mirrored else image)
            if not maps:
                logits = graph.give_name(logits, NETWORK_LOGITS)
            logits = graph.mirror(logits) if is_mirrored else logits
            maps.append(prepare_upsampling(graph, logits, height, width))
    kind = TensorProto.UINT8 if max(label_ids) < 256 else TensorProto.INT64
    add_class_map(graph, maps, np.array(label_ids, helper.tensor_dtype_to_np_dtype(kind)))
    picture = helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, ["H", "W", 3])
    ids = helper.make_tensor_value_info(IDS_NAME, kind, ["H", "W"])
    weights = [*network.graph.initializer, *graph.constants]
    return helper.make_model(
        helper.make_graph(graph.nodes, "picture", [picture], [ids], weights),
        opset_imports=network.opset_import,
        ir_version=network.ir_version,
        producer_name=network.producer_name,
    )


def add_network(graph: GraphBuilder, network: GraphProto, image: str) -> str:
    """Add the operators of a network, with names of their own; the name of its logits. Its weights are not copied."""
    prefix = f"{graph.create_name()}_"
    names = {tensor.name: tensor.name for tensor in network.initializer} | {"": "", network.input[0].name: image}
    for node in network.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        names |= {name: prefix + name for name in node.output if name}
        copy.input[:] = [names[name] for name in node.input]
        copy.output[:] = [names[name] for name in node.output]
        copy.name = prefix + node.name if node.name else ""  # quantisation leaves some nodes without a name
        graph.nodes.append(copy)
    return names[network.output[0].name]


# ---- the file


def write_picture_model(path: Path) -> float:
    """Replace the network in the ONNX file `path` by one that takes pictures, and compare the two.

    Returns:
        The fraction of pixels of the compared pictures that have the same id.

    Raises:
        ExportError: if that is less than MIN_EQUAL_PIXELS, or onnxruntime cannot run the graph.
    """
    saved = read_exported(path)
    assert saved.graph is not None, "an exported file has a graph"
    net = build_graph_network(saved, saved.graph)
    rule = picture_rule(saved, net)
    network = onnx.load_model_from_string(saved.graph.model)
    entry = json.loads({item.key: item.value for item in network.metadata_props}[METADATA_KEY])
    model = build_picture_model(network, rule, entry["label_ids"])
    entry |= {
        "preprocessing": rule.as_plain(in_graph=True),
        "input": f"{INPUT_NAME}: uint8 (H, W, 3), RGB, any H and W",
        "output": f"{IDS_NAME}: {'uint8' if max(entry['label_ids']) < 256 else 'int64'} (H, W), ids of the label files",
    }
    helper.set_model_props(model, {METADATA_KEY: json.dumps(entry)})
    path.write_bytes(model.SerializeToString())
    return compare_with_prediction(path, net, rule, entry["label_ids"])


def compare_with_prediction(path: Path, net: SegmentationNetwork, rule: PictureRule, label_ids: Sequence[int]) -> float:
    """Compare the class ids of the file `path` with those of mode=predict on drawn pictures; see `write_picture_model`.

    Args:
        net: the exported network, run by onnxruntime.
    """
    generator = torch.Generator().manual_seed(0)
    num_equal, num_pixels = 0, 0
    for size in PICTURE_SIZES:
        coarse = torch.randint(0, 256, (1, 3, 12, 12), generator=generator, dtype=torch.uint8)
        picture = F.interpolate(coarse, size, mode="bilinear")[0].permute(1, 2, 0).contiguous().numpy()
        scales = resize_to_scales(picture, rule.scales, rule.max_long_edge, rule.size_divisor, antialias=rule.antialias)
        index = predict_class_map(net, scales, size, net.convention, flip=rule.flip).ids.numpy()
        num_equal += int((run_picture_model(path, picture) == np.array(label_ids)[index]).sum())
        num_pixels += index.size
    if num_equal < MIN_EQUAL_PIXELS * num_pixels:
        raise ExportError(
            f"the graph with its preprocessing gives other classes for {num_pixels - num_equal} of {num_pixels} "
            "pixels. No file was written."
        )
    return num_equal / num_pixels


def run_picture_model(path: Path, picture: NDArray[np.uint8]) -> NDArray[np.integer]:
    """The class ids (H, W) that the file `path` gives for a picture (H, W, 3).

    Raises:
        ExportError: if onnxruntime cannot run it.
    """
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (ids,) = session.run([IDS_NAME], {INPUT_NAME: picture})
    except Exception as error:  # onnxruntime's exceptions have no public names
        raise ExportError(f"onnxruntime cannot run the graph with its preprocessing: {first_line(error)}.") from error
    return np.asarray(ids)


# ---- resizing the picture


def add_scaled_sides(
    graph: GraphBuilder, height: str, width: str, short_edge: int, rule: PictureRule
) -> tuple[str, str]:
    """Height and width of the network's input: semseg.data.geometry.stretched_size."""
    sides = [graph.cast(side, TensorProto.DOUBLE) for side in (height, width)]
    by_short = graph.add("Div", np.float64(short_edge), graph.add("Min", *sides))
    by_long = graph.add("Div", np.float64(rule.max_long_edge), graph.add("Max", *sides))
    scale = graph.add("Min", by_short, by_long)
    rounded = []
    for side in sides:
        truncated = graph.cast(graph.add("Mul", side, scale), TensorProto.INT64)
        raised = graph.add("Add", graph.add("Max", truncated, np.int64(1)), np.int64(rule.size_divisor - 1))
        multiples = graph.add("Div", raised, np.int64(rule.size_divisor))
        rounded.append(graph.add("Mul", multiples, np.int64(rule.size_divisor)))
    return rounded[0], rounded[1]


def resize_antialiased(graph: GraphBuilder, planes: str, rows: str, columns: str) -> str:
    """Resize (3, H, W) uint8 to (3, rows, columns) float64 as PyTorch does with antialias=True.

    PyTorch's weights are 16-bit integers, and it rounds after each pass. In float64 all of that is exact, as products
    of matrices, which are what onnxruntime multiplies fastest.
    """
    pixels = graph.cast(planes, TensorProto.DOUBLE)
    weights, one = add_triangle_weights(graph, graph.extent(planes, 2), columns)
    across = graph.add("MatMul", pixels, graph.add("Transpose", weights, perm=[1, 0]))  # (3, H, columns)
    across = add_rounding(graph, across, one)
    weights, one = add_triangle_weights(graph, graph.extent(planes, 1), rows)
    return add_rounding(graph, graph.add("MatMul", weights, across), one)


def add_triangle_weights(graph: GraphBuilder, length: str, out_length: str) -> tuple[str, str]:
    """Integer weights (out_length, length) of a resized axis in float64, and the scalar that they sum to."""
    lengths = [graph.cast(value, TensorProto.DOUBLE) for value in (length, out_length)]
    ratio = graph.add("Div", *lengths)
    positions = graph.add("Add", graph.count_from_zero(out_length, TensorProto.DOUBLE), np.float64(0.5))
    centres = graph.add("Unsqueeze", graph.add("Mul", ratio, positions), np.array([1]))
    distance = graph.add("Sub", graph.count_from_zero(length, TensorProto.DOUBLE), centres)
    distance = graph.add("Abs", graph.add("Add", distance, np.float64(0.5)))
    scaled = graph.add("Div", distance, graph.add("Max", ratio, np.float64(1)))
    triangle = graph.add("Max", graph.add("Sub", np.float64(1), scaled), np.float64(0))
    weights = graph.add("Div", triangle, graph.add("ReduceSum", triangle, np.array([1]), keepdims=1))
    # The largest power of two, up to 2**22, for which every weight fits in 16 bits.
    powers = 2.0 ** np.arange(23)
    largest = graph.add("ReduceMax", weights, keepdims=0)
    fits = graph.add("Less", graph.add("Mul", largest, powers), np.float64(2**15 - 0.5))
    one = graph.add("ReduceMax", graph.add("Where", fits, powers, np.float64(1)), keepdims=0)
    return graph.add("Floor", graph.add("Add", graph.add("Mul", weights, one), np.float64(0.5))), one


def add_rounding(graph: GraphBuilder, sums: str, one: str) -> str:
    """Sums of weighted pixels as whole numbers 0..255."""
    rounded = graph.add("Floor", graph.add("Add", graph.add("Div", sums, one), np.float64(0.5)))
    return graph.add("Clip", rounded, np.float64(0), np.float64(255))


def resize_like_opencv(graph: GraphBuilder, planes: str, rows: str, columns: str) -> str:
    """Resize (3, H, W) uint8 to (3, rows, columns) int32 as cv2.INTER_LINEAR does, with its 11-bit weights."""
    pixels = graph.cast(planes, TensorProto.INT32)
    taps = add_opencv_taps(graph, graph.extent(planes, 2), columns, is_clamped=True)
    across = graph.add("Add", *add_weighted_neighbours(graph, pixels, taps, axis=2))  # (3, H, columns)
    across = graph.add("Div", across, np.int32(16))
    taps = make_column(graph, add_opencv_taps(graph, graph.extent(planes, 1), rows, is_clamped=False))
    weighted = add_weighted_neighbours(graph, across, taps, axis=1)
    total = graph.add("Add", *(graph.add("Div", value, np.int32(2**16)) for value in weighted))
    return graph.add("Div", graph.add("Add", total, np.int32(2)), np.int32(4))


def add_opencv_taps(graph: GraphBuilder, length: str, out_length: str, *, is_clamped: bool) -> Taps:
    """The neighbours of each position of a resized axis, with weights int32 in multiples of 1 / CV2_ONE.

    Args:
        is_clamped: whether positions beyond the first and last pixel are moved to it. OpenCV does that for columns; for
            rows, it repeats the pixel and keeps both weights, which rounds differently.
    """
    lengths = [graph.cast(value, TensorProto.DOUBLE) for value in (out_length, length)]
    scale = graph.add("Div", np.float64(1), graph.add("Div", *lengths))
    middles = graph.add("Add", graph.count_from_zero(out_length, TensorProto.DOUBLE), np.float64(0.5))
    source = graph.add("Sub", graph.add("Mul", middles, scale), np.float64(0.5))
    source = graph.cast(source, TensorProto.FLOAT)
    floor = graph.add("Floor", source)
    fraction, first = graph.add("Sub", source, floor), graph.cast(floor, TensorProto.INT64)
    last = graph.add("Sub", length, np.int64(1))
    if is_clamped:
        is_outside = graph.add("Or", graph.add("Less", first, np.int64(0)), graph.add("GreaterOrEqual", first, last))
        fraction = graph.add("Where", is_outside, np.float32(0), fraction)
    first, second = (
        graph.add("Max", graph.add("Min", index, last), np.int64(0))
        for index in (first, graph.add("Add", first, np.int64(1)))
    )
    first_weight, second_weight = (
        graph.cast(graph.add("Round", graph.add("Mul", weight, np.float32(CV2_ONE))), TensorProto.INT32)
        for weight in (graph.add("Sub", np.float32(1), fraction), fraction)
    )
    return Taps(first, second, first_weight, second_weight)


# ---- from logits to class ids


class UpsampledLogits(NamedTuple):
    """Logits (h, w, K) and the neighbours of each row and column of the picture in them."""

    logits: str
    vertical: Taps  # (H,) each
    horizontal: Taps  # (W,) each; the weights (W, 1)


def prepare_upsampling(graph: GraphBuilder, logits: str, height: str, width: str) -> UpsampledLogits:
    """The logits (1, K, h, w) of a scale as the last step reads them."""
    # The maximum over one image in place of Squeeze: onnxruntime 1.32 moves dequantisation through Squeeze and
    # Transpose into Scan, and crashes.
    one_image = graph.add("ReduceMax", logits, np.array([0]), keepdims=0)
    by_position = graph.add("Transpose", one_image, perm=[1, 2, 0])
    vertical = add_upsampling_taps(graph, graph.extent(logits, 2), height)
    horizontal = add_upsampling_taps(graph, graph.extent(logits, 3), width)
    return UpsampledLogits(by_position, vertical, make_column(graph, horizontal))


def add_upsampling_taps(graph: GraphBuilder, length: str, out_length: str) -> Taps:
    """The neighbours and float32 weights of semseg.evaluation.inference.linear_interpolation."""
    lengths = [graph.cast(value, TensorProto.FLOAT) for value in (length, out_length)]
    middles = graph.add("Add", graph.count_from_zero(out_length, TensorProto.FLOAT), np.float32(0.5))
    source = graph.add("Sub", graph.add("Mul", middles, graph.add("Div", *lengths)), np.float32(0.5))
    source = graph.add("Max", source, np.float32(0))
    last = graph.add("Sub", length, np.int64(1))
    first = graph.add("Min", graph.cast(source, TensorProto.INT64), last)
    second = graph.add("Min", graph.add("Add", first, np.int64(1)), last)
    weight = graph.add("Sub", source, graph.cast(first, TensorProto.FLOAT))
    return Taps(first, second, graph.add("Sub", np.float32(1), weight), weight)


def add_class_map(graph: GraphBuilder, maps: Sequence[UpsampledLogits], label_ids: NDArray[np.integer]) -> None:
    """Add the result IDS_NAME (H, W): the id of the largest mean probability.

    The operator Scan computes one row of the picture at a time, because the probabilities of all rows of a large
    picture do not fit in memory.
    """
    row = GraphBuilder("row_")
    inputs: list[onnx.ValueInfoProto] = []
    probabilities: list[str] = []
    for view in maps:
        taps = Taps(*(row.create_name() for _ in view.vertical))  # of this row
        kinds = (TensorProto.INT64, TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT)
        inputs += [helper.make_tensor_value_info(name, kind, []) for name, kind in zip(taps, kinds, strict=True)]
        narrow = row.add("Add", *add_weighted_neighbours(row, view.logits, taps, axis=0))  # (w, K)
        wide = row.add("Add", *add_weighted_neighbours(row, narrow, view.horizontal, axis=0))  # (W, K)
        probabilities.append(row.add("Softmax", wide, axis=-1))
    total = probabilities[0]
    for summand in probabilities[1:]:
        total = row.add("Add", total, summand)
    index = row.add("ArgMax", row.add("Div", total, np.float32(len(maps))), axis=-1, keepdims=0)
    ids = row.add("Gather", label_ids, index)
    output = helper.make_tensor_value_info(ids, helper.np_dtype_to_tensor_dtype(label_ids.dtype), ["W"])
    body = helper.make_graph(row.nodes, "row", inputs, [output], row.constants)
    scanned = [name for view in maps for name in view.vertical]
    graph.nodes.append(
        helper.make_node("Scan", scanned, [IDS_NAME], body=body, num_scan_inputs=len(scanned), name="rows")
    )


# ---- linear interpolation


class Taps(NamedTuple):
    """The two neighbours of each position of a resized axis, int64, and their weights."""

    first: str
    second: str
    first_weight: str
    second_weight: str


def make_column(graph: GraphBuilder, taps: Taps) -> Taps:
    """The same with weights (n, 1), for an axis that is followed by another one."""
    first, second = (
        graph.add("Unsqueeze", weight, np.array([1])) for weight in (taps.first_weight, taps.second_weight)
    )
    return Taps(taps.first, taps.second, first, second)


def add_weighted_neighbours(graph: GraphBuilder, values: str, taps: Taps, axis: int) -> tuple[str, str]:
    """Both neighbours of each position along an axis, times their weights; each product is rounded once."""
    first = graph.add("Mul", graph.add("Gather", values, taps.first, axis=axis), taps.first_weight)
    return first, graph.add("Mul", graph.add("Gather", values, taps.second, axis=axis), taps.second_weight)
