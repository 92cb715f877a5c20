"""Stage 5: the explicit tables of networks. A name in a file can choose from them and nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from semseg.errors import ConfigError, choose, nearest
from semseg.nets.c1 import C1
from semseg.nets.features import Decoder, Encoder
from semseg.nets.ppm import PPM
from semseg.nets.resnet import resnet18, resnet50, resnet101
from semseg.nets.resnext import resnext101
from semseg.nets.segmenter import Segmenter
from semseg.nets.upernet import UPerNet

ENCODERS: dict[str, Callable[..., Encoder]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnext101": resnext101,
}
DECODERS: dict[str, Callable[..., Decoder]] = {"c1": C1, "ppm": PPM, "upernet": UPerNet}

# Arguments that are not for users: the tables and build_segmenter fill them in.
FIXED = {"block", "depths", "groups", "channels", "num_classes"}


def build_segmenter(
    encoder: str,
    decoder: str,
    num_classes: int,
    encoder_options: Mapping[str, Any] | None = None,
    decoder_options: Mapping[str, Any] | None = None,
) -> Segmenter:
    """A network by the names of its parts, with fresh weights.

    Raises:
        ConfigError: for a name or an option that does not exist, with the nearest one that does.

    >>> net = build_segmenter("resnet18", "ppm", 150, {"output_stride": 8})
    >>> net.size_divisor, net.label_stride
    (8, 8)
    """
    body = construct("encoder", ENCODERS, encoder, encoder_options or {})
    head = construct("decoder", DECODERS, decoder, decoder_options or {}, body.channels, num_classes)
    return Segmenter(body, head, num_classes)


def construct(kind: str, table: Mapping[str, Callable[..., Any]], name: str, options: Mapping[str, Any], *args: Any) -> Any:
    """Call the constructor `name` of `table` with `args` and the user's `options`.

    Raises:
        ConfigError: for a name or an option that does not exist.
    """
    constructor = table[choose(f"model.{kind}.name", name, table)]
    valid = [option for option in inspect.signature(constructor).parameters if option not in FIXED]
    for option in options:
        if option not in valid:
            meant = nearest(option, valid)
            hint = f" Did you mean {meant}?" if meant else ""
            raise ConfigError(
                f"model.{kind}.{option}: {name} has no such option.{hint} Valid: {', '.join(valid) or 'none'}."
            )
    return constructor(*args, **options)
