"""Stage 5: torchvision's classification networks as encoders (model/encoder=torchvision)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import ResNet, SwinTransformer

from semseg.errors import ConfigError, check_choice
from semseg.nets.encoders.dilation import stage_plans
from semseg.nets.encoders.library import FINEST_STRIDE, LibraryEncoder, rgb_convention, weights_file

# Prefixes of names. The networks of these families are a plain sequence of modules, which is all this file relies on.
FAMILIES = (
    "resnet", "resnext", "wide_resnet", "regnet", "mobilenet_v", "efficientnet", "convnext", "swin",
)  # fmt: skip
DILATABLE = ("resnet50", "resnet101", "resnet152", "resnext", "wide_resnet")  # those of bottleneck blocks
CONTAINERS = ("features", "trunk_output")  # hold modules of the sequence; other modules of the network are part of it
CLASSIFIERS = ("norm", "permute", "avgpool", "flatten", "fc", "classifier", "head")  # what follows the last map


class Part(NamedTuple):
    """A module of the sequence, and what comes out of it."""

    name: str
    channels: int
    stride: int


class TorchvisionEncoder(LibraryEncoder):
    """A torchvision network; a map is what the last module at each stride of 4 and above gives.

    In MobileNet and EfficientNet that is the 1x1 convolution before the pooling for the deepest map. ImageNet weights
    are those that torchvision calls DEFAULT; the final norm of Swin and ConvNeXt counts as part of the classifier.

    Args:
        name: torchvision's name, such as convnext_tiny.
        output_stride: 8, 16 or 32; below 32 for ResNets of bottleneck blocks only, as torchvision dilates them: the
            first block of a dilated stage keeps the dilation of the stage before.

    Raises:
        ConfigError: for a name that torchvision or this encoder does not have, and for an output stride that the
            network does not offer.
    """

    def __init__(self, name: str = "resnet50", output_stride: int = 32) -> None:
        model = build_model(name, output_stride)
        for classifier in CLASSIFIERS:
            if hasattr(model, classifier):
                delattr(model, classifier)
        super().__init__(model, channels_last=isinstance(model, SwinTransformer))
        parts = measure(model, self.channels_last)
        ends = ends_of_levels(model, parts)
        self.parts = [part.name for part in parts]
        self.ends = {part.name for part in ends}
        self.channels = tuple(part.channels for part in ends)
        self.strides = tuple(part.stride for part in ends)
        published = models.get_model_weights(name)["DEFAULT"]
        transforms = published.transforms()
        self.convention = rgb_convention(transforms.mean, transforms.std)
        self.weights_file = weights_file(published.url)

    def library_maps(self, image: Tensor) -> list[Tensor]:
        features, maps = image, []
        for part in self.parts:
            # By name: torch's conversion to synced layers puts new modules in the place of old ones.
            features = self.model.get_submodule(part)(features)
            if part in self.ends:
                maps.append(features)
        return maps

    def state_from(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            f"model.{name}": value for name, value in published.items() if name.partition(".")[0] not in CLASSIFIERS
        }


def build_model(name: str, output_stride: int) -> nn.Module:
    """torchvision's network with fresh weights.

    Raises:
        ConfigError: see TorchvisionEncoder.
    """
    names = [name for name in models.list_models(module=models) if name.startswith(FAMILIES)]
    check_choice("model.encoder.name", name, names)
    plans = stage_plans(output_stride)
    if output_stride == 32:
        return models.get_model(name, weights=None)
    if not name.startswith(DILATABLE):
        raise ConfigError(
            f"model.encoder.output_stride={output_stride}: torchvision's {name} cannot be dilated. "
            f"Use 32, or one of {', '.join(name for name in names if name.startswith(DILATABLE))}."
        )
    dilated = [plan.stride == 1 for plan in plans[1:]]
    return models.get_model(name, weights=None, replace_stride_with_dilation=dilated)


@torch.no_grad()
def measure(model: nn.Module, channels_last: bool) -> list[Part]:
    """The sequence of modules in `model`, with sizes from running it once on a black image."""
    names = []
    for name, child in model.named_children():
        names += [f"{name}.{inner}" for inner, _ in child.named_children()] if name in CONTAINERS else [name]
    height = 64
    features = torch.zeros(1, 3, height, height, device=next(model.parameters()).device)
    parts = []
    model.eval()  # draws no random numbers and leaves the running statistics alone
    for name in names:
        features = model.get_submodule(name)(features)
        num_channels, rows = features.shape[-1 if channels_last else 1], features.shape[1 if channels_last else 2]
        parts.append(Part(name, num_channels, height // rows))
    model.train()
    return parts


def ends_of_levels(model: nn.Module, parts: list[Part]) -> list[Part]:
    """Those parts whose outputs are the maps."""
    if isinstance(model, ResNet):  # a dilated stage has the stride of the one before it
        return [part for part in parts if part.name.startswith("layer")]
    last = {part.stride: part for part in parts if part.stride >= FINEST_STRIDE}
    return list(last.values())
