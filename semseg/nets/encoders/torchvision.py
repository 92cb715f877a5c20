"""Stage 5: torchvision's classification networks as encoders (model/encoder=torchvision)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import ResNet, SwinTransformer

from semseg.errors import ConfigError, check_choice
from semseg.nets.encoders.dilation import plan_stages
from semseg.nets.encoders.library import MIN_STRIDE, LibraryEncoder, rgb_preprocessing, weights_file_at

# Prefixes of names. The networks of these families are plain sequences of modules, which this file relies on.
FAMILIES = (
    "resnet", "resnext", "wide_resnet", "regnet", "mobilenet_v", "efficientnet", "convnext", "swin",
)  # fmt: skip
DILATABLE = ("resnet50", "resnet101", "resnet152", "resnext", "wide_resnet")  # networks of bottleneck blocks
CONTAINERS = ("features", "trunk_output")  # their children belong to the sequence; so do other children of the network
CLASSIFIER_MODULES = ("norm", "permute", "avgpool", "flatten", "fc", "classifier", "head")  # after the last map


class SequencePart(NamedTuple):
    """A module of the sequence, with channels and stride of its output."""

    name: str
    channels: int
    stride: int


class TorchvisionEncoder(LibraryEncoder):
    """A torchvision network. The maps are the outputs of the last module at each stride of at least 4.

    In MobileNet and EfficientNet the deepest map comes from the 1x1 convolution before the pooling. The ImageNet
    weights are those that torchvision calls DEFAULT. The final norm of Swin and ConvNeXt belongs to the classifier.

    Args:
        name: torchvision's name, such as convnext_tiny.
        output_stride: 8, 16 or 32; below 32 only for ResNets of bottleneck blocks. torchvision dilates them so that the
            first block of a dilated stage has the dilation of the stage before.

    Raises:
        ConfigError: for a name that torchvision or this encoder does not have, and for an output stride that the
            network does not offer.
    """

    def __init__(self, name: str = "resnet50", output_stride: int = 32) -> None:
        model = build_torchvision_model(name, output_stride)
        for classifier in CLASSIFIER_MODULES:
            if hasattr(model, classifier):
                delattr(model, classifier)
        super().__init__(model, channels_last=isinstance(model, SwinTransformer))
        parts = measure_parts(model, self.channels_last)
        ends = select_level_ends(model, parts)
        self.parts = [part.name for part in parts]
        self.ends = {part.name for part in ends}
        self.channels = tuple(part.channels for part in ends)
        self.strides = tuple(part.stride for part in ends)
        published = models.get_model_weights(name)["DEFAULT"]
        transforms = published.transforms()
        self.convention = rgb_preprocessing(transforms.mean, transforms.std)
        self.weights_file = weights_file_at(published.url)

    def compute_library_maps(self, image: Tensor) -> list[Tensor]:
        features, maps = image, []
        for part in self.parts:
            # By name, because torch's conversion to synchronised layers replaces modules.
            features = self.model.get_submodule(part)(features)
            if part in self.ends:
                maps.append(features)
        return maps

    def convert_weights(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            f"model.{name}": value
            for name, value in published.items()
            if name.partition(".")[0] not in CLASSIFIER_MODULES
        }


def build_torchvision_model(name: str, output_stride: int) -> nn.Module:
    """Build torchvision's network with initial weights.

    Raises:
        ConfigError: see TorchvisionEncoder.
    """
    names = [name for name in models.list_models(module=models) if name.startswith(FAMILIES)]
    check_choice("model.encoder.name", name, names)
    plans = plan_stages(output_stride)
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
def measure_parts(model: nn.Module, channels_last: bool) -> list[SequencePart]:
    """The sequence of modules in `model`, measured by running it once on a black image."""
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
        parts.append(SequencePart(name, num_channels, height // rows))
    model.train()
    return parts


def select_level_ends(model: nn.Module, parts: list[SequencePart]) -> list[SequencePart]:
    """The parts whose outputs are the maps."""
    if isinstance(model, ResNet):  # a dilated stage has the stride of the one before it
        return [part for part in parts if part.name.startswith("layer")]
    last = {part.stride: part for part in parts if part.stride >= MIN_STRIDE}
    return list(last.values())
