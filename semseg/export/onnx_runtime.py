"""Networks as ONNX files: the description beside the graph, reading and running them. Needs semseg[export].

A file may come from anywhere. It is read once, and the bytes that were checked are those that run. onnxruntime runs
them with the standard operators of ONNX only. A file cannot refer to code or to other files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnx.numpy_helper
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from onnx.external_data_helper import uses_external_data
from torch import Tensor, nn

from semseg.checkpoints.format import (
    Graph,
    SavedNetwork,
    describe_network,
    network_from_entry,
    refuse_nonfinite_weights,
)
from semseg.config.preprocessing import Preprocessing
from semseg.config.schema import config_to_plain
from semseg.data.crops import NATIVE, choose_crop
from semseg.data.geometry import Size
from semseg.data.sources import make_output_label_map
from semseg.errors import CheckpointError, SemsegError, first_line
from semseg.evaluation.tiled import choose_layout
from semseg.nets.interfaces import Decoder, Encoder, Logits, SegmentationNetwork, choose_size_divisor
from semseg.nets.normalise import restore_values
from semseg.nets.segmenter import Segmenter

METADATA_KEY = "semseg"
PREPROCESSING_VERSION = 1  # of the arithmetic in docs/export.md that leads from a picture to its class map
INPUT_NAME, OUTPUT_NAME = "image", "logits"  # input and output of a graph
IDS_NAME = "ids"  # output of a graph that resizes pictures itself (export.preprocessing)
# Ends of the network inside such a graph: pixels (1, 3, H, W) and logits.
NETWORK_IMAGE, NETWORK_LOGITS = "network_image", "network_logits"
STANDARD_DOMAINS = ("", "ai.onnx")  # domains of the operators of ONNX itself

_log = logging.getLogger(__name__)


# ---- the description beside the graph


def build_description(saved: SavedNetwork, net: SegmentationNetwork, quantized: str = "none") -> dict[str, Any]:
    """Everything that is needed to use a graph without its checkpoint, as plain data.

    The entries `config`, `classes` and `convention` are those of a checkpoint.

    Args:
        quantized: the value of export.quantize.
    """
    ids = make_output_label_map(saved.config.data, saved.classes, saved.config.predict.format)
    entry = describe_network(
        config_to_plain(saved.config), saved.classes, net.convention, saved.origin, saved.threshold
    )
    # These keys do not apply to a graph, because onnxruntime runs it.
    entry["config"]["model"] |= {"compile": False, "channels_last": False}
    return entry | {
        "epoch": saved.epoch,
        "step": saved.step,
        "size_divisor": net.size_divisor,
        "label_stride": net.label_stride,
        "image_size": None if net.image_size is None else list(net.image_size),
        "padding": list_padding(net.convention),
        "label_ids": ids.class_ids,
        "ignored_ids": ids.ignored_ids,
        "preprocessing": describe_windows(saved, net) or picture_rule(saved, net).as_plain(),
        "quantized": quantized,
        "input": f"{INPUT_NAME}: float32 {describe_values(net.convention)}; H and W {describe_sides(net)}",
        "output": f"{OUTPUT_NAME}: float32 (N, {net.num_classes}, H / {net.label_stride}, W / {net.label_stride})",
    }


def describe_windows(saved: SavedNetwork, net: SegmentationNetwork) -> dict[str, Any] | None:
    """The entry `preprocessing` of a network at native resolution, whose images are not resized; None for others."""
    config = saved.config
    crop = choose_crop(config.data, config.augment, net.image_size)
    if config.data.resize != NATIVE or crop is None:
        return None
    window, stride = config.predict.window, config.predict.stride
    layout = choose_layout(net, crop, divisor=config.model.size_divisor, window=window, stride=stride)
    return {
        "version": PREPROCESSING_VERSION,
        "resizing": "none: windows of the image as it is, whose logits are averaged",
        "window": layout.side,
        "stride": layout.step,
        "size_divisor": layout.divisor,
        "flip": config.predict.flip,
        "normalisation": "inside the graph",
    }


def list_padding(convention: Preprocessing) -> list[float]:
    """What pixels beyond the edge of an image are for the graph: for each band the value whose normalisation is 0."""
    return restore_values(torch.zeros(1, convention.num_bands, 1, 1), convention).flatten().tolist()


def describe_values(convention: Preprocessing) -> str:
    """What an image is: its shape, bands and values."""
    if convention.takes_pictures:
        return "(N, 3, H, W), RGB, 0..255"
    values = "the values of the files, whose ranges are in convention" if convention.ranges else "0..255"
    return f"(N, {convention.num_bands}, H, W), {', '.join(convention.bands)}, {values}"


def describe_sides(net: SegmentationNetwork) -> str:
    """What the sides of an image must be."""
    if net.image_size is not None:
        return f"are {net.image_size.height} and {net.image_size.width}"
    return f"multiples of {net.size_divisor}"


class PictureRule(NamedTuple):
    """How a picture of any size leads to a class map through a network; docs/export.md states the arithmetic."""

    scales: tuple[int, ...]  # short edges, pixels
    max_long_edge: int  # pixels
    size_divisor: int  # pixels; a multiple of what the network requires
    antialias: bool  # as in Preprocessing
    flip: bool  # average with the mirrored picture

    def as_plain(self, *, in_graph: bool = False) -> dict[str, Any]:
        """The entry `preprocessing` of an exported file; `in_graph`: whether the graph resizes pictures itself."""
        return {
            "version": PREPROCESSING_VERSION,
            **self._asdict(),
            "scales": list(self.scales),
            "interpolation": "bilinear",
            "resizing": "inside the graph" if in_graph else "outside the graph",
            "normalisation": "inside the graph",
        }


def picture_rule(saved: SavedNetwork, net: SegmentationNetwork) -> PictureRule:
    """The rule of mode=predict for a network with the settings of its own configuration."""
    config = saved.config
    return PictureRule(
        tuple(config.eval.scales),
        config.data.max_long_edge,
        choose_size_divisor(net, config.model.size_divisor),
        net.convention.antialias,
        config.predict.flip,
    )


# ---- reading


def read_exported(path: Path) -> SavedNetwork:
    """Read an ONNX file of mode=export; `build_graph_network` makes a network of it.

    Of a graph that takes pictures (export.preprocessing), this is the network inside: pictures are scaled here, as for
    every other network, so that everything that needs logits works.

    Raises:
        CheckpointError: if it is missing, damaged, of another kind, or contains more than a graph and its weights.
    """
    try:
        content = path.read_bytes()
        model = onnx.load_model_from_string(content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except DecodeError:
        raise CheckpointError(f"{path}: not an ONNX file, or a damaged one. Export the network again.") from None
    if [value.name for value in model.graph.output] == [IDS_NAME]:
        model = extract_network(model)
        content = model.SerializeToString()
    problem = find_problem(model)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}. It was not run.")
    refuse_nonfinite_weights(read_weights(model, path), str(path))
    metadata = {item.key: item.value for item in model.metadata_props}
    try:
        entry = json.loads(metadata[METADATA_KEY])
        size = entry.get("image_size")
        graph = Graph(
            content,
            int(entry["size_divisor"]),
            int(entry["label_stride"]),
            None if size is None else Size(int(size[0]), int(size[1])),
        )
        saved = network_from_entry(path, entry, {}, entry["epoch"], entry["step"])
    except SemsegError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: not written by mode=export ({first_line(error)}).") from None
    if graph.label_stride < 1 or graph.size_divisor < 1 or graph.size_divisor % graph.label_stride:
        raise CheckpointError(
            f"{path}: size_divisor {graph.size_divisor} must be a multiple of label_stride {graph.label_stride}, and "
            "both at least 1. Export the network again."
        )
    return saved._replace(graph=graph)


def extract_network(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network between NETWORK_IMAGE and NETWORK_LOGITS of a graph that takes pictures, with the same description.

    Without these two, the result is empty, and `find_problem` rejects it.
    """
    needed, nodes = {NETWORK_LOGITS}, list[onnx.NodeProto]()
    for node in reversed(model.graph.node):
        if NETWORK_IMAGE not in node.output and needed.intersection(node.output):
            needed.update(node.input)
            nodes.insert(0, node)
    names = {NETWORK_IMAGE: INPUT_NAME, NETWORK_LOGITS: OUTPUT_NAME}
    network = onnx.ModelProto()
    network.CopyFrom(model)
    graph = network.graph
    graph.Clear()
    graph.name = "network"
    for node in nodes:
        copy = graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = [names.get(name, name) for name in node.input]
        copy.output[:] = [names.get(name, name) for name in node.output]
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in needed)
    if nodes and NETWORK_IMAGE in needed:
        kind = onnx.TensorProto.FLOAT
        graph.input.append(onnx.helper.make_tensor_value_info(INPUT_NAME, kind, ["N", 3, "H", "W"]))
        graph.output.append(onnx.helper.make_empty_tensor_value_info(OUTPUT_NAME))
        graph.output[0].type.tensor_type.elem_type = kind
    return network


def find_problem(model: onnx.ModelProto) -> str | None:
    """Why a graph is not run, as printable text; None if it can be run.

    Graphs inside of operators are not allowed, so that this function sees all tensors and operators.
    """
    graph = model.graph
    names = [[value.name for value in values] for values in (graph.input, graph.output)]
    if names != [[INPUT_NAME], [OUTPUT_NAME]]:
        return f"not written by mode=export (its graph must lead from {INPUT_NAME} to {OUTPUT_NAME})"
    if model.functions or graph.sparse_initializer:
        return "contains functions or sparse weights"
    tensors = list(graph.initializer)
    for node in graph.node:
        if node.domain not in STANDARD_DOMAINS:
            return f"uses operators of {node.domain[:40]!a}, not only those of ONNX"
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                return f"its operator {node.op_type[:40]!a} contains another graph"
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                return f"its operator {node.op_type[:40]!a} contains sparse weights"
            tensors += [attribute.t, *attribute.tensors]
    return "stores weights in other files" if any(map(uses_external_data, tensors)) else None


def read_weights(model: onnx.ModelProto, path: Path) -> dict[str, Tensor]:
    """The weights of a graph by name.

    Raises:
        CheckpointError: if one cannot be read.
    """
    try:
        arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path}: a damaged ONNX file ({first_line(error)}).") from None
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items() if array.dtype.kind == "f"}


# ---- running


def build_graph_network(saved: SavedNetwork, graph: Graph) -> Segmenter:
    """A network in eval mode whose encoder is the whole graph and whose decoder returns the graph's output."""
    encoder = GraphEncoder(saved.source, graph, saved.classes.num_classes, saved.convention)
    net = Segmenter(encoder, GraphDecoder(), saved.classes.num_classes).eval()
    net.image_size = graph.image_size
    return net


class GraphEncoder(Encoder):
    """Runs a graph; its only map are the logits. It cannot be trained.

    As every network it takes normalised images, so that padding is the same for all. Normalisation is a part of the
    graph, which therefore gets the values that they had.

    Args:
        source: path of the file, for messages.
        num_classes: number of classes of the logits.
        convention: the normalisation inside the graph.
    """

    def __init__(self, source: str, graph: Graph, num_classes: int, convention: Preprocessing) -> None:
        super().__init__()
        self.source = source
        self.graph = graph
        self.channels = (num_classes,)
        self.strides = (graph.label_stride,)
        self.convention = convention
        self.sessions: dict[torch.device, onnxruntime.InferenceSession] = {}
        # The device of a network is that of its parameters, so there is an empty one.
        self.device_marker = nn.Parameter(torch.empty(0), requires_grad=False)

    @property
    def size_divisor(self) -> int:
        return self.graph.size_divisor

    def forward(self, image: Tensor) -> list[Tensor]:
        """(N, bands, H, W) -> [(N, num_classes, H / label_stride, W / label_stride)] float32.

        Raises:
            CheckpointError: if onnxruntime cannot run the graph.
        """
        return [self.run_graph(restore_values(image, self.convention))]

    def run_graph(self, image: Tensor) -> Tensor:
        """The logits of an image before normalisation; see `forward`."""
        if image.device not in self.sessions:
            self.sessions[image.device] = self.open_session(image.device)
        (logits,) = self.sessions[image.device].run([OUTPUT_NAME], {INPUT_NAME: image.float().cpu().numpy()})
        return torch.from_numpy(logits).to(image.device)

    def open_session(self, device: torch.device) -> onnxruntime.InferenceSession:
        """Open the graph on a device; on the CPU if onnxruntime does not support it."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        elif device.type != "cpu":
            _log.warning("onnxruntime has no CUDA, so %s runs on the CPU. Install onnxruntime-gpu.", self.source)
        try:
            return onnxruntime.InferenceSession(self.graph.model, options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions have no public names
            raise CheckpointError(
                f"{self.source}: onnxruntime cannot run it ({first_line(error)}). Export the network again."
            ) from None


class GraphDecoder(Decoder):
    """Returns the logits that the graph computed."""

    feature_level = -1

    def forward(self, maps: Sequence[Tensor]) -> Logits:
        (logits,) = maps
        return Logits(logits, None)
