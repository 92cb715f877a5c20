"""Networks as ONNX files: what we write into one beside its graph, and how it is read and run. Needs semseg[export].

A file is data from anywhere. It is read once; what is read is checked, and those bytes are run, by onnxruntime, which
knows the operators of ONNX and no others here. Nothing in a file can name code, and it can name no other file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    first_line,
    network_from_entry,
    refuse_nonfinite_weights,
)
from semseg.config.preprocessing import Preprocessing
from semseg.data.sources import make_label_map
from semseg.errors import CheckpointError, SemsegError
from semseg.nets.interfaces import Decoder, Encoder, Logits
from semseg.nets.segmenter import Segmenter

METADATA_KEY = "semseg"
IMAGE, LOGITS = "image", "logits"  # the input and the output of a graph
STANDARD_DOMAINS = ("", "ai.onnx")  # of operators
# What a graph takes: pixels as they are. Normalisation is inside.
PIXELS = Preprocessing("rgb", 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), antialias=True)

log = logging.getLogger(__name__)


# ---- what is written beside the graph


def description(saved: SavedNetwork, net: Segmenter, quantized: str = "none") -> dict[str, Any]:
    """All that is needed to use a graph without its checkpoint, as plain data.

    The entries `config`, `classes` and `convention` are those of a checkpoint.

    Args:
        quantized: as export.quantize has it.
    """
    ids = make_label_map(saved.config.data, saved.classes)
    entry = describe_network(saved.config, saved.classes, net.convention)
    # How a network is run does not belong to a graph: onnxruntime sees to it.
    entry["config"]["model"] |= {"compile": False, "channels_last": False}
    return entry | {
        "epoch": saved.epoch,
        "step": saved.step,
        "size_divisor": net.size_divisor,
        "label_stride": net.label_stride,
        "label_ids": ids.class_ids,
        "ignored_ids": ids.ignored_ids,
        "quantized": quantized,
        "input": f"{IMAGE}: float32 (N, 3, H, W), RGB, 0..255; H and W multiples of {net.size_divisor}",
        "output": f"{LOGITS}: float32 (N, {net.num_classes}, H / {net.label_stride}, W / {net.label_stride})",
    }


# ---- reading


def read_exported(path: Path) -> SavedNetwork:
    """The network of an ONNX file that mode=export has written, for `graph_network`.

    Raises:
        CheckpointError: if it is missing, damaged, another kind of file, or holds more than a graph and its weights.
    """
    try:
        content = path.read_bytes()
        model = onnx.load_model_from_string(content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except DecodeError:
        raise CheckpointError(f"{path}: a damaged ONNX file, or none.") from None
    problem = problem_of(model)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}. It was not run.")
    refuse_nonfinite_weights(constants_of(model, path), str(path))
    metadata = {item.key: item.value for item in model.metadata_props}
    try:
        entry = json.loads(metadata[METADATA_KEY])
        graph = Graph(content, int(entry["size_divisor"]), int(entry["label_stride"]))
        saved = network_from_entry(path, entry, {}, entry["epoch"], entry["step"])
    except SemsegError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a network that mode=export has written ({first_line(error)}).") from None
    if graph.label_stride < 1 or graph.size_divisor < 1 or graph.size_divisor % graph.label_stride:
        raise CheckpointError(f"{path}: strides {graph.size_divisor} and {graph.label_stride} do not go together.")
    return saved._replace(graph=graph, convention=PIXELS._replace(antialias=saved.convention.antialias))


def problem_of(model: onnx.ModelProto) -> str | None:
    """What keeps a graph from being run here, in words that may be printed; None if nothing does.

    Graphs inside of operators are not allowed, so that all tensors and operators are in plain sight.
    """
    graph = model.graph
    if [value.name for value in graph.input] != [IMAGE] or [value.name for value in graph.output] != [LOGITS]:
        return f"not a network that mode=export has written (its graph must lead from {IMAGE} to {LOGITS})"
    if model.functions or graph.sparse_initializer:
        return "holds functions of its own or sparse weights"
    tensors = list(graph.initializer)
    for node in graph.node:
        if node.domain not in STANDARD_DOMAINS:
            return f"uses {node.domain[:40]!a}, which are not operators of ONNX"
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                return f"its operator {node.op_type[:40]!a} holds another graph"
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                return f"its operator {node.op_type[:40]!a} holds sparse weights"
            tensors += [attribute.t, *attribute.tensors]
    return "keeps weights in other files" if any(map(uses_external_data, tensors)) else None


def constants_of(model: onnx.ModelProto, path: Path) -> dict[str, Tensor]:
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


def graph_network(saved: SavedNetwork, graph: Graph) -> Segmenter:
    """A network whose encoder is the whole graph and whose decoder hands on what comes out; in eval mode."""
    encoder = GraphEncoder(saved.source, graph, saved.classes.num_classes, saved.convention)
    return Segmenter(encoder, HandOn(), saved.classes.num_classes).eval()


class GraphEncoder(Encoder):
    """Gives one map, the logits; it cannot be trained.

    Args:
        source: the file it is from, for messages.
        num_classes: of the logits.
        convention: PIXELS, for normalisation is a part of the graph.
    """

    def __init__(self, source: str, graph: Graph, num_classes: int, convention: Preprocessing) -> None:
        super().__init__()
        self.source = source
        self.graph = graph
        self.channels = (num_classes,)
        self.strides = (graph.label_stride,)
        self.convention = convention
        self.sessions: dict[torch.device, onnxruntime.InferenceSession] = {}
        # Where images go is told by where the weights are; these are none, but they can be moved like any.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    @property
    def size_divisor(self) -> int:
        return self.graph.size_divisor

    def forward(self, image: Tensor) -> list[Tensor]:
        """(N, 3, H, W) RGB 0..255 -> [(N, num_classes, H / label_stride, W / label_stride)] float32.

        Raises:
            CheckpointError: if onnxruntime cannot make anything of the graph.
        """
        if image.device not in self.sessions:
            self.sessions[image.device] = self.session(image.device)
        (logits,) = self.sessions[image.device].run([LOGITS], {IMAGE: image.float().cpu().numpy()})
        return [torch.from_numpy(logits).to(image.device)]

    def session(self, device: torch.device) -> onnxruntime.InferenceSession:
        """The graph, ready to run on a device; on the CPU if onnxruntime does not know it."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        elif device.type != "cpu":
            log.warning("onnxruntime has no CUDA here, so %s runs on the CPU (pip: onnxruntime-gpu).", self.source)
        try:
            return onnxruntime.InferenceSession(self.graph.model, options, providers=providers)
        except Exception as error:  # its classes have no public name
            raise CheckpointError(f"{self.source}: onnxruntime cannot run it ({first_line(error)}).") from None


class HandOn(Decoder):
    """The logits that a graph has made."""

    feature_level = -1

    def forward(self, maps: Sequence[Tensor]) -> Logits:
        (logits,) = maps
        return Logits(logits, None)
