"""Stage 5: all families of transformers by the `model_type` of their configuration, and how a network is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from semseg.config.preprocessing import Preprocessing
from semseg.errors import ConfigError
from semseg.nets.libraries.mask_classification import MASK_FAMILIES, NEEDED_SETTINGS, MaskClassifier
from semseg.nets.libraries.transformers import SEMANTIC_FAMILIES, Family, TransformersNetwork, read_plain_config

ALL_FAMILIES: dict[str, Family] = {**SEMANTIC_FAMILIES, **MASK_FAMILIES}


def find_family(model_type: object, source: str) -> Family:
    """The family of a configuration.

    Args:
        source: of the configuration, which begins the message.

    Raises:
        ConfigError: if it is none that works, with those that do.
    """
    family = ALL_FAMILIES.get(str(model_type))
    if family is None:
        raise ConfigError(
            f"{source}: its model_type is {model_type!r}, which is not supported. Supported: {', '.join(ALL_FAMILIES)}."
        )
    return family


def read_library_config(plain: Mapping[str, Any], num_classes: int) -> Any:
    """The configuration of transformers in plain data, for this number of classes, with what the family needs.

    Raises:
        ConfigError: if transformers refuses it.
    """
    config = read_plain_config(plain, num_classes)
    for name, value in NEEDED_SETTINGS.get(str(plain["model_type"]), {}).items():
        setattr(config, name, value)
    return config


def build_from_config(
    plain: Mapping[str, Any], num_classes: int, convention: Preprocessing | None = None, source: str = "model.config"
) -> TransformersNetwork:
    """The network of a configuration as plain data, with initial weights.

    Args:
        convention: preprocessing of the pixel values; None: that of the published weights of the family.
        source: of the configuration, for messages.

    Raises:
        ConfigError: for a family or a variant that is not supported.
    """
    family = find_family(plain.get("model_type"), source)
    config = read_library_config(plain, num_classes)
    network = MaskClassifier if plain["model_type"] in MASK_FAMILIES else TransformersNetwork
    return network(family, config, convention)
