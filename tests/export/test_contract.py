"""The arithmetic from a picture to its class map, as docs/export.md states it: its programs run as they stand."""
# ruff: noqa: E402 - imports that need the extra come after the check for it

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="needs semseg[export]")

import onnx

import semseg
from helpers.exported import CLASS_IDS, PICTURE_SIZES, draw_picture, export
from semseg.checkpoints.format import read_checkpoint, write_ckpt
from semseg.config.compose import CONFIG_DIR
from semseg.export.onnx_runtime import read_exported

PAGE = CONFIG_DIR.parent / "docs" / "export.md"

pytestmark = pytest.mark.usefixtures("tiny_encoder")


def run_program(picture: NDArray[np.uint8], position: int = 1, *changes: tuple[str, str]) -> NDArray[np.uint8]:
    """The class map that a program of the page writes for photo.jpg, with model.onnx in the current folder.

    Args:
        position: of the program on the page.
        changes: pieces of the program and their replacements.
    """
    Image.fromarray(picture).save("photo.jpg", format="PNG")  # without loss
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[position]
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    exec(code, {})
    return np.asarray(Image.open("ids.png"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["predict.scales=[64]"], marks=pytest.mark.long),
        ["predict.scales=[40,64,90]"],
        pytest.param(["predict.scales=[48]", "predict.flip=true"], marks=pytest.mark.long),
        pytest.param(["predict.scales=[64]", "data.max_long_edge=70"], marks=pytest.mark.long),
    ],
    ids=" ".join,
)
def test_the_program_of_the_page_gives_the_class_map_of_prediction(settings: list[str], tiny_checkpoint: Path) -> None:
    export(tiny_checkpoint, *settings)
    exported, original = (
        semseg.load(path, *settings, device="cpu") for path in ("model.onnx", tiny_checkpoint / "net.ckpt")
    )
    num_pixels, num_different, ids = 0, 0, set[int]()
    for size in PICTURE_SIZES:
        picture = draw_picture(*size)
        found = run_program(picture)
        assert np.array_equal(found, exported.predict(picture).label_ids), size
        num_different += int((found != original.predict(picture).label_ids).sum())
        num_pixels += found.size
        ids |= set(found.ravel().tolist())
    assert num_different <= num_pixels / 10_000  # where two classes are equally probable up to rounding
    assert len(ids) > 4 and ids <= set(CLASS_IDS)


@pytest.mark.slow
def test_without_antialiasing_the_program_resizes_with_opencv_as_the_page_says(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    saved = read_checkpoint(tiny_checkpoint / "net.ckpt")
    write_ckpt(tmp_path / "net.ckpt", saved._replace(convention=saved.convention._replace(antialias=False)))
    shutil.copy(tiny_checkpoint / "graph.onnx", tmp_path)
    export(tmp_path, "predict.scales=[40,90]")
    predictor = semseg.load("model.onnx", device="cpu")
    assert "`cv2.resize(photo, (columns, rows))`" in PAGE.read_text()
    line = "resize(resize(photo.swapaxes(0, 1), columns).swapaxes(0, 1), rows)"
    changes = (("import json", "import json\nimport cv2"), (line, "cv2.resize(photo, (columns, rows))"))
    for size in PICTURE_SIZES:
        picture = draw_picture(*size)
        assert np.array_equal(run_program(picture, 1, *changes), predictor.predict(picture).label_ids), size


@pytest.mark.slow
def test_the_program_for_a_graph_that_takes_photos_runs(tiny_checkpoint: Path) -> None:
    picture = draw_picture(97, 131)
    export(tiny_checkpoint, "predict.scales=[40,64]")
    expected = run_program(picture)
    export(tiny_checkpoint, "predict.scales=[40,64]", "export.preprocessing=true")
    assert np.array_equal(run_program(picture, position=0), expected)


@pytest.mark.slow
def test_the_scales_of_the_command_line_are_those_of_the_file(tiny_checkpoint: Path) -> None:
    settings = ["predict.scales=[40,64]", "predict.flip=true", "data.max_long_edge=90", "eval.window=64"]
    export(tiny_checkpoint, *settings)
    (item,) = onnx.load("model.onnx").metadata_props
    assert json.loads(item.value)["preprocessing"] == {
        "version": 1, "scales": [40, 64], "max_long_edge": 90, "size_divisor": 8, "interpolation": "bilinear",
        "antialias": True, "flip": True, "resizing": "outside the graph", "normalisation": "inside the graph",
    }  # fmt: skip
    config = read_exported(Path("model.onnx")).config
    assert (config.eval.scales, config.eval.window, config.data.max_long_edge) == ([40, 64], 64, 90)


@pytest.mark.slow
def test_a_file_of_an_earlier_version_loads(tiny_checkpoint: Path) -> None:
    export(tiny_checkpoint)
    model = onnx.load("model.onnx")
    (item,) = model.metadata_props
    entry = json.loads(item.value)
    del entry["preprocessing"]
    item.value = json.dumps(entry)
    onnx.save(model, "earlier.onnx")
    picture = draw_picture(97, 131)
    found, expected = (semseg.load(name, device="cpu").predict(picture).ids for name in ("earlier.onnx", "model.onnx"))
    assert np.array_equal(found, expected)
