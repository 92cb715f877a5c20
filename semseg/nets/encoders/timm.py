"""Stage 5: networks of timm (PyTorch Image Models) as encoders (model/encoder=timm). Needs semseg[timm]."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from semseg.errors import CheckpointError, ConfigError, find_nearest, install_command
from semseg.nets.encoders.dilation import plan_stages
from semseg.nets.encoders.efficientnet_lite import convert_lite_weights, is_lite_layout
from semseg.nets.encoders.library import MIN_STRIDE, LibraryEncoder, rgb_preprocessing, weights_file_at
from semseg.nets.interfaces import WeightsFile

try:
    import timm
except ModuleNotFoundError as error:
    raise ConfigError(f"model/encoder=timm needs the timm package: {install_command('timm')}") from error

# Its warnings list the weights of the classifier, which the encoder does not have.
logging.getLogger("timm").setLevel(logging.ERROR)

# Options that make a network for one image size accept all sizes: ViT has the first, Swin the second or both.
ANY_SIZE_OPTIONS: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False})
# Errors of networks that do not support an option or an image size.
UNSUPPORTED_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError)


class TimmEncoder(LibraryEncoder):
    """The feature maps of a timm network, without those of stride 1 and 2.

    A plain ViT is not a pyramid: its maps come from its last layers, and all have the stride of its patches.

    Args:
        name: timm's name, with or without the tag of its weights: efficientnet_b3 or efficientnet_b3.ra2_in1k.
        output_stride: 8, 16 or 32; below 32 for networks that timm can dilate.

    Raises:
        ConfigError: for a name that timm does not have, and for a network that gives no maps, cannot be dilated, or
            does not accept images of all sizes.
    """

    def __init__(self, name: str = "resnet50", output_stride: int = 32) -> None:
        model = build_timm_model(name, output_stride)
        super().__init__(model, channels_last=getattr(model, "output_fmt", "NCHW") == "NHWC")
        self.name = name
        self.output_stride = output_stride
        info, published = model.feature_info, model.pretrained_cfg
        self.levels = [level for level, stride in enumerate(info.reduction()) if stride >= MIN_STRIDE]
        self.channels = tuple(info.channels()[level] for level in self.levels)
        self.strides = tuple(info.reduction()[level] for level in self.levels)
        self.convention = rgb_preprocessing(published["mean"], published["std"])
        self.weights_file = find_weights_file(published)
        self.check_maps()

    def compute_library_maps(self, image: Tensor) -> list[Tensor]:
        maps = self.model(image)
        return [maps[level] for level in self.levels]

    @torch.no_grad()
    def check_maps(self) -> None:
        """Run the network once on a black image that is not square and not of the size that it was designed for.

        Raises:
            ConfigError: if the maps are not those announced.
        """
        height, width = 2 * self.size_divisor, 3 * self.size_divisor
        image = torch.zeros(1, 3, height, width, device=next(self.parameters()).device)
        expected = [
            (1, num_channels, height // stride, width // stride)
            for num_channels, stride in zip(self.channels, self.strides, strict=True)
        ]
        self.eval()  # draws no random numbers and leaves the running statistics alone
        found = []
        with suppress(*UNSUPPORTED_ERRORS):
            found = [tuple(self.convert_map(features).shape) for features in self.compute_library_maps(image)]
        self.train()
        if found != expected:
            strides = ", ".join(str(stride) for stride in self.strides)
            raise ConfigError(
                f"model.encoder.name={self.name}: timm's network gives no maps of strides {strides} for an image of "
                f"{height} x {width} pixels. It is designed for other sizes. Choose another network."
            )

    def convert_weights(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """As Encoder.convert_weights, for older names and layouts in timm's files too, and for EfficientNet-Lite.

        Raises:
            CheckpointError: if timm cannot use the weights for this network.
        """
        if is_lite_layout(published):
            published = convert_lite_weights(published, self.name, self.channels[-1], self.model.state_dict())
        weights = self.filter_weights(published)
        return weights if weights is not None else self.probe_weights(published)

    def filter_weights(self, published: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The published weights after timm's own filter for the network's files; None unless they are complete."""
        weights = run_checkpoint_filter(self.name, self.output_stride, published)
        by_key = {feature_key(key): value for key, value in weights.items()}
        if len(by_key) < len(weights):
            return None  # ambiguous
        # A wrapper of timm that collects feature maps has the network as its attribute `model`.
        prefix = "model." if hasattr(self.model, "model") else ""
        own = self.model.state_dict()
        found = {key: by_key.get(feature_key(key.removeprefix(prefix))) for key in own}
        if any(value is None or value.shape != own[key].shape for key, value in found.items()):
            return None
        return {f"model.{key}": value for key, value in found.items() if value is not None}

    def probe_weights(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """What timm's loader makes of the published weights.

        The loader leaves weights that it does not find at their random initial values, and does not report them. So
        the weights are loaded a second time with all values NaN: a weight that is not NaN then was not in the file.
        """
        loaded = self.load_with_timm(published)
        probed = self.load_with_timm({name: fill_with_nan(value) for name, value in published.items()})
        return {
            f"model.{name}": value
            for name, value in loaded.items()
            if not value.is_floating_point() or probed[name].isnan().any()
        }

    def load_with_timm(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of another network like `model` that timm has loaded `published` into."""
        source = {"state_dict": published, "hf_hub_id": None, "url": ""}  # and nothing from the network
        try:
            with torch.random.fork_rng(devices=[]):
                model = create_timm_model(
                    self.name, self.output_stride, features_only=True, pretrained=True, pretrained_cfg_overlay=source
                )
        except (*UNSUPPORTED_ERRORS, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"These weights do not fit timm's {self.name}: {reason}") from error
        return model.state_dict()


def run_checkpoint_filter(name: str, output_stride: int, published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights after timm's filter for the network; empty if that is not known or fails.

    timm keeps such a function, `checkpoint_filter_fn` in most cases, beside each family of networks whose older files
    have other names or layouts.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = create_timm_model(name, output_stride)
        family = vars(sys.modules[type(model).__module__])
        if "checkpoint_filter_fn" in family:
            return family["checkpoint_filter_fn"](dict(published), model)
        return {} if any("filter" in function for function in family) else published
    except (*UNSUPPORTED_ERRORS, KeyError, NotImplementedError):
        return {}


def feature_key(key: str) -> str:
    """The key of a weight without the difference between a network and its feature maps: stem.1.bias, stem_1.bias."""
    return key.replace(".", "_")


def build_timm_model(name: str, output_stride: int) -> Any:
    """Build timm's network as a module that gives feature maps, with initial weights.

    Raises:
        ConfigError: see TimmEncoder.
    """
    check_name(name)
    plan_stages(output_stride)  # raises an error unless it is 8, 16 or 32
    try:
        return create_timm_model(name, output_stride, features_only=True)
    except UNSUPPORTED_ERRORS as error:
        if output_stride < 32:
            raise ConfigError(
                f"model.encoder.output_stride={output_stride}: timm's {name} cannot be dilated. Use 32."
            ) from error
        raise ConfigError(
            f"model.encoder.name={name}: timm gives no feature maps of it ({error}). Choose another network."
        ) from error


def create_timm_model(name: str, output_stride: int, **options: Any) -> nn.Module:
    """timm.create_model, for images of all sizes if the network has an option for that."""
    if output_stride < 32:
        options["output_stride"] = output_stride
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        for any_size in ANY_SIZE_OPTIONS:
            with suppress(TypeError):  # the network has no such option
                return timm.create_model(name, **options, **any_size)
    return timm.create_model(name, **options)


def check_name(name: str) -> None:
    """Check that timm has a network of this name. Addresses to load networks from are not names.

    Raises:
        ConfigError: with the nearest name.
    """
    names = [*timm.list_models(), *timm.list_pretrained()]
    if name in names:
        return
    suggestion = find_nearest(name, names)
    hint = f" Did you mean {suggestion}?" if suggestion else ""
    raise ConfigError(
        f"model.encoder.name={name}: timm has no such network.{hint} timm.list_models() lists all networks."
    )


def find_weights_file(published: Mapping[str, Any]) -> WeightsFile | None:
    """The file that timm loads weights from, according to its entry for them; None if there is none."""
    if published.get("hf_hub_id"):
        file_name = published.get("hf_hub_filename") or "model.safetensors"
        return WeightsFile(f"https://huggingface.co/{published['hf_hub_id']}/resolve/main/{file_name}")
    return weights_file_at(published["url"]) if published.get("url") else None


def fill_with_nan(value: Tensor) -> Tensor:
    """A tensor like `value` with all values NaN, if its type has NaN."""
    return torch.full_like(value, torch.nan) if value.is_floating_point() else value
