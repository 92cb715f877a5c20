"""The arithmetic from a picture to its class map, as docs/export.md states it: its program runs as it stands."""
# ruff: noqa: E402 - imports that need the extra come after the check for it

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="needs semseg[export]")

import onnx

import semseg
from helpers.command_line import TINY, TINY_ENCODERS, TINY_NETWORK
from semseg.checkpoints.format import SavedNetwork, write_ckpt
from semseg.checkpoints.network import build_network
from semseg.config.compose import CONFIG_DIR, compose_config
from semseg.config.validate import check_config
from semseg.data.sources import DataSource
from semseg.export import onnx as onnx_export
from semseg.export.onnx import Deviation, add_metadata, write_onnx
from semseg.export.onnx_runtime import read_exported
from semseg.modes import export as export_mode
from semseg.nets.registry import ENCODERS
from semseg.nets.segmenter import Segmenter

CLASS_IDS = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31]  # of the label files, by class index
MAP = [f"+data.map.{raw_id}={index}" for index, raw_id in enumerate(CLASS_IDS)]
# Height and width: odd, larger than max_long_edge, portrait, a panorama, smaller than the divisor, one that no scale
# changes.
PICTURES = [(97, 131), (333, 500), (211, 90), (40, 400), (5, 6), (64, 96)]
CONTRACT = CONFIG_DIR.parent / "docs" / "export.md"


def export(folder: Path, *overrides: str) -> None:
    """Write model.onnx by mode=export; its graph was traced before, because that takes five seconds."""

    def write(path: Path, net: Segmenter, entry: dict[str, Any]) -> Deviation:
        path.write_bytes(add_metadata(onnx.load(folder / "graph.onnx"), entry).SerializeToString())
        return Deviation(0.0, 1.0)

    words = ["mode=export", f"ckpt={folder / 'net.ckpt'}", "output=model.onnx", *overrides]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(onnx_export.EXPORT_WRITERS, "onnx", write)
        export_mode.run(check_config(compose_config(words)), words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, `net.ckpt`, of a tiny network whose random weights predict many classes."""
    folder = tmp_path_factory.mktemp("contract")
    torch.manual_seed(0)
    words = [*TINY, *TINY_NETWORK, *MAP, f"data.root={folder / 'scenes'}", "eval.scales=[64]", "data.max_long_edge=160"]
    config = check_config(compose_config(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "tiny", TINY_ENCODERS["tiny"])
        net = build_network(config.model, len(CLASS_IDS)).eval()
    center_logits(net)
    classes = DataSource(config.data).classes
    write_ckpt(folder / "net.ckpt", SavedNetwork("", net.state_dict(), config, classes, net.convention, epoch=3))
    write_onnx(folder / "graph.onnx", net, {})
    return folder


def center_logits(net: torch.nn.Module) -> None:
    """Give all classes of a network with random weights the same mean logit on noise."""
    last = [module for module in net.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    assert last.bias is not None
    with torch.no_grad():
        last.weight *= 30  # so that the softmax matters when scales are averaged
        last.bias -= net(torch.randn(4, 3, 64, 64)).main.mean((0, 2, 3))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ENCODERS, "tiny", TINY_ENCODERS["tiny"])


def draw_picture(height: int, width: int) -> NDArray[np.uint8]:
    """Noise at three scales, so that shrinking does not average it away."""
    generator = torch.Generator().manual_seed(height)
    layers = [
        F.interpolate(torch.rand(1, 3, side, side, generator=generator), (height, width), mode="bilinear")
        for side in (3, 12, 64)
    ]
    return (torch.stack(layers).mean(0)[0].permute(1, 2, 0) * 255).byte().numpy()


def run_program(picture: NDArray[np.uint8], name: str = "photo.jpg") -> NDArray[np.uint8]:
    """The class map that the program of the page writes for photo.jpg, with model.onnx in the current folder."""
    Image.fromarray(picture).save(name, format="PNG")  # without loss
    (code,) = re.findall(r"```python\n(.*?)```", CONTRACT.read_text(), re.DOTALL)
    exec(code, {})
    return np.asarray(Image.open("ids.png"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["predict.scales=[64]"],
        ["predict.scales=[40,64,90]"],
        ["predict.scales=[48]", "predict.flip=true"],
        ["predict.scales=[64]", "data.max_long_edge=70"],
    ],
    ids=" ".join,
)
def test_the_program_of_the_page_gives_the_class_map_of_prediction(settings: list[str], folder: Path) -> None:
    export(folder, *settings)
    exported, original = (semseg.load(path, *settings, device="cpu") for path in ("model.onnx", folder / "net.ckpt"))
    num_pixels, num_different, ids = 0, 0, set[int]()
    for size in PICTURES:
        picture = draw_picture(*size)
        found = run_program(picture)
        assert np.array_equal(found, exported.predict(picture).label_ids), size
        num_different += int((found != original.predict(picture).label_ids).sum())
        num_pixels += found.size
        ids |= set(found.ravel().tolist())
    assert num_different <= num_pixels / 10_000  # where two classes are equally probable up to rounding
    assert len(ids) > 4 and ids <= set(CLASS_IDS)


@pytest.mark.slow
def test_the_scales_of_the_command_line_are_those_of_the_file(folder: Path) -> None:
    settings = ["predict.scales=[40,64]", "predict.flip=true", "data.max_long_edge=90", "eval.window=64"]
    export(folder, *settings)
    (item,) = onnx.load("model.onnx").metadata_props
    assert json.loads(item.value)["preprocessing"] == {
        "version": 1, "scales": [40, 64], "max_long_edge": 90, "size_divisor": 8, "interpolation": "bilinear",
        "antialias": True, "flip": True, "normalisation": "inside the graph",
    }  # fmt: skip
    config = read_exported(Path("model.onnx")).config
    assert (config.eval.scales, config.eval.window, config.data.max_long_edge) == ([40, 64], 64, 90)


@pytest.mark.slow
def test_a_file_of_an_earlier_version_loads(folder: Path) -> None:
    export(folder)
    model = onnx.load("model.onnx")
    (item,) = model.metadata_props
    entry = json.loads(item.value)
    del entry["preprocessing"]
    item.value = json.dumps(entry)
    onnx.save(model, "earlier.onnx")
    picture = draw_picture(97, 131)
    found, expected = (semseg.load(name, device="cpu").predict(picture).ids for name in ("earlier.onnx", "model.onnx"))
    assert np.array_equal(found, expected)
