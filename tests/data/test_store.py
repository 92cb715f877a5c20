"""A data set inside a zip archive is read in place, and reads like the same files on disk."""

from __future__ import annotations

import multiprocessing
import os
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from helpers.in_process import configured
from helpers.records import folder_records
from semseg.data import store
from semseg.data.overlap import find_overlap
from semseg.data.pairs import read_pair
from semseg.data.scenes import make_scenes
from semseg.data.sources import DataSource
from semseg.errors import DataError
from semseg.reports.run_card import compute_data_fingerprint


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain") / "scenes"
    make_scenes(root, num_train=6, num_val=2, seed=1)
    return root


@pytest.fixture
def archive(plain: Path, tmp_path: Path) -> Path:
    return packed(plain, tmp_path / "Scenes.ZIP")


def packed(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder))
        file.writestr("__MACOSX/images/training/._scene.jpg", b"what macOS puts beside every file")
    return archive


def source(root: Path, *words: str) -> DataSource:
    return DataSource(configured(f"data.root={root}", *words).data)


LISTS = ("data=folder", "data.train.list=training.odgt", "data.val.list=validation.odgt", "data.num_classes=11")
FOLDERS = ("data=folder", "data.train.images=images", "data.train.masks=annotations", "data.num_classes=11")


@pytest.mark.slow
@pytest.mark.parametrize("words", [LISTS, FOLDERS], ids=["lists", "folders"])
def test_an_archive_gives_the_records_and_pixels_of_its_files(
    plain: Path, archive: Path, words: tuple[str, ...]
) -> None:
    on_disk, in_zip = source(plain, *words), source(archive, *words)
    for split in ("train", "val"):
        expected, found = on_disk.records(split), in_zip.records(split)
        assert [os.path.relpath(record.image, plain) for record in expected] == [
            os.path.relpath(record.image, archive) for record in found
        ]
        for one, other in zip(expected, found, strict=True):
            assert one.size == other.size
            whole, zipped = read_pair(one, on_disk.label_map), read_pair(other, in_zip.label_map)
            assert np.array_equal(whole.image, zipped.image)
            assert np.array_equal(np.asarray(whole.label), np.asarray(zipped.label))
        assert compute_data_fingerprint(expected, plain) == compute_data_fingerprint(found, archive)


def test_the_class_table_and_a_list_of_pairs_may_be_in_the_archive(plain: Path, tmp_path: Path) -> None:
    names = sorted(path.stem for path in (plain / "images" / "training").iterdir())
    rows = [f"images/training/{name}.jpg,annotations/training/{name}.png" for name in names]
    archive = packed(plain, tmp_path / "set.zip")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("pairs.csv", "\n".join(["image,mask", *rows]))
        file.writestr("names.txt", "a\nb\nc\nd\ne\n")
    data = source(
        archive, "data=folder", "data.train.list=pairs.csv", "data.classes=names.txt", "data.num_classes=null"
    )
    assert data.classes.names == ("a", "b", "c", "d", "e")
    assert len(data.records("train")) + len(data.records("val")) == len(names)


def test_a_folder_inside_may_be_the_root(plain: Path, tmp_path: Path) -> None:
    archive = packed(plain.parent, tmp_path / "set.zip")
    assert len(source(archive / "scenes", *LISTS).records("train")) == 6


def test_copies_in_another_archive_are_found(archive: Path, plain: Path) -> None:
    train, val = source(archive, *LISTS).records("train"), source(plain, *LISTS).records("train")[:2]
    found = find_overlap(train, val)
    assert found is not None
    assert len(found.same_content) == 2


def test_processes_that_were_forked_read_side_by_side(archive: Path) -> None:
    paths = [path for path in store.list_files_below(archive) if path.suffix == ".jpg"] * 20
    expected = [store.read_file(path) for path in paths]  # the archive is open in this process now
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(store.read_file, paths)) == expected


def test_an_archive_that_was_written_again_is_opened_again(plain: Path, archive: Path, tmp_path: Path) -> None:
    before = store.file_stamp(archive / "training.odgt")
    other = tmp_path / "other"
    make_scenes(other, num_train=3, num_val=2, seed=2)
    packed(other, archive)
    assert store.file_stamp(archive / "training.odgt") != before
    assert len(source(archive, *LISTS).records("train")) == 3


def test_a_folder_whose_name_ends_like_an_archive_is_a_folder(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "set.zip").symlink_to(plain)
    assert len(source(tmp_path / "set.zip", *LISTS).records("train")) == 6


# ---- what is broken


def test_missing_files_are_reported_as_on_disk(archive: Path) -> None:
    with pytest.raises(DataError, match=r"list of images not found: .*Scenes\.ZIP/training\.txt"):
        source(archive, *LISTS, "data.train.list=training.txt").records("train")
    with pytest.raises(DataError, match=r"folder of masks not found: .*Scenes\.ZIP/masks"):
        source(archive, *FOLDERS, "data.train.masks=masks").records("train")
    with pytest.raises(IsADirectoryError):
        store.read_file(archive / "images")


def test_a_broken_file_is_named(archive: Path) -> None:
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        entry = next(entry for entry in file.infolist() if entry.filename.endswith(".jpg"))
    middle = entry.header_offset + 30 + len(entry.filename) + entry.compress_size // 2
    content[middle] ^= 255
    archive.write_bytes(content)
    with pytest.raises(DataError, match=rf"{entry.filename}: cannot be unpacked"):
        records = source(archive, *LISTS).records("train")
        for record in records:
            read_pair(record, None)


def test_a_truncated_archive_is_reported(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"Scenes\.ZIP: is not a zip archive, or is damaged"):
        source(archive, *LISTS).records("train")


def test_a_damaged_name_in_an_archive_is_reported(archive: Path) -> None:
    content = archive.read_bytes()
    name = "images/ä.png".encode()
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("images/ä.png", b"")
    content = bytearray(archive.read_bytes())
    content[content.rfind(name) + 7] = 255
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"Scenes\.ZIP: is not a zip archive, or is damaged \('utf-8' codec"):
        source(archive, *LISTS).records("train")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_damaged_data_is_named_whatever_its_compression(tmp_path: Path, method: int) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("a.bin", bytes(range(256)) * 8)
    content = bytearray(path.read_bytes())
    content[45:60] = bytes(value ^ 0x55 for value in content[45:60])
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.bin: cannot be unpacked"):
        store.read_file(path / "a.bin")


def test_what_unpacks_to_more_than_any_image_is_not_unpacked(
    archive: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb/a.png", bytes(2_000_000))
    monkeypatch.setattr(store, "MAX_BYTES", 1_000_000)
    with pytest.raises(DataError, match="2000000 bytes when unpacked"):
        folder_records(archive / "bomb", cache_dir=tmp_path)


def test_names_that_leave_the_archive_are_not_there(archive: Path) -> None:
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("../outside.png", b"x")
        file.writestr("/etc/absolute.png", b"x")
    assert not [
        path for path in store.list_files_below(archive) if path.suffix == ".png" and "annotations" not in path.parts
    ]
