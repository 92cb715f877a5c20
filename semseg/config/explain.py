"""Explain errors of Hydra and OmegaConf to users in one sentence: the mistake, the nearest name, valid names."""

from __future__ import annotations

import re
import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from semseg.config.compose import compose_config, explain_option
from semseg.config.groups import CONFIG_DIR, list_groups, list_options
from semseg.config.hints import explain_unknown_key
from semseg.config.overrides import quote_value, shorten_override
from semseg.config.schema import list_keys
from semseg.config.tables import list_own_keys
from semseg.config.validate import explain_omegaconf_error, iterate_leaves
from semseg.errors import find_nearest

# Messages about an unknown key: from Hydra for key=value and for ~key, and from OmegaConf.
UNKNOWN_KEY_PATTERNS = (
    r"Could not override '([^'@]+)",
    r"Could not delete from config\. '([^'@]+)' does not",
    r"Key '([^']+)'",
)


def explain_hydra_error(error: Exception, overrides: list[str]) -> str:
    """Hydra's error in at most three lines: the mistake, the nearest name, valid names."""
    if isinstance(error, OverrideParseException):
        return explain_grammar_error(error.override)
    while not str(error) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = str(error)
    several = re.search(r"Ambiguous value for argument '([^']+)'", text)
    if several:
        key, _, values = several[1].partition("=")
        return (
            f"{several[1]}: has several values. A list has brackets: {key}=[{values}]. A sweep over them is for the "
            f"command line: -m {several[1]}"
        )
    missing = re.search(r"Could not (?:find|load) '([^']+)'", text)  # load: an item of a list
    if missing:
        group, _, option = missing[1].rpartition("/")
        return explain_option(group, option, re.findall(r"^\t(\w+)$", text, re.MULTILINE))
    key = next(filter(None, (re.search(pattern, text) for pattern in UNKNOWN_KEY_PATTERNS)), None)
    if key:
        return explain_key(key[1], overrides)
    if isinstance(error, OmegaConfBaseException):
        return explain_omegaconf_error(error, OmegaConf.create())
    return " ".join(line.strip() for line in text.splitlines() if line.strip())[:400]


def explain_key(key: str, overrides: list[str]) -> str:
    """One line for a key that does not exist in the configuration with these groups."""
    section, option = [*key.split("."), ""][:2]
    if section in ("logger", "callbacks") and option in list_options(section):
        return f"There is no key {key!r} without {section}={option}."
    if key in ("model/encoder", "model/decoder"):  # groups, which the defaults list of a whole network does not have
        return f"{key}: cannot be chosen for a whole network, whose encoder is model.encoder.name=<name> if it has one."
    if "." in key and key in list_keys():
        return f"There is no key {key!r}, because {key.rpartition('.')[0]} is null."
    group = guess_group(key, overrides)
    valid = [*list_keys(), *list_own_keys(), *list_composed_keys(overrides), *list_groups()]
    return explain_unknown_key(key, [group] if group else valid)


def guess_group(key: str, overrides: list[str]) -> str | None:
    """The group that a mistyped `key=value` was probably for, from its value: modle=upernet50 -> model."""
    values = [override.partition("=")[2] for override in overrides if override.startswith(f"{key}=")]
    owners = [group for group in list_groups() for value in values if (CONFIG_DIR / group / f"{value}.yaml").is_file()]
    return find_nearest(key, owners)


def explain_grammar_error(override: str) -> str:
    """One line for an argument that is not key=value in Hydra's grammar."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{shorten_override(override) if len(override) > 200 else repr(override)} is not of the form key=value."
    if len(override) > 200:
        return f"cannot read {shorten_override(override)}. Quote the value."
    if value.startswith("[") and value.endswith("]"):
        return f'cannot read {override!r}. Quote each part of the list: \'{key}=["...","..."]\''
    if value[:1] in ("[", "{") and (value.count("[") > value.count("]") or value.count("{") > value.count("}")):
        return f"cannot read {override!r}: its bracket is not closed."
    quoted = quote_value(value.strip("\"'"))
    return f"cannot read {override!r}. Quote the value: {shlex.quote(f'{key}={quoted}')}"


def list_composed_keys(overrides: list[str]) -> list[str]:
    """All keys of the configuration with the groups of `overrides`, ignoring values of keys."""
    parser = OverridesParser.create()
    chosen = []
    for override in overrides:
        try:
            is_group = (CONFIG_DIR / parser.parse_override(override).key_or_group).is_dir()
        except HydraException:
            continue
        if is_group:
            chosen.append(override)
    try:
        plain = OmegaConf.to_container(compose_config(chosen), resolve=False)
    except (HydraException, OmegaConfBaseException):
        return []
    return [key for key, _ in iterate_leaves(plain)]
