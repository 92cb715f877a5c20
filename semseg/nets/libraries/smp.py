"""Stage 5: the networks of segmentation-models-pytorch (model=smp). Needs semseg[smp]."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from semseg.config.preprocessing import PREPROCESSING, Preprocessing
from semseg.errors import CheckpointError, ConfigError, check_choice, install_command, one_line, suggest
from semseg.nets.encoders.library import replace_batch_norms, rgb_preprocessing
from semseg.nets.encoders.timm import (
    HUB_ADDRESS,
    check_name,
    choose_resampling,
    drop_size_checks,
    find_weights_file,
    load_with_timm,
)
from semseg.nets.interfaces import Logits, NetworkKeys, SegmentationNetwork, WeightsFile
from semseg.nets.meta import reads_meta_values
from semseg.nets.padding import crop_logits, pad_image

try:
    import segmentation_models_pytorch as smp
    import timm
except ModuleNotFoundError as error:
    raise ConfigError(f"model=smp needs segmentation-models-pytorch: {install_command('smp')}") from error

TIMM_PREFIX = "tu-"  # marks encoders of timm among smp's names
DESCRIPTION = "config.json"  # beside the weights on the hub: mean, std, and the order of channels
# Keys of encoders that the configuration has; all others would be options of our own encoders.
ENCODER_KEYS = ("name", "weights", "frozen")
# Arguments of smp's classes that are no options here, and what to do instead.
FIXED_ARGUMENTS = {
    "encoder_name": "Set model.encoder.name.",
    "encoder_weights": "Set model.encoder.weights.",
    "in_channels": "Images have three channels.",
    "classes": "The classes are those of the data.",
    "activation": "Logits are what every loss and score expects.",
    "upsampling": "Logits stay at their own resolution; predictions are upsampled to the picture.",
    "aux_params": "It adds a classifier of whole images, which nothing here trains.",
    "encoder_depth": "With another depth than its own, smp's networks give maps of other sizes than they announce.",
}
# What smp and timm raise for options, encoders and combinations that they cannot build.
BUILD_ERRORS = (TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError)
CLASSIFIERS = ("fc.", "classifier.", "head.", "last_linear.", "_fc.", "linear.")  # of smp's files


class Architecture(NamedTuple):
    """What smp does not say about one of its architectures. Sizes are in pixels."""

    label_stride: int | None  # of the logits before smp's own upsampling; None: the stride of the encoder
    size_divisor: int = 32  # None: the stride of the encoder
    min_size: int = 1  # at the output stride 16; twice that at 32
    needs_dilation: bool = False


ARCHITECTURES = {
    "unet": Architecture(1),
    "unetplusplus": Architecture(1),
    "manet": Architecture(1),
    "linknet": Architecture(1),
    "fpn": Architecture(4),
    "pspnet": Architecture(8, 8),
    "pan": Architecture(4, 16, min_size=128, needs_dilation=True),
    "deeplabv3": Architecture(None, 8, needs_dilation=True),
    "deeplabv3plus": Architecture(4, 16, needs_dilation=True),
    "segformer": Architecture(4),
    "upernet": Architecture(4),
    "dpt": Architecture(2),
}


class SmpNetwork(SegmentationNetwork):
    """A network of segmentation-models-pytorch. Its state dict is smp's own, below `model.`.

    The logits are those before smp's last upsampling, which differs from ours at the borders (align_corners): loss,
    windows, scales and scores then work as for every network, with a fraction of the memory. nn.BatchNorm2d layers are
    replaced by ours, which can train on one value per channel.

    Args:
        keys: arch, encoder and options of `model`; options are arguments of smp's class.

    Raises:
        ConfigError: for unknown names, options and keys with the nearest one, and for what smp cannot build.
    """

    def __init__(self, num_classes: int, keys: NetworkKeys) -> None:
        super().__init__()
        check_keys(keys)
        architecture, encoder = ARCHITECTURES[keys.arch], str(keys.encoder["name"])
        self.num_classes = num_classes
        self.arch, self.encoder_name = keys.arch, encoder
        self.model = build_model(keys.arch, encoder, num_classes, keys.options)
        replace_batch_norms(self.model)
        drop_size_checks(self.model)
        stride = output_stride(keys)
        self.size_divisor = max(architecture.size_divisor, stride) if stride else architecture.size_divisor
        self.label_stride = architecture.label_stride or stride
        self.min_size = architecture.min_size * (2 if stride == 32 else 1)
        self.convention, self.weights_file, self.licence = find_weights(encoder)
        if keys.arch == "dpt":
            self.check_sizes()

    @property
    def backbone(self) -> nn.Module:
        return self.model.encoder

    @property
    def architecture(self) -> str:
        return f"smp.{type(self.model).__name__} + {self.encoder_name}"

    def forward(self, image: Tensor) -> Logits:
        """As SegmentationNetwork.forward; images of other sizes are padded with 0 first."""
        logits = self.compute_logits(pad_image(image, self.size_divisor, self.min_size))
        return Logits(crop_logits(logits, image, self.label_stride), None)

    def compute_logits(self, image: Tensor) -> Tensor:
        """Sizes that the architecture takes -> (N, num_classes, H / label_stride, W / label_stride)."""
        with choose_resampling(has_positions=self.arch == "dpt"):
            features = self.model.encoder(image)
        head = self.model.segmentation_head
        if self.arch == "dpt":
            maps, prefix_tokens = features
            return head.head(self.model.decoder(maps, prefix_tokens))
        return head[0](self.model.decoder(features))

    @torch.no_grad()
    def check_sizes(self) -> None:
        """Run the network once on an image of another size than its encoder was designed for.

        Raises:
            ConfigError: if it cannot.
        """
        image = torch.zeros(1, 3, 64, 96, device=next(self.parameters()).device)
        is_training = self.training
        try:
            size = tuple(self.eval().compute_logits(image).shape[-2:])
        except BUILD_ERRORS:
            size = None
        self.train(is_training)
        if size != (32, 48):
            raise ConfigError(
                f"model.encoder.name={self.encoder_name}: takes images of one size, or has patches that are not 16 "
                "pixels, and smp's DPT works with neither. Choose another, such as tu-vit_base_patch16_224."
            )

    def convert_weights(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of smp's hub, torchvision or timm in the names of the encoder, without the classifier.

        Raises:
            CheckpointError: if timm cannot use the weights for its network.
        """
        own = self.backbone.state_dict()
        if not self.encoder_name.startswith(TIMM_PREFIX) or set(own) <= set(published):
            return {name: value for name, value in published.items() if not name.startswith(CLASSIFIERS)}
        build = partial(build_timm_encoder, self.backbone, self.encoder_name)
        return load_with_timm(build, self.encoder_name, published)

    def adopt_description(self, weights: Path) -> None:
        """Take the preprocessing from the description beside a file of weights, as smp's hub has it."""
        path = weights.with_name(DESCRIPTION)
        if path.is_file():
            self.convention = read_preprocessing(path) or self.convention


# ---- building


def check_keys(keys: NetworkKeys) -> None:
    """Refuse what smp would ignore, or answer with an error of several pages.

    Raises:
        ConfigError: with all problems.
    """
    check_choice("model.arch", keys.arch, list(ARCHITECTURES))
    problems = [*find_key_problems(keys), *find_arch_problems(keys.arch, keys.options)]
    if problems:
        raise ConfigError(" ".join(problems))


def find_key_problems(keys: NetworkKeys) -> Iterator[str]:
    """A sentence for every key of `model` that is for other networks, and for an encoder that smp does not have."""
    for key, value in (("revision", keys.revision), ("config", keys.config)):
        if value:
            yield f"model.{key}={value}: is for model=transformers."
    for key in keys.encoder:
        if key not in ENCODER_KEYS:
            yield (
                f"model.encoder.{key}: is for encoders of ours. Options of smp's networks are model.options.<name>: "
                f"{', '.join(list_arch_options(keys.arch))}."
            )
    name = str(keys.encoder.get("name") or "")
    known = list(smp.encoders.encoders)
    if not name:
        yield "model.encoder.name must be set: one of smp's names, such as resnet34, or tu-<name of timm>."
    elif name.startswith(TIMM_PREFIX):
        try:
            check_name(name.removeprefix(TIMM_PREFIX))
        except ConfigError as error:
            yield str(error).replace("model.encoder.name=", f"model.encoder.name={TIMM_PREFIX}", 1)
    elif keys.arch == "dpt":
        yield (
            f"model.encoder.name={name}: smp's DPT needs a vision transformer of timm: model.encoder.name=tu-<name>, "
            "such as tu-vit_base_patch16_224."
        )
    elif name not in known:
        hint = suggest(name, [*known, *(f"{TIMM_PREFIX}{model}" for model in timm.list_models())])
        yield (
            f"model.encoder.name={name}: smp has no such encoder.{hint} It has {', '.join(known[:6])}, ... and "
            "tu-<name of timm>."
        )


def list_arch_options(arch: str) -> dict[str, Any]:
    """The arguments of smp's class that a user may set, with their defaults."""
    parameters = inspect.signature(smp.MODEL_ARCHITECTURES_MAPPING[arch].__init__).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not parameter.empty and parameter.name not in FIXED_ARGUMENTS
    }


def find_arch_problems(arch: str, options: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for every option that the class does not have, or whose value is of another kind than its default."""
    known = list_arch_options(arch)
    for name, value in options.items():
        if name in FIXED_ARGUMENTS:
            yield f"model.options.{name}: cannot be set here. {FIXED_ARGUMENTS[name]}"
        elif name not in known:
            hint = suggest(name, known, prefix="model.options.")
            yield f"model.options.{name}: smp's {arch} has no such option.{hint} Valid: {', '.join(known)}."
        else:
            rule = find_wrong_kind(value, known[name])
            if rule:
                yield f"model.options.{name}={value}: must be {rule}, such as {known[name]}."


def find_wrong_kind(value: Any, default: Any) -> str | None:
    """What a value must be, if it is not of the kind of its default; options without one are left to smp."""
    if isinstance(default, tuple):
        is_list = isinstance(value, list | tuple) and len(value) == len(default)
        is_right = is_list and all(type(number) is int and number > 0 for number in value)
        return None if is_right else f"a list of {len(default)} whole numbers above 0"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        return None if type(value) is int and value > 0 else "a whole number above 0"
    if isinstance(default, float):
        return None if type(value) in (int, float) and 0 <= value < 1 else "a number from 0 and below 1"
    return None


def output_stride(keys: NetworkKeys) -> int:
    """The stride of the coarsest map of an encoder that is dilated; 0 for architectures that do not dilate."""
    default = list_arch_options(keys.arch).get("encoder_output_stride", 0)
    return int(keys.options.get("encoder_output_stride") or default)


def build_model(arch: str, encoder: str, num_classes: int, options: Mapping[str, Any]) -> Any:
    """smp's network with initial weights.

    Raises:
        ConfigError: if smp cannot build it.
    """
    given = {name: value for name, value in options.items() if value is not None}
    arguments = {"encoder_name": encoder, "encoder_weights": None, "classes": num_classes, **given}
    build = smp.MODEL_ARCHITECTURES_MAPPING[arch]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about names of encoders that smp will drop, and about readout tokens
            if arch == "dpt":
                return build_any_size(build, arguments)
            return build(**arguments)
    except BUILD_ERRORS as error:
        if reads_meta_values(error):
            raise  # to build_on_meta, which builds it in memory
        raise ConfigError(explain_failure(arch, encoder, options, error)) from error


def build_any_size(build: Any, arguments: dict[str, Any]) -> Any:
    """smp's DPT, for images of all sizes if its encoder has an option for that."""
    try:
        return build(**arguments, dynamic_img_size=True)
    except TypeError:
        return build(**arguments)


def explain_failure(arch: str, encoder: str, options: Mapping[str, Any], error: Exception) -> str:
    """One sentence on why smp cannot build a network."""
    reason = one_line(error)
    if ARCHITECTURES[arch].needs_dilation:
        return (
            f"model.encoder.name={encoder}: smp cannot dilate this encoder, as its {arch} does ({reason}). Choose "
            "another encoder, such as resnet34, or an architecture without dilation, such as unet or fpn."
        )
    given = "".join(f" model.options.{name}={value}" for name, value in options.items())
    return f"model.arch={arch} model.encoder.name={encoder}{given}: smp cannot build this network ({reason})."


def build_timm_encoder(like: Any, name: str, **options: Any) -> Any:
    """An encoder like `like`, of timm's network `name` (with smp's prefix), with weights that `options` provide."""
    own = {"name": name.removeprefix(TIMM_PREFIX), "pretrained": True, **options}
    if hasattr(like, "_output_indices"):  # of vision transformers
        indices = like._output_indices
        return build_any_size(type(like), {**own, "depth": len(indices), "output_indices": list(indices)})
    return type(like)(**own, depth=like._depth, output_stride=like._output_stride)


# ---- weights


class PublishedWeights(NamedTuple):
    """What is known about the ImageNet weights of an encoder without its files."""

    convention: Preprocessing
    file: WeightsFile | None
    licence: str  # empty: not stated


def find_weights(encoder: str) -> PublishedWeights:
    """The ImageNet weights of an encoder, by smp's name for it."""
    if encoder.startswith(TIMM_PREFIX):
        published = timm.get_pretrained_cfg(encoder.removeprefix(TIMM_PREFIX))
        if published is None:
            return PublishedWeights(PREPROCESSING["rgb_mean_std"], None, "")
        convention = rgb_preprocessing(list(published.mean), list(published.std))
        return PublishedWeights(convention, find_weights_file(published.to_dict()), published.license or "")
    settings = smp.encoders.encoders[encoder]["pretrained_settings"]
    if "imagenet" not in settings:
        return PublishedWeights(PREPROCESSING["rgb_mean_std"], None, "")
    repository, revision = settings["imagenet"]["repo_id"], settings["imagenet"]["revision"]
    address = f"{HUB_ADDRESS}/{repository}/resolve/{revision}"
    file = WeightsFile(f"{address}/model.safetensors", folder=repository, beside=(f"{address}/{DESCRIPTION}",))
    return PublishedWeights(PREPROCESSING["rgb_mean_std"], file, "")


def read_preprocessing(path: Path) -> Preprocessing | None:
    """The preprocessing in a description of smp's hub; None if the file says nothing about it.

    Raises:
        CheckpointError: if it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "mean" not in found:
            return None
        largest = found.get("input_range", [0, 1])[1]
        return Preprocessing.from_plain(
            {
                "channel_order": str(found.get("input_space", "RGB")).lower(),
                "scale": 1.0 if largest > 1 else 1 / 255,
                "mean": found["mean"],
                "std": found["std"],
                "antialias": True,
            }
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{path}: does not describe the input of a network ({error}). Delete it, or set model.convention."
        ) from None
