"""Files of a data set are found whatever they are called and wherever they lie, or counted in one line."""

from __future__ import annotations

import os
import unicodedata
import zipfile
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.in_process import configured
from semseg.checks.dataset import ScannedSplit, check_files
from semseg.config.schema import DataConfig
from semseg.data import store
from semseg.data.labels import read_label
from semseg.data.scan import scan_pair
from semseg.data.sources import DataSource, require_masks
from semseg.errors import DataError

pytestmark = pytest.mark.reliability

COMPOSED, DECOMPOSED = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")


@pytest.fixture(autouse=True)
def no_cache_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def draw(*paths: Path) -> None:
    """Files of 4 x 4 pixels, all of id 1."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".jfif": "JPEG", ".jpe": "JPEG"}.get(path.suffix.lower())
        Image.fromarray(np.ones((4, 4), np.uint8)).save(path, kind)


def draw_pairs(root: Path, *stems: str) -> None:
    for stem in stems:
        draw(root / f"images/{stem}.jpg", root / f"masks/{stem}.png")


@cache
def folder_config() -> DataConfig:
    """The configuration of data=folder, composed once."""
    return configured("data=folder", "data.num_classes=3", "data.val_fraction=0").data


def source(root: Path, *words: str) -> DataSource:
    """The data set below `root`, with words such as data.train.images=photos."""
    config = deepcopy(folder_config())
    for word in (f"data.root={root}", *words):
        key, _, value = word.removeprefix("data.").partition("=")
        split, _, name = key.rpartition(".")
        setattr(getattr(config, split) if split else config, name, value)
    return DataSource(config)


def pairs(root: Path, *words: str, split: str = "train") -> dict[str, str]:
    """Image -> mask of a split, both below `root`."""
    return {
        os.path.relpath(record.image, root): os.path.relpath(str(record.label), root)
        for record in source(root, *words).records(split)
    }


def unused(root: Path, *words: str) -> str:
    found = source(root, *words)
    found.survey("train")
    return found.describe_unused("train")


# ---- links


@pytest.mark.slow
def test_c29_links_to_folders_are_followed(tmp_path: Path) -> None:
    draw_pairs(tmp_path / "set", "a/0", "a/1")
    draw_pairs(tmp_path / "elsewhere", "2", "sub/3")
    for name in ("images", "masks"):
        (tmp_path / "set" / name / "b").symlink_to(tmp_path / "elsewhere" / name)
    assert pairs(tmp_path / "set") == {
        f"images/{stem}.jpg": f"masks/{stem}.png" for stem in ("a/0", "a/1", "b/2", "b/sub/3")
    }
    assert unused(tmp_path / "set") == ""


@pytest.mark.parametrize("target", ["images", "images/a", ".", ".."])
def test_c29_a_link_that_leads_back_is_not_followed_but_counted(tmp_path: Path, target: str) -> None:
    draw_pairs(tmp_path / "set", "a/0")
    (tmp_path / "set/images/a/again").symlink_to((tmp_path / "set" / target).resolve())
    assert pairs(tmp_path / "set") == {"images/a/0.jpg": "masks/a/0.png"}
    assert "1 link to a folder that is searched anyway (images/a/again)" in unused(tmp_path / "set")


def test_c29_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    draw_pairs(tmp_path / "set", "0")
    draw(tmp_path / "x/1.jpg", tmp_path / "y/2.jpg")
    (tmp_path / "x/y").symlink_to(tmp_path / "y")
    (tmp_path / "y/x").symlink_to(tmp_path / "x")
    (tmp_path / "set/images/x").symlink_to(tmp_path / "x")
    with pytest.raises(DataError, match=r"2 of 3 images .* have no mask \(x/1, x/y/2\)"):
        source(tmp_path / "set").records("train")


# ---- names


@pytest.mark.parametrize(("image", "mask"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_c30_names_pair_in_either_unicode_form(tmp_path: Path, image: str, mask: str) -> None:
    draw(tmp_path / f"images/{image}/{image}.jpg", tmp_path / f"masks/{mask}/{mask}.png")
    expected = {f"images/{image}/{image}.jpg": f"masks/{mask}/{mask}.png"}
    assert pairs(tmp_path) == expected
    (tmp_path / "list.csv").write_text(f"image,mask\nimages/{mask}/{mask}.jpg,masks/{image}/{image}.png\n")
    assert pairs(tmp_path, "data.train.list=list.csv") == expected
    (tmp_path / "stems.txt").write_text(f"{mask}/{mask}\n")
    assert pairs(tmp_path, "data.train.stems=stems.txt") == expected
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for path in (*expected, *expected.values(), "list.csv"):
            file.write(tmp_path / path, path)
    assert pairs(tmp_path / "set.zip") == expected
    listed = source(tmp_path / "set.zip", "data.train.list=list.csv").records("train")[0]
    assert read_label(str(listed.label)).tolist() == np.ones((4, 4)).tolist()


def test_c30_two_names_that_differ_in_their_form_only_are_two(tmp_path: Path) -> None:
    draw_pairs(tmp_path, COMPOSED, DECOMPOSED)
    assert pairs(tmp_path) == {f"images/{name}.jpg": f"masks/{name}.png" for name in (COMPOSED, DECOMPOSED)}


def test_c31_unusual_suffixes_are_found_and_the_rest_is_counted_in_one_line(tmp_path: Path) -> None:
    for suffix in ("jfif", "jpe", "JPG", "TIF", "tiff", "webp", "avif", "jp2", "ppm", "gif", "bmp"):
        draw(tmp_path / f"images/{suffix}.{suffix}", tmp_path / f"masks/{suffix}.png")
    draw(tmp_path / "images/pgm.pgm", tmp_path / "masks/pgm.pgm")
    assert len(pairs(tmp_path)) == 12
    for name in ("notes.txt", "b.txt", "IMG_1", ".DS_Store", "Thumbs.db", "._a.jpg", "photo.HEIC", "film.mp4"):
        (tmp_path / "images" / name).touch()
    (tmp_path / "images/nothing").mkdir()
    (tmp_path / "masks/gone.png").symlink_to(tmp_path / "nowhere.png")
    assert len(pairs(tmp_path)) == 12
    line = unused(tmp_path)
    assert line.startswith(f"train: not used below {tmp_path}: ")
    for part in (
        "2 .txt (images/b.txt, images/notes.txt)", "3 hidden (", "images/._a.jpg", "1 without suffix (images/IMG_1)",
        "1 .heic, which is not read: save as JPEG or PNG (images/photo.HEIC)", "1 .mp4 (images/film.mp4)",
        "1 empty (images/nothing)", "1 broken link (masks/gone.png)",
    ):  # fmt: skip
        assert part in line
    found = source(tmp_path)
    records, problems = found.survey("train")
    notices = check_files(ScannedSplit("train", records[:0], [], problems, unused=found.describe_unused("train")))
    assert (line in [notice.text for notice in notices]) and "\n" not in line


def test_c31_without_any_image_the_line_is_part_of_the_error(tmp_path: Path) -> None:
    draw(tmp_path / "masks/a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.heic").touch()
    with pytest.raises(DataError, match=r"no image in this folder .* Not used: 1 \.heic, which is not read"):
        source(tmp_path).records("train")


@pytest.mark.parametrize("name", ["a[1]", "*", "a?b", "{x}", "a b", "a,b", "a=b", "it's", "-a", "100%d", "a$b", "#1"])
def test_c33_names_with_the_characters_of_patterns_are_names(tmp_path: Path, name: str) -> None:
    draw(tmp_path / name / f"im {name}/{name}.jpg", tmp_path / name / f"ma {name}/{name}.png")
    found = pairs(tmp_path / name, f"data.train.images=im {name}", f"data.train.masks=ma {name}")
    assert found == {f"im {name}/{name}.jpg": f"ma {name}/{name}.png"}


def test_c35_names_that_are_not_utf8_are_counted_in_one_line_of_plain_characters(tmp_path: Path) -> None:
    draw_pairs(tmp_path, "0")
    for folder, name in (("images", b"caf\xe9.jpg"), ("masks", b"caf\xe9.png")):
        Path(os.fsdecode(os.fsencode(tmp_path / folder) + b"/" + name)).touch()
    assert pairs(tmp_path) == {"images/0.jpg": "masks/0.png"}
    line = unused(tmp_path)
    assert r"2 with a name that is not UTF-8 (images/caf\xe9.jpg, masks/caf\xe9.png)" in line
    line.encode()


# ---- masks beside images


@pytest.mark.parametrize(
    ("words", "files", "expected"),
    [
        (["data.mask_suffix=_L"], ["0.jpg", "0_L.png"], {"0.jpg": "0_L.png"}),
        (["data.mask_suffix=_mask"], ["x/1.png", "x/1_mask.png"], {"x/1.png": "x/1_mask.png"}),
        ([], ["a.jpg", "a.png", "b.jfif", "b.png"], {"a.jpg": "a.png", "b.jfif": "b.png"}),
        ([], ["a.tif", "a.png", "b.jpg", "b.bmp"], {"a.tif": "a.png", "b.jpg": "b.bmp"}),
        (["data.image_suffix=_photo"], ["a_photo.png", "a.png"], {"a_photo.png": "a.png"}),
        (["data.image_suffix=_rgb", "data.mask_suffix=_m"], ["a_rgb.jpg", "a_m.png"], {"a_rgb.jpg": "a_m.png"}),
        (["data.image_suffix=_L", "data.mask_suffix=_gt_L"], ["a_L.png", "a_gt_L.png"], {"a_L.png": "a_gt_L.png"}),
    ],
)  # fmt: skip
def test_c32_masks_lie_beside_images(
    tmp_path: Path, words: list[str], files: list[str], expected: dict[str, str]
) -> None:
    draw(*(tmp_path / name for name in files))
    assert pairs(tmp_path, "data.train.images=.", "data.train.masks=.", *words) == expected


def test_c32_one_folder_may_lie_in_the_other(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg", tmp_path / "labels/a.png", tmp_path / "photos/b.jpg", tmp_path / "b.png")
    (tmp_path / "stems.txt").write_text("a\n")
    words = ["data.train.images=.", "data.train.masks=labels", "data.train.stems=stems.txt"]
    assert pairs(tmp_path, *words) == {"a.jpg": "labels/a.png"}
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "labels/a.png").unlink()
    assert pairs(tmp_path, "data.train.images=photos", "data.train.masks=.") == {"photos/b.jpg": "b.png"}


def test_c32_a_mask_without_an_image_beside_it_is_reported(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg", tmp_path / "a_L.png", tmp_path / "b_L.png", tmp_path / "c.jpg")
    with pytest.raises(DataError, match=r"1 of 2 images in .* have no mask \(c\); 1 of 2 masks .* no image \(b\)"):
        source(tmp_path, "data.train.images=.", "data.train.masks=.", "data.mask_suffix=_L").records("train")


def test_the_stems_of_val_are_looked_for_in_the_folders_of_train(tmp_path: Path) -> None:
    draw_pairs(tmp_path, "a", "b", "c")
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "val.txt").write_text("c\n")
    words = ["data.train.stems=train.txt", "data.val.stems=val.txt"]
    assert set(pairs(tmp_path, *words)) == {"images/a.jpg", "images/b.jpg"}
    assert set(pairs(tmp_path, *words, split="val")) == {"images/c.jpg"}
    assert set(pairs(tmp_path, *words[1:])) == {"images/a.jpg", "images/b.jpg"}


def test_class_maps_of_prediction_for_maps_are_used_once(tmp_path: Path) -> None:
    """mode=predict writes the ids of a GeoTIFF as PNG and, with their place, as TIFF; those of a large one as TIFF."""
    draw(
        *(
            tmp_path / name
            for name in ("photos/a.tif", "masks/a_ids.png", "masks/a_ids.tif", "photos/b.tif", "masks/b_ids.tif")
        )
    )
    words = ["data.train.images=photos", "data.train.masks=masks"]
    assert pairs(tmp_path, *words, "data.mask_suffix=_ids") == {
        "photos/a.tif": "masks/a_ids.png", "photos/b.tif": "masks/b_ids.tif",
    }  # fmt: skip
    draw(*(tmp_path / "other" / name for name in ("photos/a.tif", "masks/a_m.png", "masks/a_m.tif")))
    words = ["data.train.images=other/photos", "data.train.masks=other/masks", "data.mask_suffix=_m"]
    with pytest.raises(DataError, match="differ only in their suffix: remove one of them"):
        source(tmp_path, *words).records("train")


# ---- archives of other systems


class OldZipInfo(zipfile.ZipInfo):
    """An entry whose name is written as the bytes that zipfile reads as cp437, without saying which text they are."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode("cp437"), 0


def pack(archive: Path, names: dict[str, Path]) -> Path:
    """A zip archive of files under given names."""
    with zipfile.ZipFile(archive, "w") as file:
        for name, path in names.items():
            file.writestr(OldZipInfo(name), path.read_bytes())
    return archive


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    draw(tmp_path / "a.jpg", tmp_path / "a.png")
    return tmp_path / "a.jpg", tmp_path / "a.png"


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images\\sub\\a.jpg", "masks\\sub\\a.png"),
        ("images/sub\\a.jpg", "masks/sub/a.png"),
        ("./images/sub/a.jpg", "./masks//sub/a.png"),
        ("set/images/sub/a.jpg", "set/masks/sub/a.png"),
        ("set\\images\\sub\\a.jpg", "set\\masks\\sub\\a.png"),
    ],
)
def test_c34_archives_of_other_systems_are_read(tmp_path: Path, pair: tuple[Path, Path], image: str, mask: str) -> None:
    macos = {"__MACOSX/images/sub/._a.jpg": pair[0], "images/.DS_Store": pair[0]} if "set" not in image else {}
    archive = pack(tmp_path / "set.zip", {image: pair[0], mask: pair[1], **macos})
    (record,) = source(archive).records("train")
    assert os.path.relpath(record.image, archive) == "images/sub/a.jpg"
    assert read_label(str(record.label)).shape == (4, 4)


@pytest.mark.parametrize("encoding", ["utf-8", "cp437", "cp932", "gbk"])
def test_c34_names_in_the_encoding_of_a_country_pair_and_are_found_by_lists(
    tmp_path: Path, pair: tuple[Path, Path], encoding: str
) -> None:
    name = "é" if encoding == "cp437" else "表"  # the second byte of 表 is a backslash in cp932
    stored = name.encode(encoding).decode("cp437")
    (tmp_path / "list.csv").write_text(f"image,mask\nimages/{name}.jpg,masks/{name}.png\n", encoding="utf-8")
    files = {f"images/{stored}.jpg": pair[0], f"masks/{stored}.png": pair[1], "list.csv": tmp_path / "list.csv"}
    pack(tmp_path / "set.zip", files)
    assert len(source(tmp_path / "set.zip").records("train")) == 1
    (record,) = source(tmp_path / "set.zip", "data.train.list=list.csv").records("train")
    assert read_label(str(record.label)).shape == (4, 4)


def test_c34_what_is_not_used_of_an_archive_is_counted(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    names = ("../out.jpg", "images/._a.jpg", "images/Thumbs.db", "images/inner.zip")
    archive = pack(
        tmp_path / "set.zip", {"images/a.jpg": pair[0], "masks/a.png": pair[1], **dict.fromkeys(names, pair[0])}
    )
    line = unused(archive)
    assert line.startswith("train: not used below ")
    assert "1 with a path that leads out of the archive (../out.jpg)" in line
    assert "2 hidden (images/._a.jpg, images/Thumbs.db), 1 .zip (images/inner.zip)" in line
    with pytest.raises(DataError, match=r"inner\.zip: archives inside archives are not read\. Unpack the outer one"):
        store.is_folder(archive / "images/inner.zip/images")


def test_c34_a_missing_folder_is_reported_with_what_exists_instead(tmp_path: Path) -> None:
    draw(tmp_path / "photos/a.jpg", tmp_path / "labels/a.png")
    with pytest.raises(DataError, match=r"folder of images not found.* In .* there are: labels, photos\."):
        source(tmp_path).records("train")
    for split, named in (("train", "train"), ("test", "test")):
        data = configured(
            "data=folder", f"data.root={tmp_path}", "data.num_classes=2", f"data.{split}.images=gone"
        ).data
        with pytest.raises(
            DataError, match=rf"folder of images not found.* data\.{named}\.images and data\.{named}\.masks"
        ):
            DataSource(data).require_paths(split)
    gone = configured("data=folder", "data.root=gone", "data.num_classes=2").data
    with pytest.raises(DataError, match=r"data\.train\.images and data\.train\.masks"):
        DataSource(gone).records("val")  # which are cut from those of train
    (tmp_path / "set.tar").touch()
    with pytest.raises(DataError, match=r"set\.tar is a file; of archives, only whole \.zip files are read in place"):
        source(tmp_path / "set.tar").records("train")


# ---- lists


@pytest.mark.slow
@pytest.mark.parametrize("separator", [",", ";", "\t", ", "])
@pytest.mark.parametrize(
    "header",
    ["image,mask,split", "Image,Mask,Split", "img,label,set", "file_name,annotation,Subset", "Image Path,gt,phase"],
)
def test_c36_columns_and_separators_of_lists_have_many_spellings(tmp_path: Path, header: str, separator: str) -> None:
    draw_pairs(tmp_path, "0", "1", "2")
    rows = [header, "images/0.jpg,masks/0.png,Train", 'images\\1.jpg,"masks\\1.png",VALIDATION ', "", "# x,y,z"]
    text = "\r\n".join(row.replace(",", separator) for row in [*rows, "images/2.jpg,masks/2.png,testing"])
    (tmp_path / "all.csv").write_bytes(b"\xef\xbb\xbf# made by hand\r\n" + text.encode())
    words = [f"data.{split}.list=all.csv" for split in ("train", "val", "test")]
    for number, split in enumerate(("train", "val", "test")):
        expected = {f"images/{number}.jpg": f"masks/{number}.png"}
        assert pairs(tmp_path, *words, split=split) == expected


@pytest.mark.parametrize("name", ["val", "validation", "valid", "dev", "eval", " Val ", "VALID"])
def test_c36_splits_have_many_spellings(tmp_path: Path, name: str) -> None:
    draw_pairs(tmp_path, "0")
    for list_file, text in (
        ("all.csv", f"image,mask,split\nimages/0.jpg,masks/0.png,{name}\n"),
        ("all.jsonl", f'{{"file_name": "images/0.jpg", "label": "masks/0.png", "split": "{name}"}}\n'),
    ):
        (tmp_path / list_file).write_text(text)
        assert len(pairs(tmp_path, f"data.val.list={list_file}", split="val")) == 1
        with pytest.raises(DataError, match=r"names no image of train\. It has 1 of val\."):
            source(tmp_path, f"data.train.list={list_file}").records("train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,mask,split\na.jpg,a.png,holdout\n", r"all\.csv:2: there is no split 'holdout'.*val, validation, valid"),
        ("#\nphoto,shape\na.jpg,a.png\n", r"all\.csv:2: columns image and mask are needed.*'photo,shape'.*file_name"),
        ("img,filename,mask\na.jpg,b.jpg,a.png\n", "img and filename may both be the image"),
        ("image,mask\na,b.jpg,a.png\n", r"all\.csv:2: more values than columns"),
        ('image,mask\n"",a.png\n', r"all\.csv:2: image must be a path"),
    ],
)  # fmt: skip
def test_c36_other_spellings_are_refused_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "all.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        source(tmp_path, "data.train.list=all.csv").records("train")


def test_c36_names_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text('{"image": "\\ud800.jpg", "mask": null}\n')
    with pytest.raises(DataError, match=r"all\.jsonl:1: image must be a path"):
        source(tmp_path, "data.train.list=all.jsonl").records("train")


def test_val_is_cut_from_the_rows_of_train_and_rows_of_other_splits_are_reported(tmp_path: Path) -> None:
    draw_pairs(tmp_path, *map(str, range(12)))
    rows = [f"images/{number}.jpg,masks/{number}.png,{'train' if number < 8 else 'val'}" for number in range(12)]
    (tmp_path / "all.csv").write_text("\n".join(["image,mask,split", *rows]))
    cut = source(tmp_path, "data.train.list=all.csv")
    cut.config.val_fraction = 0.4
    found = [{Path(record.image).name for record in cut.records(split)} for split in ("train", "val")]
    assert found[0] | found[1] == {f"{number}.jpg" for number in range(8)} and not found[0] & found[1]
    assert cut.find_named_splits() == {"data.val.list": "all.csv"}
    assert not source(tmp_path, "data.train.list=all.csv", "data.val.list=all.csv").find_named_splits()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"image,mask\n" + b"x" * 200_000 + b",y\n", r"a\.csv: not a table of comma-separated values \("),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not one JSON object \(nested too deeply\)"),
        ("a.odgt", b"[" * 100_000, r"a\.odgt:1: not one JSON object \(nested too deeply\)"),
        ("a.odgt", b'{"width": 1' + b"0" * 5000 + b"}", r"a\.odgt:1: not one JSON object \(a number is too long\)"),
    ],
)
def test_lists_that_are_none_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        source(tmp_path, f"data.train.list={name}").records("train")


def test_lists_may_have_the_line_ends_of_old_spreadsheets_and_stems_must_be_utf8(tmp_path: Path) -> None:
    draw_pairs(tmp_path, "0", "1")
    (tmp_path / "all.csv").write_bytes(b"image,mask\rimages/0.jpg,masks/0.png\rimages/1.jpg,masks/1.png\r")
    assert len(pairs(tmp_path, "data.train.list=all.csv")) == 2
    (tmp_path / "stems.txt").write_bytes("0\n1\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"stems\.txt: not UTF-8 text \(byte 0\)\. Save the list as UTF-8"):
        source(tmp_path, "data.train.stems=stems.txt").records("train")


def test_c36_folders_of_splits_are_reported_with_the_keys_that_use_them(tmp_path: Path) -> None:
    draw_pairs(tmp_path, "Train/0", "valid/1")
    assert source(tmp_path).find_named_splits() == {
        "data.train.images": "images/Train", "data.train.masks": "masks/Train",
        "data.val.images": "images/valid", "data.val.masks": "masks/valid",
    }  # fmt: skip
    assert not source(tmp_path, "data.val.images=images/valid", "data.val.masks=masks/valid").find_named_splits()


def test_c37_validation_without_masks_is_refused_in_one_sentence(tmp_path: Path) -> None:
    draw_pairs(tmp_path, "0", "1")
    (tmp_path / "val.csv").write_text("image,mask\nimages/0.jpg,masks/0.png\nimages/1.jpg,\n")
    found = source(tmp_path, "data.val.list=val.csv")
    with pytest.raises(
        DataError, match=r"val\.csv:3: .*1\.jpg has no mask, so it cannot be scored \(1 of 2.*data\.val\.list=null"
    ):
        require_masks("val", found.records("val"))
    records = found.records("val")
    notices = check_files(ScannedSplit("val", records, [scan_pair(record) for record in records], []))
    (notice,) = [notice for notice in notices if "no mask" in notice.text]
    assert notice.text == "val: 1 of 2 images have no mask and cannot be scored."


def test_a_missing_data_folder_is_named_and_not_its_class_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data folder not found: \S*facade .*data\.root=<folder>") as caught:
        source(tmp_path / "facade", "data.num_classes=", "data.classes=classes.txt")
    assert "class table" not in str(caught.value)


def test_one_file_without_a_pair_is_counted_in_the_singular() -> None:
    (notice,) = [each for each in check_files(ScannedSplit("train", [], [], ["b.png: no image"])) if each.files]
    assert notice.text.startswith("train: 1 line or file gives no pair")
