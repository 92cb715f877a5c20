"""Check a composed configuration: all of its problems are collected and raised once. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import cache, reduce
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from semseg.config.fields import convert_auto_value, find_bound_problems, format_wrong_choice, key_of
from semseg.config.hints import EXTENDING, explain_unknown_key
from semseg.config.mix import find_mix_problems
from semseg.config.schema import (
    ALLOWED_TARGETS,
    EARLY_STOPPING,
    INSTANTIATE_KEYS,
    LOWEST_IS_BEST,
    MONITORED_METRICS,
    OPEN_SECTIONS,
    Config,
    ModelConfig,
    config_to_plain,
    get_sections,
    list_keys,
)
from semseg.config.tables import list_own_keys, list_own_names, list_own_scores
from semseg.config.uses import INHERITING_MODES, find_mode_problems
from semseg.errors import ConfigError


def check_config(
    composed: DictConfig,
    find_use_problems: Callable[[Config], Iterator[str]] | None = find_mode_problems,
    *,
    is_saved: bool = False,
) -> Config:
    """The composed configuration as typed sections, or one error with all its problems.

    Args:
        find_use_problems: a rule of config/uses.py for what it is used for, by default its mode; None: no rule.
        is_saved: that of a finished run, which may name losses, scores, augmentations and callbacks that this program
            does not have, because only training needs them.

    Raises:
        ConfigError: for unknown keys, wrong types, values out of range, and keys that contradict each other or what the
            configuration is used for.
    """
    try:
        return _check_sections(composed, find_use_problems, is_saved=is_saved)
    except RecursionError:
        raise ConfigError("cannot read the configuration: a value has too many nested brackets.") from None


def _check_sections(
    composed: DictConfig, find_use_problems: Callable[[Config], Iterator[str]] | None, *, is_saved: bool
) -> Config:
    """`check_config` for values that are not nested too deeply."""
    plain = OmegaConf.to_container(composed, resolve=False)
    raise_first(find_section_problems(plain))
    raise_first(find_nested_list_problems(plain))
    try:
        # Into copies of both, of which OmegaConf would make further ones.
        typed = OmegaConf.unsafe_merge(copy_schema(), name_fields(composed))
        config = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_omegaconf_error(error, composed)) from None
    assert isinstance(config, Config)
    convert_auto_values(config)
    check_values(config, find_use_problems, is_saved=is_saved)
    return config


def check_values(
    config: Config, find_use_problems: Callable[[Config], Iterator[str]] | None, *, is_saved: bool = False
) -> None:
    """`check_config` for values that have the types of the schema.

    Raises:
        ConfigError: with all problems of the values.
    """
    raise_first(find_interpolation_problems(config))  # alone, because the other sentences quote values
    if not is_saved:
        raise_first(find_own_key_problems(config))
    is_inherited = find_use_problems is not None and config.ckpt is not None and config.mode in INHERITING_MODES
    replaced = ("data", "eval") if is_inherited else ()  # which are checked with the values of the run
    problems = [*find_range_problems(config), *find_target_problems(config), *find_cross_problems(config, replaced)]
    problems += find_mix_problems(config.data)
    if find_use_problems is not None:
        problems += find_use_problems(config)
    if not is_saved:
        problems += find_name_problems(config)
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} problems in the configuration:\n  " + "\n  ".join(problems))


def convert_auto_values(section: Any, prefix: str = "") -> None:
    """Give the values of keys that may be `auto` the type of their field, which OmegaConf does for the others.

    Raises:
        ConfigError: for a value of another type.
    """
    for item in fields(section):
        key, value = prefix + key_of(item), getattr(section, item.name)
        if is_dataclass(value):
            convert_auto_values(value, key + ".")
        elif "kind" in item.metadata:
            setattr(section, item.name, convert_auto_value(key, value, item))


def copy_schema() -> DictConfig:
    """A new copy of the schema as OmegaConf reads it."""
    return deepcopy(_read_schema())


@cache
def _read_schema() -> DictConfig:
    return OmegaConf.structured(Config)


def name_fields(composed: DictConfig) -> DictConfig:
    """A copy with the names of the schema's fields, which may differ from the keys of the command line.

    The keys that programs added to a section are in its field `own`, and a section whose key is a keyword of Python has
    the name of its field.
    """
    copied = composed.copy()
    for path, cls in OPEN_SECTIONS.items():
        section = OmegaConf.select(copied, path)
        if not isinstance(section, DictConfig):
            continue
        known = {item.name for item in fields(cls)}
        own = {str(key): section._get_node(key) for key in section if key not in known}
        OmegaConf.set_struct(section, False)
        for key in own:
            section.pop(key)
        if own:
            section["own"] = own
    OmegaConf.set_struct(copied, False)
    for item in fields(Config):
        if key_of(item) != item.name and key_of(item) in copied:
            copied[item.name] = copied.pop(key_of(item))
    return copied


def raise_first(problems: Iterator[str]) -> None:
    """Raise the first problem.

    Raises:
        ConfigError: if there is one.
    """
    problem = next(problems, None)
    if problem is not None:
        raise ConfigError(problem)


NO_LIST = "must be text, not a list"
# OmegaConf's messages about values of another type, and what they mean to users.
TYPE_RULES = {
    r"is not a ListConfig, list or tuple": "must be a list, such as {example}",
    r"Cannot convert '(ListConfig|list)' to string": NO_LIST,
    r"could not be converted to Integer": "must be a whole number",
    r"could not be converted to Float": "must be a number",
    r"is not a valid bool": "must be true or false",
}


# Lists of more than one value: [value] would be refused as well.
LIST_EXAMPLES = dict.fromkeys(("data.crop", "augment.crop", "augment.scale", "augment.blur_sigma"), "[{0},{0}]")
NESTED_LISTS = {"data.ignore_colors": "[[0,0,0]]", "eval.also_scales": "[[300,375]]"}


def explain_omegaconf_error(error: OmegaConfBaseException, composed: DictConfig) -> str:
    """OmegaConf's error as one line: the key, the value, and the nearest valid name."""
    key = str(error.full_key or error.key or "")
    for item in fields(Config):
        key = f"{key_of(item)}{key.removeprefix(item.name)}" if key.partition(".")[0] == item.name else key
    key = "run_dir" if key == "hydra.run.dir" else key
    if isinstance(error, ConfigKeyError):
        return explain_unknown_key(key, list_keys())
    value = find_value(OmegaConf.to_container(composed, resolve=False), re.sub(r"\[(\d+)\]", r".\1", key))
    reason = str(error.msg or error).splitlines()[0].rstrip(".")
    reason = reason.removeprefix("ConfigError raised while resolving interpolation: ")
    for pattern, rule in TYPE_RULES.items():
        if re.search(pattern, reason):
            reason = rule.format(example=(LIST_EXAMPLES | NESTED_LISTS).get(key, "[{0}]").format(value))
    if key == "input" and reason == NO_LIST:
        reason += ": a folder, a pattern, or a file with one path per line"
    if "Missing mandatory value" in str(error) or (
        key and OmegaConf.is_missing(composed, key.split(".", maxsplit=1)[0])
    ):
        return f"{key} must be set: {key}=..."
    if key == "run_dir":
        return f"run_dir: {reason}."  # Hydra has the value under another key
    return f"{key}={value}: {reason}." if key else f"cannot read the configuration: {reason}."


def find_value(plain: Any, key: str) -> Any:
    """The value of a dotted key in nested dicts and lists, which may be a list or a dict; None if there is none.

    >>> find_value({"data": {"crop": [[1], [2]]}}, "data.crop.1")
    [2]
    """
    for part in key.split("."):
        if isinstance(plain, list):
            plain = plain[int(part)] if part.isdecimal() and int(part) < len(plain) else None
        else:
            plain = plain.get(part) if isinstance(plain, dict) else None
    return plain


def find_section_problems(plain: Any, cls: type = Config, prefix: str = "") -> Iterator[str]:
    """A sentence for every section that was set to a single value."""
    for name, kind in get_sections(cls).items():
        key, value = prefix + name, plain.get(name, {})
        if isinstance(value, dict):
            yield from find_section_problems(value, kind, key + ".")
        elif value is not None:
            keys = ", ".join(f"{key}.{item.name}" for item in fields(kind))
            yield f"{key}={value}: is a section, not a value. Its keys: {keys}."
    for name in ("encoder", "decoder"):
        value = plain.get(name, {}) if cls is ModelConfig else {}
        if not isinstance(value, dict):
            way = "Set model.encoder.name." if plain.get("library") else f"Choose a network by model/{name}=<name>."
            yield f"{prefix}{name}={value}: is a section, not a value. {way}"
    options = plain.get("options", {}) if cls is ModelConfig else {}
    if not isinstance(options, dict):
        yield f"{prefix}options={options}: is a section, not a value. Its keys are options: {prefix}options.<name>=..."


def find_nested_list_problems(plain: Any) -> Iterator[str]:
    """A sentence for every list of lists that holds anything else; OmegaConf's error does not name its key."""
    for key, example in NESTED_LISTS.items():
        value = find_value(plain, key)
        if isinstance(value, list) and not all(isinstance(item, list) or "${" in str(item) for item in value):
            yield f"{key}={str(value).replace(' ', '')}: must be a list of lists, such as {example}."


def find_range_problems(section: Any, prefix: str = "") -> Iterator[str]:
    """A sentence for every value outside the range or the choices of its field."""
    for item in fields(section):
        key, value = prefix + key_of(item), getattr(section, item.name)
        if is_dataclass(value):
            yield from find_range_problems(value, key + ".")
            continue
        choices = item.metadata.get("choices")
        if choices and value is not None and value not in choices:  # types decide whether None is allowed
            yield format_wrong_choice(key, value, choices)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield from find_bound_problems(key, value, item.metadata)


def find_interpolation_problems(config: Config) -> Iterator[str]:
    """A sentence for every text that would be read differently from a saved configuration."""
    for key, value in iterate_leaves(config_to_plain(config)):
        if "${" in f"{key}={value}":
            yield f"{key}={value}: a value cannot hold ${{ as text, because it would be read as an interpolation."


def find_target_problems(config: Config) -> Iterator[str]:
    """A sentence for every `_target_` that is not on the allow-list, and for Hydra's own keys elsewhere."""
    plain = config_to_plain(config)
    for group in ("logger", "callbacks"):
        for name, section in plain[group].items():
            if isinstance(section, dict) and "_target_" not in section:
                continue  # the name says which, see find_name_problems
            target = section.pop("_target_") if isinstance(section, dict) else None
            if target not in ALLOWED_TARGETS:
                yield f"{group}.{name}._target_={target}: not allowed. Allowed: {', '.join(ALLOWED_TARGETS)}."
    for path in find_instantiate_keys(plain):
        yield f"{path}: not allowed here."


def find_own_key_problems(config: Config) -> Iterator[str]:
    """A sentence for every key that neither the schema nor a table of this program has."""
    for path in OPEN_SECTIONS:
        section: Any = reduce(getattr, path.split("."), config)
        for name in section.own:
            if name not in list_own_names(path):
                yield explain_unknown_key(f"{path}.{name}", list_keys() + list_own_keys())


def find_name_problems(config: Config) -> Iterator[str]:
    """A sentence for every callback, logger and monitored score that this program does not have."""
    for group in ("logger", "callbacks"):
        for name, section in getattr(config, group).items():
            if isinstance(section, dict) and "_target_" not in section and name not in list_own_names(group):
                yield f"{group}.{name}: has no _target_, and no program adds this name ({EXTENDING})."
    scores = (*MONITORED_METRICS, *list_own_scores())
    validated = tuple(score for score in scores if score.startswith("val/"))
    if config.checkpoint.monitor not in validated:
        yield format_wrong_choice("checkpoint.monitor", config.checkpoint.monitor, validated)
    for name, section in config.callbacks.items():
        monitor = section.get("monitor") if isinstance(section, dict) else None
        if monitor is not None and monitor not in scores:
            yield format_wrong_choice(f"callbacks.{name}.monitor", monitor, scores)
    yield from find_direction_problems(config)


def find_direction_problems(config: Config) -> Iterator[str]:
    """A sentence for every score of ours whose best value would be taken for the worst."""
    watched = [("checkpoint", config.checkpoint.monitor, config.checkpoint.mode)]
    for name, section in config.callbacks.items():
        if isinstance(section, dict) and section.get("_target_") == EARLY_STOPPING:
            mode = section.get("mode", "min")  # Lightning's default
            watched.append((f"callbacks.{name}", str(section.get("monitor")), mode))
    for key, monitor, mode in watched:
        best, extreme = ("min", "lowest") if monitor in LOWEST_IS_BEST else ("max", "highest")
        if monitor in MONITORED_METRICS and mode != best:
            yield f"{key}.mode={mode}: the best {monitor} is the {extreme}. Set {key}.mode={best}."


def find_instantiate_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """The paths of all keys in nested dicts and lists that Hydra could interpret, in upper or lower case."""
    if not isinstance(node, dict | list):
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        path = f"{prefix}.{key}" if prefix else str(key)
        if str(key).strip().lower() in INSTANTIATE_KEYS:
            yield path
        yield from find_instantiate_keys(value, path)


def find_cross_problems(section: Any, without: Collection[str] = ()) -> Iterator[str]:
    """A sentence for every contradiction that a section, or one inside it, finds between its keys.

    Args:
        without: sections inside it that are left out.
    """
    if hasattr(section, "find_problems"):
        yield from section.find_problems()
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value) and item.name not in without:
            yield from find_cross_problems(value)


def iterate_leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All (dotted key, leaf) pairs of nested dicts and lists; an empty dict is a leaf."""
    if isinstance(node, dict) and (node or not prefix):
        for key, value in node.items():
            yield from iterate_leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from iterate_leaves(value, f"{prefix}.{index}")
    else:
        yield prefix, node
