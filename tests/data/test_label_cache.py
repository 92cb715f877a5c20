"""Kept labels are the labels of the files, whatever happens to either."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.utils.data import DataLoader

from semseg.collate import collate
from semseg.config.inherit import inherit_config
from semseg.config.schema import AugmentConfig, Config, DataConfig
from semseg.data import label_cache, labels
from semseg.data.augment import Augmentation
from semseg.data.batch import Batch, EvalSample
from semseg.data.datasets import EvalDataset, ReadOptions, TrainDataset
from semseg.data.geometry import Size
from semseg.data.label_cache import LabelCache, LabelRuns
from semseg.data.label_map import LabelMap
from semseg.data.labels import RawLabel, read_class_indices
from semseg.data.plan import SubBatch
from semseg.data.records import Record
from semseg.errors import ConfigError, DataError

LABEL_MAP = LabelMap(5, ignore=[0, 255])


def drawn(folder: Path, count: int = 3) -> list[Record]:
    """Photographs and labels with areas of several classes, of different sizes."""
    chance, records = np.random.default_rng(0), []
    for number in range(count):
        size = Size(70 + 20 * number, 120 - 10 * number)
        coarse = chance.choice([0, 1, 2, 3, 4, 5, 255], (6, 8)).astype(np.uint8)
        label = cv2.resize(coarse, (size.width, size.height), interpolation=cv2.INTER_NEAREST)
        image = cv2.resize(chance.integers(0, 256, (9, 9, 3), dtype=np.uint8), (size.width, size.height))
        cv2.imwrite(str(folder / f"{number}.png"), label)
        cv2.imwrite(str(folder / f"{number}.jpg"), image)
        records.append(Record(str(folder / f"{number}.jpg"), str(folder / f"{number}.png"), size, "list"))
    return records


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def no_reading(path: object, **_: object) -> None:
    raise AssertionError(f"{path} was read again")


@given(arrays(np.int16, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(-1, 2)), st.data())
def test_runs_say_what_the_label_says(label: np.ndarray, data: st.DataObject) -> None:
    runs = LabelRuns.from_label(label)
    assert np.array_equal(runs.to_array(), label)
    assert runs.to_array().dtype == np.int16
    rows, columns = (
        np.array(data.draw(st.lists(st.integers(0, length - 1), max_size=5)), np.int64) for length in label.shape
    )
    assert np.array_equal(runs.select(rows, columns), label[rows][:, columns])


Item = Batch | EvalSample


def train_set(records: list[Record], cache: LabelCache | None, **options: object) -> TrainDataset:
    read = ReadOptions(max_long_edge=200, size_divisor=8, cache=cache)
    return TrainDataset(records, LABEL_MAP, read, collate=collate, label_stride=8, **options)  # pyright: ignore[reportArgumentType]


def batches(dataset: TrainDataset) -> list[Item]:
    return [dataset[SubBatch(number, (0, 1, 2), 60, (False, True, False))] for number in range(2)]


def samples(records: list[Record], cache: LabelCache | None) -> list[Item]:
    read = ReadOptions(max_long_edge=200, size_divisor=8, cache=cache)
    dataset = EvalDataset(records, LABEL_MAP, read, short_edges=[60], antialias=True)
    return [dataset[number] for number in range(len(records))]


AUGMENT = AugmentConfig(rotation=20, crop=[48, 48])
WAYS: dict[str, Callable[[list[Record], LabelCache | None], list[Item]]] = {
    "fast": lambda records, cache: batches(train_set(records, cache, exact=False)),
    "exact": lambda records, cache: batches(train_set(records, cache)),
    "augmented": lambda records, cache: batches(train_set(records, cache, augmentation=Augmentation(AUGMENT, 1))),
    "evaluation": samples,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_reading_gives_the_same_with_cached_labels(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = drawn(tmp_path)
    expected = WAYS[way](records, None)
    cache = LabelCache(tmp_path / "kept", LABEL_MAP)
    first = WAYS[way](records, cache)
    assert len(files_of(tmp_path / "kept")) == len(records)
    monkeypatch.setattr(labels, "read_label", no_reading)
    second = WAYS[way](records, cache)
    for uncached, *found in zip(expected, first, second, strict=True):
        for item in found:
            assert torch.equal(item.label, uncached.label)
            assert item.label.min() == -1
            if isinstance(item, Batch):
                assert torch.equal(item.image, uncached.image)


def test_a_changed_file_and_another_meaning_of_its_ids_are_read_again(tmp_path: Path) -> None:
    path, cache = drawn(tmp_path, 1)[0].label or "", LabelCache(tmp_path / "kept", LABEL_MAP)
    before = read_class_indices(path, LABEL_MAP, cache=cache).to_array()
    other = LabelMap(6, first_id=0, ignore=[255])
    shifted = read_class_indices(path, other, cache=LabelCache(tmp_path / "kept", other)).to_array()
    assert np.array_equal(shifted[before >= 0], before[before >= 0] + 1)
    cv2.imwrite(path, np.full((70, 120), 2, np.uint8))
    after = read_class_indices(path, LABEL_MAP, cache=cache)
    assert isinstance(after, RawLabel)
    assert (after.to_array() == 1).all()
    assert isinstance(read_class_indices(path, LABEL_MAP, cache=cache), LabelRuns)


def test_labels_of_an_archive_are_kept(tmp_path: Path) -> None:
    label = drawn(tmp_path, 1)[0].label or ""
    with ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(label, "masks/0.png")
    cache, path = LabelCache(tmp_path / "kept", LABEL_MAP), str(tmp_path / "a.zip/masks/0.png")
    first, second = (read_class_indices(path, LABEL_MAP, cache=cache) for _ in range(2))
    assert isinstance(second, LabelRuns)
    assert np.array_equal(first.to_array(), second.to_array())


@pytest.mark.parametrize("how", ["empty", "cut", "one bit", "other content"])
def test_a_damaged_file_counts_as_missing_and_is_written_again(how: str, tmp_path: Path) -> None:
    path, cache = drawn(tmp_path, 1)[0].label or "", LabelCache(tmp_path / "kept", LABEL_MAP)
    expected = read_class_indices(path, LABEL_MAP, cache=cache).to_array()
    (kept,) = files_of(tmp_path / "kept")
    data = kept.read_bytes()
    flipped = bytearray(data)
    flipped[-1] ^= 1  # in the last part of the file, wherever the library puts it
    spoiled = {"empty": b"", "cut": data[:-7], "one bit": bytes(flipped), "other content": b"\x02" + bytes(7) + b"{}"}
    kept.write_bytes(spoiled[how])
    found = read_class_indices(path, LABEL_MAP, cache=cache)
    assert isinstance(found, RawLabel)
    assert np.array_equal(found.to_array(), expected)
    assert kept.read_bytes() == data


@pytest.mark.parametrize("place", range(8))
def test_every_part_of_a_file_is_checked(place: int, tmp_path: Path) -> None:
    path, cache = drawn(tmp_path, 1)[0].label or "", LabelCache(tmp_path / "kept", LABEL_MAP)
    expected = read_class_indices(path, LABEL_MAP, cache=cache).to_array()
    (kept,) = files_of(tmp_path / "kept")
    data = bytearray(kept.read_bytes())
    data[len(data) * place // 8] ^= 0x10
    kept.write_bytes(bytes(data))
    assert np.array_equal(read_class_indices(path, LABEL_MAP, cache=cache).to_array(), expected)


def test_an_invalid_label_is_reported_every_time(tmp_path: Path) -> None:
    record, cache = drawn(tmp_path, 1)[0], LabelCache(tmp_path / "kept", LABEL_MAP)
    cv2.imwrite(record.label or "", np.full((70, 120), 9, np.uint8))
    for _ in range(2):
        with pytest.raises(DataError, match=r"0\.png: label ids 9 \(8400 pixels\) are neither"):
            read_class_indices(record.label or "", LABEL_MAP, cache=cache)
    Path(record.label or "").unlink()
    with pytest.raises(DataError, match=r"0\.png: there is no such file"):
        read_class_indices(record.label or "", LABEL_MAP, cache=cache)
    assert not files_of(tmp_path / "kept")


def test_a_kept_label_that_is_too_large_is_refused_as_its_file_is(tmp_path: Path) -> None:
    path, cache = drawn(tmp_path, 1)[0].label or "", LabelCache(tmp_path / "kept", LABEL_MAP)
    read_class_indices(path, LABEL_MAP, cache=cache)
    with pytest.raises(DataError, match=r"data\.max_pixels=1000"):
        read_class_indices(path, LABEL_MAP, cache=cache, max_pixels=1000)


def test_noise_is_not_kept(tmp_path: Path) -> None:
    path = str(tmp_path / "noise.png")
    cv2.imwrite(path, np.random.default_rng(0).integers(0, 6, (40, 50), dtype=np.uint8))
    cache = LabelCache(tmp_path / "kept", LABEL_MAP)
    first, second = (read_class_indices(path, LABEL_MAP, cache=cache).to_array() for _ in range(2))
    assert np.array_equal(first, second)
    assert not files_of(tmp_path / "kept")


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    with pytest.raises(ConfigError, match=r"data\.label_cache=.*kept: the folder cannot be created"):
        LabelCache(tmp_path / "kept", LABEL_MAP)


def test_a_folder_that_cannot_be_written_to_is_reported_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    records, cache = drawn(tmp_path), LabelCache(tmp_path / "kept", LABEL_MAP)
    for number in range(256):
        (tmp_path / f"kept/{number:02x}").write_text("")  # files where folders should be
    labels = [read_class_indices(record.label or "", LABEL_MAP, cache=cache).to_array() for record in records]
    assert [label.shape for label in labels] == [record.size for record in records]
    (warning,) = recwarn
    assert "kept: cannot be written to" in str(warning.message)


def test_workers_fill_one_folder_together(tmp_path: Path) -> None:
    records = drawn(tmp_path) * 8
    dataset = train_set(records, LabelCache(tmp_path / "kept", LABEL_MAP), exact=False)
    plan = [SubBatch(number, (number,), 60, (False,)) for number in range(len(records))]
    loader = DataLoader(dataset, sampler=plan, batch_size=None, num_workers=2)  # pyright: ignore[reportArgumentType]
    found = [batch.label for batch in loader]
    expected = train_set(records, None, exact=False)
    assert all(torch.equal(label, expected[plan[number]].label) for number, label in enumerate(found))
    assert len(files_of(tmp_path / "kept")) == 3


@pytest.mark.slow
def test_a_checkpoint_does_not_say_where_labels_are_kept() -> None:
    saved, given = Config(data=DataConfig(label_cache="/theirs")), Config(data=DataConfig(label_cache="ours"))
    assert inherit_config(saved, given, []).data.label_cache == "ours"
    assert inherit_config(saved, Config(), []).data.label_cache == "auto"


def test_a_folder_with_a_limit_stops_growing_and_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_cache, "SAVES_PER_CHECK", 1)
    (tmp_path / "data").mkdir()
    label = np.zeros((64, 64), np.int16)
    cache = LabelCache(tmp_path / "cache", LABEL_MAP, max_bytes=2000 * label_cache.NUM_SUBFOLDERS)
    entries = [tmp_path / "cache" / "00" / f"{number}.safetensors" for number in range(20)]
    for entry in entries:
        cache.save(entry, label)
    kept = [entry for entry in entries if entry.is_file()]
    assert kept == entries[: len(kept)] and 2 < len(kept) < 20
    assert 2000 < sum(entry.stat().st_size for entry in kept) < 3000
    assert np.array_equal(cache.load(kept[0]).to_array(), label)  # pyright: ignore[reportOptionalMemberAccess]


def test_the_automatic_folders_of_data_sets_that_were_not_used_for_longest_are_removed(tmp_path: Path) -> None:
    folders = []
    for name in ("first", "second", "third"):
        folder = label_cache.prepare_automatic_cache(tmp_path, Path(name))
        assert folder is not None and label_cache.prepare_automatic_cache(tmp_path, Path(name)) == folder
        (folder / "00").mkdir()
        (folder / "00" / "label.safetensors").write_bytes(bytes(1000))  # counts 16 times
        os.utime(folder, (len(folders), len(folders)))
        folders.append(folder)
    assert label_cache.prepare_automatic_cache(tmp_path, Path("third"), max_bytes=40000) == folders[2]
    assert [folder.is_dir() for folder in folders] == [False, True, True]
    assert (tmp_path / "labels" / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
    assert LabelCache(folders[2], LABEL_MAP).max_bytes == label_cache.MAX_AUTOMATIC_BYTES
    assert LabelCache(tmp_path / "own", LABEL_MAP).max_bytes is None


def test_a_cache_that_cannot_be_made_or_a_full_disk_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "labels").write_text("a file")
    assert label_cache.prepare_automatic_cache(tmp_path, Path("data")) is None
    monkeypatch.setattr(label_cache, "LEAST_FREE_BYTES", 2**62)
    assert label_cache.prepare_automatic_cache(tmp_path / "other", Path("data")) is None
