"""Where a result comes from: command, configuration, versions, commit, data, device. No torch.

Secrets stay out: nothing is read from the environment, and values under keys that sound like one are masked.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from semseg import __version__
from semseg.config.schema import Config, as_plain
from semseg.data.records import Record
from semseg.data.store import stamp

PACKAGES = ("torch", "torchvision", "pytorch-lightning")
SECRET_KEY = re.compile("key|token|secret|password", re.IGNORECASE)
LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
MASK = "***"
NO_CHECKOUT = "not a git checkout"
GIT_SECONDS = 20


class Fingerprint(NamedTuple):
    """Which files a split is made of."""

    images: int
    sha256: str  # 64 hexadecimal digits


class RunCard(NamedTuple):
    """What is needed to repeat a run."""

    command: str  # one line for a shell
    config: str  # YAML
    versions: dict[str, str]
    git: str
    device: str
    date: str  # local time
    data: Fingerprint | None


def run_card(config: Config, command: Sequence[str], device: str, data: Fingerprint | None = None) -> RunCard:
    """The card of the run that this process does now.

    Args:
        command: the words of the command line: ["python", "run.py", "mode=eval", ...].
        device: in words, such as "cpu" or the name of a GPU.
    """
    return RunCard(
        command=shlex.join(masked_word(word) for word in command),
        config=OmegaConf.to_yaml(OmegaConf.create(masked(as_plain(config)))),
        versions=versions(),
        git=git_state(Path(__file__).resolve().parent.parent / "__init__.py"),
        device=device,
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z"),
        data=data,
    )


def masked(node: Any) -> Any:
    """Nested dicts and lists, with *** for values whose key sounds like a secret and for logins in URLs.

    >>> masked({"api_key": "abc", "lr": 0.1})
    {'api_key': '***', 'lr': 0.1}
    """
    if isinstance(node, dict):
        return {key: MASK if SECRET_KEY.search(str(key)) else masked(value) for key, value in node.items()}
    if isinstance(node, list):
        return [masked(value) for value in node]
    return LOGIN_IN_URL.sub(MASK, node) if isinstance(node, str) else node


def masked_word(word: str) -> str:
    """A word of a command line, its value masked as in `masked`.

    >>> masked_word("logger.api_key=abc")
    'logger.api_key=***'
    """
    key, equals, value = word.partition("=")
    is_secret = equals and (SECRET_KEY.search(key) or ("{" in value and SECRET_KEY.search(value)))
    return f"{key}={MASK}" if is_secret else LOGIN_IN_URL.sub(MASK, word)


def versions() -> dict[str, str]:
    """Versions of Python, this package and what it computes with."""
    return {"semseg": __version__, "python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def git_state(file: Path) -> str:
    """The commit of the checkout that tracks `file`, and whether something in it was changed since."""
    # Without the question for the file, a package installed below someone else's checkout would claim its commit.
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return NO_CHECKOUT
    commit = _git(file.parent, "rev-parse", "HEAD")
    changes = _git(file.parent, "status", "--porcelain")
    if commit is None or changes is None:
        return NO_CHECKOUT
    changed = len(changes.splitlines())
    return f"{commit}, files changed since: {changed}" if changed else f"{commit}, nothing changed since"


def _git(folder: Path, *words: str) -> str | None:
    """What git answers, or None if it is missing or fails."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    try:
        answer = subprocess.run(  # noqa: S603 - fixed words
            command, capture_output=True, text=True, timeout=GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def data_fingerprint(records: Sequence[Record], root: str | Path) -> Fingerprint:
    """Tells whether two results are of the same files: a hash of relative paths and sizes in bytes, not of pixels.

    Images and labels count; order and the place of `root` do not.
    """
    files = {path for record in records for path in (record.image, record.label) if path}
    lines = sorted(f"{_below(Path(path), Path(root))}\t{stamp(path)[1]}\n" for path in files)
    return Fingerprint(len(records), hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest())


def _below(path: Path, root: Path) -> str:
    path, root = path.absolute(), root.absolute()
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
