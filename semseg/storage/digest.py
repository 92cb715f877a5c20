"""Digests of downloaded files: given by their publisher, or recorded beside them the first time. No torch.

The record of a file <name> is <name>.sha256 in the format of `sha256sum`, so that `sha256sum -c` reads it.
"""

from __future__ import annotations

import hashlib
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

from semseg.errors import ConfigError, DownloadError
from semseg.storage.atomic import atomic_write

HEX_DIGITS = {"sha256": 64, "sha1": 40, "md5": 32}
MIN_PREFIX = 8  # hex digits of a SHA-256 that identify a file: as many as torchvision puts into file names


class Digest(NamedTuple):
    """The digest that a file should have."""

    algorithm: str  # a key of HEX_DIGITS
    hex: str  # lower case; a SHA-256 may be abbreviated to its first digits
    record: Path | None = None  # the file that it was read from; None: the caller gave it

    def find_mismatch(self, path: Path) -> str:
        """How the digest of a file differs from this one; empty if it does not."""
        found = compute_digest(path, self.algorithm)
        if found.startswith(self.hex):
            return ""
        origin = f"by {self.record} (remove it if the file was supposed to change) it " if self.record else ""
        return f"its {self.algorithm} is {found}, but {origin}should be {self.hex}"


def parse_digest(text: str) -> Digest | None:
    """Parse "sha256:<hex>" (or its first 8 digits or more), "sha1:<hex>" or "md5:<hex>"; None for "".

    Raises:
        ConfigError: if it has another form.

    >>> parse_digest("sha256:11AD3FA6")
    Digest(algorithm='sha256', hex='11ad3fa6', record=None)
    """
    if not text:
        return None
    algorithm, _, digits = text.lower().partition(":")
    longest = HEX_DIGITS.get(algorithm, 0)
    shortest = MIN_PREFIX if algorithm == "sha256" else longest
    if not longest or not re.fullmatch(rf"[0-9a-f]{{{shortest},{longest}}}", digits):
        raise ConfigError(
            f"digest {text!r}: must be sha256:<{MIN_PREFIX} to 64 hex digits>, sha1:<40 hex digits> or "
            "md5:<32 hex digits>."
        )
    return Digest(algorithm, digits)


def compute_digest(path: Path, algorithm: str = "sha256") -> str:
    """The digest of a file in hex."""
    # SHA-1 and MD5 are what publishers of old files give; they protect from damage, not from forgery.
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.new, algorithm, usedforsecurity=False)).hexdigest()


def record_path(path: Path) -> Path:
    """The file that records the digest of `path`."""
    return path.with_name(f"{path.name}.sha256")


def record_digest(path: Path) -> str:
    """Record the SHA-256 of a file beside it, and return it."""
    digest = compute_digest(path)
    with atomic_write(record_path(path)) as temporary:
        temporary.write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    return digest


def read_recorded_digest(path: Path) -> Digest | None:
    """What `record_digest` or `sha256sum` recorded about a file, which may have been removed; None if nothing.

    Raises:
        DownloadError: if the record is damaged.
    """
    record = record_path(path)
    if not record.exists():
        return None
    match = re.match(r"([0-9a-f]{64})\s", record.read_text(encoding="utf-8", errors="replace"))
    if match is None:
        raise DownloadError(f"{record}: contains no SHA-256 in the format of sha256sum. Remove this file.")
    return Digest("sha256", match[1], record)
