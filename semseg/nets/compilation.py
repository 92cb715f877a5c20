"""Stage 5: networks that are compiled for images of all sizes (model.compile)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def compile_network(net: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the forward pass of a network in place, so that the names in its state dict stay as they are.

    Compilation takes place when the network is first called, and again for sizes that no graph is valid for.

    Numbers with a fraction (the epsilons and momenta of normalisation) become constants of the graph, in this whole
    process. With dynamic=True they would be inputs like the sizes; no operator takes them as such, which PyTorch finds
    out at the end of its tracing, and then it traces the network a second time.

    Args:
        backend: of torch.compile.
    """
    from torch._dynamo import config  # noqa: PLC0415 - it takes a second

    config.specialize_float = True
    net.compile(dynamic=True, backend=backend)
