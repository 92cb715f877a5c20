"""Compose faster, since tests compose more than a thousand times: files are read once, and groups are composed once.

tests/config/test_composition.py shows that nothing else changes.
"""

from __future__ import annotations

import copy
import functools
import pickle
from dataclasses import replace
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import DefaultsList
from hydra._internal.hydra import Hydra
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf, open_dict

from semseg.config import validate
from semseg.config.compose import compose_config, compose_with_hydra
from semseg.config.groups import CONFIG_DIR, list_groups

FIXED = (f"file://{CONFIG_DIR}", "pkg://hydra.conf")  # where files do not change while tests run


def cache_option_files() -> None:
    """From now on, read every option of a group once. Files of users and what programs register are read each time."""
    read = ConfigRepository.load_config
    kept: dict[tuple[str, ...], bytes] = {}

    def load_config(self: ConfigRepository, config_path: str) -> ConfigResult | None:
        key = (config_path, *(source.path for source in self.sources))
        if key in kept:
            return pickle.loads(kept[key])  # a copy: compositions change what they get
        result = read(self, config_path)
        if result is not None and result.path in FIXED:
            kept[key] = pickle.dumps(result)
        return result

    ConfigRepository.load_config = load_config
    ConfigRepository.__deepcopy__ = copy_repository  # pyright: ignore[reportAttributeAccessIssue]


def cache_defaults() -> None:
    """From now on, choose and merge the files of configs/ once per choice of options, not once per command."""
    find = config_loader_impl.create_defaults_list
    compose = ConfigLoaderImpl._compose_config_from_defaults_list
    lists: dict[Any, DefaultsList] = {}
    composed: dict[Any, bytes] = {}

    def create_defaults_list(
        repo: Any, config_name: str | None, overrides_list: list[Override], prepend_hydra: bool, skip_missing: bool
    ) -> DefaultsList:
        choices = [override for override in overrides_list if chooses_option(override)]
        if config_name != "config" or not all(map(chooses_fixed_file, choices)):
            return find(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        key = (*(override.input_line for override in choices), prepend_hydra, skip_missing)
        if key not in lists:
            found = find(repo, config_name, choices, prepend_hydra, skip_missing)
            if found.config_overrides:
                return find(repo, config_name, overrides_list, prepend_hydra, skip_missing)
            lists[key] = found
        others = [each for each in overrides_list if not (chooses_option(each) or each.is_sweep_override())]
        return replace(lists[key], config_overrides=others)

    def compose_from_defaults(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: Any) -> DictConfig:
        if not any(defaults is kept.defaults for kept in lists.values()):
            return compose(self, defaults, repo)
        key = tuple((default.config_path, default.package, default.is_self) for default in defaults)
        if key not in composed:
            composed[key] = pickle.dumps(compose(self, defaults, repo))
        return pickle.loads(composed[key])

    config_loader_impl.create_defaults_list = create_defaults_list
    ConfigLoaderImpl._compose_config_from_defaults_list = compose_from_defaults


def chooses_fixed_file(override: Override) -> bool:
    """Whether an override takes a group away, or chooses files of it in configs/."""
    value = override.value()
    names = value if isinstance(value, list) else [value]
    folder = CONFIG_DIR / override.key_or_group
    return all(name is None or (folder / f"{name}.yaml").is_file() for name in names)


def cache_schema() -> None:
    """From now on, copy the schema in a fifth of the time."""
    pickled = pickle.dumps(validate.copy_schema())
    validate.copy_schema = lambda: pickle.loads(pickled)


def copy_repository(repository: ConfigRepository, memo: dict[int, Any]) -> ConfigRepository:
    """A repository whose list of sources may be replaced, which is all that Hydra does with a copy."""
    copied = copy.copy(repository)
    copied.sources = list(repository.sources)
    return copied


def cache_modes() -> None:
    """From now on, Hydra does not compose once more for every command to find out that it is no sweep.

    Only an override of `hydra.mode` or an option whose file speaks of Hydra can say that it is one.
    """
    find = Hydra.get_mode
    kept: dict[tuple[str, ...], Any] = {}

    def get_mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        try:
            options = tuple(word for word in overrides if may_start_sweep(parse_override(word)))
        except HydraException:  # which Hydra reports elsewhere
            return find(self, config_name, overrides)
        if options not in kept:
            kept[options] = find(self, config_name, list(options))
        return kept[options]

    Hydra.get_mode = get_mode


def may_start_sweep(override: Override) -> bool:
    """Whether an override sets Hydra's mode, or chooses an option that may: any but a file of configs/ without one."""
    file = CONFIG_DIR / override.key_or_group / f"{override.value()}.yaml"
    return chooses_option(override) and not (file.is_file() and "hydra" not in file.read_text())


def compose_quickly(words: tuple[str, ...]) -> DictConfig:
    """As `compose_config`, in a third of the time if only values differ from an earlier call."""
    overrides = [parse_override(word) for word in words]
    values = [override for override in overrides if not chooses_option(override)]
    if any(override.key_or_group.startswith("hydra.") for override in values):
        return compose_config(list(words))
    composed = pickle.loads(compose_groups(tuple(word for word in words if chooses_option(parse_override(word)))))
    ConfigLoaderImpl._apply_overrides_to_config(values, composed)
    composed.run_dir = str(composed.run_dir)
    OmegaConf.set_struct(composed, None)  # pyright: ignore[reportArgumentType] - as in the copy that is the real one
    return composed


@functools.cache
def parse_override(word: str) -> Override:
    return OverridesParser.create().parse_override(word)


def chooses_option(override: Override) -> bool:
    """Whether an override is about an option of a group, or sets Hydra's mode."""
    key = override.key_or_group
    return key in ("hydra", "hydra.mode") or key.startswith("hydra/") or key in list_groups()


@functools.cache
def compose_groups(words: tuple[str, ...]) -> bytes:
    """A composition without Hydra's own settings, pickled."""
    composed = compose_with_hydra(list(words))
    with open_dict(composed):
        del composed["hydra"]
    return pickle.dumps(composed)
