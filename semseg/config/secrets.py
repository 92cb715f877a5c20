"""Secrets of the environment (keys, tokens, passwords) stay out of the configuration. No torch.

A configuration is printed, saved with its run and kept in every checkpoint that is passed on. Nothing in it needs a
secret, so one that gets in, by ${oc.env:NAME} or because a shell has put it there, is refused; masking it in every
place that is written would be one place short some day.
"""

from __future__ import annotations

import os
import re
from typing import Any

from omegaconf import OmegaConf
from omegaconf.resolvers import oc

from semseg.errors import ConfigError

SECRET_NAME = re.compile("key|token|secret|password", re.IGNORECASE)
SHORTEST = 8  # characters; a shorter value is part of many harmless words


def secret_in(text: str) -> str | None:
    """The environment variable whose secret value is part of `text`, or None.

    Values that name a file or folder are no secrets (SSH_KEY_FILE=/home/me/.ssh/id).
    """
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and value in text and SECRET_NAME.search(name) and not os.path.lexists(value):
            return name
    return None


def refusal(place: str, name: str) -> str:
    """The sentence for a secret in the configuration: where, and which."""
    return f"{place}: holds the value of the environment variable {name}, but configurations are saved and printed."


def guard_interpolations() -> None:
    """From now on ${oc.env:NAME} is an error, whether NAME is set or not, if it sounds like a secret."""
    OmegaConf.register_new_resolver("oc.env", env, replace=True)


def env(*words: Any) -> Any:
    """OmegaConf's resolver oc.env(name) or oc.env(name, default).

    Raises:
        ConfigError: for the name of a secret.
    """
    if words and SECRET_NAME.search(str(words[0])):
        raise ConfigError(f"{words[0]} sounds like a secret, and configurations are saved and printed.")
    return oc.env(*words)
