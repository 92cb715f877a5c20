"""Stage 5: MobileNetV2 (Sandler et al. 2018) without its last convolution, as in the 2020 release.

Names of parameters are those of the published weight files.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor, nn

from semseg.nets.blocks import BatchNorm2d, init_encoder
from semseg.nets.encoders.dilation import StagePlan, stage_plans, strides_of
from semseg.nets.encoders.resnet import conv3x3, published_weights
from semseg.nets.interfaces import Encoder

MAP_BLOCKS = (2, 4, 7, 14, 17)  # whose outputs are the maps: the first with each resolution, and the last of all
CLASSIFIERS = ("features.18.", "classifier.")  # the last convolution, to 1280 channels, and the ImageNet head
ONLY_IN_TORCHVISION = "features.1.conv.0.0.weight"  # a name that tells its files from the published ones


class Row(NamedTuple):
    """A row of the paper's table 2: blocks of the same width."""

    expansion: int
    channels: int
    depth: int  # number of blocks
    plan: StagePlan


class InvertedResidual(nn.Module):
    """1x1 to more channels, 3x3 on each channel by itself, 1x1 without activation, and a shortcut (fig. 4d).

    The shortcut is there where neither channels nor resolution change; without expansion there is no first 1x1.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int, dilation: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        expand = conv_norm_relu6(nn.Conv2d(in_channels, inner, 1, bias=False)) if expansion > 1 else []
        self.conv = nn.Sequential(
            *expand,
            *conv_norm_relu6(conv3x3(inner, inner, stride, dilation, groups=inner)),
            nn.Conv2d(inner, out_channels, 1, bias=False),
            BatchNorm2d(out_channels),
        )
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, features: Tensor) -> Tensor:
        out = self.conv(features)
        return features + out if self.has_shortcut else out


class MobileNetV2(Encoder):
    """1 811 712 parameters. Five maps.

    Args:
        output_stride: 8, 16 or 32; below 32 the deep blocks are dilated instead of strided, as in a ResNet.

    Raises:
        ConfigError: for another output stride.
    """

    channels = (24, 32, 64, 160, 320)
    weights_file = published_weights("mobilenet_v2.pth.tar")

    def __init__(self, output_stride: int = 32) -> None:
        super().__init__()
        plans = stage_plans(output_stride)
        strides = strides_of(plans)
        self.strides = (*strides, strides[-1])
        in_channels = 32
        blocks: list[nn.Module] = [nn.Sequential(*conv_norm_relu6(conv3x3(3, in_channels, stride=2)))]
        for expansion, channels, depth, plan in rows(plans):
            blocks.append(InvertedResidual(in_channels, channels, expansion, plan.stride, plan.first_dilation))
            blocks += (InvertedResidual(channels, channels, expansion, 1, plan.dilation) for _ in range(depth - 1))
            in_channels = channels
        self.features = nn.ModuleList(blocks)
        init_encoder(self)

    def forward(self, image: Tensor) -> list[Tensor]:
        features, maps = image, []
        for index, block in enumerate(self.features):
            features = block(features)
            if index in MAP_BLOCKS:
                maps.append(features)
        return maps

    def state_from(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes published files and torchvision's, which has other names for the same blocks."""
        if ONLY_IN_TORCHVISION in published:
            published = {published_name(name): value for name, value in published.items()}
        return {name: value for name, value in published.items() if not name.startswith(CLASSIFIERS)}


def rows(plans: tuple[StagePlan, ...]) -> tuple[Row, ...]:
    """The blocks after the first convolution; `plans` are those of the four resolutions from 1/4 on."""
    _, second, third, fourth = plans
    return (
        Row(1, 16, 1, StagePlan(1, 1, 1)),
        Row(6, 24, 2, StagePlan(2, 1, 1)),
        Row(6, 32, 3, second),
        Row(6, 64, 4, third),
        Row(6, 96, 3, continued(third)),
        Row(6, 160, 3, fourth),
        Row(6, 320, 1, continued(fourth)),
    )


def continued(plan: StagePlan) -> StagePlan:
    """Of more blocks at the resolution that `plan` led to."""
    return StagePlan(1, plan.dilation, plan.dilation)


def conv_norm_relu6(convolution: nn.Conv2d) -> list[nn.Module]:
    """`convolution`, batch normalisation, and a ReLU that ends at 6."""
    return [convolution, BatchNorm2d(convolution.out_channels), nn.ReLU6(inplace=True)]


def published_name(name: str) -> str:
    """The published name of a weight that torchvision calls `name`; others stay.

    torchvision puts each convolution that has an activation into a module of its own, with its norm and activation.

    >>> published_name("features.2.conv.1.0.weight"), published_name("features.2.conv.2.weight")
    ('features.2.conv.3.weight', 'features.2.conv.6.weight')
    """
    found = re.fullmatch(r"features\.(\d+)\.conv\.(\d+)\.(?:(\d)\.)?(\w+)", name)
    if not found:
        return name
    block, position, inner, leaf = found.groups()
    if inner is not None:
        index = 3 * int(position) + int(inner)
    else:
        num_activated = 1 if block == "1" else 2  # block 1 does not expand
        index = int(position) + 2 * num_activated
    return f"features.{block}.conv.{index}.{leaf}"
