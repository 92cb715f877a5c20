"""Errors for users: one sentence that names what is wrong and the way out.

The launcher prints the message of a `SemsegError` and nothing else; every other exception is a
defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

INTERRUPTED, TERMINATED = 130, 143  # exit codes of a run that stopped in good order: after Ctrl-C; after other signals
STOPPED_CODES = (INTERRUPTED, TERMINATED)


class SemsegError(ValueError):
    """Base of all errors that a user can mend. `exit_code` is what the process ends with."""

    exit_code = 1


class ConfigError(SemsegError):
    """A key, group or value of the configuration is wrong."""

    exit_code = 2


class DataError(SemsegError):
    """A file of a data set is missing, broken or does not fit the configuration."""


class CheckpointError(SemsegError):
    """A checkpoint or weight file is missing, broken or belongs to another network."""


class ExportError(SemsegError):
    """A network cannot be written for other programs, or would give other numbers there."""


class DownloadError(SemsegError):
    """A file cannot be fetched, or is not the one that was meant."""


def find_nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` was probably meant to be, or None if none is close.

    >>> find_nearest("upernett", ["c1", "ppm", "upernet"])
    'upernet'
    """
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None


def check_choice(kind: str, word: str, choices: Iterable[str]) -> str:
    """`word` itself if it is one of `choices`.

    Raises:
        ConfigError: otherwise, with the nearest valid name and the list of all.
    """
    names = sorted(choices)
    if word in names:
        return word
    meant = find_nearest(str(word), names)
    hint = f" Did you mean {meant}?" if meant else ""
    raise ConfigError(f"{kind}: {word!r} is not known.{hint} Valid: {', '.join(names)}.")
