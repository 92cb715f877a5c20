"""Operations that CUDA refuses with trainer.deterministic=true are found without a GPU, and named before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import PropertyMock, patch

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from helpers.in_process import PreparedRun, prepare_run
from semseg.config.schema import LossConfig
from semseg.errors import ConfigError
from semseg.nets.interfaces import Logits
from semseg.nets.registry import build_segmenter
from semseg.training.determinism import RefusedOperation, find_refused_operations
from semseg.training.losses import LOSSES, build_term, segmentation_loss
from semseg.training.unused import compute_probe_loss

pytestmark = pytest.mark.reliability

GRID = torch.zeros(1, 4, 4, 2)
LABEL = torch.zeros(1, 12, 12, dtype=torch.int64)
REFUSED: dict[str, Callable[[Tensor], object]] = {
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 3),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 3),
    "bilinear interpolation with antialias": lambda x: F.interpolate(x, (5, 5), mode="bilinear", antialias=True),
    "bicubic interpolation with antialias": lambda x: F.interpolate(x, (5, 5), mode="bicubic", antialias=True),
    "grid_sample": lambda x: F.grid_sample(x, GRID, align_corners=False),
    "padding by reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
}
REFUSED_ALWAYS: dict[str, Callable[[Tensor], object]] = {
    "nll_loss of images with a sum or mean": lambda x: F.cross_entropy(x, LABEL),
    "median of a dimension": lambda x: x.median(dim=1),
}
ACCEPTED: list[Callable[[Tensor], object]] = [
    lambda x: F.adaptive_avg_pool2d(x, 1),  # a mean
    lambda x: F.interpolate(x, (5, 5), mode="bilinear"),
    lambda x: F.interpolate(x, (5, 5), mode="bicubic"),
    lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    lambda x: F.max_pool2d(x, 3),
    lambda x: F.cross_entropy(x, LABEL, reduction="none").sum(),
    lambda x: F.scaled_dot_product_attention(x, x, x),
]


class Layer(nn.Module):
    def __init__(self, act: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> object:
        return self.act(x)


def find(act: Callable[[Tensor], object], *, needs_gradient: bool = True) -> list[RefusedOperation]:
    net = nn.Sequential(nn.Identity(), nn.Sequential(Layer(act)))
    return find_refused_operations(net, lambda: net(torch.ones(1, 3, 12, 12, requires_grad=needs_gradient)))


@pytest.mark.parametrize("name", REFUSED)
def test_d11_an_operation_without_a_deterministic_gradient_is_found_where_it_needs_one(name: str) -> None:
    assert find(REFUSED[name]) == [RefusedOperation("1.0", name)]
    assert find(REFUSED[name], needs_gradient=False) == []


@pytest.mark.parametrize("name", REFUSED_ALWAYS)
def test_d11_an_operation_that_is_never_deterministic_is_found_everywhere(name: str) -> None:
    for needs_gradient in (True, False):
        assert find(REFUSED_ALWAYS[name], needs_gradient=needs_gradient) == [RefusedOperation("1.0", name)]


@pytest.mark.parametrize("act", ACCEPTED)
def test_d11_no_other_operation_is_reported(act: Callable[[Tensor], object]) -> None:
    assert find(act) == []


@pytest.mark.parametrize("name", LOSSES)
def test_d11_no_term_of_the_loss_has_one(name: str) -> None:
    logits, label = torch.zeros(2, 3, 4, 5, requires_grad=True), torch.zeros(2, 4, 5, dtype=torch.int64)
    term = build_term(name, LossConfig(), torch.ones(3))
    loss = partial(segmentation_loss, Logits(logits, logits), label, terms=[(1.0, term)])
    assert find_refused_operations(nn.Identity(), loss) == []


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """Runs whose trainer would use a GPU, before their first step."""
    with patch.object(SingleDeviceStrategy, "root_device", PropertyMock(return_value=torch.device("cuda", 0))):
        yield
    torch.use_deterministic_algorithms(False)


def prepare_blurred(tmp_path: Path, *words: str) -> PreparedRun:
    """A run whose encoder pads by reflection, before its first step."""
    run = prepare_run(tmp_path / "scenes", tmp_path, *words)
    run.net.encoder.dropout = Layer(lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")[..., 1:-1, 1:-1])
    run.module.trainer = run.trainer
    return run


def test_d11_a_network_that_cannot_train_so_on_a_gpu_is_named_before_the_first_step(
    tmp_path: Path, on_gpu: None
) -> None:
    run = prepare_blurred(tmp_path, "trainer.deterministic=true")
    with pytest.raises(ConfigError) as caught:
        run.module.setup("fit")
    assert str(caught.value) == (
        "trainer.deterministic=true: PyTorch cannot train tiny + c1 so on a GPU, because it has no deterministic "
        "algorithm for padding by reflection (in encoder.dropout). Choose another network, freeze the encoder "
        "(model.encoder.frozen=true), or set trainer.deterministic=false."
    )


@pytest.mark.parametrize("words", [["trainer.deterministic=true", "model.encoder.frozen=true"], []])
def test_d11_a_frozen_encoder_and_other_runs_are_accepted(tmp_path: Path, on_gpu: None, words: list[str]) -> None:
    prepare_blurred(tmp_path, *words).module.setup("fit")


def test_d11_the_cpu_has_these_operations(tmp_path: Path) -> None:
    try:
        prepare_blurred(tmp_path, "trainer.deterministic=true").module.setup("fit")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.long
@pytest.mark.parametrize("name", [
    "resnet18", "resnext50_32x4d", "wide_resnet50_2", "regnet_x_400mf", "regnet_y_400mf", "mobilenet_v2",
    "mobilenet_v3_small", "efficientnet_b0", "efficientnet_v2_s", "convnext_tiny", "swin_t", "swin_v2_t",
])  # fmt: skip
def test_d11_no_family_of_torchvision_has_one(name: str) -> None:
    net = build_segmenter("torchvision", "c1", 3, {"name": name})
    loss = partial(compute_probe_loss, net, lambda logits, label: logits.main.sum())
    assert find_refused_operations(net, loss) == []


@pytest.mark.slow
def test_d11_encoders_of_libraries_are_looked_into() -> None:
    pytest.importorskip("timm")
    net = build_segmenter("timm", "c1", 3, {"name": "resnetblur18"})
    loss = partial(compute_probe_loss, net, lambda logits, label: logits.main.sum())
    found = find_refused_operations(net, loss)
    assert {one.operation for one in found} == {"padding by reflection"}
    assert all(one.module.startswith("encoder.model.") for one in found)
    net.encoder.requires_grad_(False)
    assert find_refused_operations(net, loss) == []
