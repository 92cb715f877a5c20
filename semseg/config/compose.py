"""Compose the configuration from overrides, by Hydra. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from semseg.config.choice_files import is_choice_file, register_choice_files
from semseg.config.groups import CONFIG_DIR, list_groups, list_options
from semseg.config.hints import explain_unknown_key
from semseg.config.override_keys import split_override
from semseg.config.tables import list_own_keys
from semseg.errors import ConfigError, install_command, one_line, suggest

register_choice_files()
SECTIONS_OF_GROUPS = {"loss": "loss.terms"}  # where programs add names, if it is not the section of the group itself
PLUGIN_EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm", "optuna": "optuna"}


def compose_config(overrides: list[str]) -> DictConfig:
    """The configuration of a command line."""
    return drop_hydra_section(compose_with_hydra(overrides))


def compose_with_hydra(overrides: list[str], *, sweep: bool = False) -> DictConfig:
    """The configuration with Hydra's own settings below `hydra`; in a sweep, without the keys that are swept.

    Raises:
        ConfigError: if Hydra fails on an override, or a file that is an option of a group is wrong.
    """
    with replace_hydra():
        loader = GlobalHydra.instance().config_loader()
        mode = RunMode.MULTIRUN if sweep else RunMode.RUN
        with translate_hydra_failures(overrides):
            return loader.load_configuration(
                "config", overrides, mode, from_shell=False, validate_sweep_overrides=not sweep
            )


@contextmanager
def replace_hydra() -> Iterator[None]:
    """Within this context, Hydra reads our configs; afterwards those of a program that uses Hydra itself, if there is
    one."""
    instance = GlobalHydra.instance()
    others = instance.hydra
    instance.clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = others


@contextmanager
def translate_hydra_failures(overrides: list[str]) -> Iterator[None]:
    """Turn unexpected failures of Hydra into one sentence: assertions, too many brackets or digits, long file names.

    Raises:
        ConfigError: instead of every exception that is not one of Hydra's, OmegaConf's or ours.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException, ConfigError):
        raise
    except Exception as error:
        problem = next(find_group_problems(overrides), None)
        if problem is not None:
            raise ConfigError(problem) from error
        reason = one_line(error)
        raise ConfigError(f"cannot read this command line ({type(error).__name__}: {reason}).") from error


def drop_hydra_section(composed: DictConfig) -> DictConfig:
    """The configuration without Hydra's own settings. The name of the run folder is resolved, so that it is fixed."""
    config = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    config.run_dir = str(composed.run_dir)
    return config


def read_unresolved(node: DictConfig, key: str) -> str:
    """The text of `key` with its interpolations unresolved."""
    plain = OmegaConf.to_container(node, resolve=False)
    assert isinstance(plain, dict)
    return str(plain[key])


def find_group_problems(overrides: list[str]) -> Iterator[str]:
    """A sentence for every group whose value is not one of its options."""
    for override in overrides:
        key, value = split_override(override)
        if override.startswith("~") or key not in list_groups():
            continue
        if value not in list_options(key) and not is_choice_file(key, value):
            yield explain_option(key, value, [])


def explain_option(group: str, option: str, listed: list[str]) -> str:
    """One line for an unknown option of a group; `listed` are the options of a group that is not ours."""
    if group in ("hydra/launcher", "hydra/sweeper") and option in PLUGIN_EXTRAS:
        return f"{group}={option} is not installed. To install it: {install_command(PLUGIN_EXTRAS[option])}"
    options = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml")) or listed
    if not options:
        return explain_unknown_key(group or option, list_groups())
    own_key = f"{SECTIONS_OF_GROUPS.get(group, group)}.{option}"
    hint = suggest(option, options, prefix=f"{group}=")
    if own_key in list_own_keys():
        hint = f" To use it: {own_key}={'{}' if group in ('callbacks', 'logger') else '1'}"
    return f"{group}={option}: not known.{hint}\nValid: {', '.join(options)}."
