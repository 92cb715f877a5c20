"""A device without hardware, on which steps run without computing: finds what would fail on a GPU, or wait for it.

A backend registered from Python has no kernels, but autograd's engine serves it, so that with fake tensors a forward
pass, a backward pass and an optimiser's step run on it. Mixed devices and questions to the device (`.item()`, `if x`,
boolean indices, bincount) raise there; `HostCopies` finds the rest, copies between device and host, and operations that
CUDA refuses with deterministic algorithms.

The registration changes a process for good: import this module only in a process of its own.
"""

from __future__ import annotations

import re
import traceback
from typing import Any

import torch
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

_setup_privateuseone_for_python_backend(DEVICE)


class FakeDevice(FakeTensorMode):
    """Tensors without content, on DEVICE and on the CPU."""

    avoid_device_init = True  # without it, uniform_ and copy_ are sent to the device


class HostCopies(TorchDispatchMode):
    """Collects copies between the host and the device, and indices that hide one: masks, and indices on the host.

    It also collects operations that CUDA refuses with deterministic algorithms.

    Attributes:
        found: what was found and where, such as "cpu to gpu in evaluation/inference.py:batch_logits".
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

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

    def add(self, what: str) -> None:
        stack = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        ours = [frame for frame in stack if not frame.name.startswith("<")]  # comprehensions belong to their function
        where = f"{ours[-1].filename.removeprefix(PACKAGE)}:{ours[-1].name}" if ours else "outside of semseg"
        self.found.add(f"{what} in {where}")


def fill_meta_tensors(net: nn.Module) -> None:
    """Replace the parameters and buffers of a network on the meta device by empty ones on the default device."""
    for module in net.modules():
        kinds: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in kinds:
            for key, value in tensors.items():
                if value is not None:
                    empty = torch.empty(value.shape, dtype=value.dtype)
                    tensors[key] = nn.Parameter(empty) if isinstance(value, nn.Parameter) else empty
