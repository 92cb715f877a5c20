"""Errors for users: one sentence that says what is wrong and how to fix it.

The command line prints the message of a `SemsegError` and nothing else; every other exception is a defect and keeps its
traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

INTERRUPTED, TERMINATED = 130, 143  # exit codes of a run that stopped properly, after Ctrl-C and after other signals
STOPPED_CODES = (INTERRUPTED, TERMINATED)
MAX_REASON = 200  # characters of another library's error in ours


class SemsegError(ValueError):
    """Base of all errors that a user can fix. `exit_code` is the exit code of the process."""

    exit_code = 1


class ConfigError(SemsegError):
    """A key, group or value of the configuration is wrong."""

    exit_code = 2


class ArgumentError(ConfigError, TypeError):
    """An argument of a call from Python is unknown, or has a wrong type, shape or value."""


class DataError(SemsegError):
    """A file of a data set is missing, broken or does not fit the configuration."""


class OutOfMemoryError(SemsegError):
    """Something does not fit into the memory of the machine or of the device, which is not the fault of a file."""


class ReportedError(DataError):
    """An error whose report is on the screen already: the command line prints nothing more."""


class CheckpointError(SemsegError):
    """A checkpoint or weight file is missing, broken or belongs to another network."""


class ExportError(SemsegError):
    """A network cannot be exported, or the exported one would compute other numbers."""


class DownloadError(SemsegError):
    """A file cannot be downloaded, or is not the expected one."""


def install_command(extra: str) -> str:
    """The command that installs an extra of this package, in its clone or where a wheel of it is installed."""
    return f'pip install --editable ".[{extra}]"' if is_clone() else f'pip install "semseg[{extra}]"'


def is_clone() -> bool:
    """Whether this package is that of a clone, and not of a wheel."""
    return (Path(__file__).resolve().parents[1] / "pyproject.toml").exists()


def describe_reason(error: Exception) -> str:
    """Why a file cannot be read: a system error without its number and the name of the file, else the text."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)


def first_line(error: Exception) -> str:
    """The first line of an error, or its class if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0][:MAX_REASON] if lines else type(error).__name__


def one_line(error: Exception) -> str:
    """All lines of an error as one, without its full stop, or its class if it has no text."""
    return " ".join(str(error).split())[:MAX_REASON].rstrip(".") or type(error).__name__


def find_nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that is most similar to `name`, or None if none is similar.

    >>> find_nearest("upernett", ["c1", "ppm", "upernet"])
    'upernet'
    """
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None


def suggest(name: str, choices: Iterable[str], prefix: str = "") -> str:
    """A sentence with the choice that is most similar to `name`, after a space; empty if none is similar.

    >>> suggest("upernett", ["c1", "ppm", "upernet"], prefix="model/decoder=")
    ' Did you mean model/decoder=upernet?'
    """
    nearest = find_nearest(name, choices)
    return f" Did you mean {prefix}{nearest}?" if nearest else ""


def check_choice(key: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        ConfigError: otherwise, with the nearest valid name and the list of all.
    """
    names = sorted(choices)
    if value in names:
        return value
    hint = suggest(str(value), names)
    raise ConfigError(f"{key}: {value!r} is not known.{hint} Valid: {', '.join(names)}.")
