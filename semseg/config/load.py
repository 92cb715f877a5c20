"""The configuration of arguments that do not come from a command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from semseg.config.compose import compose_config
from semseg.config.explain import explain_hydra_error
from semseg.config.fields import key_of
from semseg.config.groups import list_groups
from semseg.config.override_keys import override_key
from semseg.config.overrides import parse_overrides, quote_value
from semseg.config.schema import Config, list_keys
from semseg.config.uses import (
    find_mode_problems,
    find_prediction_problems,
    refuse_unread_keys,
    refuse_unused_sizes,
)
from semseg.config.validate import check_config
from semseg.errors import ArgumentError, ConfigError

# Sections that decide how a network is found and applied.
PREDICTION_SECTIONS = ("data", "download", "eval", "experiment", "model", "predict", "runs_dir", "trainer")
# Those of which only some keys do: what becomes of the others is decided in training, evaluation and mode=predict.
PREDICTION_KEYS = {
    "data": (
        "name", "root", "classes", "num_classes", "first_id", "ignore", "map", "mask_type", "ignore_colors",
        "max_long_edge", "max_pixels", "resize", "crop", "bands", "band_files", "value_range", "show_bands",
    ),
    "eval": ("scales", "batch_size"),
    "predict": ("format", "scales", "flip", "window", "stride", "memory_limit_mb", "threshold", "min_confidence"),
    "trainer": ("accelerator", "devices", "precision"),
}  # fmt: skip


def load_config(
    arguments: list[str], find_use_problems: Callable[[Config], Iterator[str]] = find_mode_problems
) -> tuple[Config, list[str]]:
    """The checked configuration of a command line, and its overrides in Hydra's grammar.

    Args:
        find_use_problems: what it is used for, a rule of config/uses.py; by default its mode.

    Raises:
        ConfigError: if an argument is wrong.
    """
    overrides = parse_overrides(arguments)
    try:
        config = check_config(compose_config(overrides), find_use_problems)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_hydra_error(error, overrides)) from error
    refuse_unused_sizes(config, overrides)
    return config, overrides


def load_prediction_config(
    ckpt: str | Path | Sequence[str | Path], overrides: Sequence[str]
) -> tuple[Config, list[str]]:
    """The checked configuration for predicting with the network `ckpt`, and the overrides in Hydra's grammar. No mode.

    Raises:
        ArgumentError: if `ckpt` is no text, path, or list of several of them, or an override no text.
        ConfigError: if an override is wrong or would have no effect, or the network cannot be loaded.
    """
    is_list = isinstance(ckpt, list | tuple) and len(ckpt) > 1 and all(isinstance(item, str | Path) for item in ckpt)
    if ckpt == "" or (not isinstance(ckpt, str | Path) and not is_list):
        raise ArgumentError(
            f"ckpt={ckpt!r}: must be a path, last, best, zoo:<name> or hf:<name>, or a list of at least two of them."
        )
    given = str(ckpt) if isinstance(ckpt, str | Path) else f"[{','.join(quote_value(item) for item in ckpt)}]"
    groups = {group.partition("/")[0] for group in list_groups()}
    known = groups | {key_of(item) for item in fields(Config)}
    for override in overrides:
        if not isinstance(override, str):
            raise ArgumentError(f"{override!r}: an override is text, semseg.load(ckpt, 'predict.flip=true').")
        key = override_key(override)
        section, _, name = key.replace("/", ".").partition(".")
        if section in known and section not in PREDICTION_SECTIONS:
            raise ConfigError(
                f"{override}: does not change predictions. semseg.load takes overrides of "
                f"{', '.join(PREDICTION_SECTIONS)}."
            )
        used, name = PREDICTION_KEYS.get(section, ()), name.partition(".")[0]
        if used and name and name not in used and key in list_keys():
            raise ConfigError(
                f"{override}: does not change predictions. Of {section}, semseg.load takes "
                f"{', '.join(f'{section}.{each}' for each in used)}."
            )
    loaded = load_config([f"ckpt={given}", *overrides], find_prediction_problems)
    refuse_unread_keys("predict", overrides)
    return loaded
