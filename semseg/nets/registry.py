"""Stage 5: the tables of networks. A name in a configuration or a checkpoint selects one of their entries only.

Importing this file does not import torch, so that names can be listed and checked quickly. The module of a network is
imported when the network is built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from semseg.errors import ConfigError, check_choice, suggest

if TYPE_CHECKING:
    from semseg.nets.interfaces import Decoder, Encoder, NetworkKeys, SegmentationNetwork
    from semseg.nets.segmenter import Segmenter


class Constructor(NamedTuple):
    """A class or function that builds a network or a part of one; calling it imports its module."""

    module: str
    attribute: str

    def load(self) -> Callable[..., Any]:
        return getattr(import_module(self.module), self.attribute)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.load()(*args, **options)


ENCODERS: dict[str, Constructor] = {
    "resnet18": Constructor("semseg.nets.encoders.resnet", "resnet18"),
    "resnet50": Constructor("semseg.nets.encoders.resnet", "resnet50"),
    "resnet101": Constructor("semseg.nets.encoders.resnet", "resnet101"),
    "resnext101": Constructor("semseg.nets.encoders.resnext", "resnext101"),
    "mobilenetv2": Constructor("semseg.nets.encoders.mobilenet", "MobileNetV2"),
    "hrnetv2": Constructor("semseg.nets.encoders.hrnet", "HRNetV2"),
    "torchvision": Constructor("semseg.nets.encoders.torchvision", "TorchvisionEncoder"),
    "timm": Constructor("semseg.nets.encoders.timm", "TimmEncoder"),
}
DECODERS: dict[str, Constructor] = {
    "c1": Constructor("semseg.nets.decoders.c1", "C1"),
    "ppm": Constructor("semseg.nets.decoders.ppm", "PPM"),
    "upernet": Constructor("semseg.nets.decoders.upernet", "UPerNet"),
    "linear": Constructor("semseg.nets.decoders.linear", "Linear"),
    "segformer": Constructor("semseg.nets.decoders.segformer", "SegFormer"),
}
# Whole networks, by model.library. A constructor is handed the number of classes and, if it has a parameter `keys`, all
# keys of `model` that choose a network (NetworkKeys), which it checks; otherwise model.options as keyword arguments.
NETWORKS: dict[str, Constructor] = {
    "smp": Constructor("semseg.nets.libraries.smp", "SmpNetwork"),
    "transformers": Constructor("semseg.nets.libraries.description", "build_transformers"),
}
NETWORK_TABLES: dict[str, dict[str, Constructor]] = {"encoder": ENCODERS, "decoder": DECODERS}


class Network(NamedTuple):
    """A name of ENCODERS or DECODERS, and options of its constructor."""

    name: str
    options: Mapping[str, Any]


# Names of the 2018 and 2020 releases, which contain options.
OLD_NAMES: dict[str, dict[str, Network]] = {
    "encoder": {
        "resnet18_dilated8": Network("resnet18", {"output_stride": 8}),
        "resnet18_dilated16": Network("resnet18", {"output_stride": 16}),
        "resnet18dilated": Network("resnet18", {"output_stride": 8}),
        "resnet50_dilated8": Network("resnet50", {"output_stride": 8}),
        "resnet50_dilated16": Network("resnet50", {"output_stride": 16}),
        "resnet50dilated": Network("resnet50", {"output_stride": 8}),
        "resnet101_dilated8": Network("resnet101", {"output_stride": 8}),
        "resnet101_dilated16": Network("resnet101", {"output_stride": 16}),
        "resnet101dilated": Network("resnet101", {"output_stride": 8}),
        "mobilenetv2_dilated8": Network("mobilenetv2", {"output_stride": 8}),
        "mobilenetv2_dilated16": Network("mobilenetv2", {"output_stride": 16}),
        "mobilenetv2dilated": Network("mobilenetv2", {"output_stride": 8}),
    },
    "decoder": {
        "c1_bilinear": Network("c1", {}),
        "c1_bilinear_deepsup": Network("c1", {"deep_supervision": True}),
        "c1_deepsup": Network("c1", {"deep_supervision": True}),
        "ppm_bilinear": Network("ppm", {}),
        "ppm_bilinear_deepsup": Network("ppm", {"deep_supervision": True}),
        "ppm_deepsup": Network("ppm", {"deep_supervision": True}),
        "upernet_lite": Network("upernet", {"width": 256}),
    },
}

# What the networks of the 2018 and 2020 releases consist of.
ORIGINAL_NAMES = {
    "encoder": ("resnet18", "resnet50", "resnet101", "resnext101", "mobilenetv2", "hrnetv2"),
    "decoder": ("c1", "ppm", "upernet"),
}

OPTION_TYPES = {int: "an integer", bool: "true or false", str: "a string", tuple: "a list of integers"}


def resolve_network(kind: str, name: str) -> Network:
    """The current name of the network `name`, with the options that an old name contains.

    Args:
        kind: "encoder" or "decoder".
        name: one of NETWORK_TABLES[kind] or OLD_NAMES[kind].

    Raises:
        ConfigError: for an unknown name, with the nearest one and all known ones.

    >>> resolve_network("encoder", "resnet50_dilated8")
    Network(name='resnet50', options={'output_stride': 8})
    """
    old_names = OLD_NAMES[kind]
    check_choice(f"model.{kind}.name", name, [*NETWORK_TABLES[kind], *old_names])
    return old_names.get(name, Network(name, {}))


def build_encoder(name: str, /, **options: Any) -> Encoder:
    """Build the encoder `name` with initial weights; `options` take precedence over those in an old name.

    Raises:
        ConfigError: for an unknown name or option, with the nearest known one.
    """
    return _build("encoder", name, options)


def build_decoder(name: str, channels: Sequence[int], num_classes: int, **options: Any) -> Decoder:
    """Build the decoder `name` for an encoder with these `channels`, with initial weights.

    Raises:
        ConfigError: for an unknown name or option, with the nearest known one.
    """
    return _build("decoder", name, options, channels, num_classes)


def build_segmenter(
    encoder: str,
    decoder: str,
    num_classes: int,
    encoder_options: Mapping[str, Any] | None = None,
    decoder_options: Mapping[str, Any] | None = None,
) -> Segmenter:
    """Build a network by the names of its parts, with initial weights.

    An encoder that can join its maps (option `join`) does not if the decoder reads a pyramid, unless the option is set.
    Of the maps of an encoder of one stride that has the option `pyramid`, a pyramid is made for such a decoder.

    Raises:
        ConfigError: for an unknown name or option, with the nearest known one, for deep supervision on an encoder with
            one map, and for a pyramid that cannot be made or is not read.

    >>> net = build_segmenter("resnet18", "ppm", 150, {"output_stride": 8})
    >>> net.size_divisor, net.label_stride
    (8, 8)
    """
    from semseg.nets.pyramid import Pyramid, PyramidDecoder  # noqa: PLC0415 - it imports torch
    from semseg.nets.segmenter import Segmenter  # noqa: PLC0415 - it imports torch

    encoder_class, encoder_options = _select("encoder", encoder, encoder_options or {})
    decoder_class, decoder_options = _select("decoder", decoder, decoder_options or {})
    can_join = "join" in default_options(encoder_class)
    if can_join and "join" not in encoder_options and decoder_class.reads_pyramid:
        encoder_options["join"] = False
    wants_pyramid = encoder_options.get("pyramid", False)
    if wants_pyramid and not decoder_class.reads_pyramid:
        raise ConfigError(
            f"model.encoder.pyramid=true: {decoder} reads one map. Leave it out, or choose a decoder that reads a "
            "pyramid: model/decoder=upernet, segformer."
        )
    if "pyramid" in default_options(encoder_class):
        encoder_options.setdefault("pyramid", decoder_class.reads_pyramid)
    body = encoder_class(**encoder_options)
    if wants_pyramid and not body.wants_pyramid:
        raise ConfigError(
            f"model.encoder.pyramid=true: the maps of {encoder_options.get('name', encoder)} are a pyramid already, of "
            f"strides {', '.join(str(stride) for stride in body.strides)}. Leave it out."
        )
    if len(body.channels) == 1 and decoder_options.get("deep_supervision"):
        more_maps = "Set model.encoder.join=false, or use" if can_join else "Use"
        raise ConfigError(
            f"model.decoder.deep_supervision=true: the auxiliary head reads the second deepest map, but {encoder} "
            f"gives one map. {more_maps} a decoder without it: model/decoder={', '.join(DECODERS)}."
        )
    if not body.wants_pyramid:
        return Segmenter(body, decoder_class(body.channels, num_classes, **decoder_options), num_classes)
    pyramid = Pyramid(body.channels, body.strides)
    head = decoder_class(pyramid.channels, num_classes, **decoder_options)
    return Segmenter(body, PyramidDecoder(pyramid, head), num_classes)


def build_library_network(library: str, num_classes: int, keys: NetworkKeys) -> SegmentationNetwork:
    """Build the whole network `library` of NETWORKS, with initial weights.

    Raises:
        ConfigError: for an unknown name or option, with the nearest known one.
    """
    check_choice("model.library", library, list(NETWORKS))
    constructor = NETWORKS[library].load()
    if "keys" in inspect.signature(constructor).parameters:
        return constructor(num_classes, keys)
    problems = list(find_option_problems("model.options", library, constructor, keys.options))
    encoder = {f"encoder.{key}": value for key, value in keys.encoder_options.items()}
    unused = {"arch": keys.arch, "revision": keys.revision, "config": keys.config, **encoder}
    problems += [
        f"model.{key}={value}: {library} has no such key."
        for key, value in unused.items()
        if value not in (None, "", {})
    ]
    if problems:
        raise ConfigError(" ".join(problems))
    return constructor(num_classes, **{name: value for name, value in keys.options.items() if value is not None})


def _build(kind: str, name: str, options: Mapping[str, Any], *args: Any) -> Any:
    constructor, options = _select(kind, name, options)
    return constructor(*args, **options)


def _select(kind: str, name: str, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The constructor of `name` and its options: those in the name, overridden by `options`; None: not set.

    Raises:
        ConfigError: for an unknown name or option, with the nearest known one.
    """
    network = resolve_network(kind, name)
    constructor = NETWORK_TABLES[kind][network.name].load()
    problems = list(find_option_problems(f"model.{kind}", name, constructor, options))
    if problems:
        raise ConfigError(" ".join(problems))
    given = {option: value for option, value in options.items() if value is not None}
    return constructor, {**network.options, **given}


def find_option_problems(
    section: str, name: str, constructor: Callable[..., Any], options: Mapping[str, Any]
) -> Iterator[str]:
    """A message for every option that `constructor` does not have, or whose value has another type."""
    defaults = default_options(constructor)
    for option, value in options.items():
        if option not in defaults:
            hint = suggest(option, defaults, prefix=f"{section}.")
            yield f"{section}.{option}: {name} has no such option.{hint} Valid: {', '.join(defaults) or 'none'}."
        elif value is not None and not is_of_type(value, type(defaults[option])):
            yield f"{section}.{option}={value!r}: must be {OPTION_TYPES[type(defaults[option])]}."


def is_of_type(value: Any, kind: type) -> bool:
    """Whether the value of an option is of the type of its default; lists stand for tuples of integers."""
    if kind is tuple:
        return isinstance(value, list | tuple) and all(type(item) is int for item in value)
    return type(value) is kind


def default_options(constructor: Callable[..., Any]) -> dict[str, Any]:
    """The options of a network: the parameters that have a default. This module passes the others."""
    parameters = inspect.signature(constructor).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}
