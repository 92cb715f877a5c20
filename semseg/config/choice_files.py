"""Files anywhere on disk as options of groups: data=plants.yaml, experiment=recipes/long.yaml. No torch.

An override that names such a file holds its absolute path (`resolve_choice`); Hydra then asks `ChoiceFileSource` for
`<group>/<path>`, a name that no option of configs/ can have. A file holds what differs from the complete option of its
group, and relative paths of a data set start at the folder of the file. A recipe, which is a file for `experiment=`,
also serves as `data=<file>`: its section `data` is then used alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from semseg.config.groups import COMPLETE_OPTIONS, list_groups, list_options
from semseg.config.hints import explain_unknown_key
from semseg.config.schema import BUILT_IN_CLASSES, SPLITS, Config, get_sections, list_keys
from semseg.config.tables import is_own_key
from semseg.config.validate import explain_omegaconf_error, find_range_problems, name_fields
from semseg.errors import ConfigError, find_nearest, suggest

SUFFIXES = (".yaml", ".yml")
SCHEME = "choice-file"  # of our entry in Hydra's search path
GLOBAL_GROUPS = ("experiment", "debug", "hparams_search")  # their files hold keys of the whole configuration
# What a file without a defaults list starts from.
BASE_OPTIONS = COMPLETE_OPTIONS | {"data": "folder"}
GLOBAL_HEADER = "# @package _global_"


class ChoiceFile(NamedTuple):
    """The content of a file that is an option of a group."""

    content: dict[str, Any]  # with its defaults list
    is_global: bool  # whether its keys are those of the whole configuration, and not of a section

    def to_yaml(self) -> str:
        """The text of a file with this content, wherever it lies."""
        head = f"{GLOBAL_HEADER}\n" if self.is_global else ""
        return head + yaml.safe_dump(self.content, sort_keys=False, allow_unicode=True, width=120)


def is_choice_file(group: str, value: str) -> bool:
    """Whether `group=value` names a file instead of an option."""
    return value.lower().endswith(SUFFIXES) and group in list_groups()


def resolve_choice(group: str, value: str) -> Path:
    """The absolute path of the file that `group=value` names, after a check of its content.

    Raises:
        ConfigError: if there is no such file, or it cannot be an option of the group.
    """
    path = Path(value).expanduser()
    if not path.is_file():
        files = [each for suffix in SUFFIXES for each in path.parent.glob(f"*{suffix}")]
        choices = {name: name for name in list_options(group)} | {
            each.stem: str(Path(value).with_name(each.name)) for each in files
        }
        nearest = find_nearest(path.stem, choices)
        hint = f" Did you mean {group}={choices[nearest]}?" if nearest else ""
        raise ConfigError(f"{group}={value}: there is no such file.{hint}")
    read_choice_file(group, path)
    return path.absolute()


def read_choice_file(group: str, path: Path) -> ChoiceFile:
    """Read a file as an option of `group`, its relative paths resolved.

    Raises:
        ConfigError: naming the file, if it is no YAML, or has unknown keys, wrong values or unknown defaults.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        text = error.strerror if isinstance(error, OSError) else str(error)
        reason = " ".join(str(text).split())[:200] or type(error).__name__
        raise ConfigError(f"{path}: cannot be read as YAML ({reason}).") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path}: must hold keys and values, such as `root: images`.")
    if group == "data" and isinstance(content.get("data"), dict):
        content, text = take_data_section(content), ""
    package = re.search(r"^#\s*@package[ \t]+(\S+)", text, re.MULTILINE)
    if package is not None and package[1] not in ("_global_", "_group_"):
        raise ConfigError(f"{path}: @package {package[1]} is not supported. Write {GLOBAL_HEADER}, or none.")
    is_global = package[1] == "_global_" if package is not None else group in GLOBAL_GROUPS
    problem = next(find_problems(group, content, is_global=is_global), None)
    if problem is not None:
        raise ConfigError(f"{path}: {problem}")
    if not is_global:
        return ChoiceFile(complete_section(group, content, path), is_global)
    data = content.get("data")
    if isinstance(data, dict):
        hint = {"hint": f"Its folders are set in {path}."} if {"root", "images"} & set(data) else {}
        content["data"] = resolve_data_paths(hint | data, path.absolute().parent)
    return ChoiceFile(content, is_global)


def take_data_section(recipe: dict[str, Any]) -> dict[str, Any]:
    """The data set of a recipe as a file of its own: its section `data`, and the option that this starts from."""
    defaults = recipe.get("defaults")
    entries = [entry for entry in defaults if isinstance(entry, dict)] if isinstance(defaults, list) else []
    options = [entry[key] for entry in entries for key in entry if str(key).removeprefix("override ") == "/data"]
    based = {"defaults": [options[-1], "_self_"]} if options and options[-1] != "folder" else {}
    return based | recipe["data"]


def complete_section(group: str, content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content of a file of one section with what it leaves out: its defaults list, and the name of a data set."""
    base = BASE_OPTIONS.get(group)
    if base is None:
        return content
    is_based = "defaults" in content
    completed = content if is_based else {"defaults": [base, "_self_"], **content}
    if group == "data":
        hint = {} if is_based else {"hint": f"Its folders are set in {path}."}
        completed = resolve_data_paths({"name": path.stem, **hint, **completed}, path.absolute().parent)
    return completed


def resolve_data_paths(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The description of a data set with its relative paths below `folder` instead of the working directory.

    Paths that are relative to data.root stay as they are. A description without a root, images and defaults list is of
    the folder that it lies in.
    """

    def resolve(value: Any) -> Any:
        is_path = isinstance(value, str) and value and not value.startswith(("~", "${"))
        return join_path(folder, value) if is_path else value

    resolved = dict(content)
    if not resolved.get("images") and "root" not in resolved and resolved.get("defaults") == ["folder", "_self_"]:
        resolved["root"] = "."
    for key in ("root", "images", "masks", "label_cache"):
        if key in resolved:
            resolved[key] = resolve(resolved[key])
    if isinstance(resolved.get("mix"), list):
        resolved["mix"] = [
            resolve_data_paths(entry, folder) if isinstance(entry, dict) else entry for entry in resolved["mix"]
        ]
    if not resolved.get("images"):
        return resolved
    if resolved.get("classes") not in (
        None,
        *BUILT_IN_CLASSES,
    ):  # without a root, these would be below the working directory
        resolved["classes"] = resolve(resolved.get("classes"))
    for split in SPLITS:
        if isinstance(resolved.get(split), dict):
            resolved[split] = {key: resolve(value) for key, value in resolved[split].items()}
    return resolved


def join_path(folder: Path, path: str) -> str:
    """`path` below `folder`, without `..` where that names the same file."""
    joined = str(folder / path)
    shortened = os.path.normpath(joined)
    return shortened if os.path.realpath(shortened) == os.path.realpath(joined) else joined


# ---- checks


def find_problems(group: str, content: Mapping[str, Any], *, is_global: bool) -> Iterator[str]:
    """A sentence for every problem of a file: unknown keys first, then defaults, then wrong values."""
    section = get_sections(Config).get(group)
    values = {key: value for key, value in content.items() if key != "defaults"}
    if is_global:
        if group == "hparams_search":
            values = {key: value for key, value in values.items() if key != "hydra"}
        yield from find_unknown_keys(values, Config)
    elif section is not None:
        yield from find_unknown_keys(values, section, f"{group}.")
    yield from find_default_problems(group, content.get("defaults", []))
    for key, value in values.items():
        if is_global and isinstance(value, str) and key in list_groups() and key in get_sections(Config):
            yield f"{key}: {value}: choose an option of a group below defaults, as `- override /{key}: {value}`."
    if is_global or section is not None:
        yield from find_value_problems(values if is_global else {group: values})


def find_unknown_keys(content: Mapping[Any, Any], cls: type, prefix: str = "") -> Iterator[str]:
    """A sentence for every key that a section does not have."""
    sections, keys = get_sections(cls), list_keys(cls)
    for key, value in content.items():
        if is_own_key(f"{prefix}{key}"):
            continue
        if key not in keys:
            yield explain_unknown_key(f"{prefix}{key}", list_keys())
        elif key in sections and isinstance(value, Mapping):
            yield from find_unknown_keys(value, sections[key], f"{prefix}{key}.")


def find_default_problems(group: str, defaults: Any) -> Iterator[str]:
    """A sentence for every entry of a defaults list that is not an option of configs/."""
    if not isinstance(defaults, list):
        yield f"defaults={defaults}: must be a list of options, such as [camvid, _self_]."
        return
    for entry in defaults:
        owner, option = (group, entry) if not isinstance(entry, dict) else next(iter(entry.items()), ("", None))
        owner = str(owner).removeprefix("optional ").removeprefix("override ").lstrip("/")
        if isinstance(entry, dict) and not (isinstance(option, str | list) or option is None):
            yield f"defaults: {entry}: must be like `override /model: upernet50`."
        for name in option if isinstance(option, list) else [option]:
            is_known = name in (None, "_self_") or (owner in list_groups() and str(name) in list_options(owner))
            if not is_known:
                hint = suggest(str(name), list_options(owner)) if owner in list_groups() else ""
                yield f"defaults: {owner}={name} is not an option of configs/, and only those can be listed.{hint}"


def find_value_problems(content: dict[str, Any]) -> Iterator[str]:
    """A sentence for every value of another type or outside its range; values that hold interpolations are skipped."""
    if "${" in str(content):
        return
    plain = OmegaConf.create(content)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), name_fields(plain)))
    except OmegaConfBaseException as error:
        yield explain_omegaconf_error(error, plain)
    else:
        yield from find_range_problems(config)


# ---- Hydra


def split_choice(config_path: str) -> tuple[str, str] | None:
    """The group and the file of `<group>/<absolute path>`, by which Hydra asks for a file; None for other names.

    >>> split_choice("model/encoder//tmp/tiny.yaml"), split_choice("model/encoder/resnet18.yaml")
    (('model/encoder', '/tmp/tiny.yaml'), None)
    """
    for group in list_groups():
        path = config_path.removeprefix(f"{group}/")
        if path != config_path and os.path.isabs(path) and is_choice_file(group, path):  # noqa: PTH117
            return group, path
    return None


class ChoiceFileSource(ConfigSource):
    """Gives Hydra the files that overrides name by their absolute path; see `split_choice`."""

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return False

    def is_config(self, config_path: str) -> bool:
        choice = split_choice(config_path)
        return choice is not None and Path(choice[1]).is_file()

    def load_config(self, config_path: str) -> ConfigResult:
        choice = split_choice(config_path)
        assert choice is not None, "Hydra asks is_config first"
        file = read_choice_file(choice[0], Path(choice[1]))
        header: dict[str, str | None] = {"package": "_global_" if file.is_global else None}
        return ConfigResult(self.provider, config_path, OmegaConf.create(file.content), header)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []


class ChoiceFilePlugin(SearchPathPlugin):
    """Puts `ChoiceFileSource` into Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("semseg", f"{SCHEME}://")


def register_choice_files() -> None:
    """Make Hydra accept files as options of groups, in this process."""
    for plugin in (ChoiceFileSource, ChoiceFilePlugin):
        Plugins.instance().register(plugin)
