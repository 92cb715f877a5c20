"""Stage 5: the context in which a network runs on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from semseg.nets.cpu.pointwise import use_onednn_pointwise
from semseg.nets.cpu.winograd import use_winograd


@contextmanager
def use_cpu_kernels() -> Iterator[None]:
    """While active, in this thread, F.conv2d takes the faster kernels of this package where they are faster.

    Not under autocast: nothing was measured there.
    """
    if torch.is_autocast_enabled("cpu"):
        yield
        return
    with use_winograd(), use_onednn_pointwise():
        yield
