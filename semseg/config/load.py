"""The configuration of a command line, for use from Python."""

from __future__ import annotations

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from semseg.config.compose import compose_config
from semseg.config.explain import explain_hydra_error
from semseg.config.overrides import parse_overrides
from semseg.config.schema import Config
from semseg.config.validate import check_config
from semseg.errors import ConfigError


def load_config(arguments: list[str]) -> tuple[Config, list[str]]:
    """The checked configuration of a command line, and its overrides in Hydra's grammar.

    Raises:
        ConfigError: if an argument is wrong.
    """
    overrides = parse_overrides(arguments)
    try:
        return check_config(compose_config(overrides)), overrides
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_hydra_error(error, overrides)) from error
