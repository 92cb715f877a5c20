"""The stride of training labels: what model.label_stride amounts to for each kind of network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from helpers.command_line import TINY_NETWORK, run_here
from helpers.in_process import SHORT_RUN, configured, prepare_run
from semseg.build import choose_label_stride
from semseg.checkpoints.format import read_checkpoint
from semseg.nets.interfaces import SegmentationNetwork

VIT = ["model/encoder=timm", "model.encoder.name=vit_small_patch16_dinov3", "model/decoder=c1"]


def stride_of(*words: str, stride: int, divisor: int | None = None, has_own_loss: bool = False) -> int:
    """The stride of labels for a network whose logits have `stride`."""
    net: Any = SimpleNamespace(label_stride=stride, size_divisor=divisor or stride, has_own_loss=has_own_loss)
    return choose_label_stride(configured(*words), cast(SegmentationNetwork, net))


def test_the_networks_of_the_original_keep_the_stride_of_their_logits() -> None:
    assert stride_of("model=resnet50_dilated8_ppm_deepsup", stride=8) == 8
    assert stride_of("model=mobilenetv2_dilated8_c1_deepsup", stride=8) == 8
    assert stride_of("model=upernet50", stride=4, divisor=32) == 4
    assert stride_of("model.encoder.name=resnet18_dilated16", stride=16) == 16


@pytest.mark.parametrize(
    ("stride", "expected"), [(16, 4), (32, 4), (14, 2), (8, 4), (4, 4), (2, 2), (1, 1), (15, 3), (13, 1)]
)
def test_others_have_at_most_4_a_divisor_of_the_size_divisor(stride: int, expected: int) -> None:
    assert stride_of(*VIT, stride=stride) == expected
    assert stride_of("model=smp", "model.arch=unet", stride=stride) == expected


def test_at_native_resolution_the_networks_of_the_original_have_at_most_4_too() -> None:
    assert stride_of("model=resnet50_dilated8_ppm_deepsup", "data.resize=native", stride=8) == 4


def test_a_number_and_null_are_what_they_say() -> None:
    assert stride_of(*VIT, "model.label_stride=null", stride=16) == 16
    assert stride_of(*VIT, "model.label_stride=1", stride=16) == 1
    assert stride_of(*VIT, "model.label_stride=8", stride=16) == 8


def test_a_network_with_a_loss_of_its_own_keeps_its_stride() -> None:
    assert stride_of(*VIT, stride=16, has_own_loss=True) == 16


@pytest.mark.parametrize("value", ["fine", "0", "1.5", "true", "2000"])
def test_other_values_are_refused(tmp_path: Path, value: str) -> None:
    output = run_here(tmp_path, f"model.label_stride={value}", code=2)
    assert "must be auto, null, or a number from 1 to 1024" in " ".join(output.split())


@pytest.mark.slow
def test_a_run_of_the_version_before_continues_with_its_stride(tmp_path: Path) -> None:
    words = [*SHORT_RUN, *TINY_NETWORK, "data.root=scenes", "run_dir=run"]
    words = list(dict.fromkeys(words))
    run_here(tmp_path, *words, "model.label_stride=null")
    output = run_here(tmp_path, *words, "trainer.max_epochs=2")
    assert "labels at 1/8" in " ".join(output.split())
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved.config.model.label_stride is None


def test_a_new_run_of_another_network_has_fine_labels(tmp_path: Path) -> None:
    run = prepare_run(tmp_path / "scenes", tmp_path / "run")
    assert (run.net.label_stride, run.data.label_stride) == (8, 4)
