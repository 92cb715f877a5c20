"""Stage 5: dilation in place of strides, for finer deep maps (Chen et al. 2017, Yu and Koltun 2016)."""

from __future__ import annotations

from typing import NamedTuple

from semseg.errors import ConfigError


class StagePlan(NamedTuple):
    """Stride and dilations of one stage of a residual network."""

    stride: int  # stride of its first block
    first_dilation: int  # dilation of the 3x3 convolution that has the stride, or had it before dilation
    dilation: int  # dilation of all other 3x3 convolutions


# Output stride -> the four stages. Every stride of 2 that is removed doubles the dilation of what follows. The
# convolution that had the stride reads the finer map first and gets half of that dilation.
STAGE_PLANS: dict[int, tuple[StagePlan, ...]] = {
    32: (StagePlan(1, 1, 1), StagePlan(2, 1, 1), StagePlan(2, 1, 1), StagePlan(2, 1, 1)),
    16: (StagePlan(1, 1, 1), StagePlan(2, 1, 1), StagePlan(2, 1, 1), StagePlan(1, 1, 2)),
    8: (StagePlan(1, 1, 1), StagePlan(2, 1, 1), StagePlan(1, 1, 2), StagePlan(1, 2, 4)),
}


def plan_stages(output_stride: int) -> tuple[StagePlan, ...]:
    """The four stages of a network whose maps have strides of at most `output_stride`.

    Raises:
        ConfigError: if it is not 8, 16 or 32.
    """
    if output_stride not in STAGE_PLANS:
        raise ConfigError(f"model.encoder.output_stride={output_stride}: must be 8, 16 or 32.")
    return STAGE_PLANS[output_stride]


def strides_of(plans: tuple[StagePlan, ...], stem_stride: int = 4) -> tuple[int, ...]:
    """The strides of the four maps.

    >>> strides_of(plan_stages(8))
    (4, 8, 8, 8)
    """
    strides, stride = [], stem_stride
    for plan in plans:
        stride *= plan.stride
        strides.append(stride)
    return tuple(strides)
