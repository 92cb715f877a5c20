"""The kernels of nets/cpu run where they were measured: on the CPU, in eager mode, outside of autocast."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import semseg
from semseg.nets.cpu import kernels
from semseg.nets.registry import build_segmenter
from semseg.nets.segmenter import Segmenter


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels in use, one entry per forward pass of a network."""
    names: list[str] = []
    for name in ("use_winograd", "use_onednn_pointwise"):

        @contextmanager
        def record(name: str = name) -> Iterator[None]:
            names.append(name)
            yield

        monkeypatch.setattr(kernels, name, record)
    return names


@pytest.fixture(scope="module")
def net() -> Segmenter:
    return build_segmenter("resnet18", "c1", 3).eval()


def test_a_network_on_the_cpu_uses_all_kernels(net: Segmenter, entered: list[str]) -> None:
    net(torch.zeros(1, 3, 32, 32))
    assert entered == ["use_winograd", "use_onednn_pointwise"]


def test_autocast_other_devices_and_compilers_use_none(
    net: Segmenter, entered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.zeros(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        net(image)
    with torch.device("meta"):
        build_segmenter("resnet18", "c1", 3).eval()(image.to("meta"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    net(image)
    assert not entered


def test_a_network_with_the_switch_off_uses_none(entered: list[str]) -> None:
    net = build_segmenter("resnet18", "c1", 3).eval()
    net.has_cpu_kernels = False
    net(torch.zeros(1, 3, 32, 32))
    assert not entered


@pytest.mark.slow
def test_nothing_imports_them_before_a_network_runs_on_a_cpu() -> None:
    package = Path(semseg.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent.name == "cpu":
            continue
        for node in ast.parse(path.read_text()).body:  # the top level of the file
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("semseg.nets.cpu")], path
