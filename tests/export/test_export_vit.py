"""Vision transformers of timm exported for images of all sizes. Needs the packages of semseg[export]."""
# ruff: noqa: E402 - imports that need the extra come after the check for it

from __future__ import annotations

from pathlib import Path

import pytest
import torch

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="needs semseg[export]")

from helpers import tiny_vit
from semseg.errors import ExportError
from semseg.export.onnx import write_onnx, write_torch_export
from semseg.nets.registry import build_segmenter

assert tiny_vit.default_cfgs  # registers the networks
LONG = pytest.mark.long


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        ("tiny_dinov3", "linear"),
        ("tiny_dinov3", "upernet_lite"),
        ("tiny_dinov3", "segformer"),
        ("tiny_dinov2", "linear"),
        ("tiny_dinov2", "segformer"),
        ("test_vit", "c1"),
        ("test_convnext", "linear"),
    ],
)
def test_a_vision_transformer_is_exported_for_all_sizes(name: str, decoder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = build_segmenter("timm", decoder, 5, {"name": name}).eval()
    assert write_onnx(tmp_path / "net.onnx", net, {}).largest < 1e-4  # compared at five sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        pytest.param("tiny_dinov3", "linear", marks=LONG),
        pytest.param("tiny_dinov3", "segformer", marks=LONG),
        pytest.param("tiny_dinov2", "linear", marks=LONG),
        pytest.param("test_vit", "c1", marks=LONG),
        pytest.param("test_convnext", "linear", marks=LONG),
    ],
)
def test_torch_export_takes_a_vision_transformer_for_all_sizes(name: str, decoder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"blocks": [0]} if decoder == "linear" and name != "test_convnext" else {}  # exported in half the time
    net = build_segmenter("timm", decoder, 5, {"name": name, **options}).eval()
    assert write_torch_export(tmp_path / "net.pt2", net, {}).largest < 1e-4


@pytest.mark.parametrize("name", ["sam2_hiera_tiny", "swin_tiny_patch4_window7_224", "samvit_base_patch16"])
def test_windows_of_timm_are_refused_before_the_exporter_needs_minutes(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        net = build_segmenter("timm", "upernet", 3, {"name": name}, {"width": 8})
    for write in (write_onnx, write_torch_export):
        with pytest.raises(ExportError) as caught:
            write(tmp_path / "net", net, {})
        assert str(caught.value).startswith(f"timm's {name} cannot be exported for images of all sizes: ")
    assert not list(tmp_path.iterdir())
