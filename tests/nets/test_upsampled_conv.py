"""Both ways of the convolution of concatenated maps give one result, and hooks see the convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from semseg.nets.blocks import GridPool, resize
from semseg.nets.cpu import strips
from semseg.nets.registry import build_segmenter
from semseg.nets.upsampled_conv import UpsampledConcatConv, conv_of_upsampled, interpolation_matrices

MAPS = {
    "pyramid": [(6, 16, 24), (6, 8, 12), (6, 4, 6), (6, 2, 3)],
    "grids": [(8, 13, 17), (4, 1, 1), (4, 2, 2), (4, 3, 3), (4, 6, 6)],
    "odd sizes": [(3, 7, 5), (2, 4, 3), (1, 7, 5), (2, 1, 5)],
    "finer than the first": [(2, 5, 5), (2, 9, 11)],
    "one position": [(2, 1, 1), (3, 1, 1)],
}


def layers_for(shapes: list[tuple[int, int, int]], *layers: nn.Module) -> UpsampledConcatConv:
    conv = nn.Conv2d(sum(shape[0] for shape in shapes), 5, 3, padding=1, bias=False).double()
    return UpsampledConcatConv(conv, *layers)


def convolve_concatenated(layers: nn.Sequential, maps: list[Tensor]) -> Tensor:
    """The definition: upsample, concatenate, convolve."""
    return nn.Sequential(*layers)(torch.cat([resize(features, maps[0]) for features in maps], 1))


@pytest.mark.parametrize("shapes", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_the_factored_way_gives_the_values_and_gradients_of_the_direct_way(
    shapes: list[tuple[int, int, int]], layout: torch.memory_format
) -> None:
    layers = layers_for(shapes, nn.Tanh())
    outcomes = []
    for factored in (True, False):
        layers.factored = factored
        torch.manual_seed(0)
        maps = [torch.randn(2, *shape, dtype=torch.float64).contiguous(memory_format=layout) for shape in shapes]
        output = layers([features.requires_grad_() for features in maps])
        gradients = torch.autograd.grad(
            output, [*maps, layers[0].weight], torch.randn(output.shape, dtype=output.dtype)
        )
        outcomes.append([output, *gradients])
    for factored, direct in zip(*outcomes, strict=True):
        assert torch.allclose(factored, direct, atol=1e-12)
    assert torch.equal(outcomes[1][0], convolve_concatenated(layers, maps))


def test_the_factored_way_is_the_einsum_of_the_docstring() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    weight = torch.randn(6, 3, 3, 3, dtype=torch.float64)
    rows, columns = interpolation_matrices(4, 9, features), interpolation_matrices(5, 7, features)
    expected = torch.einsum("kcuv, ncij, vXj, uYi -> nkYX", weight, features, columns, rows)
    assert torch.allclose(conv_of_upsampled(features, weight, (9, 7)), expected, atol=1e-12)
    upsampled = F.interpolate(features, size=(9, 7), mode="bilinear", align_corners=False)
    assert torch.allclose(expected, F.conv2d(upsampled, weight, padding=1), atol=1e-12)


@pytest.mark.parametrize("shapes", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("strip_bytes", [1, 2000, strips.OUTPUT_STRIP_BYTES])
def test_without_gradients_it_is_computed_in_strips_of_columns(
    shapes: list[tuple[int, int, int]], strip_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "OUTPUT_STRIP_BYTES", strip_bytes)
    layers = layers_for(shapes)
    maps = [torch.randn(2, *shape, dtype=torch.float64) for shape in shapes]
    with torch.no_grad():
        output = layers(maps)
    assert torch.allclose(output, convolve_concatenated(layers, maps), atol=1e-12)


# ---- which way is taken


def test_the_factored_way_is_taken_on_the_cpu_outside_of_autocast() -> None:
    layers = layers_for(MAPS["grids"])
    assert layers.is_factored("cpu")
    assert not layers.is_factored("cuda") and not layers.is_factored("meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert not layers.is_factored("cpu")
        layers.factored = True
        assert layers.is_factored("cpu") and layers.is_factored("cuda")
    layers.factored = False
    assert not layers.is_factored("cpu")


def test_a_network_without_cpu_kernels_takes_the_direct_way() -> None:
    net = build_segmenter("resnet18", "upernet", 3)
    (layers,) = (module for module in net.modules() if isinstance(module, UpsampledConcatConv))
    assert layers.is_factored("cpu")
    net.has_cpu_kernels = False
    assert not layers.is_factored("cpu")
    net.has_cpu_kernels = True
    assert layers.is_factored("cpu")


def test_hooks_and_counters_see_the_convolution() -> None:
    shapes = MAPS["grids"]
    layers = layers_for(shapes)
    maps = [torch.randn(1, *shape, dtype=torch.float64) for shape in shapes]
    seen: list[torch.Size] = []
    handle = layers[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    layers(maps)
    assert seen == [(1, 24, 13, 17)]
    handle.remove()
    assert layers.is_factored("cpu")
    with FlopCounterMode(display=False) as counter:
        layers(maps)
    assert counter.get_total_flops() == 2 * 13 * 17 * 9 * 24 * 5


def test_a_convolution_of_another_class_is_called() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    shapes = MAPS["grids"]
    layers = UpsampledConcatConv(Doubled(24, 5, 3, padding=1, bias=False).double())
    maps = [torch.randn(1, *shape, dtype=torch.float64) for shape in shapes]
    plain = layers_for(shapes)
    plain.load_state_dict(layers.state_dict())
    assert torch.allclose(layers(maps), 2 * plain(maps), atol=1e-12)


SIZES = {
    "odd sizes": [(57, 76), (29, 38), (6, 6), (1, 1)],
    "pyramid": [(56, 72), (28, 36), (14, 18), (7, 9)],
    "grids": [(56, 72), (6, 6), (3, 3), (2, 2), (1, 1)],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_in_half_precision_the_factored_way_is_as_exact_as_the_direct_way_on_cuda(sizes: list[tuple[int, int]]) -> None:
    """The direct way by the rules of CUDA's autocast, which tests/nets/test_mixed_precision.py shows, on the CPU."""
    torch.manual_seed(0)
    maps = [torch.randn(2, 32, *size).bfloat16() for size in sizes]
    layers = UpsampledConcatConv(nn.Conv2d(32 * len(maps), 16, 3, padding=1, bias=False))
    weight = layers[0].weight.detach()
    exact = convolve_concatenated(layers.double(), [features.double() for features in maps]).detach()
    layers = layers.float()
    layers.factored = True
    with torch.autocast("cpu", torch.bfloat16):
        autocast = layers(maps)
    true = layers.bfloat16()(maps)
    # Interpolated in float32, rounded, multiplied by rounded weights, added up in float32, rounded.
    upsampled = torch.cat([resize(features.float(), maps[0]) for features in maps], 1).bfloat16()
    direct = F.conv2d(upsampled.float(), weight.bfloat16().float(), padding=1).bfloat16()
    errors = [relative_error(output, exact) for output in (autocast, true, direct)]
    assert autocast.dtype == true.dtype == torch.bfloat16
    assert errors[0] < errors[2] < 3.1e-3
    assert errors[1] < 1.1 * errors[2]  # where the weights are rounded as well


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The root mean square of the differences, relative to that of the exact values."""
    return float((found.detach().double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def test_it_is_exported_once_for_all_sizes_with_a_whole_convolution() -> None:
    class PooledConv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = UpsampledConcatConv(nn.Conv2d(4, 3, 3, padding=1, bias=False))

        def forward(self, fine: Tensor) -> Tensor:
            return self.layers([fine, GridPool(3)(fine)])

    height, width = torch.export.Dim("height", min=4, max=512), torch.export.Dim("width", min=4, max=512)
    net = PooledConv()
    program = torch.export.export(net, (torch.randn(2, 2, 14, 18),), dynamic_shapes=({2: height, 3: width},))
    exported = program.module()
    assert [str(node.target) for node in program.graph.nodes].count("aten.conv2d.default") == 1
    for size in ((5, 7), (4, 40)):
        features = torch.randn(2, 2, *size)
        assert torch.allclose(exported(features), net(features), atol=1e-6)


@pytest.mark.slow
def test_it_is_compiled_without_a_graph_break() -> None:
    layers = layers_for(MAPS["grids"], nn.ReLU())
    maps = [torch.randn(2, *shape, dtype=torch.float64) for shape in MAPS["grids"]]
    compiled = torch.compile(layers, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(maps), layers(maps), atol=1e-12)
