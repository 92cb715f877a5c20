"""From overrides to one configuration, by Hydra, with nothing in it that could name code to run. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from semseg.config.hints import unknown_key
from semseg.config.schema import hydra_words, walk
from semseg.config.secrets import guard_interpolations
from semseg.errors import ConfigError, nearest

# In a wheel inside the package, in a checkout beside it.
PACKAGE = Path(__file__).resolve().parents[1]
CONFIG_DIR = next(place for place in (PACKAGE / "configs", PACKAGE.parent / "configs") if place.is_dir())
# What Hydra's own settings may call: its plugins, which it looks up among those that are installed, and no callback.
HYDRA_TARGETS = {"launcher._target_", "sweeper._target_"}
HYDRA_PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")
OPTUNA_SAMPLERS = tuple(f"optuna.samplers.{name}Sampler" for name in ("TPE", "Random", "CmaEs", "NSGAII", "MOTPE"))
PLUGIN_EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm", "optuna": "optuna"}
LOGGING_CALLS = ("logging.StreamHandler", "logging.FileHandler", "colorlog.ColoredFormatter")
LOGGING_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def compose_config(overrides: list[str]) -> DictConfig:
    """The configuration that a command line amounts to, without running it.

    Raises:
        ConfigError: if Hydra's own settings name code.
    """
    return without_hydra_section(compose_with_hydra(overrides))


def compose_with_hydra(overrides: list[str], *, sweep: bool = False) -> DictConfig:
    """The configuration with Hydra's own settings below `hydra`; in a sweep, without what is swept over.

    Raises:
        ConfigError: if Hydra's own settings name code, or Hydra cannot make anything of the words.
    """
    guard_interpolations()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        mode = RunMode.MULTIRUN if sweep else RunMode.RUN
        try:
            composed = loader.load_configuration(
                "config", overrides, mode, from_shell=False, validate_sweep_overrides=not sweep
            )
        except (HydraException, OmegaConfBaseException):
            raise
        except Exception as error:  # whatever Hydra stumbles over: an assertion, a file name that is too long, ...
            told = next(group_problems(overrides), None)
            if told is not None:
                raise ConfigError(told) from error
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"cannot read this command line ({type(error).__name__}: {reason}).") from error
    told = next(hydra_problems(OmegaConf.to_container(composed.hydra, resolve=False)), None)
    if told is not None:
        raise ConfigError(told)
    return composed


def without_hydra_section(composed: DictConfig) -> DictConfig:
    """The configuration without Hydra's own settings; the name of the run folder stays what it is now."""
    ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    ours.run_dir = str(composed.run_dir)
    return ours


def list_options(group: str) -> list[str]:
    """The names of a group's files in configs/, sorted."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def list_groups() -> list[str]:
    """Names of all configuration groups: model, model/encoder, data, ..."""
    folders = (path.relative_to(CONFIG_DIR) for path in CONFIG_DIR.rglob("*") if path.is_dir())
    return sorted(folder.as_posix() for folder in folders if folder.parts[0] != "hydra")


def unresolved(node: DictConfig, key: str) -> str:
    """The text under `key`, its interpolations as they were written."""
    plain = OmegaConf.to_container(node, resolve=False)
    assert isinstance(plain, dict)
    return str(plain[key])


def hydra_problems(settings: Any) -> Iterator[str]:
    """A sentence for everything in Hydra's own settings, as they are written, that would call what is not on a list."""
    found = dict(walk(settings))
    for place in hydra_words(settings):
        if not may_call(place, str(found.get(place))):
            yield f"hydra.{place}={found.get(place)}: not allowed."
    if found.get("sweeper.custom_search_space") is not None:
        yield f"hydra.sweeper.custom_search_space={found['sweeper.custom_search_space']}: not allowed."
    for name in ("params", "search_space"):
        space = settings["sweeper"].get(name) or {}
        if not isinstance(space, dict) or any(re.search(r"\bhydra\b", str(key)) for key in space):
            yield f"hydra.sweeper.{name}={space}: not allowed. It makes words of jobs, which cannot change Hydra."
    for key, value in found.items():
        section, _, rest = key.partition(".")
        if section not in ("job_logging", "hydra_logging"):
            continue
        words, text = rest.split("."), str(value)
        calls = words[-1] in ("class", "()") and value not in LOGGING_CALLS
        names = "://" in text and value not in LOGGING_STREAMS
        later = "${" in text and words[-1] != "filename"
        if calls or names or later or "()" in words[:-1]:
            yield f"hydra.{key}={text}: not allowed. Allowed: {', '.join((*LOGGING_CALLS, *LOGGING_STREAMS))}."


def may_call(place: str, target: str) -> bool:
    """Whether Hydra's own setting `place` may name `target`."""
    is_plugin = place in HYDRA_TARGETS and target.startswith(HYDRA_PLUGINS)
    return is_plugin or (place == "sweeper.sampler._target_" and target in OPTUNA_SAMPLERS)


def group_problems(overrides: list[str]) -> Iterator[str]:
    """A sentence for every group that was given something else than the name of one of its options."""
    for word in overrides:
        key, _, value = word.lstrip("+").partition("=")
        if key in list_groups() and value not in list_options(key):
            yield explain_option(key, value, [])


def explain_option(group: str, option: str, listed: list[str]) -> str:
    """One line for a group that has no such option; `listed` are those of a group that is not ours."""
    if group in ("hydra/launcher", "hydra/sweeper") and option in PLUGIN_EXTRAS:
        return f"{group}={option} is not installed. To install it: pip install 'semseg[{PLUGIN_EXTRAS[option]}]'"
    options = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml")) or listed
    if not options:
        return unknown_key(group or option, list_groups())
    meant = nearest(option, options)
    hint = f" Did you mean {group}={meant}?" if meant else ""
    return f"{group}={option}: not known.{hint}\nValid: {', '.join(options)}."
