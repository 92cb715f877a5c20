"""Predictions for annotation tools: the way back gives the same masks, to within the tolerance of polygons."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from helpers.exports import import_here, masks_of, photo, put
from semseg.data.classes import ClassTable
from semseg.data.importing.label_studio import find_image_name
from semseg.data.label_map import LabelMap
from semseg.prediction import annotations
from semseg.prediction.annotations import AnnotationFiles, AnnotationSettings
from semseg.prediction.outputs import write_outputs
from semseg.prediction.predictor import PredictionResult

CLASSES = ClassTable(("background", "cat", "dog <b>"), ((0, 0, 0), (250, 50, 83), (51, 221, 255)))


def class_map(seed: int, size: tuple[int, int] = (60, 80)) -> NDArray[np.int16]:
    """Blobs of three classes, with holes and specks."""
    noise = np.random.default_rng(seed).normal(size=(3, *size))
    return np.stack([cv2.GaussianBlur(layer, (0, 0), 3) for layer in noise]).argmax(0).astype(np.int16)


def write(folder: Path, output: str, maps: dict[str, NDArray[np.int16]], tolerance: float) -> None:
    files = AnnotationFiles(folder, [output, "ids"], CLASSES, LabelMap(3), AnnotationSettings(tolerance))
    with files:
        for name, ids in maps.items():
            files.add(f"{name}.jpg", ids)
            put(folder / f"{name}.jpg", photo(name, (ids.shape[0], ids.shape[1])))


def accept(folder: Path) -> None:
    """Make annotations of predictions, as Label Studio does when an annotator submits them."""
    file = folder / "label_studio.json"
    tasks = json.loads(file.read_text())
    put(file, [{"id": 1, "data": task["data"], "annotations": task["predictions"]} for task in tasks])


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("output", ["coco", "label_studio"])
def test_the_way_back_gives_the_same_masks_within_the_tolerance(output: str, tolerance: float, tmp_path: Path) -> None:
    maps = {name: class_map(seed) for seed, name in enumerate("abc")}
    write(tmp_path / "e", output, maps, tolerance)
    if output == "label_studio":
        accept(tmp_path / "e")
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert imported.names == ("cat", "dog <b>", "background")
    for name, mask in masks_of(tmp_path / "out").items():
        ids = maps[name]
        is_different = mask != np.array([3, 1, 2])[ids]
        if tolerance == 0:
            assert not is_different.any()
        border = np.ones(ids.shape, np.uint8)  # the edge of the image is a part of outlines too
        border[1:-1, 1:-1] = 0
        border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
        border[1:] |= ids[1:] != ids[:-1]
        reach = int(np.ceil(tolerance)) + 1
        near = cv2.dilate(border, np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))
        assert not (is_different & (near == 0)).any() and is_different.mean() < 0.04 * tolerance + 1e-9


def test_holes_are_run_lengths_and_other_tools_read_the_same_pixels(tmp_path: Path) -> None:
    ids = np.zeros((40, 50), np.int16)
    ids[5:25, 10:40] = 1
    ids[10:15, 15:20] = 0
    ids[30:35, 5:9] = 2
    write(tmp_path / "e", "coco", {"a": ids}, 1.0)
    content = json.loads((tmp_path / "e/coco.json").read_text())
    cat, dog = content["annotations"]
    assert [category["name"] for category in content["categories"]] == ["cat", "dog <b>"]
    assert content["images"] == [{"id": 1, "file_name": "a.jpg", "height": 40, "width": 50}]
    assert isinstance(cat["segmentation"], dict) and cat["area"] == 600 - 25 and cat["bbox"] == [10, 5, 30, 20]
    assert np.array_equal(coco_mask.decode(cat["segmentation"]), ids == 1)
    assert sorted(zip(*[iter(dog["segmentation"][0])] * 2, strict=True)) == [(5, 30), (5, 35), (9, 30), (9, 35)]
    assert (cat["category_id"], dog["category_id"], dog["iscrowd"]) == (2, 3, 0)


def test_many_small_regions_of_a_class_become_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations, "MAX_REGIONS", 2)
    ids = np.zeros((20, 30), np.int16)
    ids[2:6, 2:6] = ids[10:13, 2:5] = ids[::5, 10::4] = 1
    write(tmp_path / "e", "coco", {"a": ids}, 0)
    entries = json.loads((tmp_path / "e/coco.json").read_text())["annotations"]
    assert [entry["iscrowd"] for entry in entries] == [0, 0, 1] and entries[0]["area"] == 16
    import_here(tmp_path / "e", tmp_path / "out")
    assert np.array_equal(masks_of(tmp_path / "out")["a"] == 1, ids == 1)


def test_label_studio_gets_its_labelling_interface_and_the_prefix_of_images(tmp_path: Path) -> None:
    settings = AnnotationSettings(1.0, "/data/local-files/?d=")
    with AnnotationFiles(tmp_path, ["label_studio"], CLASSES, LabelMap(3), settings) as files:
        files.add("sub/a.jpg", class_map(0))
        files.add("a&b #1%20.jpg", class_map(0))
    task, other = json.loads((tmp_path / "label_studio.json").read_text())
    assert task["data"]["image"] == "/data/local-files/?d=sub/a.jpg"
    assert find_image_name(other["data"]["image"]) == "a&b #1%20.jpg"
    tree = ElementTree.parse(tmp_path / "label_studio.xml")
    labels = {label.get("value"): label.get("background") for label in tree.iter("Label")}
    assert labels == {"cat": "#fa3253", "dog <b>": "#33ddff"}
    names = {tag.get("name") for tag in tree.getroot()}
    assert {result["from_name"] for result in task["predictions"][0]["result"]} | {"image"} <= names
    (tmp_path / "label_studio.xml").write_text("<View>with hotkeys</View>")
    with AnnotationFiles(tmp_path, ["label_studio"], CLASSES, LabelMap(3), settings) as files:
        files.add("a.jpg", class_map(0))
    assert (tmp_path / "label_studio.xml").read_text() == "<View>with hotkeys</View>"


def test_an_error_leaves_no_file_and_one_result_can_be_saved(tmp_path: Path) -> None:
    files = AnnotationFiles(tmp_path, ["coco"], CLASSES, LabelMap(3), AnnotationSettings())
    with pytest.raises(KeyError), files:
        files.add("a.jpg", class_map(0))
        raise KeyError
    assert not list(tmp_path.iterdir())
    image = np.asarray(Image.new("RGB", (80, 60)))
    result = PredictionResult(image, class_map(0), CLASSES, LabelMap(3), None)
    (path,) = write_outputs(result, tmp_path / "photo.jpg", ["coco"])
    assert path.name == "photo.jpg_coco.json"
    assert json.loads(path.read_text())["images"][0]["file_name"] == "photo.jpg"
