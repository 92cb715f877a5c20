"""A network as a file for other programs: written, and checked against the network at once. Needs semseg[export].

What goes in are pixels, what comes out are logits at their own resolution: normalisation is inside the graph,
upsampling and softmax are not, so that windows, scales and mirror images work with an exported network as with any.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from semseg.checkpoints.format import Graph, first_line
from semseg.data.geometry import Size
from semseg.errors import ExportError
from semseg.export.onnx_runtime import IMAGE, LOGITS, METADATA_KEY, PIXELS, GraphEncoder
from semseg.nets.normalise import normalise
from semseg.nets.segmenter import Segmenter

# How many times size_divisor the sides of an image are. Unlike each other and the grids of pyramid pooling, so that the
# exporter cannot take one for another.
TRACED = Size(7, 9)
# (images, height, width): the smallest map, both orientations, maps of the size of pyramid pooling's grids.
ONNX_SIZES = ((1, 1, 1), (1, 2, 3), (2, 6, 6), (3, 4, 1), (1, 11, 8))
TORCH_EXPORT_SIZES = ((1, 2, 2), (1, 2, 3), (2, 6, 6), (3, 4, 2), (1, 11, 8))  # its maps have two places at least
TOLERANCE = 1e-4  # of the largest logit; sums in another order differ by a hundredth of that


class Deviation(NamedTuple):
    """How far an exported file is from its network."""

    largest: float  # difference of two logits
    scale: float  # the largest logit


class PixelNetwork(nn.Module):
    """RGB pixels 0..255 (N, 3, H, W) float32 -> main logits."""

    def __init__(self, net: Segmenter) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        pixels = image.clone()  # normalise works in place on what is float already
        return self.net(normalise(pixels, self.net.convention)).main


def write_onnx(path: Path, net: Segmenter, entry: dict[str, Any]) -> Deviation:
    """Write `net` as ONNX, with `entry` as JSON under METADATA_KEY, and compare the file with it.

    Args:
        net: on the CPU, in eval mode.

    Raises:
        ExportError: if it cannot be expressed in ONNX with open sizes, or gives other numbers there.
    """
    image, dynamic_shapes = example(net)
    with quiet(), explained("ONNX"):
        program = torch.onnx.export(
            PixelNetwork(net).eval(),
            (image,),
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            input_names=[IMAGE],
            output_names=[LOGITS],
            verbose=False,
        )
    assert program is not None
    path.write_bytes(labelled(program.model_proto, entry).SerializeToString())
    return deviation(net, run_onnx(path, net), ONNX_SIZES)


def run_onnx(path: Path, net: Segmenter) -> Callable[[Tensor], Tensor]:
    """The ONNX file of `net` as a function of pixels."""
    graph = Graph(path.read_bytes(), net.size_divisor, net.label_stride)
    encoder = GraphEncoder(str(path), graph, net.num_classes, PIXELS)
    return lambda image: encoder(image)[0]


def labelled(model: onnx.ModelProto, entry: dict[str, Any]) -> onnx.ModelProto:
    """`model` with `entry` in its metadata, names for its sizes, and nothing about the machine it was made on."""
    for node in model.graph.node:
        node.ClearField("metadata_props")  # the lines of code it came from, with their folders
        node.ClearField("doc_string")
    for value, height, width in ((model.graph.input[0], "H", "W"), (model.graph.output[0], "h", "w")):
        shape = value.type.tensor_type.shape
        for dimension, name in ((0, "N"), (2, height), (3, width)):
            shape.dim[dimension].dim_param = name
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(entry)})
    return model


def write_torch_export(path: Path, net: Segmenter, entry: dict[str, Any]) -> Deviation:
    """Write `net` for torch.export.load, with `entry` as the extra file METADATA_KEY.json; see `write_onnx`."""
    image, dynamic_shapes = example(net)
    with quiet(), explained("torch.export"):
        program = torch.export.export(PixelNetwork(net).eval(), (image,), dynamic_shapes=dynamic_shapes)
        forget_origin(program)
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files={f"{METADATA_KEY}.json": json.dumps(entry)})
        with path.open("rb") as file:
            module = torch.export.load(file).module()  # our own file; one of a stranger's could run code
    return deviation(net, module, TORCH_EXPORT_SIZES)


def forget_origin(program: ExportedProgram) -> None:
    """Drop from a program the lines of code that it came from, with their folders."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)


WRITERS = {"onnx": write_onnx, "torch_export": write_torch_export}


def example(net: Segmenter) -> tuple[Tensor, tuple[dict[int, Any], ...]]:
    """An image to trace, and which of its sizes stay open: N, and multiples of size_divisor for H and W."""
    divisor = net.size_divisor
    image = torch.zeros(2, 3, divisor * TRACED.height, divisor * TRACED.width)
    return image, ({0: Dim("N"), 2: divisor * Dim("H"), 3: divisor * Dim("W")},)


@torch.no_grad()
def deviation(
    net: Segmenter, exported: Callable[[Tensor], Tensor], sizes: tuple[tuple[int, int, int], ...]
) -> Deviation:
    """The largest difference of two networks on noise.

    Args:
        exported: RGB pixels (N, 3, H, W) -> logits.
        sizes: (N, H, W) of the images, H and W in multiples of size_divisor.

    Raises:
        ExportError: if it is more than TOLERANCE of the largest logit, or the shapes differ.
    """
    reference, generator = PixelNetwork(net), torch.Generator().manual_seed(0)
    largest, scale = 0.0, 0.0
    for count, height, width in sizes:
        size = (count, 3, net.size_divisor * height, net.size_divisor * width)
        image = torch.randint(0, 256, size, generator=generator).float()
        expected = reference(image)
        with explained(f"a file of the right numbers at {tuple(size)}"):
            found = exported(image)
        difference = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
        bound = expected.abs().max().item()
        if not difference <= TOLERANCE * bound:
            raise ExportError(
                f"the exported network differs from the original by {difference:.2g} at {tuple(size)}, where the "
                f"largest logit is {bound:.2g}. Nothing was written."
            )
        largest, scale = max(largest, difference), max(scale, bound)
    return Deviation(largest, scale)


@contextmanager
def explained(goal: str) -> Iterator[None]:
    """What an exporter throws, in one line.

    Raises:
        ExportError: instead of any other exception.
    """
    try:
        yield
    except Exception as error:
        # torch.onnx wraps what went wrong in a page of advice.
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ExportError(f"this network cannot be exported to {goal}: {first_line(cause)}.") from error


@contextmanager
def quiet() -> Iterator[None]:
    """The exporters' remarks on their own workings are left out."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
