"""Quarter turns, random erasing and CutMix, and the presets that use them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.command_line import run_here
from helpers.in_process import configured
from semseg.config.schema import AugmentConfig
from semseg.data.augment import Augmentation, draw_rectangle, mix_samples
from semseg.data.batch import Sample
from semseg.data.geometry import Size


def numbered(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red and green are the row and the column, and a label that says the same."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=2).astype(np.uint8)
    return image, (rows * 100 + columns).astype(np.int16)


def assert_same_pixels(image: np.ndarray, label: np.ndarray) -> None:
    expected = image[..., 0].astype(int) * 100 + image[..., 1]
    assert np.array_equal(label[label >= 0], expected[label >= 0])


def test_square_images_are_turned_by_all_quarters_with_their_labels() -> None:
    augment = Augmentation(AugmentConfig(quarter_turns=True), seed=3)
    image, label = numbered(20, 20)
    corners = set()
    for number in range(60):
        turned, turned_label = augment(image, label, number, 0)
        assert_same_pixels(turned, turned_label)
        corners.add(tuple(turned[0, 0, :2].tolist()))
    assert corners == {(0, 0), (0, 19), (19, 19), (19, 0)}


def test_other_images_keep_their_orientation() -> None:
    augment = Augmentation(AugmentConfig(quarter_turns=True), seed=3)
    image, label = numbered(20, 30)
    corners = {tuple(augment(image, label, number, 0).image[0, 0, :2].tolist()) for number in range(30)}
    assert corners == {(0, 0), (19, 29)}


def test_an_erased_rectangle_has_the_mean_and_is_ignored() -> None:
    augment = Augmentation(AugmentConfig(erasing=1.0), seed=3)
    image, label = numbered(50, 80)
    shares = []
    for number in range(40):
        erased, erased_label = augment(image, label, number, 0)
        assert_same_pixels(erased, erased_label)
        assert (erased[erased_label < 0] == [24, 40, 0]).all()
        shares.append((erased_label < 0).mean())
    assert 0 < min(shares) < 0.1 < max(shares) <= 0.34
    assert np.array_equal(image, numbered(50, 80)[0])  # the given image is not changed


@pytest.mark.parametrize("size", [Size(1, 1), Size(3, 400), Size(200, 300)])
def test_rectangles_are_inside_the_image(size: Size) -> None:
    for seed in range(50):
        top, left, height, width = draw_rectangle(size, np.random.default_rng(seed))
        assert top >= 0 and height >= 1 and top + height <= size.height
        assert left >= 0 and width >= 1 and left + width <= size.width


def sample_of(value: int, height: int, width: int, stride: int) -> Sample:
    label = np.full((-(-height // stride), -(-width // stride)), value, np.int16)
    return Sample(np.full((height, width, 3), value, np.uint8), label, f"{value}.png")


@pytest.mark.parametrize("stride", [1, 4])
def test_cutmix_replaces_a_rectangle_of_the_image_and_the_same_one_of_the_label(stride: int) -> None:
    samples = [sample_of(1, 40, 60, stride), sample_of(2, 50, 36, stride), sample_of(3, 40, 60, stride)]
    shares = []
    for number in range(40):
        mixed = mix_samples(samples, 1.0, stride, seed=3, number=number)
        for position, (own, found) in enumerate(zip(samples, mixed, strict=True)):
            other = samples[(position + 1) % 3].label[0, 0]
            assert found.image.shape == own.image.shape and found.label.shape == own.label.shape
            assert set(np.unique(found.image)) <= {own.label[0, 0], other}
            kept = found.image[stride // 2 :: stride, stride // 2 :: stride, 0]
            assert np.array_equal(found.label[: kept.shape[0], : kept.shape[1]], kept)
            shares.append((found.image != own.image).mean())
    assert min(shares) < 0.1 and max(shares) > 0.5
    assert all((sample.image == sample.label[0, 0]).all() for sample in samples)


def test_a_share_of_the_samples_is_mixed_the_same_for_the_same_numbers() -> None:
    samples = [sample_of(1, 40, 40, 4), sample_of(2, 40, 40, 4)]
    mixed = [mix_samples(samples, 0.3, 4, seed=3, number=number) for number in range(100)]
    changed = sum(found is not own for pair in mixed for found, own in zip(pair, samples, strict=True))
    assert 35 <= changed <= 85
    again = mix_samples(samples, 0.3, 4, seed=3, number=7)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(again, mixed[7], strict=True))
    assert mix_samples(samples[:1], 1.0, 4, seed=3, number=0)[0] is samples[0]


@pytest.mark.parametrize("name", ["aerial", "microscopy", "defects", "street"])
def test_presets_change_images_and_keep_shapes_and_types(name: str) -> None:
    config = configured(f"augment={name}").augment
    assert config.is_on and config.name == name
    image, label = numbered(64, 64)
    found = Augmentation(replace(config, crop=None), seed=0)(image, label, 1, 0)
    assert found.image.shape == image.shape and found.image.dtype == np.uint8
    assert found.label.shape == label.shape and found.label.dtype == np.int16


def test_cutmix_of_single_images_is_refused_with_a_way_out(tmp_path: Path) -> None:
    output = run_here(tmp_path, "augment.cutmix=0.5", "data.batch_size=1", code=2)
    assert "augment.cutmix=0.5: needs another image in a sub-batch: data.batch_size=2 or more" in " ".join(
        output.split()
    )
