"""The types in which operations compute under CUDA's autocast, without a GPU: with tensors that have no content.

Under `cuda_autocast` fake tensors on "cuda" take PyTorch's own rules for CUDA. Autograd's engine does not serve that
device; `add_autocast` teaches the rules that our networks need to one that it serves, that of helpers/fake_device.py.
The registration changes a process for good: use a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import semseg

PACKAGE = f"{semseg.__path__[0]}/"
# Part of the lists in ATen/autocast_mode.h: these operations of ours are computed in half precision, those in float32.
HALF = ("conv2d", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
SINGLE = (
    "layer_norm", "group_norm", "softmax.int", "log_softmax.int", "cross_entropy_loss", "nll_loss", "nll_loss2d",
    "upsample_bilinear2d", "sum", "sum.dim_IntList", "cumsum", "exp", "log", "pow.Tensor_Scalar", "norm.Scalar",
)  # fmt: skip

_libraries: list[Any] = []  # registrations end with them


class NumericTypes(TorchDispatchMode):
    """Collects the floating types of every operation.

    Attributes:
        found: (operation, types of its arguments, types of its results, file and function in semseg) for each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str, str, str]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        self.found.add((name, list_types((args, kwargs)), list_types(result), find_caller()))
        return result


def list_types(values: Any) -> str:
    """The floating types among some tensors, such as "bfloat16 float32"."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.is_floating_point()]
    return " ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def find_caller() -> str:
    """File and function of this package that called an operation; "backward" in a backward pass."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<"):
            return f"{code.co_filename.removeprefix(PACKAGE)}:{code.co_name}"
        frame = frame.f_back
    return "backward"


class FakeCuda(FakeTensorMode):
    """Tensors without content."""

    avoid_device_init = True  # without it, uniform_ and copy_ are sent to the device


@contextmanager
def cuda_autocast(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Fake tensors on "cuda", where new ones are created, under its autocast, which would turn itself off here."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True))
        stack.enter_context(FakeCuda())
        stack.enter_context(torch.device("cuda"))
        stack.enter_context(torch.autocast("cuda", dtype))
        yield


def add_autocast(device: str) -> None:
    """Give a device registered from Python the rules of HALF and SINGLE under torch.autocast."""
    getattr(torch, device).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    library = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for name in HALF:
        library.impl(name, cast_before(name, lambda: torch.get_autocast_dtype(device)))
    for name in SINGLE:
        library.impl(name, cast_before(name, lambda: torch.float32))
    others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    others.fallback(torch.library.fallthrough_kernel)
    _libraries.extend((library, others))


def cast_before(name: str, choose_type: Callable[[], torch.dtype]) -> Callable[..., Any]:
    """An operation whose floating arguments are converted first."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def run(*args: Any, **kwargs: Any) -> Any:
        def convert(value: Any) -> Any:
            is_float = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(choose_type()) if is_float else value

        with _ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.AutocastPrivateUse1)):
            return operation(*tree_map(convert, args), **tree_map(convert, kwargs))

    return run
