"""Export a network to a file for other programs, and compare the file with the network. Needs semseg[export].

An exported network takes pixels and gives logits at their own resolution: normalisation is inside the graph, upsampling
and softmax are not, so that windows, scales and mirrored images work as with any network.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from semseg.checkpoints.format import Graph
from semseg.config.preprocessing import Preprocessing
from semseg.data.geometry import Size
from semseg.errors import ExportError, one_line
from semseg.export.onnx_runtime import INPUT_NAME, METADATA_KEY, OUTPUT_NAME, GraphEncoder
from semseg.nets.blocks import grid_means
from semseg.nets.interfaces import SegmentationNetwork
from semseg.nets.normalise import normalise

# Sides of the traced image in multiples of size_divisor. They differ from each other and from the grids of pyramid
# pooling, so that the exporter cannot confuse them.
TRACED_SIZE = Size(7, 9)
# (images, height, width) of the images for the comparison: the smallest map, both orientations, maps of the size of
# pyramid pooling's grids.
ONNX_SIZES = ((1, 1, 1), (1, 2, 3), (2, 6, 6), (3, 4, 1), (1, 11, 8))
TORCH_EXPORT_SIZES = ((1, 2, 2), (1, 2, 3), (2, 6, 6), (3, 4, 2), (1, 11, 8))  # with maps of at least 2 x 2
TOLERANCE = 1e-4  # fraction of the largest logit; sums in another order differ by a hundredth of that


class Deviation(NamedTuple):
    """The difference between an exported file and its network."""

    largest: float  # largest difference of two logits
    scale: float  # largest logit


class PixelNetwork(nn.Module):
    """RGB pixels 0..255 (N, 3, H, W), or the values of bands (N, C, H, W), float32 -> main logits."""

    def __init__(self, net: SegmentationNetwork) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net(normalise(image, self.net.convention)).main


def write_onnx(path: Path, net: SegmentationNetwork, entry: dict[str, Any]) -> Deviation:
    """Write `net` as ONNX, with `entry` as JSON under METADATA_KEY, and compare the file with the network.

    Args:
        net: on the CPU, in eval mode.

    Raises:
        ExportError: if the network cannot be expressed in ONNX with dynamic sizes, or the file gives other numbers.
    """
    refuse_unexportable(net)
    image, dynamic_shapes = build_example(net)
    with silence_exporters(), raise_export_errors("ONNX"), net.as_graph(), pool_by_products():
        program = torch.onnx.export(
            PixelNetwork(net).eval(),
            (image,),
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            verbose=False,
        )
    assert program is not None
    path.write_bytes(add_metadata(program.model_proto, entry).SerializeToString())
    return compare_with_network(net, load_onnx(path, net), ONNX_SIZES)


def load_onnx(path: Path, net: SegmentationNetwork) -> Callable[[Tensor], Tensor]:
    """The ONNX file of `net` as a function of pixels."""
    graph = Graph(path.read_bytes(), net.size_divisor, net.label_stride, net.image_size)
    encoder = GraphEncoder(str(path), graph, net.num_classes, net.convention)
    return encoder.run_graph


def add_metadata(model: onnx.ModelProto, entry: dict[str, Any]) -> onnx.ModelProto:
    """Add `entry` to the metadata of `model`, name its dynamic sizes, and remove traces of this machine."""
    for node in model.graph.node:
        node.ClearField("metadata_props")  # source lines, with the paths of their files
        node.ClearField("doc_string")
    for value, height, width in ((model.graph.input[0], "H", "W"), (model.graph.output[0], "h", "w")):
        shape = value.type.tensor_type.shape
        for dimension, name in ((0, "N"), (2, height), (3, width)):
            if not shape.dim[dimension].dim_value:  # a network of one size has fixed ones
                shape.dim[dimension].dim_param = name
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(entry)})
    return model


def write_torch_export(path: Path, net: SegmentationNetwork, entry: dict[str, Any]) -> Deviation:
    """Write `net` for torch.export.load, with `entry` as the extra file METADATA_KEY.json; see `write_onnx`."""
    refuse_unexportable(net)
    image, dynamic_shapes = build_example(net)
    with silence_exporters(), raise_export_errors("torch.export"), net.as_graph(), pool_by_products():
        program = torch.export.export(PixelNetwork(net).eval(), (image,), dynamic_shapes=dynamic_shapes)
        remove_stack_traces(program)
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files={f"{METADATA_KEY}.json": json.dumps(entry)})
        with path.open("rb") as file:
            module = torch.export.load(file).module()  # our own file; a file of unknown origin could run code
    return compare_with_network(net, module, TORCH_EXPORT_SIZES)


def remove_stack_traces(program: ExportedProgram) -> None:
    """Remove the source lines of a program, with the paths of their files."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)


EXPORT_WRITERS = {"onnx": write_onnx, "torch_export": write_torch_export}


def refuse_unexportable(net: SegmentationNetwork) -> None:
    """Fail early for a network that is known not to pass.

    Raises:
        ExportError: with the reason.
    """
    if net.export_problem:
        raise ExportError(net.export_problem)


def build_example(net: SegmentationNetwork) -> tuple[Tensor, tuple[dict[int, Any], ...]]:
    """An image to trace, and its dynamic sizes: N, and unless the network takes one size, multiples of size_divisor."""
    divisor = net.size_divisor
    if net.image_size is not None:
        return torch.zeros(2, net.convention.num_bands, *net.image_size), ({0: Dim("N")},)
    image = torch.zeros(2, net.convention.num_bands, divisor * TRACED_SIZE.height, divisor * TRACED_SIZE.width)
    return image, ({0: Dim("N"), 2: divisor * Dim("H"), 3: divisor * Dim("W")},)


@torch.no_grad()
def compare_with_network(
    net: SegmentationNetwork, exported: Callable[[Tensor], Tensor], sizes: tuple[tuple[int, int, int], ...]
) -> Deviation:
    """Compare an exported network with the original on random images.

    Args:
        exported: RGB pixels (N, 3, H, W) -> logits.
        sizes: (N, H, W) of the images, H and W in multiples of size_divisor.

    Raises:
        ExportError: if a difference exceeds TOLERANCE times the largest logit, or the shapes differ.
    """
    reference, generator = PixelNetwork(net), torch.Generator().manual_seed(0)
    largest, scale = 0.0, 0.0
    for count, height, width in sizes:
        size = (
            count,
            net.convention.num_bands,
            *(net.image_size or (net.size_divisor * height, net.size_divisor * width)),
        )
        image = spread_values(torch.randint(0, 256, size, generator=generator).float(), net.convention)
        expected = reference(image)
        with raise_export_errors(f"a file with the same results at {tuple(size)}"):
            output = exported(image)
        difference = (output - expected).abs().max().item() if output.shape == expected.shape else float("inf")
        bound = expected.abs().max().item()
        if not difference <= TOLERANCE * bound:
            raise ExportError(
                f"the exported network differs from the original by {difference:.2g} at {tuple(size)}, where the "
                f"largest logit is {bound:.2g}. No file was written."
            )
        largest, scale = max(largest, difference), max(scale, bound)
    return Deviation(largest, scale)


def spread_values(image: Tensor, convention: Preprocessing) -> Tensor:
    """Numbers from 0 to 255 (N, C, H, W) as values in the ranges of the bands."""
    if not convention.ranges:
        return image
    low, high = (torch.tensor(ends).view(1, -1, 1, 1) for ends in zip(*convention.ranges, strict=True))
    return low + (high - low) * image / 255


@contextmanager
def raise_export_errors(goal: str) -> Iterator[None]:
    """Turn the exceptions of an exporter into messages of one line.

    Raises:
        ExportError: in place of any other exception.
    """
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        # torch.onnx wraps the cause in a page of advice.
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ExportError(f"this network cannot be exported to {goal}: {one_line(cause)}.") from error


@contextmanager
def pool_by_products() -> Iterator[None]:
    """While a network is traced, pooling to a fixed grid is two products of matrices, which any size of image has.

    Exporters write adaptive pooling for the traced size: the file computes other numbers at other sizes, or fails.
    """
    pool: Any = F.adaptive_avg_pool2d

    def pool_to_grid(features: Tensor, output_size: Any) -> Tensor:
        height, width = output_size if isinstance(output_size, list | tuple) else (output_size, output_size)
        if height != width or height in (1, None):  # a mean, which exporters write for every size
            return pool(features, output_size)
        return grid_means(features, height)

    with mock.patch.object(F, "adaptive_avg_pool2d", pool_to_grid):
        yield


@contextmanager
def silence_exporters() -> Iterator[None]:
    """Suppress log messages and warnings of the exporters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
