"""Stage 5: ResNet (He et al. 2016) with the three-convolution stem of the 2018 release.

Parameters have the names of the 2018 weight files.
"""

from __future__ import annotations

from torch import Tensor, nn

from semseg.nets.blocks import BatchNorm2d, NormFactory, init_encoder
from semseg.nets.encoders.dilation import StagePlan, plan_stages, strides_of
from semseg.nets.interfaces import Encoder, WeightsFile

WEIGHTS_URL = "http://sceneparsing.csail.mit.edu/model/pretrained_resnet"  # ImageNet weights of both releases


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, fig. 5 left)."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        dilations: tuple[int, int],
        norm: NormFactory = BatchNorm2d,
    ) -> None:
        super().__init__()
        first_dilation, second_dilation = dilations
        self.conv1 = conv3x3(in_channels, width, stride, first_dilation)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, 1, second_dilation)
        self.bn2 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = build_shortcut(in_channels, width, stride, norm)

    def forward(self, features: Tensor) -> Tensor:
        residual = features if self.downsample is None else self.downsample(features)
        out = self.relu(self.bn1(self.conv1(features)))
        return self.relu(self.bn2(self.conv2(out)) + residual)


class Bottleneck(nn.Module):
    """1x1, 3x3 (grouped in ResNeXt), 1x1 and a shortcut; the 3x3 convolution has the stride."""

    expansion = 4
    inner_expansion = 1  # width of the 3x3 convolution over that of the stage
    groups = 1  # groups of the 3x3 convolution

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        dilations: tuple[int, int],
        norm: NormFactory = BatchNorm2d,
    ) -> None:
        super().__init__()
        inner, out_channels = width * self.inner_expansion, width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = norm(inner)
        self.conv2 = conv3x3(inner, inner, stride, dilations[0], self.groups)
        self.bn2 = norm(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = build_shortcut(in_channels, out_channels, stride, norm)

    def forward(self, features: Tensor) -> Tensor:
        residual = features if self.downsample is None else self.downsample(features)
        out = self.relu(self.bn1(self.conv1(features)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + residual)


class ResNet(Encoder):
    """A residual network with three 3x3 convolutions (64, 64, 128 channels) in place of the first 7x7 one.

    Args:
        block: BasicBlock or Bottleneck.
        depths: number of blocks in each of the four stages.
        output_stride: 8, 16 or 32; below 32 the deep stages are dilated instead of strided.
        weights_file: its ImageNet weights.

    Raises:
        ConfigError: for another output stride.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: tuple[int, int, int, int],
        output_stride: int,
        weights_file: WeightsFile,
    ) -> None:
        super().__init__()
        self.weights_file = weights_file
        plans = plan_stages(output_stride)
        widths = (64, 128, 256, 512)
        self.channels = tuple(width * block.expansion for width in widths)
        self.strides = strides_of(plans)
        self.conv1 = conv3x3(3, 64, stride=2)
        self.bn1 = BatchNorm2d(64)
        self.conv2 = conv3x3(64, 64)
        self.bn2 = BatchNorm2d(64)
        self.conv3 = conv3x3(64, 128)
        self.bn3 = BatchNorm2d(128)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        inputs = (128, *self.channels[:3])
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            build_stage(block, in_channels, width, depth, plan)
            for in_channels, width, depth, plan in zip(inputs, widths, depths, plans, strict=True)
        )
        init_encoder(self)

    def forward(self, image: Tensor) -> list[Tensor]:
        features = self.relu(self.bn1(self.conv1(image)))  # (N, 64, H/2, W/2)
        features = self.relu(self.bn2(self.conv2(features)))
        features = self.relu(self.bn3(self.conv3(features)))
        features = self.maxpool(features)  # (N, 128, H/4, W/4)
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            features = layer(features)
            maps.append(features)
        return maps


def build_stage(  # noqa: PLR0917 - in the order of the blocks' own arguments
    block: type[BasicBlock | Bottleneck],
    in_channels: int,
    width: int,
    depth: int,
    plan: StagePlan,
    norm: NormFactory = BatchNorm2d,
) -> nn.Sequential:
    """One stage: its first block changes channels and resolution, the others keep both."""
    first = block(in_channels, width, plan.stride, (plan.first_dilation, plan.dilation), norm)
    others = (block(width * block.expansion, width, 1, (plan.dilation, plan.dilation), norm) for _ in range(depth - 1))
    return nn.Sequential(first, *others)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the size, except for its stride."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, groups, bias=False)


def build_shortcut(in_channels: int, out_channels: int, stride: int, norm: NormFactory) -> nn.Sequential | None:
    """A 1x1 convolution if the block changes channels or resolution, else None."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


def imagenet_weights_file(file: str) -> WeightsFile:
    """A file of ImageNet weights of the 2018 and 2020 releases; their digests are not known."""
    return WeightsFile(f"{WEIGHTS_URL}/{file}")


def resnet18(output_stride: int = 32) -> ResNet:
    """11 324 992 parameters."""
    return ResNet(BasicBlock, (2, 2, 2, 2), output_stride, imagenet_weights_file("resnet18-imagenet.pth"))


def resnet50(output_stride: int = 32) -> ResNet:
    """23 631 808 parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), output_stride, imagenet_weights_file("resnet50-imagenet.pth"))


def resnet101(output_stride: int = 32) -> ResNet:
    """42 623 936 parameters."""
    return ResNet(Bottleneck, (3, 4, 23, 3), output_stride, imagenet_weights_file("resnet101-imagenet.pth"))
