"""Stage 5: dilation, which keeps the deep maps fine (Chen et al. 2017, Yu and Koltun 2016)."""

from __future__ import annotations

from typing import NamedTuple

from semseg.errors import ConfigError


class StagePlan(NamedTuple):
    """How one stage of a residual network is laid out."""

    stride: int  # of its first block
    first_dilation: int  # of the 3x3 convolution that carries the stride, and of what replaces it
    dilation: int  # of all other 3x3 convolutions


# Output stride -> the four stages. A stage that loses its stride dilates by 2 what it lost; the
# convolution that had the stride sees the finer map first and gets half of the dilation.
STAGE_PLANS: dict[int, tuple[StagePlan, ...]] = {
    32: (StagePlan(1, 1, 1), StagePlan(2, 1, 1), StagePlan(2, 1, 1), StagePlan(2, 1, 1)),
    16: (StagePlan(1, 1, 1), StagePlan(2, 1, 1), StagePlan(2, 1, 1), StagePlan(1, 1, 2)),
    8: (StagePlan(1, 1, 1), StagePlan(2, 1, 1), StagePlan(1, 1, 2), StagePlan(1, 2, 4)),
}


def stage_plans(output_stride: int) -> tuple[StagePlan, ...]:
    """The four stages of a network none of whose maps is coarser than `output_stride`.

    Raises:
        ConfigError: if it is not 8, 16 or 32.
    """
    if output_stride not in STAGE_PLANS:
        raise ConfigError(f"model.encoder.output_stride={output_stride}: must be 8, 16 or 32.")
    return STAGE_PLANS[output_stride]


def strides_of(plans: tuple[StagePlan, ...], stem_stride: int = 4) -> tuple[int, ...]:
    """Strides of the four maps.

    >>> strides_of(stage_plans(8))
    (4, 8, 8, 8)
    """
    strides, stride = [], stem_stride
    for plan in plans:
        stride *= plan.stride
        strides.append(stride)
    return tuple(strides)
