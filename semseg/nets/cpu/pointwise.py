"""Stage 5: 1 x 1 convolutions in one thread, by oneDNN.

With one thread and fewer than sixteen images PyTorch computes 1 x 1 convolutions by MKL's matrix product, otherwise by
oneDNN. On processors with 512-bit instructions oneDNN takes half of MKL's time (benchmarks/pointwise.py), and less than
that in channels_last.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from semseg.nets.cpu.conv_options import ConvOptions, common_value, has_avx512

MIN_PIXELS = 128  # smaller inputs take longer to set up in oneDNN than to multiply


def use_onednn_pointwise() -> AbstractContextManager[Any]:
    """A context in which oneDNN computes 1 x 1 convolutions, if it is faster on this processor."""
    return OneDnnPointwise() if is_onednn_faster() else nullcontext()


def is_onednn_faster() -> bool:
    """Whether oneDNN is faster than PyTorch's choice on this processor with the current number of threads."""
    has_onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return has_onednn and torch.get_num_threads() == 1 and has_avx512()


class OneDnnPointwise(TorchFunctionMode):
    """While active, in this thread, oneDNN computes every F.conv2d that is a matrix product."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            output = _pointwise_conv2d(*args, **kwargs)
            if output is not None:
                return output
        return func(*args, **kwargs)


def _pointwise_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *positional: Any, **named: Any
) -> Tensor | None:
    """F.conv2d, differentiable any number of times; None if it is not a matrix product, or a small one."""
    if input.dim() != 4 or not input.is_cpu or not input.dtype == weight.dtype == torch.float32:
        return None
    if weight.shape[2:] != (1, 1) or len(input) * input.shape[2] * input.shape[3] < MIN_PIXELS:
        return None
    options = ConvOptions(*positional, **named)
    if options.groups != 1 or common_value(options.stride) != 1 or common_value(options.padding) != 0:
        return None
    return torch.ops.aten.mkldnn_convolution(input, weight, bias, (0, 0), (1, 1), (1, 1), 1)
