"""Stage 5: networks of timm (PyTorch Image Models) as encoders (model/encoder=timm). Needs the extra semseg[timm]."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from semseg.errors import CheckpointError, ConfigError, find_nearest
from semseg.nets.encoders.dilation import stage_plans
from semseg.nets.encoders.library import FINEST_STRIDE, LibraryEncoder, rgb_convention, weights_file
from semseg.nets.interfaces import WeightsFile

try:
    import timm
except ModuleNotFoundError as error:
    raise ConfigError("model/encoder=timm needs the timm package: pip install 'semseg[timm]'") from error

# Its warnings name the weights of a file that a network without classifier has no use for.
logging.getLogger("timm").setLevel(logging.ERROR)

# What makes a network for one size of image take all sizes: ViT has the first, Swin the second or both.
ALL_SIZES: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False})
REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError)  # of networks that cannot do a thing


class TimmEncoder(LibraryEncoder):
    """A timm network that gives feature maps; those of stride 1 and 2 are left out.

    A plain ViT is no pyramid: its maps come from its last layers and all have the stride of its patches.

    Args:
        name: timm's name, with or without the tag of its weights: efficientnet_b3 or efficientnet_b3.ra2_in1k.
        output_stride: 8, 16 or 32; below 32 for networks that timm can dilate.

    Raises:
        ConfigError: for a name that timm does not have, and for a network that gives no maps, cannot be dilated, or
            does not take images of all sizes.
    """

    def __init__(self, name: str = "resnet50", output_stride: int = 32) -> None:
        model = build_model(name, output_stride)
        super().__init__(model, channels_last=getattr(model, "output_fmt", "NCHW") == "NHWC")
        self.name = name
        self.output_stride = output_stride
        info, published = model.feature_info, model.pretrained_cfg
        self.levels = [level for level, stride in enumerate(info.reduction()) if stride >= FINEST_STRIDE]
        self.channels = tuple(info.channels()[level] for level in self.levels)
        self.strides = tuple(info.reduction()[level] for level in self.levels)
        self.convention = rgb_convention(published["mean"], published["std"])
        self.weights_file = published_file(published)
        self.refuse_unless_maps_fit()

    def library_maps(self, image: Tensor) -> list[Tensor]:
        maps = self.model(image)
        return [maps[level] for level in self.levels]

    @torch.no_grad()
    def refuse_unless_maps_fit(self) -> None:
        """Runs the network once on a black image that is neither square nor of the size it was made for."""
        height, width = 2 * self.size_divisor, 3 * self.size_divisor
        image = torch.zeros(1, 3, height, width, device=next(self.parameters()).device)
        expected = [
            (1, num_channels, height // stride, width // stride)
            for num_channels, stride in zip(self.channels, self.strides, strict=True)
        ]
        self.eval()  # draws no random numbers and leaves the running statistics alone
        found = []
        with suppress(*REFUSALS):
            found = [tuple(self.as_our_map(features).shape) for features in self.library_maps(image)]
        self.train()
        if found != expected:
            strides = ", ".join(str(stride) for stride in self.strides)
            raise ConfigError(
                f"model.encoder.name={self.name}: timm's network gives no maps of strides {strides} for an image of "
                f"{height} x {width} pixels. It is made for other sizes; choose another network."
            )

    def state_from(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """As Encoder.state_from, by timm's own loader, which knows the older names and layouts of timm's files.

        Raises:
            CheckpointError: if it cannot use them for this network.
        """
        loaded = self.loaded(published)
        # timm leaves what it does not find at its random start. Weights that are not numbers show what it found.
        marks = self.loaded({name: marked(value) for name, value in published.items()})
        return {
            f"model.{name}": value
            for name, value in loaded.items()
            if not value.is_floating_point() or marks[name].isnan().any()
        }

    def loaded(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of another network like `model` that timm fills with `published`."""
        source = {"state_dict": published, "hf_hub_id": None, "url": ""}  # and nothing from the network
        try:
            with torch.random.fork_rng(devices=[]):
                model = create(self.name, self.output_stride, pretrained=True, pretrained_cfg_overlay=source)
        except (*REFUSALS, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"These weights do not fit timm's {self.name}: {reason}") from error
        return model.state_dict()


def build_model(name: str, output_stride: int) -> Any:
    """timm's network as a module that gives feature maps, with fresh weights.

    Raises:
        ConfigError: see TimmEncoder.
    """
    check_name(name)
    stage_plans(output_stride)  # refuses what is not 8, 16 or 32
    try:
        return create(name, output_stride)
    except REFUSALS as error:
        if output_stride < 32:
            raise ConfigError(
                f"model.encoder.output_stride={output_stride}: timm's {name} cannot be dilated. Use 32."
            ) from error
        raise ConfigError(f"model.encoder.name={name}: timm gives no feature maps of it ({error}).") from error


def create(name: str, output_stride: int, **options: Any) -> nn.Module:
    """timm.create_model for feature maps, and for images of all sizes where the network has an option for that."""
    options["features_only"] = True
    if output_stride < 32:
        options["output_stride"] = output_stride
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        for all_sizes in ALL_SIZES:
            with suppress(TypeError):  # the network has no such option
                return timm.create_model(name, **options, **all_sizes)
    return timm.create_model(name, **options)


def check_name(name: str) -> None:
    """Refuses what is not a name of timm's, an address of another place to load from included.

    Raises:
        ConfigError: with the nearest name.
    """
    names = [*timm.list_models(), *timm.list_pretrained()]
    if name in names:
        return
    meant = find_nearest(name, names)
    hint = f" Did you mean {meant}?" if meant else ""
    raise ConfigError(f"model.encoder.name={name}: timm has no such network.{hint} timm.list_models() names all.")


def published_file(published: Mapping[str, Any]) -> WeightsFile | None:
    """Where timm has the weights from, by its entry for them; None if there are none."""
    if published.get("hf_hub_id"):
        file_name = published.get("hf_hub_filename") or "model.safetensors"
        return WeightsFile(f"https://huggingface.co/{published['hf_hub_id']}/resolve/main/{file_name}")
    return weights_file(published["url"]) if published.get("url") else None


def marked(value: Tensor) -> Tensor:
    """A tensor like `value` that is not a number anywhere, if its type has that."""
    return torch.full_like(value, torch.nan) if value.is_floating_point() else value
