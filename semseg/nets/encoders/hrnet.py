"""Stage 5: HRNetV2-W48 (Wang et al. 2019), as in the 2020 release: four branches of different resolution.

Parameters have the names of the 2020 weight files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from semseg.nets.blocks import BatchNorm2d, conv_norm_relu, init_encoder, resize
from semseg.nets.encoders.dilation import StagePlan
from semseg.nets.encoders.resnet import BasicBlock, Bottleneck, build_stage, conv3x3, imagenet_weights_file
from semseg.nets.interfaces import Encoder

WIDTHS = (48, 96, 192, 384)  # channels of the branches, fine to coarse
STRIDES = (4, 8, 16, 32)
UNDILATED = StagePlan(1, 1, 1)
NUM_BLOCKS = 4  # in every branch of a module
# Weights for image classification only: further convolutions and the ImageNet head.
HRNET_CLASSIFIER_PREFIXES = ("incre_modules.", "downsamp_modules.", "final_layer.", "classifier.")


class HRNetBatchNorm2d(BatchNorm2d):
    """Updates running statistics a hundred times as fast as the other networks of 2018 (semseg/syncbn/layer.py)."""

    published_momentum = 0.1


class HighResolutionModule(nn.Module):
    """Residual blocks in every branch, then every branch becomes the sum over all branches (fig. 2 and 3).

    Args:
        widths: numbers of channels of the branches, fine to coarse.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        indices = range(len(widths))
        self.branches = nn.ModuleList(
            build_stage(BasicBlock, width, width, NUM_BLOCKS, UNDILATED, HRNetBatchNorm2d) for width in widths
        )
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(build_exchange(widths, source, target) for source in indices) for target in indices
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """One map per branch, fine to coarse -> the same shapes."""
        maps = [branch(features) for branch, features in zip(self.branches, maps, strict=True)]
        return [self.fuse(layers, maps, like) for layers, like in zip(self.fuse_layers, maps, strict=True)]

    def fuse(self, layers: nn.Module, maps: Sequence[Tensor], like: Tensor) -> Tensor:
        """The sum over all branches at the size of `like`."""
        parts = [resize(layer(features), like) for layer, features in zip(layers.children(), maps, strict=True)]
        return self.relu(reduce(torch.add, parts))


class Transition(nn.ModuleList):
    """Adds a branch to those of the stage before, from the coarsest one, at half of its resolution."""

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [layer(features) for layer, features in zip(self, [*maps, maps[-1]], strict=True)]


class HRNetV2(Encoder):
    """65 325 120 parameters. It has no dilated variant, because its finest map already depends on the whole image.

    Args:
        join: return one map, the branches resized to the finest and concatenated, as published; otherwise the four
            branches, for decoders that read a pyramid.
    """

    weights_file = imagenet_weights_file("hrnetv2_w48-imagenet.pth")

    def __init__(self, join: bool = True) -> None:
        super().__init__()
        self.join = join
        self.channels = (sum(WIDTHS),) if join else WIDTHS
        self.strides = STRIDES[:1] if join else STRIDES
        self.conv1 = conv3x3(3, 64, stride=2)
        self.bn1 = HRNetBatchNorm2d(64)
        self.conv2 = conv3x3(64, 64, stride=2)
        self.bn2 = HRNetBatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = build_stage(Bottleneck, 64, 64, NUM_BLOCKS, UNDILATED, HRNetBatchNorm2d)  # to 256 channels
        self.transition1 = Transition(
            [conv_norm_relu(256, WIDTHS[0], 3, norm=HRNetBatchNorm2d), build_downsampling(256, WIDTHS[1])]
        )
        self.stage2 = build_modules(WIDTHS[:2], 1)
        self.transition2 = Transition([nn.Identity(), nn.Identity(), build_downsampling(*WIDTHS[1:3])])
        self.stage3 = build_modules(WIDTHS[:3], 4)
        self.transition3 = Transition([nn.Identity(), nn.Identity(), nn.Identity(), build_downsampling(*WIDTHS[2:])])
        self.stage4 = build_modules(WIDTHS, 3)
        init_encoder(self)

    @property
    def size_divisor(self) -> int:
        """The stride of the coarsest branch, whether the branches are joined or not."""
        return max(STRIDES)

    def forward(self, image: Tensor) -> list[Tensor]:
        features = self.relu(self.bn1(self.conv1(image)))  # (N, 64, H/2, W/2)
        features = self.relu(self.bn2(self.conv2(features)))  # (N, 64, H/4, W/4)
        features = self.layer1(features)
        maps = self.stage2(self.transition1([features]))
        maps = self.stage3(self.transition2(maps))
        maps = self.stage4(self.transition3(maps))
        if not self.join:
            return maps
        return [torch.cat([resize(features, maps[0]) for features in maps], 1)]  # (N, 720, H/4, W/4)

    def convert_weights(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in published.items() if not name.startswith(HRNET_CLASSIFIER_PREFIXES)}


def build_modules(widths: Sequence[int], count: int) -> nn.Sequential:
    """One stage: `count` modules with the same branches."""
    return nn.Sequential(*(HighResolutionModule(widths) for _ in range(count)))


def build_exchange(widths: Sequence[int], source: int, target: int) -> nn.Module:
    """The layers from branch `source` to branch `target`.

    A coarser branch goes through a 1x1 convolution, and the caller resizes the result. A finer branch goes through
    strided convolutions.
    """
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(nn.Conv2d(widths[source], widths[target], 1, bias=False), HRNetBatchNorm2d(widths[target]))
    halvings = (build_strided_conv(widths[source], widths[source]) for _ in range(target - source - 1))
    last = nn.Sequential(conv3x3(widths[source], widths[target], stride=2), HRNetBatchNorm2d(widths[target]))
    return nn.Sequential(*halvings, last)


def build_downsampling(in_channels: int, out_channels: int) -> nn.Sequential:
    """A new branch at half the resolution; the nesting is that of the weight files."""
    return nn.Sequential(build_strided_conv(in_channels, out_channels))


def build_strided_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 3x3 convolution of stride 2 with normalisation and ReLU."""
    return conv_norm_relu(in_channels, out_channels, 3, stride=2, norm=HRNetBatchNorm2d)
