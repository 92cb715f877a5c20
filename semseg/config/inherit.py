"""The configuration for using a saved network: that of its run, with what the command line changes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any

from semseg.config.fields import key_of
from semseg.config.override_keys import list_given_keys
from semseg.config.recipes import find_experiment, list_chosen_options, read_recipe
from semseg.config.schema import Config, flatten_sections
from semseg.config.uses import refuse_unused_boundary_ratio, refuse_unused_sizes
from semseg.config.validate import check_values
from semseg.errors import ConfigError

# How a network is run; these do not change the network.
FREE_MODEL_KEYS = ("model.channels_last", "model.winograd", "model.compile")


def inherit_config(saved: Config, given: Config, overrides: list[str]) -> Config:
    """The configuration for using a checkpoint: the saved one with the overrides of the user.

    The network always comes from the checkpoint; data and evaluation settings come from it unless they are given on the
    command line or by its experiment (a whole group such as data=camvid, or single keys).

    Raises:
        ConfigError: if the command line requests another network, or sizes or a width of boundaries that are not used.
    """
    keys = list_given_keys(overrides)
    for key in keys:
        if key.partition(".")[0].partition("/")[0] == "model" and key not in FREE_MODEL_KEYS:
            raise ConfigError(f"{key}: the network comes from ckpt, so it cannot be set here.")
    experiment = find_experiment(overrides)
    recipe = {} if experiment is None else read_recipe(experiment)
    sections, by_recipe = list_chosen_options(recipe), dict(flatten_sections(recipe))
    merged, ours = deepcopy(given), deepcopy(saved)
    merged.model = ours.model
    for name in ("data", "eval"):
        if name in keys or name in sections:
            continue
        setattr(merged, name, getattr(ours, name))
        for key in (*by_recipe, *keys):
            if key.startswith(f"{name}."):
                _copy_value(given, merged, key.split("."))
    for key in FREE_MODEL_KEYS:
        if key in keys:
            _copy_value(given, merged, key.split("."))
    if "data.resize" not in keys:  # it belongs to the network, whatever images it is used on
        merged.data.resize = ours.data.resize
    if merged.data.resize == "native" and "data.crop" not in keys:
        merged.data.crop = ours.data.crop or ours.augment.crop
    # What belongs to this machine.
    merged.data.label_cache, merged.data.num_workers = given.data.label_cache, given.data.num_workers
    merged.eval.bootstrap = given.eval.bootstrap  # checkpoints of older versions have 0 where nothing was chosen
    check_values(merged, None)  # the use of `given` has been checked
    refuse_unused_sizes(merged, overrides)
    refuse_unused_boundary_ratio(merged, overrides)
    return merged


def _copy_value(source: Any, target: Any, path: Sequence[str]) -> None:
    """Give the key `path` of a section, or of a dict in it, its value in `source`."""
    name, *rest = path
    if isinstance(source, dict):
        for key in [key for key in source if str(key) == name]:  # some dicts have numbers for keys
            target[key] = deepcopy(source[key])
        return
    field = next(item.name for item in fields(source) if key_of(item) == name)
    value = getattr(source, field)
    if rest and isinstance(getattr(target, field), type(value)) and (is_dataclass(value) or isinstance(value, dict)):
        _copy_value(value, getattr(target, field), rest)
    else:
        setattr(target, field, deepcopy(value))
