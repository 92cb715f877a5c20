"""Which parts of images training takes at their own resolution, and the index of pixels that they are centred on."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.random import default_rng

from semseg.collate import collate
from semseg.config.schema import AugmentConfig, DataConfig
from semseg.data.augment import Augmentation
from semseg.data.crops import CropPlan, choose_crop, cut_size, plan_crop
from semseg.data.datasets import ReadOptions, TrainDataset
from semseg.data.foreground import ForegroundIndex, Pixel, build_foreground_index, find_classes, load_labels
from semseg.data.geometry import Size
from semseg.data.label_map import LabelMap
from semseg.data.plan import SubBatch
from semseg.data.records import Record
from semseg.data.windows import Window
from semseg.errors import ConfigError, DataError

LABEL_MAP = LabelMap(4)  # ids 1 to 4, 0 is ignored


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Two images of class 0 with a few pixels of the others; every pixel of an image has a colour of its own."""
    folder, records = tmp_path_factory.mktemp("pairs"), []
    for number, size in enumerate([Size(200, 150), Size(60, 300)]):
        rows, columns = np.mgrid[: size.height, : size.width]
        image = np.stack([rows, columns % 256, columns // 256 + 10 * number], axis=2).astype(np.uint8)
        label = np.ones(size, np.uint8)
        label[40:44, 100:103] = 2
        label[:3] = 0
        if number:
            label[50, 290] = 4
        image_path, label_path = (str(folder / f"{number}_{kind}.png") for kind in ("image", "label"))
        cv2.imwrite(image_path, image[..., ::-1])
        cv2.imwrite(label_path, label)
        records.append(Record(image_path, label_path, size, "here"))
    return records


# ---- where a crop lies


def test_crops_are_of_the_size_of_the_key_whatever_the_scale_and_small_images_stay_whole() -> None:
    assert cut_size(2000, 512, 0.5) == (1024, 512)
    assert cut_size(600, 512, 0.5) == (600, 300)
    assert cut_size(100, 512, 8.0) == (64, 512)
    assert cut_size(3, 512, 0.01) == (3, 1)


@pytest.mark.parametrize("case", range(40))
def test_a_crop_is_inside_the_image_and_contains_its_centre(case: int) -> None:
    rng = default_rng(case)
    size = Size(*rng.integers(1, 900, 2).tolist())
    centre = Pixel(int(rng.integers(size.height)), int(rng.integers(size.width)))
    crop = plan_crop(size, Size(128, 200), float(rng.uniform(0.3, 3)), rng, centre if case % 2 else None)
    (top, left, height, width), resized = crop
    assert top >= 0 and top + height <= size.height and left >= 0 and left + width <= size.width
    assert resized.height <= 128 and resized.width <= 200
    if case % 2:
        assert top <= centre.row < top + height and left <= centre.column < left + width


def test_a_centre_in_the_middle_of_an_image_is_in_the_middle_of_its_crop() -> None:
    crop = plan_crop(Size(500, 500), Size(100, 60), 1.0, default_rng(0), Pixel(200, 300))
    assert crop.window == Window(150, 270, 100, 60)


def test_crops_without_a_centre_reach_every_part_of_an_image() -> None:
    plan = CropPlan(7, Size(10, 10))
    windows = [plan.draw(0, Size(12, 11), 1.0, number, 0).window for number in range(200)]
    assert {window[:2] for window in windows} == {(top, left) for top in range(3) for left in range(2)}


def test_the_crop_of_another_position_or_sub_batch_is_another_and_that_of_the_same_the_same() -> None:
    def draw(seed: int, number: int, position: int) -> Window:
        return CropPlan(seed, Size(64, 64)).draw(0, Size(4000, 4000), 1.0, number, position).window

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4)}) == 4


def test_data_crop_and_augment_crop_are_one_setting() -> None:
    native = DataConfig(resize="native")
    assert choose_crop(DataConfig(), AugmentConfig()) is None
    assert choose_crop(native, AugmentConfig()) == [512, 512]
    assert choose_crop(native, AugmentConfig(crop=[100, 100])) == [100, 100]
    assert choose_crop(DataConfig(crop=[9, 8]), AugmentConfig()) == [9, 8]
    assert choose_crop(native, AugmentConfig(), Size(64, 64)) == [64, 64]
    with pytest.raises(ConfigError, match=r"data.crop=\[32, 32\]: this network takes images of 64 x 64 only"):
        choose_crop(DataConfig(crop=[32, 32]), AugmentConfig(), Size(64, 64))


# ---- the index


def test_a_class_keeps_all_pixels_of_small_areas_and_equally_spaced_ones_of_large_areas() -> None:
    label = np.full((50, 40), -1, np.int16)
    label[10:30] = 3
    label[45, 7] = label[46, 8] = 0
    found = find_classes(label)
    assert found.classes.tolist() == [0, 3]
    assert found.counts.tolist() == [2, 800]
    assert found.positions[:2].tolist() == [[45, 7], [46, 8]]
    assert len(found.positions) == 2 + 64
    assert found.positions[2].tolist() == [10, 0]
    assert found.positions[-1].tolist() == [29, 39]
    assert (label[tuple(found.positions.T)] == np.repeat([0, 3], [2, 64])).all()


def test_classes_are_drawn_by_the_inverse_root_of_their_pixels() -> None:
    label = np.zeros((100, 100), np.int16)
    label[0, :100] = 1  # 9900 pixels of class 0, 100 of class 1
    index = ForegroundIndex([find_classes(np.full((2, 2), -1, np.int16)), find_classes(label)])
    draws = [index.draw(1, default_rng(seed)) for seed in range(400)]
    rare = sum(pixel is not None and pixel.row == 0 for pixel in draws) / 400
    assert rare == pytest.approx((1 / 10) / (1 / 10 + 1 / 9900**0.5), abs=0.05)
    assert index.draw(0, default_rng(0)) is None


def test_the_index_is_kept_and_reads_only_labels_that_have_changed(
    pairs: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = build_foreground_index(pairs, tmp_path, LABEL_MAP, cache_dir=tmp_path)
    (cache,) = tmp_path.glob("foreground-*.safetensors")
    assert len(load_labels(cache)) == 2
    monkeypatch.setattr("semseg.data.label_windows.read_class_indices", None)  # would fail
    again = build_foreground_index(pairs, tmp_path, LABEL_MAP, cache_dir=tmp_path)
    for name, values in vars(build).items():
        assert np.array_equal(values, getattr(again, name)), name
    assert again.draw(1, default_rng(0)) == build.draw(1, default_rng(0))


@pytest.mark.parametrize("damage", [b"", b"no tensors", None])
def test_a_damaged_index_is_made_again(pairs: list[Record], tmp_path: Path, damage: bytes | None) -> None:
    whole = build_foreground_index(pairs, tmp_path, LABEL_MAP, cache_dir=tmp_path)
    (cache,) = tmp_path.glob("foreground-*.safetensors")
    content = cache.read_bytes()
    cache.write_bytes(content[:-8] if damage is None else damage)
    assert load_labels(cache) == {}
    again = build_foreground_index(pairs, tmp_path, LABEL_MAP, cache_dir=tmp_path)
    assert np.array_equal(whole.positions, again.positions)
    assert cache.read_bytes() == content


def test_labels_that_cannot_be_read_have_no_classes(pairs: list[Record], tmp_path: Path) -> None:
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes(b"no image")
    records = [pairs[0]._replace(label=str(path)) for path in (broken, missing)]
    index = build_foreground_index([*records, pairs[1]], tmp_path, LABEL_MAP, cache_dir=tmp_path)
    assert index.draw(0, default_rng(0)) is None
    assert index.draw(2, default_rng(0)) is not None


# ---- samples


def dataset_of(pairs: list[Record], plan: CropPlan, augment: AugmentConfig | None = None) -> TrainDataset:
    return TrainDataset(
        pairs,
        LABEL_MAP,
        ReadOptions(1000, 8),
        collate=collate,
        label_stride=1,
        augmentation=None if augment is None else Augmentation(augment, plan.seed),
        crops=plan,
    )


@pytest.mark.parametrize("is_flipped", [False, True])
def test_a_sample_is_the_crop_of_the_image_with_the_label_of_the_same_pixels(
    pairs: list[Record], is_flipped: bool
) -> None:
    plan = CropPlan(5, Size(32, 64))
    batch = dataset_of(pairs, plan)[SubBatch(9, (1,), 0, (is_flipped,))]
    top, left, height, width = plan.draw(1, pairs[1].size, 1.0, 9, 0).window
    assert batch.size.tolist() == [[32, 64]] == [[height, width]]
    rows, columns, _ = batch.image[0].numpy().astype(int)
    expected = np.arange(left, left + width)
    assert np.array_equal(rows[:, 0], np.arange(top, top + height))
    assert np.array_equal(columns[0], (expected[::-1] if is_flipped else expected) % 256)
    label = batch.label[0].numpy()
    for row in range(height):
        for column in range(width):
            source = (top + row, left + (width - 1 - column if is_flipped else column))
            is_class_1 = 40 <= source[0] < 44 and 100 <= source[1] < 103
            expected_class = -1 if source[0] < 3 else 1 if is_class_1 else 3 if source == (50, 290) else 0
            assert label[row, column] == expected_class


def test_all_crops_around_classes_contain_a_rare_one_most_of_the_time(pairs: list[Record], tmp_path: Path) -> None:
    index = build_foreground_index(pairs, tmp_path, LABEL_MAP, cache_dir=tmp_path)
    rare = []
    for share in (0.0, 1.0):
        dataset = dataset_of(pairs, CropPlan(5, Size(16, 16), share, index))
        batches = [dataset[SubBatch(number, (0,), 0, (False,))] for number in range(60)]
        rare.append(sum(bool((batch.label == 1).any()) for batch in batches))
    assert rare[0] < 12 and rare[1] > 48


def test_augment_scale_changes_the_pixels_that_a_crop_takes_and_not_its_size(pairs: list[Record]) -> None:
    dataset = dataset_of(pairs, CropPlan(5, Size(40, 40)), AugmentConfig(scale=[0.5, 0.5]))
    batch = dataset[SubBatch(0, (0, 1), 0, (False, False))]
    assert batch.size.tolist() == [[40, 40], [30, 40]]
    rows = batch.image[0, 0, :, 0].numpy().astype(int)
    assert 76 <= rows[-1] - rows[0] <= 80  # 80 rows of the image


def test_with_on_bad_skip_a_broken_image_becomes_a_blank_crop(pairs: list[Record], tmp_path: Path) -> None:
    broken = pairs[0]._replace(image=str(tmp_path / "missing.png"))
    dataset = dataset_of([broken], CropPlan(5, Size(16, 500)))
    dataset.options = ReadOptions(1000, 8, skip_bad=True)
    batch = dataset[SubBatch(0, (0,), 0, (False,))]
    assert batch.size.tolist() == [[16, 150]]
    assert (batch.label == -1).all() and len(batch.bad) == 1


def test_crops_of_a_tiled_tiff_are_read_by_window_and_equal_those_of_a_png(
    pairs: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile = pytest.importorskip("tifffile")
    records = []
    for record in pairs:
        path = tmp_path / f"{Path(record.image).stem}.tif"
        tifffile.imwrite(path, cv2.imread(record.image)[..., ::-1], tile=(64, 64), photometric="rgb")
        records.append(record._replace(image=str(path)))
    plan = CropPlan(5, Size(32, 48))
    whole, tiled = dataset_of(pairs, plan), dataset_of(records, plan)
    # The limit of whole images does not hold for them: it is for labels only.
    monkeypatch.setattr("semseg.data.open_pairs.read_pair", None)
    found = [tiled[SubBatch(number, (0, 1), 0, (True, False))] for number in range(4)]
    monkeypatch.undo()
    for number, batch in enumerate(found):
        expected = whole[SubBatch(number, (0, 1), 0, (True, False))]
        assert np.array_equal(batch.image, expected.image)
        assert np.array_equal(batch.label, expected.label)


def test_a_tiled_tiff_whose_label_has_another_size_is_named(pairs: list[Record], tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "other.tif"
    tifffile.imwrite(path, np.zeros((90, 80, 3), np.uint8), tile=(64, 64), photometric="rgb")
    dataset = dataset_of([pairs[0]._replace(image=str(path), size=Size(90, 80))], CropPlan(5, Size(16, 16)))
    with pytest.raises(DataError, match=r"image and label differ in size: .*other.tif is 90 x 80, .* is 200 x 150"):
        dataset[SubBatch(0, (0,), 0, (False,))]
