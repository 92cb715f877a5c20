from __future__ import annotations

import pytest

from semseg.errors import ConfigError
from semseg.nets.encoders.dilation import plan_stages, strides_of


@pytest.mark.parametrize(
    ("output_stride", "strides", "dilations"),
    [
        (32, (4, 8, 16, 32), [(1, 1), (1, 1), (1, 1), (1, 1)]),
        (16, (4, 8, 16, 16), [(1, 1), (1, 1), (1, 1), (1, 2)]),
        (8, (4, 8, 8, 8), [(1, 1), (1, 1), (1, 2), (2, 4)]),
    ],
)
def test_a_stage_dilates_by_what_it_lost(output_stride: int, strides: tuple, dilations: list) -> None:
    plans = plan_stages(output_stride)
    assert strides_of(plans) == strides
    assert [(plan.first_dilation, plan.dilation) for plan in plans] == dilations


def test_another_output_stride_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^model\.encoder\.output_stride=4: must be 8, 16 or 32\.$"):
        plan_stages(4)
