"""Stage 5: ResNeXt-101 (Xie et al. 2017) with 32 groups, on the ResNet of the 2018 release."""

from __future__ import annotations

from semseg.nets.encoders.resnet import Bottleneck, ResNet, imagenet_weights_file


class GroupedBottleneck(Bottleneck):
    """A bottleneck whose grouped 3x3 convolution is twice as wide as a ResNet's (32 x 4d, table 1)."""

    inner_expansion = 2
    groups = 32


def resnext101(output_stride: int = 32) -> ResNet:
    """42 256 576 parameters."""
    return ResNet(GroupedBottleneck, (3, 4, 23, 3), output_stride, imagenet_weights_file("resnext101-imagenet.pth"))
