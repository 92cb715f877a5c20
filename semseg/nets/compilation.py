"""Stage 5: networks that are compiled for images of all sizes (model.compile)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from semseg.nets.interfaces import SegmentationNetwork


def compile_network(net: SegmentationNetwork, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the forward pass of a network in place, so that the names in its state dict stay as they are.

    Compilation takes place when the network is first called, and again for sizes that no graph is valid for.

    Numbers with a fraction (the epsilons and momenta of normalisation) become constants of the graph, in this whole
    process. With dynamic=True they would be inputs like the sizes; no operator takes them as such, which PyTorch finds
    out at the end of its tracing, and then it traces the network a second time. Two more rules of PyTorch's tracing
    change in this process: see `simplify_padding` and `skip_contiguity_checks`.

    Args:
        backend: of torch.compile.
    """
    from torch._dynamo import config  # noqa: PLC0415 - it takes a second

    config.specialize_float = True
    for change_rule in (simplify_padding, skip_contiguity_checks):
        try:
            change_rule()
        except (ImportError, AttributeError) as error:  # parts of PyTorch that another version may not have
            message = f"compilation takes longer, because PyTorch {torch.__version__} differs from the one expected"
            warnings.warn(f"model.compile: {message} ({error}).", stacklevel=2)
    net.compile(dynamic=True, backend=backend)


@functools.cache
def simplify_padding() -> None:
    """Make PyTorch write (w - n % w) % w, the padding of n pixels to whole windows, as w * ceil(n / w) - n.

    This is how torchvision and timm pad for windows of w pixels (Swin, Hiera), where n is a symbol while a network is
    compiled. PyTorch keeps both remainders, and each shape after them is a quotient of sums of them. Deciding whether
    two such shapes are equal triples the time that tracing a Swin of five blocks takes. Factors that n and w have in
    common are cancelled, so that 2 n pixels in windows of 2 w are as many windows as n pixels in windows of w.
    """
    import sympy  # noqa: PLC0415 - it takes a second
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
            factor = sympy.gcd(length.as_content_primitive()[0], divisor)
            num_windows = functions.FloorDiv((length + divisor) / factor - 1, divisor / factor)
            return divisor * num_windows - length

        remainder.eval = classmethod(evaluate_with_rule)

    for remainder in remainders:
        extend(remainder)


@functools.cache
def skip_contiguity_checks() -> None:
    """Make PyTorch trace without asking whether a tensor is contiguous where that depends on the sizes of the image.

    With an answer, a graph is valid for the sizes with the same answer alone. Libraries cut padded windows off by
    `x[:, :h, :w].contiguous()`, which is a copy unless h and w are whole windows: torchvision's Swin v2 had a graph for
    each way in which the maps of its four stages divide by windows of 8. Where only sizes decide, this is always a
    copy; and PyTorch no longer notes the memory format of each tensor of a graph, which nothing needs.
    """
    from torch._dynamo.variables import ConstantVariable, TensorVariable  # noqa: PLC0415
    from torch.fx.experimental import proxy_tensor  # noqa: PLC0415
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # noqa: PLC0415
    from torch.fx.passes import shape_prop  # noqa: PLC0415

    call_method = TensorVariable.call_method

    def is_contiguous_for_all_sizes(tensor: Tensor) -> bool:
        expected: Any = 1
        for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            if not statically_known_true(stride == expected):
                return False
            expected = expected * torch.sym_max(size, 1)
        return True

    def call_or_copy(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        is_plain = name == "contiguous" and not args and not kwargs
        if is_plain and not is_contiguous_for_all_sizes(self.proxy.node.meta["example_value"]):
            name, kwargs = "clone", {"memory_format": ConstantVariable.create(torch.contiguous_format)}
        return call_method(self, tx, name, args, kwargs)

    TensorVariable.call_method = call_or_copy
    extract = functools.partial(shape_prop._extract_tensor_metadata, include_contiguity=False)
    proxy_tensor._extract_tensor_metadata = extract  # pyright: ignore[reportPrivateImportUsage]
