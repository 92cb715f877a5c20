"""Networks at native resolution in files for other programs: windows in place of short edges. Needs semseg[export]."""
# ruff: noqa: E402 - imports that need the extra come after the check for it

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="needs semseg[export]")

import onnx
from PIL import Image

import semseg
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


def read_description(path: Path) -> dict[str, Any]:
    """What an exported file says about its network."""
    return json.loads({item.key: item.value for item in onnx.load(path).metadata_props}[METADATA_KEY])


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
    entry = read_description(trained / "int8.onnx")
    assert entry["preprocessing"] == {
        "version": 1, "resizing": "none: windows of the image as it is, whose logits are averaged", "window": 48,
        "stride": 32, "size_divisor": 8, "flip": False, "normalisation": "inside the graph",
    }  # fmt: skip
    run_here(trained, "mode=predict", "ckpt=int8.onnx", "input=images/0.tif", "run_dir=predicted", "predict.save=[ids]")
    with Image.open(trained / "predicted" / "0_ids.png") as ids:
        assert ids.size == (110, 70)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_encoder")
def test_the_file_predicts_and_scores_as_the_checkpoint_where_windows_reach_beyond_the_image(trained: Path) -> None:
    """Padding is the mean in both, and values of 16 bits are read as such."""
    run_here(trained, "mode=export", "ckpt=run", "output=padded.onnx")
    probabilities, scores = [], []
    for name in ("run", "padded.onnx"):
        net = semseg.load(trained / "run" if name == "run" else trained / name, device="cpu")
        found = net.predict(trained / "images" / "0.tif", probabilities=True).probabilities
        assert found is not None
        probabilities.append(found.astype(np.float32))
        run_here(trained, "mode=eval", f"ckpt={name}", f"run_dir=scores-{name}", "trainer=cpu")
        scores.append(json.loads((trained / f"scores-{name}" / "metrics.json").read_text())["mean_iou"])
    assert np.abs(probabilities[0] - probabilities[1]).max() < 0.002  # they are float16
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    entry = read_description(trained / "padded.onnx")
    means = [low + mean * (high - low) for mean, (low, high) in zip(
        entry["convention"]["mean"], entry["convention"]["ranges"], strict=True)]  # fmt: skip
    assert entry["padding"] == pytest.approx(means, rel=1e-4)


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
