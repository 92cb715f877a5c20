"""Networks at native resolution in files for other programs: windows in place of short edges. Needs semseg[export]."""
# ruff: noqa: E402 - imports that need the extra come after the check for it

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="needs semseg[export]")

import onnx
from PIL import Image

from helpers.command_line import run_here
from helpers.rasters import NATIVE_BANDS, draw_rasters
from semseg.evaluation.tiled import WindowLayout
from semseg.export.onnx_runtime import METADATA_KEY
from semseg.export.quantize import sample_windows


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `run` of a network of four bands at native resolution, and its data."""
    folder = tmp_path_factory.mktemp("native")
    draw_rasters(folder)
    run_here(folder, *NATIVE_BANDS, "data.root=.", "run_dir=run")
    return folder


@pytest.mark.slow
@pytest.mark.long
def test_static_quantisation_sees_windows_and_is_scored_as_in_evaluation(trained: Path) -> None:
    output = run_here(
        trained, "mode=export", "ckpt=run", "output=int8.onnx", "export.quantize=static", "export.calibration_images=2"
    )
    run_here(trained, "mode=eval", "ckpt=run", "run_dir=eval", "trainer=cpu")
    mean_iou = json.loads((trained / "eval" / "metrics.json").read_text())["mean_iou"]
    assert f"float32  mean IoU {100 * mean_iou:.2f} %" in output
    quantised = re.search(r"int8     mean IoU ([\d.]+) %", output)
    assert quantised is not None and abs(float(quantised[1]) - 100 * mean_iou) < 5
    entry = json.loads({item.key: item.value for item in onnx.load(trained / "int8.onnx").metadata_props}[METADATA_KEY])
    assert entry["preprocessing"] == {
        "version": 1, "resizing": "none: windows of the image as it is, whose logits are averaged", "window": 48,
        "stride": 32, "size_divisor": 8, "flip": False, "normalisation": "inside the graph",
    }  # fmt: skip
    run_here(trained, "mode=predict", "ckpt=int8.onnx", "input=images/0.tif", "run_dir=predicted", "predict.save=[ids]")
    with Image.open(trained / "predicted" / "0_ids.png") as ids:
        assert ids.size == (110, 70)


@pytest.mark.slow
@pytest.mark.long
def test_preprocessing_in_the_file_is_refused(trained: Path) -> None:
    words = [word for word in NATIVE_BANDS if not word.startswith(("data.bands", "data.value_range"))]
    (trained / "photographs").mkdir()
    (trained / "labels").mkdir()
    for number in range(3):
        Image.fromarray(np.full((60, 70, 3), 40 * number, np.uint8)).save(trained / "photographs" / f"{number}.png")
        Image.fromarray(np.full((60, 70), number % 2, np.uint8)).save(trained / "labels" / f"{number}.png")
    data = ["data.root=.", "data.train.images=photographs", "data.train.masks=labels", "data.val.images=photographs",
            "data.val.masks=labels"]  # fmt: skip
    run_here(trained, *words, *data, "run_dir=rgb")
    output = run_here(trained, "mode=export", "ckpt=rgb", "output=net.onnx", "export.preprocessing=true", code=1)
    assert "export.preprocessing=true: the graph would bring pictures to a short edge, this network takes" in output
    assert output.count("error:") == 1 and not (trained / "net.onnx").exists()


def test_calibration_windows_have_sides_that_the_network_takes() -> None:
    layout = WindowLayout(64, 32, 16)
    image = torch.arange(100 * 90 * 2, dtype=torch.int32).view(2, 100, 90)
    windows = sample_windows(image, layout)
    assert [tuple(window.shape) for window in windows] == [(2, 64, 64)] * 4
    assert torch.equal(windows[3], image[:, 36:, 26:])
    (small,) = sample_windows(image[:, :40, :50], layout)
    assert small.shape == (2, 48, 64) and torch.equal(small[:, :40, :50], image[:, :40, :50])
    assert torch.equal(small[:, 45, :50], image[:, 39, :50]) and torch.equal(small[:, :40, 60], image[:, :40, 49])
