from __future__ import annotations

import pytest
import torch

from semseg.config.preprocessing import PREPROCESSING, BandRange, Preprocessing
from semseg.nets.normalise import normalise, restore_values


def test_the_2018_convention_is_bgr_minus_the_mean() -> None:
    image = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1)  # red, green, blue
    values = normalise(image, PREPROCESSING["bgr_mean"]).flatten()
    assert torch.allclose(values, torch.tensor([30 - 102.9801, 20 - 115.9465, 10 - 122.7717]))


def test_the_2020_convention_is_rgb_with_mean_and_deviation() -> None:
    image = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    values = normalise(image, PREPROCESSING["rgb_mean_std"]).flatten()
    assert torch.allclose(values, torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))


@pytest.mark.parametrize("convention", PREPROCESSING)
def test_padding_is_exactly_zero(convention: str) -> None:
    image = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8)
    size = torch.tensor([[4, 6], [2, 3]])
    values = normalise(image, PREPROCESSING[convention], size)
    assert torch.equal(values[0], normalise(image, PREPROCESSING[convention])[0])
    assert torch.equal(values[1, :, :2, :3], normalise(image, PREPROCESSING[convention])[1, :, :2, :3])
    assert float(values[1, :, 2:].abs().max()) == float(values[1, :, :, 3:].abs().max()) == 0


def test_channels_last_is_kept() -> None:
    image = torch.zeros(2, 3, 4, 6, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    for convention in PREPROCESSING.values():
        assert normalise(image, convention).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("convention", PREPROCESSING)
def test_the_image_itself_is_left_alone(convention: str, dtype: torch.dtype) -> None:
    image = torch.randint(0, 256, (1, 3, 4, 6), dtype=torch.uint8).to(dtype)
    before = image.clone()
    normalise(image, PREPROCESSING[convention], torch.tensor([[2, 2]]))
    assert torch.equal(image, before)


@pytest.mark.parametrize("convention", PREPROCESSING)
def test_the_inverse_gives_all_bytes_back_and_the_mean_for_padding(convention: str) -> None:
    preprocessing = PREPROCESSING[convention]
    image = torch.arange(256).repeat(3, 2, 1)[None].to(torch.uint8)
    values = restore_values(normalise(image, preprocessing, torch.tensor([[1, 256]])), preprocessing)
    assert torch.equal(values[:, :, 0], image[:, :, 0].float())
    mean = torch.tensor(preprocessing.mean) / preprocessing.scale
    red_first = mean.flip(0) if preprocessing.channel_order == "bgr" else mean
    assert torch.allclose(values[0, :, 1], red_first[:, None].expand(-1, 256))


def test_the_inverse_gives_values_of_ranges_back() -> None:
    ranges = (BandRange(-500, 9500), BandRange(0, 1))
    preprocessing = Preprocessing(
        "rgb", 1 / 255, (0.4, 0.5), (0.2, 0.3), antialias=True, bands=("a", "b"), ranges=ranges
    )
    image = torch.stack([torch.linspace(-500, 9500, 7), torch.linspace(0, 1, 7)])[None, :, None]
    assert torch.allclose(restore_values(normalise(image, preprocessing), preprocessing), image, rtol=1e-5, atol=1e-3)
    beyond = restore_values(normalise(image * 2 - 1, preprocessing), preprocessing)
    assert torch.allclose(
        beyond, torch.maximum(torch.minimum(image * 2 - 1, image[..., -1:]), image[..., :1]), atol=1e-3
    )


@pytest.mark.gpu
def test_the_gpu_gives_the_same_numbers() -> None:
    image, size = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8), torch.tensor([[9, 7], [2, 3]])
    for convention in PREPROCESSING.values():
        there = normalise(image.cuda(), convention, size.cuda()).cpu()
        assert torch.allclose(there, normalise(image, convention, size), rtol=1e-6, atol=1e-6)
