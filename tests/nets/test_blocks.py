from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semseg.nets import blocks
from semseg.nets.blocks import BatchNorm2d, GridPool, apply_to_joined, resize


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_grid_pooling_equals_adaptive_average_pooling_at_every_size(bins: int) -> None:
    for height in range(1, 40, 2):
        features = torch.randn(2, 3, height, 41 - height, dtype=torch.float64)
        expected = F.adaptive_avg_pool2d(features, bins)
        assert torch.allclose(GridPool(bins)(features), expected, atol=1e-14)
        last = features.contiguous(memory_format=torch.channels_last)
        assert torch.allclose(GridPool(bins)(last), expected, atol=1e-14)


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


@pytest.mark.parametrize("autocast", [False, True])
def test_grid_pooling_in_bfloat16_is_as_exact_as_adaptive_pooling(autocast: bool) -> None:
    features = torch.rand(1, 8, 57, 57).bfloat16()
    expected = F.adaptive_avg_pool2d(features.double(), 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        pooled = GridPool(1)(features)
    assert pooled.dtype == torch.bfloat16
    assert ((pooled.double() - expected) / expected).abs().max() <= 2**-8  # one rounding, not one per weight


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


def joined(layers: nn.Module, maps: list[Tensor]) -> Tensor:
    """What apply_to_joined stands for."""
    return layers(torch.cat([resize(features, maps[0]) for features in maps], 1))


MAPS = {
    "pyramid": [(6, 16, 24), (6, 8, 12), (6, 4, 6), (6, 2, 3)],
    "grids": [(8, 13, 17), (4, 1, 1), (4, 2, 2), (4, 3, 3), (4, 6, 6)],
    "odd sizes": [(3, 7, 5), (2, 4, 3), (1, 7, 5), (2, 1, 5)],
    "finer than the first": [(2, 5, 5), (2, 9, 11)],
    "one place": [(2, 1, 1), (3, 1, 1)],
}


@pytest.mark.parametrize("shapes", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_a_convolution_of_joined_maps_is_the_sum_of_its_parts(
    shapes: list[tuple[int, int, int]], layout: torch.memory_format
) -> None:
    conv = nn.Conv2d(sum(shape[0] for shape in shapes), 5, 3, padding=1, bias=False).double()
    layers = nn.Sequential(conv, nn.Tanh())
    outcomes = []
    for form in (apply_to_joined, joined):
        torch.manual_seed(0)
        maps = [torch.randn(2, *shape, dtype=torch.float64).contiguous(memory_format=layout) for shape in shapes]
        out = form(layers, [features.requires_grad_() for features in maps])
        gradients = torch.autograd.grad(out, [*maps, conv.weight], torch.randn(out.shape, dtype=out.dtype))
        outcomes.append([out, *gradients])
    for ours, expected in zip(*outcomes, strict=True):
        assert torch.allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize("shapes", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("block_bytes", [1, 2000, blocks.BLOCK_BYTES])
def test_without_gradients_it_is_made_a_few_columns_at_a_time(
    shapes: list[tuple[int, int, int]], block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    layers = nn.Sequential(nn.Conv2d(sum(shape[0] for shape in shapes), 5, 3, padding=1, bias=False).double())
    maps = [torch.randn(2, *shape, dtype=torch.float64) for shape in shapes]
    with torch.no_grad():
        found = apply_to_joined(layers, maps)
    assert torch.allclose(found, joined(layers, maps), atol=1e-12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert apply_to_joined(layers.float(), [features.float() for features in maps]).dtype == torch.bfloat16


def test_under_autocast_it_costs_less_than_one_bit_against_the_joined_convolution() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 32, *size) for size in ((57, 76), (29, 38), (6, 6), (1, 1))]
    layers = nn.Sequential(nn.Conv2d(4 * 32, 16, 3, padding=1, bias=False))
    exact = joined(layers, maps).detach()
    errors = []
    for form in (apply_to_joined, joined):
        with torch.autocast("cpu", torch.bfloat16):
            out = form(layers, maps)
        assert out.dtype == torch.bfloat16
        errors.append(float((out.detach().float() - exact).square().mean().sqrt()))
    assert errors[0] < 2 * errors[1]


def test_a_convolution_of_joined_maps_is_exported_once_for_all_sizes() -> None:
    class Joins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1, bias=False))

        def forward(self, fine: Tensor) -> Tensor:
            return apply_to_joined(self.layers, [fine, GridPool(3)(fine)])

    height, width = torch.export.Dim("height", min=4, max=512), torch.export.Dim("width", min=4, max=512)
    net = Joins()
    exported = torch.export.export(net, (torch.randn(2, 2, 14, 18),), dynamic_shapes=({2: height, 3: width},)).module()
    for size in ((5, 7), (4, 40), (57, 76)):
        features = torch.randn(2, 2, *size)
        assert torch.allclose(exported(features), net(features), atol=1e-6)
