"""Which image an export means by a name, and what of an export or its folder is not imported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.exports import (
    CAT,
    NAMES,
    corners,
    import_here,
    labelme_content,
    labelme_shape,
    percent,
    photo,
    put,
    studio_region,
    studio_task,
    write_coco,
    write_label_studio,
    write_labelme,
    write_voc,
    write_yolo,
)
from semseg.errors import DataError


def move(root: Path, places: dict[str, str]) -> None:
    """Move images within an export."""
    for name, place in places.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / name).rename(root / place)


def rename_coco_images(file: Path, names: list[str]) -> None:
    """Change the names that a COCO file has for its images."""
    content = json.loads(file.read_text())
    for image, name in zip(content["images"], names, strict=True):
        image["file_name"] = name
    put(file, content)


def test_the_image_of_another_name_of_coco_is_not_taken_for_one_that_is_missing(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "e", ["a", "b", "c"])
    rename_coco_images(file, ["cam1/1.jpg", "cam2/1.jpg", "cam2/2.jpg"])
    move(tmp_path / "e/images", {"b.jpg": "cam2/1.jpg", "c.jpg": "cam2/2.jpg"})
    (tmp_path / "e/images/a.jpg").unlink()
    message = r"image 1: there is no image cam1/1\.jpg below .*cam2/1\.jpg is what the export calls cam2/1\.jpg"
    with pytest.raises(DataError, match=message):
        import_here(tmp_path / "e", tmp_path / "out")
    rename_coco_images(file, ["elsewhere/9.jpg", "elsewhere/1.jpg", "elsewhere/2.jpg"])  # folders of another machine
    move(tmp_path / "e/images", {"cam2/1.jpg": "1.jpg", "cam2/2.jpg": "2.jpg"})
    put(tmp_path / "e/images/9.jpg", photo("9"))
    assert len(import_here(tmp_path / "e", tmp_path / "other").images) == 3


def test_the_image_of_another_task_of_label_studio_is_not_taken_for_one_that_is_missing(tmp_path: Path) -> None:
    region = studio_region("cat", "polygon", {"points": percent(CAT)})
    tasks = [studio_task(number, f"/data/local-files/?d=cam{number}/1.jpg", [region]) for number in (1, 2)]
    put(tmp_path / "e/tasks.json", tasks)
    put(tmp_path / "e/cam2/1.jpg", photo())
    with pytest.raises(DataError, match=r"task 1: there is no image cam1/1\.jpg"):
        import_here(tmp_path / "e", tmp_path / "out")


def test_names_of_all_files_of_an_export_are_known_before_the_first_image_is_looked_for(tmp_path: Path) -> None:
    train = write_coco(tmp_path / "coco", ["a"]).rename(tmp_path / "coco/annotations/train.json")
    val = write_coco(tmp_path / "coco", ["b", "c"]).rename(tmp_path / "coco/annotations/val.json")
    rename_coco_images(train, ["cam1/1.jpg"])
    rename_coco_images(val, ["cam2/1.jpg", "cam2/2.jpg"])
    move(tmp_path / "coco/images", {"b.jpg": "cam2/1.jpg", "c.jpg": "cam2/2.jpg"})
    (tmp_path / "coco/images/a.jpg").unlink()
    with pytest.raises(DataError, match=r"train\.json: image 1: there is no image cam1/1\.jpg"):
        import_here(tmp_path / "coco", tmp_path / "out")

    put(tmp_path / "yolo/data.yaml", "names: [cat]\ntrain: train.txt\nval: val.txt\n")
    put(tmp_path / "yolo/train.txt", "./images/cam1/1.jpg\n")
    put(tmp_path / "yolo/val.txt", "./images/cam2/1.jpg\n")
    put(tmp_path / "yolo/images/cam2/1.jpg", photo())
    with pytest.raises(DataError, match=r"train\.txt:1: there is no image \./images/cam1/1\.jpg"):
        import_here(tmp_path / "yolo", tmp_path / "out")

    put(tmp_path / "yolo/data.yaml", "names: [cat]\ntrain: train.txt\nval: images/cam2\n")
    with pytest.raises(DataError, match=r"train\.txt:1: there is no image \./images/cam1/1\.jpg"):
        import_here(tmp_path / "yolo", tmp_path / "out")
    put(tmp_path / "yolo/train.txt", "../datasets/yolo/images/cam2/1.jpg\n")  # the same image in both splits
    put(tmp_path / "yolo/labels/cam2/1.txt", "0 0 0 0 1 1 1\n")
    assert len(import_here(tmp_path / "yolo", tmp_path / "yolo_out").images) == 1

    write_labelme(tmp_path / "labelme/cam1", ["1"])
    write_labelme(tmp_path / "labelme/cam2", ["1"])
    (tmp_path / "labelme/cam1/1.jpg").unlink()
    with pytest.raises(DataError, match=r"cam1/1\.json: there is no image \S*photos\S*1\.jpg"):
        import_here(tmp_path / "labelme", tmp_path / "out")

    write_voc(tmp_path / "voc", ["cam1/1", "cam2/1"])
    (tmp_path / "voc/JPEGImages/cam1/1.jpg").unlink()
    with pytest.raises(DataError, match=r"cam1/1\.png: there is no image cam1/1 below"):
        import_here(tmp_path / "voc", tmp_path / "out")


def test_the_image_of_a_task_of_label_studio_is_not_that_of_another_key(tmp_path: Path) -> None:
    region = studio_region("cat", "polygon", {"points": percent(CAT)})
    task = studio_task(1, "s3://bucket/a.jpg", [region])
    task["data"]["source"] = "photos/a.jpg"
    put(tmp_path / "e/tasks.json", [task])
    put(tmp_path / "e/photos/a.jpg", photo())
    assert len(import_here(tmp_path / "e", tmp_path / "out").images) == 1


def test_an_image_above_another_of_its_name_is_the_one_without_a_folder(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "coco", ["a", "b"])
    rename_coco_images(file, ["a.jpg", "sub/a.jpg"])
    move(tmp_path / "coco/images", {"b.jpg": "sub/a.jpg"})
    assert {image.image for image in import_here(tmp_path / "coco", tmp_path / "o1").images} == {
        "images/a.jpg", "images/sub/a.jpg"
    }  # fmt: skip
    write_voc(tmp_path / "voc", ["a"])
    put(tmp_path / "voc/JPEGImages/sub/a.jpg", photo("b"))
    imported = import_here(tmp_path / "voc", tmp_path / "o2")
    assert (tmp_path / "o2/images/a.jpg").read_bytes() == photo("a") and len(imported.images) == 1
    assert imported.notes == ("1 image has no mask: left out.",)


def test_images_that_coco_does_not_list_are_counted(tmp_path: Path) -> None:
    write_coco(tmp_path / "e")
    put(tmp_path / "e/images/x.jpg", photo("x"))
    notes = import_here(tmp_path / "e", tmp_path / "out").notes
    assert "1 image in no COCO file, or wrong there: left out." in notes


def test_a_mask_of_voc_that_is_no_png_is_refused(tmp_path: Path) -> None:
    write_voc(tmp_path / "e")
    put(tmp_path / "e/SegmentationClass/x.jpg", photo("x"))
    with pytest.raises(DataError, match=r"SegmentationClass/x\.jpg: masks are PNG files"):
        import_here(tmp_path / "e", tmp_path / "out")


def test_label_files_of_yolo_without_an_image_are_counted(tmp_path: Path) -> None:
    write_yolo(tmp_path / "e")
    put(tmp_path / "e/train/labels/x.txt", "0 0 0 0 1 1 1\n")
    put(tmp_path / "e/train/labels/classes.txt", "cat\ndog\n")  # as LabelImg writes it
    notes = import_here(tmp_path / "e", tmp_path / "out").notes
    assert "1 label file without an image that is read: left out." in notes


def test_paths_of_yolo_may_be_absolute_on_windows(tmp_path: Path) -> None:
    file = write_yolo(tmp_path / "e")
    file.write_text(file.read_text().replace("../train", r"C:\data\train").replace("../valid", r"C:\data\valid"))
    assert len(import_here(tmp_path / "e", tmp_path / "out").images) == len(NAMES)


def test_a_painted_region_that_cannot_be_read_is_refused_and_points_are_left_out(tmp_path: Path) -> None:
    file = write_label_studio(tmp_path / "e", ["a"])
    tasks = json.loads(file.read_text())
    point = studio_region("cat", "keypoint", {"x": 1, "y": 1, "keypointlabels": ["cat"]})
    tasks[0]["annotations"][0]["result"].append(point)
    put(file, tasks)
    notes = import_here(tmp_path / "e", tmp_path / "out").notes
    assert "1 result without an area or a label: left out." in notes
    mask = studio_region("cat", "bitmask", {"imageDataURL": "data:image/png;base64,"})
    for others in (tasks[0]["annotations"][0]["result"], []):
        tasks[0]["annotations"][0]["result"] = [*others, mask]
        put(file, tasks)
        with pytest.raises(
            DataError, match=r"is of the type bitmasklabels, which cannot be read\. Draw it again as one of"
        ):
            import_here(tmp_path / "e", tmp_path / "other")


def test_labels_of_label_studio_beside_their_regions_and_in_texts_are_no_areas(tmp_path: Path) -> None:
    polygon = studio_region("cat", "polygon", {"points": percent(CAT)}) | {"id": "x", "type": "polygon"}
    del polygon["value"]["polygonlabels"]
    label = studio_region("cat", "", {"points": percent(CAT)}) | {"id": "x"}  # of the tag Labels
    text = {"id": "t", "type": "hypertextlabels", "value": {"start": 0, "end": 3, "hypertextlabels": ["word"]}}
    put(tmp_path / "e/tasks.json", [studio_task(1, "a.jpg", [polygon, label, text])])
    put(tmp_path / "e/a.jpg", photo())
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert imported.names == ("cat", "background") and len(imported.images) == 1
    mask = polygon | {"type": "bitmask"}
    put(tmp_path / "e/tasks.json", [studio_task(1, "a.jpg", [mask, label])])
    with pytest.raises(DataError, match="is of the type bitmasklabels, which cannot be read"):
        import_here(tmp_path / "e", tmp_path / "other")


@pytest.mark.parametrize("path", [".", "..", "", "a/"])
def test_a_path_of_labelme_that_names_no_image_is_refused(path: str, tmp_path: Path) -> None:
    write_labelme(tmp_path / "e", ["b"])
    content = labelme_content("a", [labelme_shape("cat", corners(CAT))]) | {"imagePath": path}
    put(tmp_path / "e/a.json", content)
    with pytest.raises(DataError, match=r"a\.json: .*no image"):
        import_here(tmp_path / "e", tmp_path / "out")
