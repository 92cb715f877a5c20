"""Recipes: the options of the group experiment, and files like them. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from semseg.config.choice_files import is_choice_file
from semseg.config.groups import CONFIG_DIR
from semseg.config.override_keys import split_override


def find_experiment(overrides: Iterable[str]) -> str | None:
    """The recipe that a command line chooses: an option of the group experiment, or a file; None: it chooses none."""
    chosen = [value.strip("\"'") for key, value in map(split_override, overrides) if key == "experiment"]
    return chosen[-1] if chosen and chosen[-1] not in ("", "null") else None


def read_recipe(experiment: str) -> dict[str, Any]:
    """A recipe as plain data, together with those that it starts from.

    Args:
        experiment: an option of that group, or a file, or several: [a,b].
    """
    is_file = is_choice_file("experiment", experiment)
    names = [experiment] if is_file else [name.strip(" \"'") for name in experiment.strip("[]").split(",")]
    path = Path(names[0]).expanduser() if is_file else CONFIG_DIR / "experiment" / f"{names[0]}.yaml"
    content: Any = OmegaConf.to_container(OmegaConf.load(path)) or {} if len(names) == 1 else {"defaults": names}
    defaults: list[Any] = []
    merged = DictConfig({})
    for entry in content.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_":  # another recipe
            base = read_recipe(entry)
            defaults += base.pop("defaults")
            merged.merge_with(base)
        else:
            defaults.append(entry)
    merged.merge_with(content)
    values: Any = OmegaConf.to_container(merged)
    return {"defaults": defaults, **values}


def list_chosen_options(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a recipe chooses, by group.

    >>> list_chosen_options({"defaults": ["_self_", {"override /optim": "adamw"}]})
    {'optim': 'adamw'}
    """
    entries = [entry for entry in recipe.get("defaults", []) if isinstance(entry, Mapping)]
    return {str(key).removeprefix("override ").lstrip("/"): value for entry in entries for key, value in entry.items()}
