"""Stage 5: MobileNetV2 (Sandler et al. 2018) without its last convolution, as in the 2020 release.

Parameters have the names of the 2020 weight files.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor, nn

from semseg.nets.blocks import BatchNorm2d, init_encoder
from semseg.nets.encoders.dilation import StagePlan, plan_stages, strides_of
from semseg.nets.encoders.resnet import conv3x3, imagenet_weights_file
from semseg.nets.interfaces import Encoder

MAP_BLOCKS = (2, 4, 7, 14, 17)  # blocks whose outputs are the maps
# Weights for image classification only: the last convolution, to 1280 channels, and the ImageNet head.
MOBILENET_CLASSIFIER_PREFIXES = ("features.18.", "classifier.")
TORCHVISION_KEY = "features.1.conv.0.0.weight"  # occurs in files of torchvision, not in those of 2020


class BlockRow(NamedTuple):
    """A row of the paper's table 2: blocks of the same width."""

    expansion: int
    channels: int
    depth: int  # number of blocks
    plan: StagePlan


class InvertedResidual(nn.Module):
    """1x1 to more channels, depthwise 3x3, 1x1 without activation, and a shortcut (fig. 4d).

    There is a shortcut if neither channels nor resolution change. Without expansion there is no first 1x1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int, dilation: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        expand = build_conv_norm_relu6(nn.Conv2d(in_channels, inner, 1, bias=False)) if expansion > 1 else []
        self.conv = nn.Sequential(
            *expand,
            *build_conv_norm_relu6(conv3x3(inner, inner, stride, dilation, groups=inner)),
            nn.Conv2d(inner, out_channels, 1, bias=False),
            BatchNorm2d(out_channels),
        )
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, features: Tensor) -> Tensor:
        out = self.conv(features)
        return features + out if self.has_shortcut else out


class MobileNetV2(Encoder):
    """1 811 712 parameters. It gives five maps.

    Args:
        output_stride: 8, 16 or 32; below 32 the deep blocks are dilated instead of strided, as in a ResNet.

    Raises:
        ConfigError: for another output stride.
    """

    channels = (24, 32, 64, 160, 320)
    weights_file = imagenet_weights_file("mobilenet_v2.pth.tar")

    def __init__(self, output_stride: int = 32) -> None:
        super().__init__()
        plans = plan_stages(output_stride)
        strides = strides_of(plans)
        self.strides = (*strides, strides[-1])
        in_channels = 32
        blocks: list[nn.Module] = [nn.Sequential(*build_conv_norm_relu6(conv3x3(3, in_channels, stride=2)))]
        for expansion, channels, depth, plan in block_rows(plans):
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

    def convert_weights(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """As Encoder.convert_weights, for files of the 2020 release and of torchvision, whose names differ."""
        if TORCHVISION_KEY in published:
            published = {name_of_2020(name): value for name, value in published.items()}
        return {name: value for name, value in published.items() if not name.startswith(MOBILENET_CLASSIFIER_PREFIXES)}


def block_rows(plans: tuple[StagePlan, ...]) -> tuple[BlockRow, ...]:
    """The blocks after the first convolution; `plans` are those of the four stages from stride 4 on."""
    _, second, third, fourth = plans
    return (
        BlockRow(1, 16, 1, StagePlan(1, 1, 1)),
        BlockRow(6, 24, 2, StagePlan(2, 1, 1)),
        BlockRow(6, 32, 3, second),
        BlockRow(6, 64, 4, third),
        BlockRow(6, 96, 3, continue_stage(third)),
        BlockRow(6, 160, 3, fourth),
        BlockRow(6, 320, 1, continue_stage(fourth)),
    )


def continue_stage(plan: StagePlan) -> StagePlan:
    """The plan of further blocks at the resolution after `plan`."""
    return StagePlan(1, plan.dilation, plan.dilation)


def build_conv_norm_relu6(convolution: nn.Conv2d) -> list[nn.Module]:
    """A convolution, batch normalisation, and ReLU6."""
    return [convolution, BatchNorm2d(convolution.out_channels), nn.ReLU6(inplace=True)]


def name_of_2020(name: str) -> str:
    """The name of the 2020 files for a weight that torchvision calls `name`; other names stay.

    torchvision wraps each convolution that has an activation in a module with its norm and activation.

    >>> name_of_2020("features.2.conv.1.0.weight"), name_of_2020("features.2.conv.2.weight")
    ('features.2.conv.3.weight', 'features.2.conv.6.weight')
    """
    match = re.fullmatch(r"features\.(\d+)\.conv\.(\d+)\.(?:(\d)\.)?(\w+)", name)
    if not match:
        return name
    block, position, inner, leaf = match.groups()
    if inner is not None:
        index = 3 * int(position) + int(inner)
    else:
        num_activated = 1 if block == "1" else 2  # block 1 does not expand
        index = int(position) + 2 * num_activated
    return f"features.{block}.conv.{index}.{leaf}"
