"""A tiny network with random weights that predicts many classes, its export, and pictures for it. Imports no pytest."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from helpers.command_line import TINY, TINY_ENCODERS, TINY_NETWORK
from helpers.in_process import configured
from semseg.checkpoints.format import SavedNetwork, write_ckpt
from semseg.checkpoints.network import build_network
from semseg.data.sources import DataSource
from semseg.export import onnx as onnx_export
from semseg.export.onnx import Deviation, add_metadata, write_onnx
from semseg.modes import export as export_mode
from semseg.nets.registry import ENCODERS
from semseg.nets.segmenter import Segmenter

CLASS_IDS = [7, 2, 9, 4, 11, 6, 1, 8, 3, 10, 5]  # in the label files, by class index
# Height and width: odd, larger than max_long_edge, portrait, a panorama, smaller than the divisor, one that a scale
# does not change, and single pixels and lines, where resizing conventions differ.
PICTURE_SIZES = [(97, 131), (333, 500), (211, 90), (40, 400), (5, 6), (64, 96), (1, 1), (70, 1), (1, 70), (1, 3)]


def write_checkpoint(folder: Path, *words: str) -> None:
    """Write `net.ckpt`, and `graph.onnx`, from which `export` makes exported files quickly."""
    torch.manual_seed(0)
    ids = [f"+data.map.{raw_id}={index}" for index, raw_id in enumerate(CLASS_IDS)]
    words = (*TINY, *TINY_NETWORK, *ids, f"data.root={folder / 'scenes'}", "data.max_long_edge=160", *words)
    config = configured(*words)
    with patch.dict(ENCODERS, TINY_ENCODERS):
        net = build_network(config.model, len(CLASS_IDS)).eval()
    center_logits(net)
    classes = DataSource(config.data).classes
    write_ckpt(folder / "net.ckpt", SavedNetwork("", net.state_dict(), config, classes, net.convention, epoch=3))
    write_onnx(folder / "graph.onnx", net, {})


def center_logits(net: Segmenter) -> None:
    """Give all classes of a network with random weights the same mean logit on noise."""
    last = [module for module in net.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    assert last.bias is not None
    with torch.no_grad():
        last.weight *= 30  # so that the softmax matters when scales are averaged
        last.bias -= net(torch.randn(4, 3, 64, 64)).main.mean((0, 2, 3))


def export(folder: Path, *overrides: str) -> None:
    """Write model.onnx by mode=export, from the files of `write_checkpoint`; tracing the network takes five seconds."""

    def write(path: Path, net: Segmenter, entry: dict[str, Any]) -> Deviation:
        path.write_bytes(add_metadata(onnx.load(folder / "graph.onnx"), entry).SerializeToString())
        return Deviation(0.0, 1.0)

    words = ["mode=export", f"ckpt={folder / 'net.ckpt'}", "output=model.onnx", *overrides]
    with patch.dict(ENCODERS, TINY_ENCODERS), patch.dict(onnx_export.EXPORT_WRITERS, {"onnx": write}):
        export_mode.run(configured(*words), words)


def draw_picture(height: int, width: int) -> NDArray[np.uint8]:
    """Noise at three scales, so that shrinking does not average it away: (height, width, 3)."""
    generator = torch.Generator().manual_seed(height)
    layers = [
        F.interpolate(torch.rand(1, 3, side, side, generator=generator), (height, width), mode="bilinear")
        for side in (3, 12, 64)
    ]
    return (torch.stack(layers).mean(0)[0].permute(1, 2, 0) * 255).byte().contiguous().numpy()
