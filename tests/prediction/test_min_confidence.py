"""predict.min_confidence: pixels whose class is not sure are not scored, in every output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from prediction.test_predictor import CLASSES, Brightest, stripes

import semseg
from helpers.command_line import TINY_ENCODERS
from helpers.in_process import configured
from helpers.random_checkpoints import write_random_checkpoints
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.data.label_map import LabelMap
from semseg.errors import ConfigError
from semseg.evaluation.tiled import ArraySink
from semseg.nets.registry import ENCODERS
from semseg.prediction.geotiff import GeoTiffSink
from semseg.prediction.outputs import write_outputs
from semseg.prediction.predictor import PredictionResult, PredictionSettings, Predictor


def open_predictor(label_map: LabelMap, num_classes: int = 3, **settings: object) -> Predictor:
    classes = ClassTable(CLASSES.names[:num_classes], CLASSES.palette[:num_classes])
    chosen = PredictionSettings([16], 64, **settings)  # pyright: ignore[reportArgumentType]
    return Predictor(Brightest().eval(), classes, label_map, chosen)  # pyright: ignore[reportArgumentType]


def gradient() -> np.ndarray:
    """Red that becomes darker from left to right, with some green."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[..., 0] = np.linspace(255, 60, 24)
    pixels[..., 1] = 50
    return pixels


@pytest.mark.parametrize("settings", [{}, {"flip": True}, {"crop": [8, 8], "window": 8}])
def test_a_pixel_is_left_out_if_its_class_has_a_lower_probability(settings: dict[str, object]) -> None:
    predictor = open_predictor(LabelMap(3))
    whole = predictor.predict(gradient(), probabilities=True, **settings)
    assert whole.probabilities is not None
    sure = whole.probabilities.max(0).astype(np.float32)
    found = predictor.predict(gradient(), min_confidence=0.8, **settings).ids
    is_near = np.abs(sure - 0.8) < 1e-3  # probabilities are kept as float16
    assert np.array_equal(found[~is_near], np.where(sure < 0.8, -1, whole.ids)[~is_near])
    assert 0.2 < (found < 0).mean() < 0.8
    assert np.array_equal(predictor.predict(gradient(), min_confidence=0.0, **settings).ids, whole.ids)


@pytest.mark.parametrize("settings", [{}, {"crop": [8, 8], "window": 8}])
def test_with_a_threshold_the_probability_is_that_of_the_chosen_class(settings: dict[str, object]) -> None:
    predictor = open_predictor(LabelMap(3))
    predictor.classes = ClassTable(CLASSES.names[:2], CLASSES.palette[:2])
    predictor.net.forward = (
        lambda image: Brightest.forward(predictor.net, image)._replace(  # pyright: ignore
            main=Brightest.forward(predictor.net, image).main[:, :2]  # pyright: ignore
        )
    )
    second = predictor.predict(gradient(), probabilities=True, **settings).probabilities[1]  # pyright: ignore
    found = predictor.predict(gradient(), threshold=0.1, min_confidence=0.6, **settings).ids
    expected = np.select([second < 0.1, second >= 0.6], [0, 1], -1)
    is_near = (np.abs(second - 0.1) < 1e-3) | (np.abs(second - 0.6) < 1e-3)
    assert np.array_equal(found[~is_near], expected[~is_near]) and {-1, 0} <= set(found.ravel().tolist())


def test_every_output_leaves_these_pixels_out(tmp_path: Path) -> None:
    ids = np.zeros((40, 60), np.int16)
    ids[:, 20:] = 2
    ids[:, 40:] = -1
    result = PredictionResult(np.full((40, 60, 3), 200, np.uint8), ids, CLASSES, LabelMap(3, ignore=[0, 255]))
    write_outputs(result, tmp_path / "a", ["ids", "color", "overlay", "panel", "coco", "label_studio"])
    assert np.unique(np.asarray(Image.open(tmp_path / "a_ids.png"))).tolist() == [0, 1, 3]  # 0: the first ignored id
    picture = Image.open(tmp_path / "a_color.png")
    assert np.asarray(picture)[0, [0, 30, 50]].tolist() == [0, 2, 3]
    assert np.asarray(picture.convert("RGB"))[0, 50].tolist() == [0, 0, 0]
    annotations = json.loads((tmp_path / "a_coco.json").read_text())["annotations"]
    assert sorted(entry["area"] for entry in annotations) == [800, 800]
    (task,) = json.loads((tmp_path / "a_label_studio.json").read_text())
    assert len(task["predictions"][0]["result"]) == 2
    assert [share.name for share in result.shares()] == ["red", "blue"] and result._repr_png_()
    assert result.label_ids[0, [0, 30, 50]].tolist() == [1, 3, 0]


def test_colours_of_256_classes_leave_no_place_in_the_palette(tmp_path: Path) -> None:
    classes = ClassTable.from_names([f"class {number}" for number in range(256)])
    first, last = list(classes.palette[0]), list(classes.palette[255])
    image = np.zeros((1, 3, 3), np.uint8)
    for ids, colours in (([[0, 255, -1]], [first, last, [0, 0, 0]]), ([[0, 255, 0]], [first, last, first])):
        result = PredictionResult(image, np.array(ids, np.int16), classes, LabelMap(256))
        write_outputs(result, tmp_path / "a", ["color"])
        picture = Image.open(tmp_path / "a_color.png")
        assert np.asarray(picture.convert("RGB")).tolist() == [colours]
    assert np.asarray(picture).tolist() == ids  # with a palette, where every pixel has a class


def test_rows_of_a_geotiff_have_the_ignored_id(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    predictor = open_predictor(LabelMap(3, ignore=[9]), crop=[8, 8], min_confidence=0.8)
    pixels, kept = torch.from_numpy(gradient()).permute(2, 0, 1), ArraySink(Size(16, 24))
    with GeoTiffSink(tmp_path / "ids.tif", Size(16, 24), CLASSES, predictor.label_map) as sink:
        predictor.predict_rows(pixels, sink)
    predictor.predict_rows(pixels, kept)
    with rasterio.open(tmp_path / "ids.tif") as file:
        assert np.array_equal(file.read(1), np.where(kept.ids < 0, 9, kept.ids + 1)) and (kept.ids < 0).any()


def test_without_an_ignored_id_and_where_every_pixel_needs_a_class_it_is_refused() -> None:
    predictor = open_predictor(LabelMap(3, ignore=[]))
    with pytest.raises(ConfigError, match=r"min_confidence=0.5: no id means .*Set data.ignore=\[255\]"):
        predictor.predict(stripes(), min_confidence=0.5)
    with pytest.raises(ConfigError, match="min_confidence=2: must be a probability"):
        predictor.predict(stripes(), min_confidence=2)
    for words, message in (
        (["mode=serve"], "mode=serve shows the most probable class everywhere"),
        (["mode=export", "output=a.onnx", "export.preprocessing=true"], "gives the class of every pixel"),
        (["mode=predict", "input=x", "predict.min_confidence=1.1"], "predict.min_confidence=1.1: must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            configured("ckpt=a.ckpt", "predict.min_confidence=0.9", *words)


def test_the_key_makes_pseudo_labels_of_an_ensemble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_checkpoints(tmp_path, "data.make.num_val=1")
    monkeypatch.setitem(ENCODERS, "tiny", TINY_ENCODERS["tiny"])
    (picture,) = (tmp_path / "scenes" / "images" / "validation").iterdir()
    files = [tmp_path / "a.ckpt", tmp_path / "b.ckpt"]
    result = semseg.load(files, device="cpu").predict(picture, scales=[32], probabilities=True)
    assert result.probabilities is not None
    sure = result.probabilities.max(0).astype(np.float32)
    limit = float(np.median(sure))
    found = semseg.load(files, f"predict.min_confidence={limit}", device="cpu").predict(picture, scales=[32]).label_ids
    is_near = np.abs(sure - limit) < 1e-3
    assert np.array_equal(found[~is_near], np.where(sure < limit, 0, result.label_ids)[~is_near])
