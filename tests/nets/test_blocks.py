from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semseg.nets.blocks import BatchNorm2d, GridPool, resize


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_grid_pooling_equals_adaptive_average_pooling_at_every_size(bins: int) -> None:
    for height in (1, 2, 5, 6, 13, 20, 39):
        features = torch.randn(2, 3, height, 41 - height, dtype=torch.float64)
        expected = F.adaptive_avg_pool2d(features, bins)
        assert torch.allclose(GridPool(bins)(features), expected, atol=1e-14)
        last = features.contiguous(memory_format=torch.channels_last)
        assert torch.allclose(GridPool(bins)(last), expected, atol=1e-14)


def test_one_value_per_channel_is_normalised_by_unchanged_running_statistics() -> None:
    layer = BatchNorm2d(3).train()
    layer.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    out = layer(torch.full((1, 3, 1, 1), 3.0))
    assert torch.allclose(out.flatten(), torch.tensor([2.0, 1.0, 0.0]), atol=1e-4)
    assert layer.running_mean.tolist() == [1, 2, 3] and int(layer.num_batches_tracked) == 0


def test_several_values_per_channel_are_normalised_as_by_torch() -> None:
    ours, theirs = BatchNorm2d(3).train(), nn.BatchNorm2d(3).train()
    features = torch.randn(2, 3, 1, 1)
    assert torch.equal(ours(features), theirs(features))
    assert torch.equal(ours.running_var, theirs.running_var)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("autocast", [False, True])
def test_grid_pooling_in_bfloat16_is_as_exact_as_adaptive_pooling(autocast: bool) -> None:
    features = torch.rand(1, 8, 57, 57).bfloat16()
    expected = F.adaptive_avg_pool2d(features.double(), 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        pooled = GridPool(1)(features)
    assert pooled.dtype == torch.bfloat16
    assert ((pooled.double() - expected) / expected).abs().max() <= 2**-8  # one rounding, not one per weight


@pytest.mark.slow
def test_grid_pooling_is_exported_once_for_all_sizes() -> None:
    height, width = torch.export.Dim("height", min=2, max=512), torch.export.Dim("width", min=2, max=512)
    exported = torch.export.export(
        GridPool(3), (torch.randn(1, 2, 14, 18),), dynamic_shapes=({2: height, 3: width},)
    ).module()
    for size in ((5, 7), (2, 40), (57, 76)):
        features = torch.randn(1, 2, *size)
        assert torch.allclose(exported(features), F.adaptive_avg_pool2d(features, 3), atol=1e-6)


def test_resizing_uses_pixel_centres() -> None:
    row = torch.tensor([[[[0.0, 1.0]]]])
    assert resize(row, torch.zeros(1, 1, 1, 4)).flatten().tolist() == [0.0, 0.25, 0.75, 1.0]
    assert resize(row, row) is row
