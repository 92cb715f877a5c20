"""Record how a result was made: command, configuration, versions, commit, data, device. No torch.

The card holds no secrets: nothing is read from the environment, and the values of keys whose names look like a
secret are masked.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from semseg import __version__
from semseg.config.origin import WeightsOrigin
from semseg.data.records import Record
from semseg.data.store import file_stamp

RUN_CARD_PACKAGES = ("torch", "torchvision", "pytorch-lightning")
# Whole words, so that the class keyboard and num_key_value_heads of a network are none.
SECRET_KEY = re.compile(
    r"(^|[._-])((api|access|private|secret|auth)_?)?(key|token|secret|passw(or)?d|credentials?)s?$", re.IGNORECASE
)
SECRET_ENTRY = re.compile(r"""(?P<key>["']?[\w.-]+["']?)\s*:\s*(?P<value>"[^"]*"|'[^']*'|[^,{}\[\]]+|[\[{].*)""")
LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
MASK = "***"
NO_CHECKOUT = "not a git checkout"
GIT_SECONDS = 20


class Fingerprint(NamedTuple):
    """Identifies the files of a split."""

    images: int
    sha256: str  # 64 hexadecimal digits


class RunCard(NamedTuple):
    """Everything needed to repeat a run."""

    command: str  # one line for a shell
    config: str  # YAML
    versions: dict[str, str]
    git: str
    device: str
    date: str  # local time
    data: Fingerprint | None
    weights: str = ""  # where the weights come from that the network started from, and their licence; empty: unknown


def build_run_card(
    config: dict[str, Any],
    command: Sequence[str],
    device: str,
    data: Fingerprint | None = None,
    origins: Iterable[WeightsOrigin | None] = (),
) -> RunCard:
    """Build the card of the run in this process.

    Args:
        config: the configuration of the run as plain data.
        command: the arguments of the command line: ["python", "run.py", "mode=eval", ...].
        device: its name, such as "cpu" or the name of a GPU.
        origins: of the weights that the network, or the networks of an ensemble, started from.
    """
    return RunCard(
        command=shlex.join(mask_argument(argument) for argument in command),
        config=OmegaConf.to_yaml(OmegaConf.create(mask_secrets(config))),
        versions=collect_versions(),
        git=describe_own_git_state(),
        device=device,
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z"),
        data=data,
        weights=LOGIN_IN_URL.sub(MASK, "; ".join(dict.fromkeys(str(origin) for origin in origins if origin))),
    )


def mask_secrets(node: Any) -> Any:
    """Replace values whose key looks like a secret, and logins in URLs, by *** in nested dicts and lists.

    >>> mask_secrets({"api_key": "abc", "lr": 0.1})
    {'api_key': '***', 'lr': 0.1}
    """
    if isinstance(node, dict):
        return {key: MASK if SECRET_KEY.search(str(key)) else mask_secrets(value) for key, value in node.items()}
    if isinstance(node, list):
        return [mask_secrets(value) for value in node]
    return LOGIN_IN_URL.sub(MASK, node) if isinstance(node, str) else node


def mask_argument(argument: str) -> str:
    """Mask the value of a command-line argument as `mask_secrets` does.

    >>> mask_argument("logger.api_key=abc"), mask_argument("logger.x={api_key: abc, class_map: {keyboard: tv}}")
    ('logger.api_key=***', 'logger.x={api_key: ***, class_map: {keyboard: tv}}')
    """
    key, equals, value = argument.partition("=")
    if equals and SECRET_KEY.search(key):
        return f"{key}={MASK}"
    if "{" in value:
        value = SECRET_ENTRY.sub(_mask_entry, value)
    return LOGIN_IN_URL.sub(MASK, f"{key}{equals}{value}")


def _mask_entry(entry: re.Match[str]) -> str:
    """An entry of a mapping in the grammar of Hydra, with its value masked if its key looks like a secret."""
    if SECRET_KEY.search(entry["key"].strip("\"'")):
        return f"{entry['key']}: {MASK}"
    if entry["value"][0] in "[{":  # its entries
        return f"{entry['key']}: {SECRET_ENTRY.sub(_mask_entry, entry['value'])}"
    return entry[0]


def collect_versions() -> dict[str, str]:
    """Return the versions of Python, of this package, and of the packages that it computes with."""
    installed = {name: _installed_version(name) for name in RUN_CARD_PACKAGES}
    return {"semseg": __version__, "python": platform.python_version(), **installed}


def _installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@cache
def describe_own_git_state() -> str:
    """The state of this package when the process first asked: what it has imported, whatever changes since."""
    return describe_git_state(Path(__file__).resolve().parent.parent / "__init__.py")


def describe_git_state(file: Path) -> str:
    """Name the commit of the checkout that tracks `file`, and the number of its files changed since."""
    # A package that is installed inside another project's checkout is not tracked by it, and must not name its commit.
    if _run_git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return NO_CHECKOUT
    commit = _run_git(file.parent, "rev-parse", "HEAD")
    changes = _run_git(file.parent, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return NO_CHECKOUT
    num_changed = len(changes.splitlines())
    return f"{commit}, files changed since: {num_changed}" if num_changed else f"{commit}, nothing changed since"


def _run_git(folder: Path, *arguments: str) -> str | None:
    """Return the output of git, or None if it is missing or fails."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(  # noqa: S603 - fixed arguments
            command, capture_output=True, text=True, timeout=GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def compute_data_fingerprint(records: Sequence[Record], root: str | Path) -> Fingerprint:
    """Hash the relative paths and sizes in bytes of images and labels: equal for results of the same files.

    The pixels, the order of the records and the location of `root` do not change it.
    """
    files = {path for record in records for path in (record.image, record.label) if path}
    lines = sorted(f"{_relative_path(Path(path), Path(root))}\t{file_stamp(path)[1]}\n" for path in files)
    return Fingerprint(len(records), hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest())


def _relative_path(path: Path, root: Path) -> str:
    path, root = path.absolute(), root.absolute()
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
