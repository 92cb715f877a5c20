"""Random changes of training images: drawn by number alone, labels along with their pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from helpers.in_process import configured
from semseg.collate import collate
from semseg.config.schema import AugmentConfig
from semseg.data.augment import AUGMENTATIONS, Augmentation
from semseg.data.datasets import ReadOptions, TrainDataset
from semseg.data.geometry import Size
from semseg.data.label_map import LabelMap
from semseg.data.plan import SubBatch
from semseg.data.records import Record
from semseg.errors import ConfigError

HALVES = np.repeat([[0, 1]], 40, axis=0).repeat(30, axis=1).astype(np.int16)  # (40, 60)
PICTURE = np.repeat((60 + 100 * HALVES).astype(np.uint8)[..., None], 3, axis=2)


def changed(number: int = 0, place: int = 0, **options: object) -> tuple[np.ndarray, np.ndarray]:
    return tuple(Augmentation(AugmentConfig(**options), 304)(PICTURE, HALVES, number, place))  # pyright: ignore[reportArgumentType, reportReturnType]


STRONG = {
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "blur": 0.5,
    "rotation": 20.0,
    "crop": [24, 32],
}


def test_what_is_drawn_depends_on_the_number_and_the_place_alone() -> None:
    torch.manual_seed(1)
    first = changed(7, 1, **STRONG)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    again = changed(7, 1, **STRONG)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], changed(7, 0, **STRONG)[0])
    assert not np.array_equal(first[0], changed(8, 1, **STRONG)[0])
    torch.manual_seed(1)
    changed(7, 1, **STRONG)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # other draws of the process are as if nothing was


@pytest.mark.parametrize(("rotation", "seen"), [(0.0, (10, 20)), (5.0, (40, 60))])
def test_colours_change_a_crop_alone_unless_a_rotation_needs_what_is_around_it(
    rotation: float, seen: tuple[int, int]
) -> None:
    shapes = []

    def record(jitter: v2.ColorJitter, pixels: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        shapes.append(tuple(pixels.shape[-2:]))
        return pixels

    with patch.object(v2.ColorJitter, "transform", record):
        image, label = changed(brightness=0.5, crop=[10, 20], rotation=rotation)
    assert set(shapes) == {seen}
    assert image.shape[:2] == label.shape == (10, 20)


def test_colours_change_and_labels_do_not() -> None:
    image, label = changed(brightness=0.5)
    assert np.array_equal(label, HALVES)
    ratios = image.reshape(-1) / PICTURE.reshape(-1)
    assert ratios.max() - ratios.min() < 0.02 and abs(ratios.mean() - 1) > 0.01  # one factor for all


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 40), (40, 4), (9, 9)])
def test_images_of_any_size_are_blurred(shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    config = AugmentConfig(blur=1.0, blur_sigma=[3.0, 20.0])
    image, label = Augmentation(config, 304)(noise, np.zeros(shape, np.int16), 0, 0)
    assert image.shape == noise.shape and label.shape == shape
    assert max(shape) == 1 or image.std() < 0.8 * noise.std()
    assert np.allclose(image.mean((0, 1)), noise.mean((0, 1)), atol=40)


def test_a_crop_takes_the_same_part_of_both_and_adds_nothing() -> None:
    image, label = changed(crop=[24, 100])
    assert image.shape == (24, 60, 3) and label.shape == (24, 60)
    starts = set()
    for number in range(20):
        image, label = changed(number, crop=[10, 20])
        assert np.array_equal(image[..., 0], 60 + 100 * label)
        starts.add(int(label.sum()))
    assert len(starts) > 3


def test_a_rotation_turns_both_and_leaves_the_corners_unscored() -> None:
    image, label = changed(3, rotation=30.0)
    assert (label == -1).any() and {-1, 0, 1} == set(np.unique(label).tolist())
    empty = label == -1
    assert image[empty].mean() < 20  # black, apart from the edge
    inside = (label >= 0) & (image[..., 0] > 0)
    assert (np.abs(image[..., 0].astype(int) - (60 + 100 * label))[inside] < 10).mean() > 0.9


def test_scales_are_drawn_evenly_from_the_range() -> None:
    draw = Augmentation(AugmentConfig(scale=[0.5, 2.0]), 304)
    factors = [draw.draw_scale(number, 0) for number in range(400)]
    assert 0.5 <= min(factors) < 0.53 and 1.97 < max(factors) <= 2.0
    assert np.mean(factors) == pytest.approx(1.25, abs=0.06)


def test_training_images_are_scaled_cut_and_read_alike_by_every_worker(tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    Image.fromarray((HALVES + 1).astype(np.uint8)).save(tmp_path / "m.png")
    record = Record(str(tmp_path / "a.png"), str(tmp_path / "m.png"), Size(40, 60), "list:1")
    change = Augmentation(AugmentConfig(scale=[0.5, 0.5], crop=[16, 64]), 304)
    dataset = TrainDataset(
        [record], LabelMap(2), ReadOptions(100, 8), collate=collate, label_stride=2, augmentation=change
    )
    sub_batch = SubBatch(5, (0, 0), 40, (False, True))
    batch = dataset[sub_batch]
    assert batch.size.tolist() == [[16, 30], [16, 30]]  # half of 40 x 60, of which 16 rows
    assert batch.label[0, 0].tolist() == [0] * 7 + [1] * 8 + [-1]  # pixels 1, 3, ... of 30, padded to 32
    assert batch.label[1, 0].tolist() == [1] * 7 + [0] * 8 + [-1]
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=[sub_batch], num_workers=1)  # pyright: ignore[reportArgumentType]
    (from_worker,) = list(loader)
    assert torch.equal(from_worker.image, batch.image)


@pytest.mark.parametrize("name", ["none", "color", "geometric", "strong"])
def test_every_group_file_is_what_it_says(name: str) -> None:
    config = configured("data=scenes", f"augment={name}").augment
    assert config.name == name and config.is_on == (name != "none")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("augment.scale=[2,1]", "augment.scale="),
        ("augment.scale=[0,1]", "augment.scale="),
        ("augment.blur_sigma=[1]", "augment.blur_sigma="),
        ("augment.crop=[0,5]", "augment.crop="),
        ("augment.hue=0.6", "augment.hue="),
    ],
)
def test_ranges_that_are_none_are_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured("data=scenes", word)


# ---- those that programs add


def dim(
    image: torch.Tensor, label: torch.Tensor, generator: torch.Generator, amount: float = 0.5, side: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    factor = 1 - amount * float(torch.rand((), generator=generator))
    label[:side, :side] = -1
    return (image * factor).to(torch.uint8), label


def changed_by(function: object, number: int = 0, /, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    with patch.dict(AUGMENTATIONS, mine=function):
        return tuple(Augmentation(AugmentConfig(**options), 304)(PICTURE, HALVES, number, 0))  # pyright: ignore[reportReturnType]


def test_a_transform_of_a_program_draws_by_number_and_leaves_the_draws_of_ours_alone() -> None:
    def keep(image: torch.Tensor, label: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        torch.rand(3)
        return image, label

    ours, same = changed(5, **STRONG), changed_by(keep, 5, **STRONG, own={"mine": True})
    assert all(np.array_equal(a, b) for a, b in zip(ours, same, strict=True))  # the crop, which comes later, too
    first, again, other = (changed_by(dim, number, own={"mine": 1.0}) for number in (5, 5, 6))
    assert np.array_equal(first[0], again[0]) and not np.array_equal(first[0], other[0])
    assert first[0].mean() < PICTURE.mean() and (first[1][:4, :4] == -1).all() and HALVES.min() == 0
    assert first[0].dtype == np.uint8 and first[1].dtype == np.int16


def test_a_number_is_its_fourth_argument_a_mapping_its_options_and_0_leaves_it_out() -> None:
    image, label = changed_by(dim, own={"mine": {"amount": 0.0, "side": 2}})
    assert np.array_equal(image, PICTURE) and int((label == -1).sum()) == 4
    for off in (0, 0.0, None, False):
        assert not AugmentConfig(own={"mine": off}).is_on
        assert np.array_equal(changed_by(dim, own={"mine": off})[1], HALVES)
    with pytest.raises(ConfigError, match=r"augment\.mine.*amout"):
        changed_by(dim, own={"mine": {"amout": 1.0}})


@pytest.mark.parametrize(
    "wrong",
    [
        lambda image, label, generator: image,
        lambda image, label, generator: (image.float(), label),
        lambda image, label, generator: (image[:, 1:], label[1:]),
        lambda image, label, generator: (image, label, 0),
        lambda image, label, generator: None,
    ],
)
def test_a_transform_that_returns_anything_else_is_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"augment\.mine: returned .* must return uint8 \(3, 40, 60\) and int64"):
        changed_by(wrong, own={"mine": True})
