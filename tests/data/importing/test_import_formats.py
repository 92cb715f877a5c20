"""Every format of annotation tools in the tool's own layout, and with its quirks."""

from __future__ import annotations

import json
import re
import shutil
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from helpers.exports import (
    CAT,
    COLOURS,
    DOG,
    HEIGHT,
    NAMES,
    WIDTH,
    WRITERS,
    corners,
    expected,
    flat,
    import_here,
    labelme_content,
    labelme_shape,
    masks_of,
    percent,
    photo,
    png,
    put,
    studio_region,
    studio_task,
    to_base64,
    write_coco,
    write_label_studio,
    write_labelme,
    write_roboflow,
    write_voc,
    write_yolo,
)
from semseg.data.brush_runs import encode_brush
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.data.images import read_image
from semseg.data.importing import image_finder
from semseg.data.importing.formats import find_exports
from semseg.data.importing.image_finder import ImageFinder
from semseg.data.importing.label_studio import read_rectangle
from semseg.data.palette import voc_colour
from semseg.data.regions import encode_runs
from semseg.errors import ConfigError, DataError

CLASSES = {
    "coco": ["cat", "dog", "background"],
    "yolo": ["cat", "dog", "background"],
    "voc": ["background", "cat", "dog: small"],
    "labelme": ["cat", "dog", "background"],
    "label_studio": ["cat", "dog", "background"],
    "roboflow": ["background", "cat", "dog"],
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_an_export_is_recognised_and_becomes_the_masks_it_shows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "export")
    assert [found.format for found in find_exports(tmp_path / "export")] == [name]
    imported = import_here(tmp_path / "export", tmp_path / "out")
    assert list(imported.names) == CLASSES[name] and not imported.problems
    ids = [1 + CLASSES[name].index(each) for each in CLASSES[name] if each != "background"]
    masks = masks_of(tmp_path / "out")
    assert len(masks) == (5 if name == "roboflow" else 4)
    for mask in masks.values():
        assert np.array_equal(mask, expected(ids[0], ids[1], 1 + CLASSES[name].index("background")))
    counts = [sum(image.split == split for image in imported.images) for split in ("train", "val")]
    assert counts == {"yolo": [3, 1], "roboflow": [4, 1]}.get(name, [4, 0])
    palette = ClassTable.from_csv(tmp_path / "out" / "classes.csv").palette
    assert name != "voc" or list(palette) == list(COLOURS.values())


# ---- COCO


def coco_with(root: Path, segmentation: Any, **more: Any) -> Path:
    entry = {"id": 1, "image_id": 1, "category_id": 3, "segmentation": segmentation, **more}
    return write_coco(root, ["a"], annotations=[entry])


def region(root: Path, *words: str) -> np.ndarray:
    import_here(root, root / "../out", *words)
    (mask,) = masks_of(root / "../out").values()
    return mask == 1


def test_coco_rings_are_a_union_and_run_lengths_have_holes(tmp_path: Path) -> None:
    inner = (20, 10, 5, 5)
    coco_with(tmp_path / "rings", [flat(CAT), flat(inner)])
    assert region(tmp_path / "rings").sum() == 600
    whole = expected(1, 1, 0).astype(bool)
    hole = whole.copy()
    hole[10:15, 20:25] = False
    for number, mask in enumerate((whole, hole)):
        text = str(coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"], "ascii")  # pyright: ignore
        for kind, counts in (("text", text), ("list", encode_runs(mask))):
            root = tmp_path / f"{kind}{number}" / "export"
            coco_with(root, {"size": [HEIGHT, WIDTH], "counts": counts})
            assert np.array_equal(region(root), mask)


def test_coco_objects_lie_over_each_other_by_their_drawn_area_or_by_order(tmp_path: Path) -> None:
    write_coco(tmp_path / "export")  # `area` is 1 for all, and the dog comes first
    import_here(tmp_path / "export", tmp_path / "area")
    import_here(tmp_path / "export", tmp_path / "order", "import.overlaps=order")
    assert np.array_equal(masks_of(tmp_path / "area")["a"], expected())
    assert np.array_equal(masks_of(tmp_path / "order")["a"], expected(1, 1))


def test_coco_crowds_are_their_class_or_ignored(tmp_path: Path) -> None:
    counts = encode_runs(expected(1, 1, 0).astype(bool))
    coco_with(tmp_path / "e", {"size": [HEIGHT, WIDTH], "counts": counts}, iscrowd=1)
    drawn = import_here(tmp_path / "e", tmp_path / "drawn")
    assert "1 regions of many objects" in drawn.notes[0] and set(np.unique(masks_of(tmp_path / "drawn")["a"])) == {1, 3}
    import_here(tmp_path / "e", tmp_path / "ignored", "import.crowd=ignore")
    assert np.array_equal(masks_of(tmp_path / "ignored")["a"], expected(0, 0))


def test_coco_boxes_are_refused_or_drawn_and_empty_annotations_have_no_pixels(tmp_path: Path) -> None:
    coco_with(tmp_path / "e", [], bbox=list(CAT))
    with pytest.raises(DataError, match=r"image 1: annotation 1: is a box without an outline.*import\.boxes=draw"):
        import_here(tmp_path / "e", tmp_path / "out")
    assert np.array_equal(region(tmp_path / "e", "import.boxes=draw"), expected(1, 1, 0) == 1)
    write_coco(tmp_path / "f", ["a"], annotations=[{"id": 1, "image_id": 1, "category_id": 3, "segmentation": []}])
    import_here(tmp_path / "f", tmp_path / "background")
    assert (masks_of(tmp_path / "background")["a"] == 3).all()


def test_coco_panoptic_files_give_every_pixel_its_segment(tmp_path: Path) -> None:
    ids = np.array([0, 1000, 70_000])[expected(1, 2, 0)]
    pixels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    segments = [{"id": 1000, "category_id": 3, "iscrowd": 0}, {"id": 70_000, "category_id": 90}]
    annotation = {"image_id": 1, "file_name": "a.png", "segments_info": segments}
    file = write_coco(tmp_path / "e", ["a"], annotations=[annotation])
    put(file.rename(file.with_name("panoptic_val2017.json")).with_suffix("") / "a.png", png(pixels))
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert np.array_equal(masks_of(tmp_path / "out")["a"], expected()) and imported.images[0].split == "val"
    segments.pop()
    write_coco(tmp_path / "f", ["a"], annotations=[annotation])
    put(tmp_path / "f" / "annotations" / "a.png", png(pixels))
    with pytest.raises(DataError, match=r"a\.png: segment 70000 \(80 pixels\) is not in segments_info"):
        import_here(tmp_path / "f", tmp_path / "other")


def test_coco_files_of_several_splits_and_kinds(tmp_path: Path) -> None:
    train = write_coco(tmp_path / "e", NAMES[1:])
    content = json.loads(train.read_text())
    put(train.with_name("instances_train2017.json"), content)
    put(train.with_name("person_keypoints_train2017.json"), content)
    put(train.with_name("captions_train2017.json"), {"images": [], "annotations": []})
    val = write_coco(tmp_path / "v", ["a"])
    put(tmp_path / "e" / "images" / "a.jpg", photo("a"))
    put(train.with_name("instances_val2017.json"), json.loads(val.read_text()))
    train.unlink()
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert sorted(image.split for image in imported.images) == ["train"] * 3 + ["val"]
    with pytest.raises(DataError, match=r"both are COCO files for the split train. Choose one: input=<file>"):
        put(tmp_path / "e" / "train" / "instances.json", content)
        import_here(tmp_path / "e", tmp_path / "other")
    chosen = import_here(train.with_name("instances_val2017.json"), tmp_path / "one", f"import.images={tmp_path / 'v'}")
    assert len(chosen.images) == 1


def test_coco_of_roboflow_has_a_category_that_is_no_class(tmp_path: Path) -> None:
    categories = [{"id": 0, "name": "pets", "supercategory": "none"}]
    categories += [{"id": number, "name": name, "supercategory": "pets"} for number, name in ((3, "cat"), (90, "dog"))]
    write_coco(tmp_path / "e", categories=categories)
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert imported.names == ("cat", "dog", "background") and "'pets' only groups others" in imported.notes[0]


def test_annotations_outside_of_their_image_are_counted(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "e")
    content = json.loads(file.read_text())
    content["annotations"].append(
        content["annotations"][0] | {"id": 99, "segmentation": [[900.0, 900.0, 950.0, 900.0, 950.0, 950.0]]}
    )
    put(file, content)
    notes = " ".join(import_here(tmp_path / "e", tmp_path / "out").notes)
    assert re.search(r"1 annotation covers no pixel, such as .*: annotation 99: outside of the image", notes)


def test_coordinates_that_cover_no_pixel_are_reported_or_refused(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "e")
    content = json.loads(file.read_text())
    for entry in content["annotations"]:
        if entry["category_id"] == 90:
            entry["segmentation"] = [[0.1, 0.1, 0.2, 0.1, 0.2, 0.2]]  # fractions
    put(file, content)
    notes = import_here(tmp_path / "e", tmp_path / "one").notes
    assert "No pixel is left of the annotations of dog: others hide them, or their coordinates" in " ".join(notes)
    for entry in content["annotations"]:
        entry["segmentation"] = [[0.1, 0.1, 0.2, 0.1, 0.2, 0.2]]
    put(file, content)
    with pytest.raises(DataError, match="no annotation covers a pixel of its image"):
        import_here(tmp_path / "e", tmp_path / "none")


def test_classes_of_one_name_are_reported(tmp_path: Path) -> None:
    categories = [{"id": number, "name": name} for number, name in ((3, "cat"), (90, "cat"))]
    write_coco(tmp_path / "e", categories=categories)
    assert "Several classes are called cat." in import_here(tmp_path / "e", tmp_path / "out").notes


def test_a_file_that_coco_lists_as_two_images_is_refused(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "e")
    content = json.loads(file.read_text())
    content["images"].append(content["images"][0] | {"id": 77})
    put(file, content)
    with pytest.raises(DataError, match=r"image 77: has the file of image 1, .*a\.jpg\. Merge the two"):
        import_here(tmp_path / "e", tmp_path / "out")


def test_an_image_of_two_splits_is_in_the_first_one_and_a_note_says_so(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "e")
    content = json.loads(file.read_text())
    for name in ("instances_train2017.json", "instances_val2017.json"):
        put(file.with_name(name), content)
    file.unlink()
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert {image.split for image in imported.images} == {"train"} and len(imported.images) == len(NAMES)
    assert f"{len(NAMES)} images, such as" in " ".join(imported.notes)
    assert "listed again: each is in the split that names it first." in " ".join(imported.notes)


def test_a_mask_of_two_lists_is_in_the_first_split_and_a_note_says_so(tmp_path: Path) -> None:
    write_voc(tmp_path / "e")
    lists = tmp_path / "e/ImageSets/Segmentation"
    (lists / "default.txt").unlink()
    put(lists / "train.txt", "".join(f"{name}\n" for name in [*NAMES, NAMES[0]]))
    put(lists / "val.txt", f"{NAMES[0]}\n")
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert {image.split for image in imported.images} == {"train"} and len(imported.images) == len(NAMES)
    assert f"1 image, such as {tmp_path / 'e'}" in " ".join(imported.notes)
    assert "listed again: each is in the split that names it first." in " ".join(imported.notes)


def test_an_image_of_two_splits_with_other_annotations_is_refused(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "e")
    content = json.loads(file.read_text())
    put(file.with_name("instances_train2017.json"), content)
    content["annotations"].reverse()
    put(file.with_name("instances_val2017.json"), content)
    file.unlink()
    import_here(tmp_path / "e", tmp_path / "equal")  # in another order
    content["annotations"][0]["segmentation"] = [flat((1, 2, 3, 4))]
    put(file.with_name("instances_val2017.json"), content)
    with pytest.raises(DataError, match=r"instances_val2017\.json: image \d: annotates .*\.jpg, as .*train2017"):
        import_here(tmp_path / "e", tmp_path / "out")


def test_an_image_of_another_split_does_not_take_the_place_of_a_missing_one(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        file = write_coco(tmp_path / "w" / split, ["a", "b"])
        put(tmp_path / "e" / split / "_annotations.coco.json", json.loads(file.read_text()))
        for name in ("a", "b"):
            put(tmp_path / "e" / split / f"{name}.jpg", photo(f"{split} {name}"))
    (tmp_path / "e/train/a.jpg").unlink()
    with pytest.raises(DataError, match=r"there is no image a\.jpg of train below .*a\.jpg is one of val"):
        import_here(tmp_path / "e", tmp_path / "out")
    put(tmp_path / "e/train/test_area/a.jpg", photo("train a"))
    assert len(import_here(tmp_path / "e", tmp_path / "out").images) == 4


def test_names_may_be_percent_encoded(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "e", ["a"])
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = "one%20two.jpg"
    put(file, content)
    (tmp_path / "e/images/a.jpg").rename(tmp_path / "e/images/one two.jpg")
    assert [image.image for image in import_here(tmp_path / "e", tmp_path / "out").images] == ["images/one two.jpg"]
    content["images"][0]["file_name"] = "my%20cats/1.jpg"
    put(file, content)
    put(tmp_path / "e/images/1.jpg", photo("other"))
    put(tmp_path / "e/images/my cats/1.jpg", photo("a"))
    import_here(tmp_path / "e", tmp_path / "folders")
    assert (tmp_path / "folders/images/1.jpg").read_bytes() == photo("a")


def test_coco_crowds_may_be_booleans(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "e")
    content = json.loads(file.read_text())
    for entry in content["annotations"]:
        entry["iscrowd"] = False
    put(file, content)
    assert len(import_here(tmp_path / "e", tmp_path / "out").images) == len(NAMES)


def test_a_class_of_coco_may_be_its_own_group(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "person", "supercategory": "person"}]
    categories += [
        {"id": number, "name": name, "supercategory": "animal"} for number, name in ((3, "cat"), (90, "dog"))
    ]
    write_coco(tmp_path / "e", categories=categories)
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert imported.names == ("person", "cat", "dog", "background")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation": [[1, 2, 3, 4]]}, "annotation 1: a polygon has 2 points"),
        ({"segmentation": [[1, 2, 3, 4, 5]]}, "annotation 1: a polygon must be a list of x and y"),
        ({"segmentation": [[1, 2, 3, "x", 5, 6]]}, "annotation 1: a polygon must be a list of numbers"),
        ({"segmentation": [[1, 2, 3, 1e200, 5, 6]]}, "annotation 1: a polygon has a coordinate that is not"),
        ({"segmentation": {"size": [9, 9], "counts": "zz"}}, "annotation 1: its run lengths are for 9 x 9"),
        (
            {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "zz"}},
            "annotation 1: the text of run lengths is damaged",
        ),
        (
            {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, -1]}},
            "counts must be text or a list of whole numbers",
        ),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 5]}}, "run lengths sum to 10, not to 48 x 64"),
        ({"segmentation": {"counts": [5, 5]}}, r"segmentation must have size: \[height, width\]"),
        ({"segmentation": "text"}, "segmentation must be a list of polygons"),
        ({"category_id": 5}, "annotation 1: has category_id 5, which is no category"),
        ({"category_id": "cat"}, "annotation 1: category_id must be a whole number, got 'cat'"),
        ({"image_id": 7}, r"annotation 1 has image_id 7, which is no image\. Remove it"),
        ({"image_id": "1"}, r"image_id '1', which is no image\. The id 1 is: write both as numbers"),
    ],
)
def test_a_wrong_coco_annotation_is_named_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    entry = {"id": 1, "image_id": 1, "category_id": 3, "segmentation": [flat(CAT)]}
    write_coco(tmp_path / "e", ["a"], annotations=[entry | change])
    with pytest.raises(DataError, match=message) as caught:
        import_here(tmp_path / "e", tmp_path / "out")
    assert "instances_default.json: " in str(caught.value) and "\n" not in str(caught.value)
    assert "data.on_bad=skip" in str(caught.value) and not (tmp_path / "out").exists()


# ---- YOLO


def test_yolo_names_may_be_words_that_yaml_reads_as_booleans_and_a_mapping(tmp_path: Path) -> None:
    file = write_yolo(tmp_path / "e")
    file.write_text("path: ../datasets/pets\ntrain: train/images\nval: [valid/images]\nnames: {1: off, 0: yes}\n")
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert imported.names == ("yes", "off", "background")
    assert np.array_equal(masks_of(tmp_path / "out")["train/images/b"], expected())


def test_arrays_that_yolo_keeps_beside_images_are_left_out(tmp_path: Path) -> None:
    write_yolo(tmp_path / "e")
    for path in (tmp_path / "e").rglob("*.jpg"):
        np.save(path.with_suffix(".npy"), read_image(path)[..., ::-1])
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert not list((tmp_path / "out/images").rglob("*.npy"))
    assert any(".npy files beside images of the same names: left out" in note for note in imported.notes)


@pytest.mark.parametrize("name", ["coco", "voc"])
def test_folders_that_name_their_images_alike_cost_no_more_than_others(name: str, tmp_path: Path) -> None:
    names = [f"s{number}/rgb" for number in range(500)]
    for each in names:
        put(tmp_path / f"e/{each}.jpg", b"")
    finder = ImageFinder(tmp_path / "e")
    finder.expect(names if name == "voc" else [f"{each}.jpg" for each in names])
    with count_calls("_compose") as calls:
        for each in names:
            found = finder.find_stem(each, without=[])[0] if name == "voc" else finder.find(f"{each}.jpg")
            assert finder.relative(found) == f"{each}.jpg"
    assert len(calls) < 50 * len(names)  # quadratic: half a million


def test_many_missing_images_are_named_at_a_cost_that_does_not_grow_with_them(tmp_path: Path) -> None:
    names = list(map(str, range(500)))
    for each in names:
        put(tmp_path / f"e/SegmentationClass/{each}.png", b"")
    finder = ImageFinder(tmp_path / "e")
    with count_calls("fnmatchcase") as calls:
        assert not any(finder.find_stem(each, without=["SegmentationClass"]) for each in names)
    assert len(calls) == len(names)  # each file is looked at once


@contextmanager
def count_calls(name: str) -> Iterator[list[None]]:
    """The calls of a function of the module that finds images."""
    calls: list[None] = []
    plain = getattr(image_finder, name)

    def count(*arguments: Any) -> Any:
        calls.append(None)
        return plain(*arguments)

    with patch.object(image_finder, name, count):
        yield calls


def test_yolo_holes_by_a_bridge_and_images_without_a_label_file(tmp_path: Path) -> None:
    write_yolo(tmp_path / "e")
    outer, inner = corners(CAT), corners((15, 8, 10, 8))
    ring = [*outer, outer[0], *reversed(inner), inner[-1]]
    numbers = [number / side for point in ring for number, side in zip(point, (WIDTH, HEIGHT), strict=True)]
    (tmp_path / "e/train/labels/b.txt").write_text("0 " + " ".join(map(str, numbers)) + "\n\n")
    (tmp_path / "e/train/labels/c.txt").unlink()
    imported = import_here(tmp_path / "e", tmp_path / "out")
    masks = masks_of(tmp_path / "out")
    assert np.array_equal(masks["train/images/b"], expected(1, 3)) and (masks["train/images/c"] == 3).all()
    assert "1 image has no label file" in imported.notes[0]


def test_a_test_split_of_yolo_that_was_not_exported_is_left_out(tmp_path: Path) -> None:
    file = write_yolo(tmp_path / "e")
    file.write_text(f"{file.read_text()}test: ../test/images\n")
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert len(imported.images) == len(NAMES)
    assert "There is no ../test/images: its test images are left out." in imported.notes
    file.write_text(file.read_text().replace("../valid/images", "../nowhere"))
    with pytest.raises(DataError, match=r"val: there is no \.\./nowhere below .*, or remove the line"):
        import_here(tmp_path / "e", tmp_path / "other")


def test_yolo_masks_of_the_semantic_task(tmp_path: Path) -> None:
    for name in NAMES:
        put(tmp_path / "e/images/train" / f"{name}.jpg", photo(name))
        put(tmp_path / "e/masks/train" / f"{name}.png", png(expected(0, 1, 255)))
    put(
        tmp_path / "e/data.yaml",
        yaml.safe_dump({"train": "images/train", "names": ["cat", "dog"], "masks_dir": "masks"}),
    )
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert imported.names == ("cat", "dog") and np.array_equal(masks_of(tmp_path / "out")["a"], expected(1, 2, 0))
    put(tmp_path / "e/masks/train/a.png", png(expected(0, 7, 255)))
    with pytest.raises(DataError, match=r"a\.png: value 7 \(80 pixels\) is no class"):
        import_here(tmp_path / "e", tmp_path / "other")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2 0.2", r"is a box: this is a data set for detection\. To draw boxes: import\.boxes=draw"),
        ("0 0.5 0.5 0.2 0.2 0.3", "has 5 coordinates, a polygon has an even number of at least 6"),
        ("5 0.1 0.1 0.2 0.2 0.3 0.1", "has class 5, but there are 2 names"),
        ("cat 0.1 0.1 0.2 0.2 0.3 0.1", "must be a class and numbers"),
        ("0 10 10 20 20 30 10", "has coordinates outside of 0..1"),
        ("0 nan 0.1 0.2 0.2 0.3 0.1", "has coordinates outside of 0..1"),
    ],
)
def test_a_wrong_line_of_yolo_is_named(line: str, message: str, tmp_path: Path) -> None:
    write_yolo(tmp_path / "e")
    (tmp_path / "e/train/labels/b.txt").write_text(f"0 0.1 0.1 0.2 0.2 0.3 0.1\n{line}\n")
    with pytest.raises(DataError, match=rf"b\.txt:2: {message}"):
        import_here(tmp_path / "e", tmp_path / "out")


def test_yolo_images_may_be_in_another_folder(tmp_path: Path) -> None:
    write_yolo(tmp_path / "e")
    for split in ("train", "valid"):
        (tmp_path / "e" / split / "images").rename(put(tmp_path / "photos" / split / "x", "x").with_name("images"))
    imported = import_here(tmp_path / "e", tmp_path / "out", f"import.images={tmp_path / 'photos'}")
    assert len(imported.images) == 4 and np.array_equal(masks_of(tmp_path / "out")["train/images/b"], expected())
    write_roboflow(tmp_path / "r")
    with pytest.raises(ConfigError, match=r"import\.images=.*: in exports of Roboflow, masks lie beside"):
        import_here(tmp_path / "r", tmp_path / "other", f"import.images={tmp_path / 'photos'}")


def test_yolo_images_elsewhere_have_the_labels_of_the_export_and_not_those_beside_them(tmp_path: Path) -> None:
    write_yolo(tmp_path / "e", ["a", "b"])  # a is of val, b of train
    (tmp_path / "e/valid/images").rename(put(tmp_path / "photos/valid/x", "x").with_name("images"))
    (tmp_path / "e/train/images").rename(put(tmp_path / "photos/train/x", "x").with_name("images"))
    for name in ("train/images/a.jpg", "valid/images/b.jpg"):
        put(tmp_path / "photos" / name, photo(f"other {name}"))
    (tmp_path / "e/valid/labels/b.txt").write_text("")  # each name is in both splits
    (tmp_path / "e/train/labels/a.txt").write_text("")
    put(tmp_path / "photos/train/labels/b.txt", "1 0 0 1 0 1 1 0 1\n")  # of an older state
    imported = import_here(tmp_path / "e", tmp_path / "out", f"import.images={tmp_path / 'photos'}")
    masks = masks_of(tmp_path / "out")
    assert {image.split for image in imported.images} == {"train", "val"}
    for name in ("train/images/b", "valid/images/a"):
        assert np.array_equal(masks[name], expected()), name
    for name in ("train/images/a", "valid/images/b"):
        assert (masks[name] == 3).all(), name


def test_yolo_images_elsewhere_do_not_get_the_label_of_another_image(tmp_path: Path) -> None:
    file = write_yolo(tmp_path / "e", ["a", "b"])  # a is of val, b of train
    shutil.rmtree(tmp_path / "e/train/images")
    shutil.rmtree(tmp_path / "e/valid/images")
    for name in ("train/images/a", "valid/images/a", "train/images/b"):  # train/a has no object, and no label file
        put(tmp_path / "photos" / f"{name}.jpg", photo(name))
    import_here(tmp_path / "e", tmp_path / "out", f"import.images={tmp_path / 'photos'}")
    masks = masks_of(tmp_path / "out")
    assert (masks["train/images/a"] == 3).all() and np.array_equal(masks["valid/images/a"], expected())
    (tmp_path / "e/train/labels/b.txt").rename(tmp_path / "e/train/labels/B.txt")
    with pytest.raises(DataError, match=r"b\.jpg: its label file is called B\.txt: upper and lower case differ"):
        import_here(tmp_path / "e", tmp_path / "other", f"import.images={tmp_path / 'photos'}")
    assert file.exists()


def test_text_files_that_are_no_labels_do_not_hide_those_beside_yolo_images(tmp_path: Path) -> None:
    file = write_yolo(tmp_path / "photos")
    put(tmp_path / "e/data.yaml", file.read_text())
    put(tmp_path / "e/README.roboflow.txt", "exported on a day\n")
    import_here(tmp_path / "e", tmp_path / "out", f"import.images={tmp_path / 'photos'}")
    assert np.array_equal(masks_of(tmp_path / "out")["train/images/b"], expected())


def test_a_label_file_of_yolo_that_may_be_one_of_two_is_refused(tmp_path: Path) -> None:
    file = write_yolo(tmp_path / "e", ["a", "b"])
    put(tmp_path / "photos/one/a.jpg", photo("a"))
    shutil.copy(tmp_path / "e/valid/labels/a.txt", tmp_path / "e/train/labels/a.txt")
    shutil.copytree(tmp_path / "e/valid/labels", tmp_path / "e/valid/more/labels")
    file.write_text("names: [cat, dog]\nval: val.txt\ntrain: val.txt\n")
    put(tmp_path / "e/val.txt", "a.jpg\n")
    with pytest.raises(DataError, match=r"a\.jpg: its label file may be .*a\.txt or .*a\.txt\. Rename one"):
        import_here(tmp_path / "e", tmp_path / "out", f"import.images={tmp_path / 'photos'}")


def test_poses_of_yolo_are_boxes_and_no_polygons(tmp_path: Path) -> None:
    file = write_yolo(tmp_path / "e")
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(content | {"kpt_shape": [2, 3]}))
    x, y, width, height = CAT
    box = [(x + width / 2) / WIDTH, (y + height / 2) / HEIGHT, width / WIDTH, height / HEIGHT]
    for label in (tmp_path / "e").rglob("*.txt"):
        label.write_text(" ".join(map(str, [0, *box, 0.1, 0.2, 2, 0, 0, 0])) + "\n")
    with pytest.raises(DataError, match=r"\.txt:1: is a box"):
        import_here(tmp_path / "e", tmp_path / "out")
    import_here(tmp_path / "e", tmp_path / "out", "import.boxes=draw")
    assert np.array_equal(masks_of(tmp_path / "out")["train/images/b"], expected(1, 1))
    file.write_text(yaml.safe_dump(content | {"kpt_shape": 17}))
    with pytest.raises(DataError, match=r"data\.yaml: kpt_shape must be the numbers of points and of their values"):
        import_here(tmp_path / "e", tmp_path / "other")


def test_yolo_boxes_are_drawn_on_request(tmp_path: Path) -> None:
    write_yolo(tmp_path / "e")
    x, y, width, height = CAT
    box = [(x + width / 2) / WIDTH, (y + height / 2) / HEIGHT, width / WIDTH, height / HEIGHT]
    (tmp_path / "e/train/labels/b.txt").write_text("0 " + " ".join(map(str, box)) + "\n")
    import_here(tmp_path / "e", tmp_path / "out", "import.boxes=draw")
    assert np.array_equal(masks_of(tmp_path / "out")["train/images/b"], expected(1, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [cat, dog]\ntrain: ../../secret\n", r"train: there is no \.\./\.\./secret below"),
        ("names: [cat, dog]\ntrain: /etc\n", "train: there is no /etc below"),
        ("names: [cat, dog]\ntrain: train/images\nnc: 3\n", "nc='?3'?, but there are 2 names"),
        ("names: {0: cat, 2: dog}\ntrain: train/images\n", "the numbers of names must be 0, 1, 2, ... without gaps"),
        ("names: 3\ntrain: train/images\n", "names must be a list of texts"),
        ("names: [cat, dog]\ntrain: train/labels\n", "train: there is no image in"),
    ],
)
def test_a_wrong_description_of_yolo_is_refused(text: str, message: str, tmp_path: Path) -> None:
    write_yolo(tmp_path / "e").write_text(text)
    with pytest.raises(DataError, match=rf"data\.yaml: {message}"):
        import_here(tmp_path / "e", tmp_path / "out")


# ---- CVAT and Pascal VOC


def test_colours_of_a_palette_count_and_not_its_indices(tmp_path: Path) -> None:
    write_voc(tmp_path / "e", palette=True)
    import_here(tmp_path / "e", tmp_path / "out")
    assert np.array_equal(masks_of(tmp_path / "out")["a"], expected(2, 3, 1))


def test_images_that_cvat_did_not_export_are_asked_for_and_found_by_a_key(tmp_path: Path) -> None:
    write_voc(tmp_path / "e", with_images=False)
    with pytest.raises(DataError, match=r"there is no image a below .*'Save images'.*import\.images"):
        import_here(tmp_path / "e", tmp_path / "out")
    for name in NAMES:
        put(tmp_path / "photos" / f"{name}.jpg", photo(name))
    imported = import_here(tmp_path / "e", tmp_path / "out", f"import.images={tmp_path / 'photos'}")
    assert len(imported.images) == 4 and (tmp_path / "out/images/a.jpg").samefile(tmp_path / "photos/a.jpg")


def test_pascal_voc_without_a_label_map_has_borders_and_lists_of_splits(tmp_path: Path) -> None:
    write_voc(tmp_path / "e").unlink()
    colours = np.array([voc_colour(index) for index in (0, 8, 12)] + [(224, 224, 192)], np.uint8)  # cat, dog, border
    indices = expected(1, 2, 0)
    indices[0] = 3
    for name in NAMES:
        put(tmp_path / "e/SegmentationClass" / f"{name}.png", Image.fromarray(colours[indices]))
    lists = tmp_path / "e/ImageSets/Segmentation"
    (lists / "default.txt").unlink()
    for split, names in (("train", "b\n"), ("val", "a\n"), ("trainval", "a\nb\n")):
        put(lists / f"{split}.txt", names)
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert imported.names[8] == "cat" and len(imported.names) == 21
    assert {image.split for image in imported.images} == {"train", "val"} and len(imported.images) == 2
    mask = masks_of(tmp_path / "out")["a"]
    assert (mask[0] == 0).all() and np.array_equal(mask[1:], expected(9, 13, 1)[1:])
    assert "2 masks are in no list" in " ".join(imported.notes)


def test_a_colour_that_the_label_map_lacks_is_told_with_its_pixels(tmp_path: Path) -> None:
    file = write_voc(tmp_path / "e")
    file.write_text(file.read_text().replace("dog: small:51,221,255::\n", ""))
    with pytest.raises(DataError, match=r"a\.png: the colour \(51, 221, 255\) \(80 pixels\) is not in labelmap\.txt"):
        import_here(tmp_path / "e", tmp_path / "out")


def test_black_pixels_without_a_class_belong_to_the_class_background(tmp_path: Path) -> None:
    file = write_voc(tmp_path / "e")
    file.write_text(file.read_text().replace("background:0,0,0", "background:0,128,0"))
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert imported.background == 0 and np.array_equal(masks_of(tmp_path / "out")["a"], expected(2, 3, 1))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_a_grey_mask_has_the_same_indices_whatever_its_bits(tmp_path: Path, bits: int) -> None:
    write_voc(tmp_path / "e", names=["a", "b"])
    indices = np.resize(np.arange(3), (HEIGHT, WIDTH))
    for name in ("a", "b"):
        write_grey_png(tmp_path / "e/SegmentationClass" / f"{name}.png", indices, bits)
    import_here(tmp_path / "e", tmp_path / "out")
    assert np.array_equal(masks_of(tmp_path / "out")["a"], np.array([1, 2, 3])[indices])


def write_grey_png(path: Path, values: NDArray[np.integer], bits: int) -> None:
    """A PNG file with this many bits a pixel, which Pillow does not write."""
    height, width = values.shape
    digits = np.unpackbits(values.astype(">u2")[..., None].view(np.uint8), axis=-1)[..., 16 - bits :]
    rows = np.packbits(digits.reshape(height, -1), axis=1)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    data = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())  # each row begins with its filter: none
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    coded = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(coded))


@pytest.mark.parametrize("folder", ["SegmentationClass", "SegmentationClassPNG"])  # of version 5, and before
def test_class_names_of_labelme_are_in_the_colours_of_pascal_voc(tmp_path: Path, folder: str) -> None:
    write_voc(tmp_path / "e").unlink()
    for path in (tmp_path / "e/SegmentationClass").iterdir():
        path.unlink() if folder == path.parent.name else path.rename(path.with_suffix(".npy"))  # as older versions
    put(tmp_path / "e/class_names.txt", "_background_\ncat\ndog\n")
    colours = np.array([voc_colour(index) for index in range(3)], np.uint8)
    for name in NAMES:
        put(tmp_path / "e" / folder / f"{name}.png", Image.fromarray(colours[expected(1, 2, 0)]))
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert imported.names == ("_background_", "cat", "dog")
    assert np.array_equal(masks_of(tmp_path / "out")["a"], expected(2, 3, 1))
    put(tmp_path / "e/class_names.txt", "cat\ncat\n")
    with pytest.raises(DataError, match=r"class_names\.txt: must list 1 to 255 different names"):
        import_here(tmp_path / "e", tmp_path / "other")


def test_grey_masks_of_an_export_all_hold_indices_or_all_hold_colours(tmp_path: Path) -> None:
    write_voc(tmp_path / "e", ["a", "b"]).write_text("cat:250,50,83::\ndog:0,0,9::\n")  # black is no class
    for name, index in (("a", 1), ("b", 0)):
        Image.fromarray(np.full((HEIGHT, WIDTH), index, np.uint8)).save(
            tmp_path / "e/SegmentationClass" / f"{name}.png"
        )
    imported = import_here(tmp_path / "e", tmp_path / "out")
    masks = masks_of(tmp_path / "out")
    assert imported.names == ("cat", "dog") and (masks["a"] == 2).all() and (masks["b"] == 1).all()


def test_one_wrong_grey_mask_does_not_change_the_meaning_of_the_others(tmp_path: Path) -> None:
    write_voc(tmp_path / "e", NAMES).write_text("sky:0,0,0::\ncat:128,128,128::\ndog:200,200,200::\n")
    greys = np.array([0, 128, 200], np.uint8)[expected(1, 2, 0)]
    for name in NAMES:
        put(tmp_path / "e/SegmentationClass" / f"{name}.png", Image.fromarray(greys))
    greys[0, 0] = 7
    put(tmp_path / "e/SegmentationClass" / f"{NAMES[0]}.png", Image.fromarray(greys))
    with pytest.raises(DataError, match=rf"{NAMES[0]}\.png: the colour \(7, 7, 7\) \(1 pixels\) is not in") as caught:
        import_here(tmp_path / "e", tmp_path / "out")
    assert "entries" not in str(caught.value)  # all others are fine


def test_other_folders_of_masks_are_not_the_images(tmp_path: Path) -> None:
    write_voc(tmp_path / "e", with_images=False)
    shutil.copytree(tmp_path / "e/SegmentationClass", tmp_path / "e/SegmentationClassRaw")
    with pytest.raises(DataError, match=r"there is no image a below .*'Save images'"):
        import_here(tmp_path / "e", tmp_path / "out")


@pytest.mark.parametrize(("values", "classes"), [([0, 1, 255], [1, 2, 0]), ([0, 255], [1, 0])])
def test_255_in_a_grey_mask_is_not_scored_whatever_else_it_has(
    tmp_path: Path, values: list[int], classes: list[int]
) -> None:
    """Background alone, 0, could be a colour as well as an index."""
    write_voc(tmp_path / "e", names=["a", "b"])
    grey = np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH))
    Image.fromarray(grey).save(tmp_path / "e" / "SegmentationClass" / "b.png")
    import_here(tmp_path / "e", tmp_path / "out")
    assert np.array_equal(masks_of(tmp_path / "out")["b"], np.resize(classes, (HEIGHT, WIDTH)))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("cat\n", r"labelmap\.txt:1: a line must be like"),
        ("cat:1,2,300::\n", r"labelmap\.txt:1: a line must be like"),
        ("cat:1,2,3::\n#\ndog:1,2,3::\n", r"labelmap\.txt:3: 'cat' and 'dog' have the same colour \(1, 2, 3\)"),
        ("cat:1,2,3::\ncat:1,2,4::\n", r"labelmap\.txt:2: the class 'cat' is listed twice"),
        ("# nothing\n", r"labelmap\.txt: lists no classes"),
    ],
)
def test_a_wrong_label_map_is_refused(lines: str, message: str, tmp_path: Path) -> None:
    write_voc(tmp_path / "e").write_text(lines)
    with pytest.raises(DataError, match=message):
        import_here(tmp_path / "e", tmp_path / "out")


def test_a_label_map_is_a_class_table_with_colours_too(tmp_path: Path) -> None:
    table = ClassTable.from_file(write_voc(tmp_path / "e"))
    assert dict(zip(table.names, table.palette, strict=True)) == COLOURS
    names = put(tmp_path / "names.txt", "cat:1\ndog\n")
    assert ClassTable.from_file(names).names == ("cat:1", "dog")


# ---- LabelMe


def labelme_mask(root: Path, *shapes: dict[str, Any], words: tuple[str, ...] = ()) -> np.ndarray:
    put(root / "e" / "a.jpg", photo("a"))
    put(root / "e" / "a.json", labelme_content("a", list(shapes)))
    import_here(root / "e", root / "out", *words)
    return masks_of(root / "out")["a"]


def test_labelme_shapes_of_every_type(tmp_path: Path) -> None:
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    ends = ((x - 10) ** 2 + (y - 20) ** 2 <= 16) | ((x - 30) ** 2 + (y - 20) ** 2 <= 16)
    line = ((x > 10) & (x < 30) & (abs(y - 20) < 4)) | ends
    small = np.array([[255, 0, 255, 0], [0, 0, 0, 0], [255, 255, 255, 255]], np.uint8)
    pasted = np.zeros((HEIGHT, WIDTH), bool)
    pasted[10:13, 20:24] = small > 0
    cat = expected(1, 1, 0) == 1
    for name, points, kind, mask in (
        ("old", corners(CAT), None, cat),
        ("oriented", corners(CAT), "oriented_rectangle", cat),
        ("circle", [[20, 20], [26, 28]], "circle", (x - 20) ** 2 + (y - 20) ** 2 <= 100),
        ("point", [[20, 20]], "point", (x - 20) ** 2 + (y - 20) ** 2 <= 16),
        ("line", [[10, 20], [30, 20]], "line", line),
        ("strip", [[10, 20], [10, 20], [30, 20]], "linestrip", line),
        ("mask", [[20, 10], [23, 12]], "mask", pasted),
    ):
        shape = labelme_shape("cat", points, kind, mask=to_base64(png(small)))
        found = labelme_mask(tmp_path / name, shape, words=("import.line_width=8",))
        assert np.array_equal(found == 1, mask), name


def test_later_shapes_are_on_top_and_special_labels_mean_background_and_ignored(tmp_path: Path) -> None:
    shapes = [labelme_shape(*each) for each in (("cat", corners(CAT)), ("_background_", corners(DOG)))]
    mask = labelme_mask(tmp_path / "b", *shapes)
    assert np.array_equal(mask, expected(1, 2, 2))
    mask = labelme_mask(tmp_path / "i", shapes[0], labelme_shape("__ignore__", corners(DOG)))
    assert np.array_equal(mask, expected(1, 0, 2))
    # Where pixels nobody annotated are ignored, those somebody called background are not.
    mask = labelme_mask(tmp_path / "u", *shapes, words=("import.unlabelled=ignore",))
    assert np.array_equal(mask, expected(2, 1, 0))
    assert ClassTable.from_csv(tmp_path / "u/out/classes.csv").names == ("_background_", "cat")
    put(tmp_path / "l/e/labels.txt", "zebra\ncat\n")
    labelme_mask(tmp_path / "l", *shapes, words=("import.unlabelled=ignore",))
    assert ClassTable.from_csv(tmp_path / "l/out/classes.csv").names == ("_background_", "zebra", "cat")


def test_folders_decide_between_images_of_labelme_with_one_name_and_labels_lose_blanks(tmp_path: Path) -> None:
    for split in ("train", "val"):
        put(tmp_path / "e/images" / split / "a.jpg", photo(split))
        shapes = [
            labelme_shape("cat", corners(CAT)),
            labelme_shape("cat ", corners(DOG)),
            labelme_shape("ape", corners(DOG)),
        ]
        content = labelme_content("a", shapes) | {"imagePath": f"../../images/{split}/a.jpg"}
        put(tmp_path / "e/json" / split / "a.json", content)
    put(tmp_path / "e/labels.txt", "zebra\ncat\n")
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert {(image.split, image.image) for image in imported.images} == {
        ("train", "images/train/a.jpg"), ("val", "images/val/a.jpg")
    }  # fmt: skip
    assert imported.names[:2] == ("ape", "cat")
    assert "labels.txt does not list ape, so that the classes are in alphabetical order." in imported.notes


def test_an_image_that_is_not_there_is_taken_out_of_the_json_file(tmp_path: Path) -> None:
    content = labelme_content("a", [labelme_shape("cat", corners(CAT))], to_base64(photo("a")))
    put(tmp_path / "e" / "sub" / "a.json", content)
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert (tmp_path / "out/images/a.jpg").read_bytes() == photo("a")
    assert "taken out of its JSON files" in " ".join(imported.notes)
    content["imageData"] = None
    put(tmp_path / "e" / "sub" / "a.json", content)
    with pytest.raises(DataError, match=r"a\.json: there is no image \.\.\\photos\\a\.jpg .*or save the files"):
        import_here(tmp_path / "e", tmp_path / "other")


def test_labels_txt_gives_the_order_and_images_without_a_file_are_counted(tmp_path: Path) -> None:
    write_labelme(tmp_path / "e")
    put(tmp_path / "e" / "labels.txt", "__ignore__\n_background_\ndog\ncat\nbird\n")
    put(tmp_path / "e" / "x.jpg", photo("x"))
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert imported.names == ("dog", "cat", "bird", "background")
    assert imported.notes == ("1 image has no JSON file: left out.",)


def test_an_image_that_two_files_of_labelme_annotate_is_refused(tmp_path: Path) -> None:
    write_labelme(tmp_path / "e")
    put(tmp_path / "e" / "b_again.json", labelme_content("a", [labelme_shape("dog", corners(CAT))]))
    with pytest.raises(DataError, match=r"b_again\.json: annotates .*a\.jpg, as .*a\.json does\. Remove one"):
        import_here(tmp_path / "e", tmp_path / "out")


def test_labelme_rectangles_may_have_four_corners_and_thin_points_have_pixels(tmp_path: Path) -> None:
    box = labelme_shape("cat", [[10, 10], [30, 10], [30, 30], [10, 30]], "rectangle")
    mask = labelme_mask(tmp_path / "box", box)
    assert (mask[10:30, 10:30] == mask[15, 15]).all() and (mask == mask[15, 15]).sum() == 400
    point = labelme_mask(tmp_path / "point", labelme_shape("cat", [[30, 20]], "point"), words=("import.line_width=1",))
    assert 0 < (point == point[20, 30]).sum() < 9


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (labelme_shape("cat", [[1, 2], [3, 4], [5, 6]], "rectangle"), "shape 1: is a rectangle with 3 points, which"),
        (labelme_shape(" ", [[1, 2], [3, 4], [5, 6]]), "a shape has an empty label"),
        (labelme_shape("cat", [[1, 2]]), "shape 1: is a polygon with 1 points, at least 3 are needed"),
        (labelme_shape("cat", [[1, 2], [3, 4]], "star"), "shape 1: has shape_type 'star', which is not known"),
        (labelme_shape("cat", [[1, 2], [3, 4]], "mask", mask="????"), "shape 1: mask: "),
        (
            labelme_shape("cat", [[0, 0], [999, 999]], "mask", mask=to_base64(png(np.zeros((1000, 1000), np.uint8)))),
            "shape 1: mask: the header declares 1000 x 1000 pixels, more than the limit",
        ),
        (labelme_shape("cat", [[1, 2], [3]]), "shape 1: a polygon must be a list of numbers"),
        ({"label": 3, "points": []}, "a shape label must be text, got 3"),
    ],
)
def test_a_wrong_shape_of_labelme_is_named(shape: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"a\.json: {message}"):
        labelme_mask(tmp_path, shape)


# ---- Label Studio


def studio_mask(root: Path, *results: dict[str, Any], **more: Any) -> np.ndarray:
    put(root / "e" / "a.jpg", photo("a"))
    put(root / "e" / "tasks.json", [studio_task(1, "/data/local-files/?d=set/a.jpg", list(results), **more)])
    import_here(root / "e", root / "out")
    return masks_of(root / "out")["a"]


def test_the_image_of_a_task_of_label_studio_is_the_one_that_is_annotated(tmp_path: Path) -> None:
    file = write_label_studio(tmp_path / "e")
    tasks = json.loads(file.read_text())
    put(tmp_path / "e" / "small.jpg", Image.new("RGB", (8, 8)))
    for task in tasks:
        task["data"] = {"preview": "small.jpg", **task["data"]}
    put(file, tasks)
    assert len(import_here(tmp_path / "e", tmp_path / "out").images) == 4


def test_label_studio_brushes_ellipses_and_rotated_boxes(tmp_path: Path) -> None:
    mask = expected(1, 0, 0).astype(bool)
    brush = studio_region("cat", "brush", {"format": "rle", "rle": encode_brush(mask)})
    assert np.array_equal(studio_mask(tmp_path / "brush", brush) == 1, mask)
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    value = {"x": 50, "y": 50, "radiusX": 25, "radiusY": 12.5}
    ellipse = studio_region("cat", "ellipse", value)
    assert np.array_equal(studio_mask(tmp_path / "e0", ellipse) == 1, ((x - 32) / 16) ** 2 + ((y - 24) / 6) ** 2 <= 1)
    turned = studio_region("cat", "ellipse", value | {"rotation": 90})
    difference = (studio_mask(tmp_path / "e90", turned) == 1) ^ (((y - 24) / 16) ** 2 + ((x - 32) / 6) ** 2 <= 1)
    assert difference.sum() <= 4
    shape = read_rectangle({"x": 50, "y": 50, "width": 25, "height": 25, "rotation": 90}, Size(HEIGHT, WIDTH))
    assert np.allclose(shape.rings[0], [[32, 24], [32, 40], [20, 40], [20, 24]])  # pyright: ignore[reportAttributeAccessIssue]


def test_regions_of_label_studio_may_have_answers_to_questions(tmp_path: Path) -> None:
    region = studio_region("cat", "polygon", {"points": percent(CAT)})
    del region["value"]["polygonlabels"]
    region["type"] = "polygon"
    common = {key: region[key] for key in ("id", "to_name", "original_width", "original_height")}
    answers = [
        {**common, "type": "labels", "value": {"labels": ["cat"]}},
        {**common, "type": "choices", "value": {"choices": ["old"]}},
        {**common, "type": "textarea", "value": {"text": ["seen from above"]}},
    ]
    assert np.array_equal(studio_mask(tmp_path, region, *answers), expected(1, 1, 2))


def test_a_task_of_label_studio_with_two_annotated_pictures_is_refused(tmp_path: Path) -> None:
    regions = [
        studio_region("cat", "polygon", {"points": percent(box)}, to_name=name, id=name)
        for box, name in ((CAT, "before"), (DOG, "after"))
    ]
    studio_mask(tmp_path / "unnamed", regions[0], {key: value for key, value in regions[1].items() if key != "to_name"})
    with pytest.raises(DataError, match=r"task 1: has regions in 2 pictures \(before, after\)\. Make a task of each"):
        studio_mask(tmp_path, *regions)


def test_the_newest_annotation_that_is_not_cancelled_is_used_and_open_tasks_are_left_out(tmp_path: Path) -> None:
    file = write_label_studio(tmp_path / "e")
    tasks = json.loads(file.read_text())
    polygon = studio_region("cat", "polygon", {"points": percent(DOG)})
    tasks[0]["annotations"] += [
        {"id": 5, "result": [polygon], "created_at": "2026-11-03T10:00:00Z"},
        {"id": 6, "result": [], "created_at": "2026-11-04T10:00:00Z", "was_cancelled": True},
        {"id": 7, "result": [], "created_at": "2026-10-01T10:00:00Z"},
    ]
    tasks[1]["annotations"] = []
    tasks[2]["completions"] = tasks[2].pop("annotations")  # before 2021
    put(file, tasks)
    imported = import_here(tmp_path / "e", tmp_path / "out")
    masks = masks_of(tmp_path / "out")
    assert np.array_equal(masks["0a1b2c3d-a"] == 1, expected(0, 1, 0) == 1) and len(masks) == 3
    assert "1 task has no annotation" in imported.notes[0] and "1 task has several annotations" in imported.notes[1]


def test_uploaded_names_are_found_with_and_without_their_digits(tmp_path: Path) -> None:
    write_label_studio(tmp_path / "e", ["a"])
    (tmp_path / "e/upload/0a1b2c3d-a.jpg").rename(tmp_path / "e/upload/a.jpg")
    import_here(tmp_path / "e", tmp_path / "out")
    put(tmp_path / "e/upload/0a1b2c3d-a.jpg", photo("other"))
    with pytest.raises(DataError, match=r"task 1: its image may be .*0a1b2c3d-a\.jpg or .*a\.jpg\. Remove one"):
        import_here(tmp_path / "e", tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_rotation": 90}, "a picture that was rotated in Label Studio"),
        ({"original_width": 0}, "has the original size 48 x 0"),
        ({"value": {"points": "x", "polygonlabels": ["cat"]}}, "points must be a list, got 'x'"),
        ({"value": {"points": [[1, 2]], "polygonlabels": ["cat"]}}, "a polygon has 1 points"),
        (
            {"type": "brushlabels", "value": {"format": "rle", "rle": [1, 2], "brushlabels": ["cat"]}},
            "a brush are truncated",
        ),
    ],
)
def test_a_wrong_region_of_label_studio_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"tasks\.json: task 1: region \w+: .*{message}"):
        studio_mask(tmp_path, studio_region("cat", "polygon", {"points": percent(CAT)}) | change)


def test_json_min_is_recognised_and_refused(tmp_path: Path) -> None:
    put(tmp_path / "e/min.json", [{"image": "a.jpg", "id": 1, "label": [{"points": [], "original_width": 64}]}])
    with pytest.raises(
        DataError, match=r"task 1: has no annotations: this may be JSON-MIN. Export it from Label Studio"
    ):
        import_here(tmp_path / "e", tmp_path / "out")


def test_predictions_that_nobody_has_accepted_are_refused(tmp_path: Path) -> None:
    tasks = [{"data": {"image": "a.jpg"}, "predictions": [{"result": [{"original_width": 64}]}]}]
    put(tmp_path / "e/tasks.json", tasks)
    with pytest.raises(DataError, match=r"task number 1: has predictions only, which nobody has accepted"):
        import_here(tmp_path / "e", tmp_path / "out")


# ---- Roboflow


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename, cat\na.jpg, 1\n", r":1: the header must be Pixel Value, Class"),
        ("Pixel Value, Class\n300, cat\n", r":2: a line must be a value from 0 to 255 and a class"),
        ("Pixel Value, Class\n1, cat\n1, dog\n", r":3: the value or class is listed twice"),
        ("Pixel Value, Class\n", r": lists no classes"),
        ("Pixel Value, Class\n0, background\n1, cat\n", r"value 2 \(80 pixels\) is not in _classes\.csv"),
    ],
)
def test_wrong_classes_of_roboflow_are_named(text: str, message: str, tmp_path: Path) -> None:
    write_roboflow(tmp_path / "e")
    for split in ("train", "valid"):
        put(tmp_path / "e" / split / "_classes.csv", text)
    with pytest.raises(DataError, match=message):
        import_here(tmp_path / "e", tmp_path / "out", "import.format=roboflow")


def test_a_class_file_of_roboflow_above_those_of_splits_reads_no_image_twice(tmp_path: Path) -> None:
    write_roboflow(tmp_path / "e")
    found = import_here(tmp_path / "e", tmp_path / "one")
    shutil.copy(tmp_path / "e/train/_classes.csv", tmp_path / "e/_classes.csv")
    again = import_here(tmp_path / "e", tmp_path / "two")
    assert len(again.images) == len(found.images)


def test_images_of_roboflow_without_a_mask_are_named(tmp_path: Path) -> None:
    write_roboflow(tmp_path / "e")
    (tmp_path / "e/valid/a_jpg.rf.11aa_mask.png").rename(tmp_path / "e/valid/A_jpg.rf.11aa_mask.png")
    with pytest.raises(DataError, match=r"its mask is called A_jpg\.rf\.11aa_mask\.png: upper and lower case differ"):
        import_here(tmp_path / "e", tmp_path / "out")
    (tmp_path / "e/valid/A_jpg.rf.11aa_mask.png").unlink()
    with pytest.raises(DataError, match=r"a_jpg\.rf\.11aa\.jpg: has no mask a_jpg\.rf\.11aa_mask\.png beside it"):
        import_here(tmp_path / "e", tmp_path / "out")
