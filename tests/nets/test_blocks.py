from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semseg.data.convention import CONVENTIONS
from semseg.nets.blocks import BatchNorm2d, GridPool
from semseg.nets.c1 import C1
from semseg.nets.normalise import normalise
from semseg.nets.registry import ENCODERS


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_grid_pooling_equals_adaptive_average_pooling_at_every_size(bins: int) -> None:
    for height in range(1, 40, 2):
        features = torch.randn(2, 3, height, 41 - height, dtype=torch.float64)
        expected = F.adaptive_avg_pool2d(features, bins)
        assert torch.allclose(GridPool(bins)(features), expected, atol=1e-14)


def test_one_value_per_channel_is_normalised_by_the_running_statistics_which_stay() -> None:
    layer = BatchNorm2d(3).train()
    layer.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    out = layer(torch.full((1, 3, 1, 1), 3.0))
    assert torch.allclose(out.flatten(), torch.tensor([2.0, 1.0, 0.0]), atol=1e-4)
    assert layer.running_mean.tolist() == [1, 2, 3] and int(layer.num_batches_tracked) == 0


def test_with_more_values_it_is_torchs_batch_norm() -> None:
    ours, theirs = BatchNorm2d(3).train(), nn.BatchNorm2d(3).train()
    features = torch.randn(2, 3, 1, 1)
    assert torch.equal(ours(features), theirs(features))
    assert torch.equal(ours.running_var, theirs.running_var)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_encoders_start_as_published() -> None:
    torch.manual_seed(0)
    encoder = ENCODERS["resnext101"]()
    grouped = encoder.layer1[0].conv2
    assert float(grouped.weight.detach().std()) == pytest.approx(math.sqrt(2 / (9 * 128 / 32)), rel=0.02)
    assert float(encoder.conv3.weight.detach().std()) == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    assert float(encoder.bn1.weight.min()) == 1 and float(encoder.bn1.bias.abs().max()) == 0


def test_decoders_start_as_published() -> None:
    torch.manual_seed(0)
    decoder = C1((64, 128, 256, 512), 150)
    convolution, norm = decoder.cbr[0], decoder.cbr[1]
    assert float(convolution.weight.detach().std()) == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.02)
    assert float(norm.weight.min()) == 1
    assert torch.allclose(norm.bias, torch.full_like(norm.bias, 1e-4))


def test_the_2018_convention_is_bgr_minus_the_mean() -> None:
    image = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1)  # red, green, blue
    values = normalise(image, CONVENTIONS["bgr_mean"]).flatten()
    assert torch.allclose(values, torch.tensor([30 - 102.9801, 20 - 115.9465, 10 - 122.7717]))


def test_the_2020_convention_is_rgb_with_mean_and_deviation() -> None:
    image = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    values = normalise(image, CONVENTIONS["rgb_mean_std"]).flatten()
    assert torch.allclose(values, torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_padding_is_exactly_zero(convention: str) -> None:
    image = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8)
    size = torch.tensor([[4, 6], [2, 3]])
    values = normalise(image, CONVENTIONS[convention], size)
    assert torch.equal(values[0], normalise(image, CONVENTIONS[convention])[0])
    assert torch.equal(values[1, :, :2, :3], normalise(image, CONVENTIONS[convention])[1, :, :2, :3])
    assert float(values[1, :, 2:].abs().max()) == float(values[1, :, :, 3:].abs().max()) == 0


def test_channels_last_is_kept() -> None:
    image = torch.zeros(2, 3, 4, 6, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    for convention in CONVENTIONS.values():
        assert normalise(image, convention).is_contiguous(memory_format=torch.channels_last)
