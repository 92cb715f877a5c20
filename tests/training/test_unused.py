"""What the loss does not reach is found, frozen and named; everything else gets a gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from helpers.in_process import TINY_RUN, TinyEncoder, assert_equal, configured, fit
from semseg.config.schema import OptimConfig
from semseg.nets.decoders.c1 import C1
from semseg.nets.registry import build_decoder, build_segmenter
from semseg.nets.segmenter import Segmenter
from semseg.training.losses import segmentation_loss
from semseg.training.optim import build_optimizer, parameter_groups
from semseg.training.unused import freeze_unused, summarise_modules

pytestmark = pytest.mark.reliability

ENCODERS: list[tuple[str, dict[str, Any]]] = [
    ("resnet18", {}), ("resnet50", {"output_stride": 8}), ("mobilenetv2", {}),
    ("torchvision", {"name": "mobilenet_v3_small"}), ("timm", {"name": "hrnet_w18_small"}),
    ("timm", {"name": "convnext_atto"}),
]  # fmt: skip
DECODERS: list[tuple[str, dict[str, Any], float]] = [
    ("c1", {}, 0.4), ("c1", {"deep_supervision": True}, 0.4), ("c1", {"deep_supervision": True}, 0.0), ("ppm", {}, 0.4),
    ("ppm", {"deep_supervision": True}, 0.4), ("ppm", {"deep_supervision": True}, 0.0), ("upernet", {"width": 8}, 0.4),
]  # fmt: skip
AUXILIARY = ["decoder.cbr_deepsup", "decoder.conv_last_deepsup"]


def freeze(net: Segmenter, deepsup_weight: float = 0.4) -> list[str]:
    """The modules that are frozen."""
    frozen = freeze_unused(net, lambda logits, label: segmentation_loss(logits, label, deepsup_weight).total)
    return summarise_modules(frozen, net)


def check_gradients(net: Segmenter, deepsup_weight: float) -> None:
    """A backward pass after freezing gives a gradient to every trainable parameter and to no other."""
    freeze(net, deepsup_weight)
    logits = net(torch.zeros(2, 3, 64, 64, device=next(net.parameters()).device))
    label = torch.zeros_like(logits.main[:, 0], dtype=torch.int64)
    segmentation_loss(logits, label, deepsup_weight).total.backward()
    wrong = [name for name, value in net.named_parameters() if value.requires_grad != (value.grad is not None)]
    assert wrong == []
    assert all(any(value.requires_grad for value in part.parameters()) for part in (net.encoder, net.decoder))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), ENCODERS, ids=str)
def test_d8_each_parameter_of_an_encoder_gets_a_gradient_or_is_frozen(name: str, options: dict[str, Any]) -> None:
    """Below C1, which reads the fewest maps."""
    if name == "timm":
        pytest.importorskip("timm")
    with torch.device("meta"):
        net = build_segmenter(name, "c1", 3, options, {})
    check_gradients(net, 0.4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "deepsup_weight"), DECODERS, ids=str)
def test_d8_each_parameter_of_a_decoder_gets_a_gradient_or_is_frozen(
    name: str, options: dict[str, Any], deepsup_weight: float
) -> None:
    check_gradients(Segmenter(TinyEncoder(), build_decoder(name, (8, 16), 3, **options), 3), deepsup_weight)


@pytest.mark.long
def test_d8_what_is_frozen_of_hrnet_is_named_by_its_largest_modules() -> None:
    with torch.device("meta"):
        net = build_segmenter("hrnetv2", "c1", 3, {"join": False}, {})
    assert freeze(net) == [f"encoder.stage4.2.fuse_layers.{index}" for index in range(3)]
    assert sum(not value.requires_grad for value in net.parameters()) == 30
    check_gradients(net, 0.4)


def test_d8_what_the_user_froze_is_not_named() -> None:
    net = Segmenter(TinyEncoder(), C1((8, 16), 3, deep_supervision=True), 3)
    assert freeze(net) == []
    net.encoder.fine[0].requires_grad_(False)  # by the user, not by us
    assert freeze(net, 0.0) == AUXILIARY


def test_d8_looking_changes_no_weight_statistic_mode_or_random_number() -> None:
    net = Segmenter(TinyEncoder(), C1((8, 16), 3, deep_supervision=True), 3)
    net.encoder.fine.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    random_state = torch.get_rng_state()
    freeze(net, 0.0)
    assert_equal(dict(net.state_dict()), before)
    assert modes == [module.training for module in net.modules()]
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_d8_an_optimiser_keeps_its_layout_and_leaves_what_is_frozen_alone(name: str) -> None:
    net = Segmenter(TinyEncoder(), C1((8, 16), 3, deep_supervision=True), 3)
    config = OptimConfig(name=name, weight_decay=0.5)
    layout = [len(group["params"]) for group in parameter_groups(net, config)]
    frozen = freeze_unused(net, lambda logits, label: segmentation_loss(logits, label, 0.0).total)
    optimizer = build_optimizer(net, config, frozen.values())
    assert [len(group["params"]) for group in optimizer.param_groups] == layout
    before = {name: value.clone() for name, value in net.named_parameters()}
    logits = net(torch.randn(2, 3, 32, 32))
    segmentation_loss(logits, torch.zeros(2, 4, 4, dtype=torch.int64), 0.0).total.backward()
    optimizer.step()
    unmoved = {name for name, value in net.named_parameters() if torch.equal(value, before[name])}
    assert unmoved == set(frozen)


@pytest.mark.slow
def test_d8_a_run_of_a_release_that_froze_nothing_resumes_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "data=scenes", "data.make.num_train=4", "data.make.num_val=2", f"data.root={tmp_path / 'scenes'}", *TINY_RUN,
        "data.steps_per_epoch=2", "model/decoder=c1_deepsup", "model.deepsup_weight=0", "trainer.max_epochs=2",
        "checkpoint.every_n_steps=1", "checkpoint.keep=9",
    ]  # fmt: skip
    whole = fit(configured(*words, f"run_dir={tmp_path / 'whole'}"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("frozen")]
    assert len(lines) == 1 and all(name in lines[0] for name in AUXILIARY)
    with patch("semseg.lit_module.freeze_unused", lambda net, loss: {}):
        fit(configured(*words, f"run_dir={tmp_path / 'earlier'}"))
    earlier = tmp_path / "earlier" / "checkpoints" / "step_00000001.ckpt"
    end = fit(configured(*words, f"run_dir={tmp_path / 'resumed'}"), resume=earlier)
    assert end["global_step"] == 4
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_equal(end[key], whole[key], key)
