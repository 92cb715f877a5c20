"""A device without hardware, on which steps run without computing: finds what would fail on a GPU, or wait for it.

A backend registered from Python has no kernels, but autograd's engine serves it, so that with fake tensors a forward
pass, a backward pass and an optimiser's step run on it. Mixed devices and questions to the device (`.item()`, `if x`,
boolean indices, bincount) raise there; `HostCopies` finds the rest, copies between device and host, and operations that
CUDA refuses with deterministic algorithms.

`AppleProblems` finds what fails on an Apple GPU in the same way: float64, which Metal does not have, and operations for
which PyTorch's own table of operations has no kernel for it.

The registration changes a process for good: import this module only in a process of its own.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchgen
import yaml
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import semseg
from semseg.training.determinism import name_refused

DEVICE = "gpu"
PACKAGE = f"{semseg.__path__[0]}/"

# Gradients without a deterministic kernel in CUDA. Bilinear interpolation without antialias has another one there.
REFUSED_GRADIENTS = re.compile(
    r"aten::(_?adaptive_(avg|max)_pool[23]d|_upsample_\w+_aa|upsample_(linear1d|trilinear3d)|avg_pool3d|"
    r"grid_sampler_[23]d|reflection_pad[123]d|fractional_max_pool[23]d)_backward"
)

# Kernels that are written in terms of other operations, which are seen by themselves.
COMPOSITE = {"CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}

_setup_privateuseone_for_python_backend(DEVICE)


class FakeDevice(FakeTensorMode):
    """Tensors without content, on DEVICE and on the CPU."""

    avoid_device_init = True  # without it, uniform_ and copy_ are sent to the device


class Findings(TorchDispatchMode):
    """Collects findings about the operations that run within this context.

    Attributes:
        found: what was found and where, such as "cpu to gpu in evaluation/inference.py:batch_logits".
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def add(self, what: str) -> None:
        stack = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        ours = [frame for frame in stack if not frame.name.startswith("<")]  # comprehensions belong to their function
        where = f"{ours[-1].filename.removeprefix(PACKAGE)}:{ours[-1].name}" if ours else "outside of semseg"
        self.found.add(f"{what} in {where}")


class HostCopies(Findings):
    """Collects copies between the host and the device, and indices that hide one: masks, and indices on the host.

    It also collects operations that CUDA refuses with deterministic algorithms.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, result = func.name(), func(*args, **(kwargs or {}))
        if name in ("aten::_to_copy", "aten::copy_"):
            source, target = args[name == "aten::copy_"].device.type, result.device.type
            if source != target:
                self.add(f"{source} to {target}")
        if name.startswith(("aten::index", "aten::_index_put")) and isinstance(args[1], list | tuple):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool or index.device != args[0].device for index in indices):
                self.add("index")
        if name_refused(name, args) is not None or REFUSED_GRADIENTS.match(name):
            self.add(f"refused {name}")
        return result


class AppleProblems(Findings):
    """Collects float64 on the device, and operations on the device that have no kernel for Apple's GPUs."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else (result,)
        here = [one for one in results if isinstance(one, torch.Tensor) and one.device.type == DEVICE]
        if any(tensor.dtype == torch.float64 for tensor in here):
            self.add("float64")
        namespace, _, name = func.name().partition("::")
        if here and namespace == "aten" and not has_apple_kernel(name):
            self.add(f"no kernel for {name}")
        return result


@cache
def has_apple_kernel(name: str) -> bool:
    """Whether PyTorch has a kernel of an operation such as `add.Tensor` for Apple's GPUs."""
    operations = read_operations()
    entry = operations.get(name)
    return entry is not None and ("MPS" in entry or bool(entry & COMPOSITE))


@cache
def read_operations() -> dict[str, frozenset[str]]:
    """The kinds of kernels of every operation, from the table that PyTorch is built from, which it brings along."""
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    rows = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    entries = {row["func"].partition("(")[0]: row for row in rows}
    return {name: frozenset(list_kernels(row, entries)) for name, row in entries.items()}


def list_kernels(row: dict[str, Any], entries: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The kinds of kernels of a row of the table, with those of the row that it delegates to."""
    dispatch, delegate = row.get("dispatch"), row.get("structured_delegate")
    if dispatch is None and delegate is None:
        yield "CompositeImplicitAutograd"
    for kinds in dispatch or ():
        yield from (kind.strip() for kind in kinds.split(","))
    if delegate is not None:
        yield from list_kernels(entries[delegate], entries)


def fill_meta_tensors(net: nn.Module) -> None:
    """Replace the parameters and buffers of a network on the meta device by empty ones on the default device."""
    for module in net.modules():
        kinds: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in kinds:
            for key, value in tensors.items():
                if value is not None:
                    empty = torch.empty(value.shape, dtype=value.dtype)
                    tensors[key] = nn.Parameter(empty) if isinstance(value, nn.Parameter) else empty
