"""Lists and folders become records, or one sentence that names file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.records import folder_records, odgt_records
from semseg.data import header_cache
from semseg.data.geometry import Size
from semseg.data.header_cache import read_header_only
from semseg.data.records import Record, split_by_hash
from semseg.errors import DataError

GOOD = {"fpath_img": "images/a.jpg", "fpath_segm": "annotations/a.png", "width": 640, "height": 480}


def write_list(folder: Path, *lines: str | bytes) -> Path:
    raw = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    path = folder / "train.odgt"
    path.write_bytes(raw)
    return path


def draw(path: Path, height: int = 6, width: int = 8, orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path, exif=exif)
    return path


# ---- lists


def test_a_line_becomes_a_record(tmp_path: Path) -> None:
    path = write_list(tmp_path, json.dumps(GOOD))
    root = str(tmp_path)
    assert odgt_records(path, tmp_path) == [
        Record(f"{root}/images/a.jpg", f"{root}/annotations/a.png", Size(480, 640), f"{path}:1")
    ]


@pytest.mark.reliability
def test_c14_blank_lines_byte_order_mark_and_crlf_are_fine(tmp_path: Path) -> None:
    line = json.dumps(GOOD).encode()
    path = write_list(tmp_path, b"\xef\xbb\xbf" + line + b"\r", b"\r", b"  ", line + b"\r", b"")
    assert [record.origin for record in odgt_records(path, tmp_path)] == [f"{path}:1", f"{path}:4"]


@pytest.mark.reliability
def test_c14_extra_keys_null_labels_repeats_and_inner_dots_are_fine(tmp_path: Path) -> None:
    inner = {**GOOD, "fpath_img": "images/../images/a.jpg", "fpath_segm": None, "dbName": "ADE20K"}
    absolute = {**GOOD, "fpath_img": f"{tmp_path}/images/a.jpg"}
    found = odgt_records(write_list(tmp_path, json.dumps(inner), json.dumps(absolute)), tmp_path)
    assert [record.image for record in found] == [f"{tmp_path}/images/a.jpg"] * 2
    assert found[0].label is None


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"fpath_img": "a.jpg", "width": 3, "height": 4}', "fpath_segm is missing"),
        (json.dumps(GOOD) + ",", "not one JSON object"),
        ("images/a.jpg annotations/a.png", "not one JSON object"),
        (f"[{json.dumps(GOOD)}]", "must be a JSON object, this is a list"),
        (json.dumps({**GOOD, "width": -640}), "width must be a whole number of pixels above 0, got -640"),
        (json.dumps({**GOOD, "height": 0}), "height must be a whole number of pixels above 0, got 0"),
        (json.dumps({**GOOD, "height": "480"}), "height must be .* got '480'"),
        (json.dumps({**GOOD, "height": 480.0}), "height must be .* got 480.0"),
        (json.dumps({**GOOD, "height": True}), "height must be .* got True"),
        (json.dumps({**GOOD, "fpath_img": "../../etc/passwd"}), "leaves the data folder"),
        (json.dumps({**GOOD, "fpath_segm": "/etc/passwd"}), "leaves the data folder"),
        (json.dumps({**GOOD, "fpath_img": ""}), "fpath_img must be a path"),
        (json.dumps({**GOOD, "fpath_img": "a\0b"}), "fpath_img must be a path"),
        (json.dumps({**GOOD, "fpath_img": 7}), "fpath_img must be a path"),
        (json.dumps(GOOD).encode().replace(b"images/a", b"images/\xff"), "not UTF-8"),
    ],
)
def test_c14_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = write_list(tmp_path, json.dumps(GOOD), "", line)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:3: .*{message}") as caught:
        odgt_records(path, tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_data_is_one_line_with_place_and_remedy(tmp_path: Path) -> None:
    for root, list_file, missing in (
        (tmp_path / "nowhere", tmp_path / "nowhere/train.odgt", "data folder"),
        (tmp_path, tmp_path / "train.odgt", "list of images"),
    ):
        with pytest.raises(DataError, match=missing) as caught:
            odgt_records(list_file, root, hint="Get it with: make ade20k")
        assert str(tmp_path) in str(caught.value)
        assert str(caught.value).endswith("Get it with: make ade20k")
        assert "\n" not in str(caught.value)


@pytest.mark.reliability
def test_c15_an_empty_list_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names no image"):
        odgt_records(write_list(tmp_path, "", "  "), tmp_path)


# ---- folders


def test_folders_pair_by_relative_stem_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "a/10.png", "a/9.webp", "1.tif", "a.b.bmp"):
        draw(tmp_path / "images" / name)
        draw((tmp_path / "masks" / name).with_suffix(".png"))
    draw(tmp_path / "images/.hidden.png")
    (tmp_path / "images/notes.txt").write_text("no image")
    found = folder_records(tmp_path / "images", tmp_path / "masks", cache_dir=tmp_path / "cache")
    assert [Path(record.image).relative_to(tmp_path / "images").as_posix() for record in found] == [
        "1.tif",
        "a/10.png",
        "a/9.webp",
        "a.b.bmp",
        "b/2.JPG",
    ]
    assert all(Path(str(record.label)).stem == Path(record.image).stem for record in found)
    assert {record.size for record in found} == {Size(6, 8)}


def test_unpaired_files_are_counted_and_the_first_named(tmp_path: Path) -> None:
    for index in range(5):
        draw(tmp_path / f"images/{index}.jpg")
    for name in ("0", "9"):
        draw(tmp_path / f"masks/{name}.png")
    with pytest.raises(DataError, match=r"4 of 5 images .* \(1, 2, 3, \.\.\.\); 1 of 2 masks .* \(9\)"):
        folder_records(tmp_path / "images", tmp_path / "masks", cache_dir=tmp_path)


def test_two_images_of_one_stem_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "images/a.jpg")
    draw(tmp_path / "images/a.png")
    with pytest.raises(DataError, match="differ only in their suffix"):
        folder_records(tmp_path / "images", cache_dir=tmp_path)


def test_missing_and_empty_folders_have_different_messages(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"folder of images not found: .*nowhere.* Try this\."):
        folder_records(tmp_path / "nowhere", hint="Try this.")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image in this folder"):
        folder_records(tmp_path / "empty")
    draw(tmp_path / "images/a.jpg")
    with pytest.raises(DataError, match="folder of masks not found"):
        folder_records(tmp_path / "images", tmp_path / "masks")


def test_a_turned_photo_has_the_size_of_its_mask(tmp_path: Path) -> None:
    draw(tmp_path / "images/stored.jpg", 6, 8, orientation=6)
    draw(tmp_path / "masks/stored.png", 6, 8)
    draw(tmp_path / "images/upright.jpg", 6, 8, orientation=6)
    draw(tmp_path / "masks/upright.png", 8, 6)
    with_masks = folder_records(tmp_path / "images", tmp_path / "masks", cache_dir=tmp_path)
    assert [record.size for record in with_masks] == [Size(6, 8), Size(8, 6)]
    alone = folder_records(tmp_path / "images", cache_dir=tmp_path)
    assert [record.size for record in alone] == [Size(8, 6), Size(8, 6)]
    assert read_header_only(str(tmp_path / "images/stored.jpg")).upright == Size(8, 6)


def test_headers_are_read_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = header_cache.read_header_only
    monkeypatch.setattr(header_cache, "read_header_only", lambda path: (opened.append(path), original(path))[1])
    for name in "abc":
        draw(tmp_path / f"images/{name}.png")
    scan = [folder_records(tmp_path / "images", cache_dir=tmp_path / "cache") for _ in range(2)]
    assert scan[0] == scan[1]
    assert len(opened) == 3
    draw(tmp_path / "images/b.png", 20, 30)
    assert folder_records(tmp_path / "images", cache_dir=tmp_path / "cache")[1].size == Size(20, 30)
    assert len(opened) == 4
    (cache_file,) = (tmp_path / "cache").iterdir()  # no temporary file is left
    for damage in ("not json", "[1]", json.dumps({opened[0]: "x"})):
        cache_file.write_text(damage)
        assert len(folder_records(tmp_path / "images", cache_dir=tmp_path / "cache")) == 3


def test_a_cache_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    draw(tmp_path / "images/a.png")
    (tmp_path / "file").write_text("")
    assert len(folder_records(tmp_path / "images", cache_dir=tmp_path / "file")) == 1


def test_a_broken_header_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_text("<!DOCTYPE html>")
    with pytest.raises(DataError, match=r"a\.jpg: the header cannot be read"):
        folder_records(tmp_path / "images", cache_dir=tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_header_only(str(tmp_path / "none.jpg"))


# ---- split


def some_records(root: str, names: range) -> list[Record]:
    return [Record(f"{root}/images/{index:04d}.jpg", None, Size(1, 1), root) for index in names]


def test_a_split_holds_out_about_the_fraction_and_loses_nobody() -> None:
    records = some_records("/data", range(1000))
    kept, held_out = split_by_hash(records, 0.1, "/data")
    assert 70 < len(held_out) < 130
    assert sorted(kept + held_out) == records


def test_a_record_keeps_its_side_when_others_come_or_the_folder_moves() -> None:
    before = {record.image[6:] for record in split_by_hash(some_records("/data", range(500)), 0.2, "/data")[1]}
    after = {record.image[6:] for record in split_by_hash(some_records("/home", range(900)), 0.2, "/home")[1]}
    assert before == {path for path in after if int(path[-8:-4]) < 500}


def test_no_side_is_empty() -> None:
    for fraction in (0.001, 0.999):
        kept, held_out = split_by_hash(some_records("/d", range(2)), fraction, "/d")
        assert len(kept) == len(held_out) == 1
    with pytest.raises(DataError, match="cannot be split"):
        split_by_hash(some_records("/d", range(1)), 0.5, "/d")
    with pytest.raises(ValueError, match="fraction"):
        split_by_hash(some_records("/d", range(9)), 1.0, "/d")
