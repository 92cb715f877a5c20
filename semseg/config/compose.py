"""From overrides to one configuration, by Hydra. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from semseg.config.hints import explain_unknown_key
from semseg.errors import ConfigError, find_nearest

# In a wheel inside the package, in a checkout beside it.
PACKAGE_DIR = Path(__file__).resolve().parents[1]
CONFIG_DIR = next(place for place in (PACKAGE_DIR / "configs", PACKAGE_DIR.parent / "configs") if place.is_dir())
PLUGIN_EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm", "optuna": "optuna"}


def compose_config(overrides: list[str]) -> DictConfig:
    """The configuration that a command line amounts to, without running it."""
    return drop_hydra_section(compose_with_hydra(overrides))


def compose_with_hydra(overrides: list[str], *, sweep: bool = False) -> DictConfig:
    """The configuration with Hydra's own settings below `hydra`; in a sweep, without what is swept over.

    Raises:
        ConfigError: if Hydra cannot make anything of the words.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        mode = RunMode.MULTIRUN if sweep else RunMode.RUN
        with translate_hydra_failures(overrides):
            return loader.load_configuration(
                "config", overrides, mode, from_shell=False, validate_sweep_overrides=not sweep
            )


@contextmanager
def translate_hydra_failures(overrides: list[str]) -> Iterator[None]:
    """Turns what Hydra stumbles over into one sentence: an assertion, too many brackets or digits, a long file name.

    Raises:
        ConfigError: in place of every exception that is not one of Hydra's or OmegaConf's own.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException):
        raise
    except Exception as error:
        told = next(find_group_problems(overrides), None)
        if told is not None:
            raise ConfigError(told) from error
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"cannot read this command line ({type(error).__name__}: {reason}).") from error


def drop_hydra_section(composed: DictConfig) -> DictConfig:
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


def read_unresolved(node: DictConfig, key: str) -> str:
    """The text under `key`, its interpolations as they were written."""
    plain = OmegaConf.to_container(node, resolve=False)
    assert isinstance(plain, dict)
    return str(plain[key])


def find_group_problems(overrides: list[str]) -> Iterator[str]:
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
        return explain_unknown_key(group or option, list_groups())
    meant = find_nearest(option, options)
    hint = f" Did you mean {group}={meant}?" if meant else ""
    return f"{group}={option}: not known.{hint}\nValid: {', '.join(options)}."
