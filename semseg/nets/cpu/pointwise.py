"""Stage 5: 1 x 1 convolutions in one thread.

With one thread and fewer than sixteen images PyTorch gives 1 x 1 convolutions to MKL's matrix product, with more to
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

from semseg.nets.cpu.winograd import Settings, both, has_wide_registers

MIN_PIXELS = 128  # of an input; below, setting up oneDNN takes longer than the product


def use_onednn(image: Tensor) -> AbstractContextManager[Any]:
    """The context in which a network shall run on `image`."""
    can = image.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return Pointwise() if can and pays() else nullcontext()


def pays() -> bool:
    """Whether this processor, with this number of threads, gains by it."""
    has_onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return has_onednn and torch.get_num_threads() == 1 and has_wide_registers()


class Pointwise(TorchFunctionMode):
    """Within it, in this thread, oneDNN makes every F.conv2d that is a product of matrices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            found = _made_by_onednn(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def _made_by_onednn(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *settings: Any, **named: Any
) -> Tensor | None:
    """F.conv2d, differentiable as often; None if it is no product of matrices, or a small one."""
    if input.dim() != 4 or not input.is_cpu or not input.dtype == weight.dtype == torch.float32:
        return None
    if weight.shape[2:] != (1, 1) or len(input) * input.shape[2] * input.shape[3] < MIN_PIXELS:
        return None
    chosen = Settings(*settings, **named)
    if chosen.groups != 1 or both(chosen.stride) != 1 or both(chosen.padding) != 0:
        return None
    return torch.ops.aten.mkldnn_convolution(input, weight, bias, (0, 0), (1, 1), (1, 1), 1)
