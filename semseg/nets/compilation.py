"""Stage 5: networks that are compiled for images of all sizes (model.compile)."""

from __future__ import annotations

import functools
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
    simplify_padding()
    net.compile(dynamic=True, backend=backend)


@functools.cache
def simplify_padding() -> None:
    """Make PyTorch write (w - n % w) % w, the padding of n pixels to whole windows, as w * ceil(n / w) - n.

    This is how torchvision and timm pad for windows of w pixels (Swin, Hiera), where n is a symbol while a network is
    compiled. PyTorch keeps both remainders, and each shape after them is a quotient of sums of them. Deciding whether
    two such shapes are equal takes it so long that it had not traced a Swin of five blocks after 400 seconds of CPU
    time; with quotients by w it takes 76.
    """
    from torch.utils._sympy import functions  # noqa: PLC0415 - imports sympy

    remainders = (functions.Mod, functions.PythonMod)

    def find_length(dividend: Any, divisor: Any) -> Any:
        """The n of a dividend w - n % w; None if it is something else."""
        remainder = divisor - dividend
        return remainder.args[0] if isinstance(remainder, remainders) and remainder.args[1] == divisor else None

    def extend(remainder: Any) -> None:
        """Add the rule to one of the remainders."""
        evaluate = remainder.eval.__func__

        def evaluate_with_rule(cls: Any, dividend: Any, divisor: Any) -> Any:
            length = find_length(dividend, divisor) if divisor.is_Integer and dividend.is_Add else None
            if length is None:
                return evaluate(cls, dividend, divisor)
            return divisor * functions.FloorDiv(length + divisor - 1, divisor) - length

        remainder.eval = classmethod(evaluate_with_rule)

    for remainder in remainders:
        extend(remainder)
