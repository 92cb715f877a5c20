"""What a file hashes to: given by whoever publishes it, or remembered beside it from the first time. No torch.

The note beside a file <name> is <name>.sha256, as `sha256sum` writes it, so that `sha256sum -c` reads it. A comment in
it says in which state the file was hashed, so that it is read again only if it may have changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from semseg.errors import ConfigError, DownloadError
from semseg.storage.atomic import atomic_write

HEX_DIGITS = {"sha256": 64, "sha1": 40, "md5": 32}
MIN_PREFIX = 8  # hex digits of a SHA-256 that tell a file: as many as torchvision puts into file names
BLOCK = 1 << 20  # bytes


class Digest(NamedTuple):
    """What a file should hash to."""

    algorithm: str  # a key of HEX_DIGITS
    hex: str  # lower case; of a SHA-256 maybe its beginning only
    origin: str = "but should be"  # begins the sentence that ends with `hex`


def parse_digest(text: str) -> Digest | None:
    """The digest that "sha256:<hex>" (or its first 8 digits or more), "sha1:<hex>" or "md5:<hex>" means; None for "".

    Raises:
        ConfigError: if it is of another form.

    >>> parse_digest("sha256:11AD3FA6")
    Digest(algorithm='sha256', hex='11ad3fa6', origin='but should be')
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


def digests_of(path: Path, wanted: Digest | None = None) -> dict[str, str]:
    """The SHA-256 of a file, and what `wanted` asks for, in hex by algorithm; the file is read once."""
    algorithms = {"sha256", wanted.algorithm} if wanted else {"sha256"}
    # SHA-1 and MD5 are what publishers of old files give; they guard against damage, not against forgery.
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            for value in hashes.values():
                value.update(block)
    return {name: value.hexdigest() for name, value in hashes.items()}


def mismatch(digests: dict[str, str], wanted: Digest | None) -> str:
    """How a file differs from what was wanted, with both digests; empty if it does not."""
    if wanted is None or digests[wanted.algorithm].startswith(wanted.hex):
        return ""
    return f"its {wanted.algorithm} is {digests[wanted.algorithm]}, {wanted.origin} {wanted.hex}"


# ---- remembered


class Remembered(NamedTuple):
    """What is known of a file from the last time it was read in full."""

    digests: dict[str, str]  # hex by algorithm; has "sha256"
    size: int  # bytes
    mtime_ns: int
    note: Path

    def is_current(self, path: Path) -> bool:
        """Whether the file has not been written since."""
        status = path.stat()
        return (self.size, self.mtime_ns) == (status.st_size, status.st_mtime_ns)

    @property
    def first_seen(self) -> Digest:
        """What the file should hash to if nobody else says so."""
        return Digest(
            "sha256", self.digests["sha256"], f"but by {self.note} (remove it if the file was meant to change) it was"
        )


def note_of(path: Path) -> Path:
    """Where the digest of a file is remembered."""
    return path.with_name(f"{path.name}.sha256")


def remember(path: Path, digests: dict[str, str]) -> None:
    """Note the digests of a file and the state it has them in."""
    status = path.stat()
    facts = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "digests": digests}
    with atomic_write(note_of(path)) as temporary:
        temporary.write_text(f"{digests['sha256']}  {path.name}\n# {json.dumps(facts)}\n", encoding="utf-8")


def recall(path: Path) -> Remembered | None:
    """What `remember` or `sha256sum` has noted about a file, which need not be there any more; None if nothing.

    Raises:
        DownloadError: if the note is damaged.
    """
    note = note_of(path)
    if not note.exists():
        return None
    content = note.read_text(encoding="utf-8", errors="replace")
    line = re.match(r"([0-9a-f]{64})\s", content)
    if line is None:
        raise DownloadError(f"{note}: holds no SHA-256 as sha256sum writes it. Remove this note.")
    _, _, comment = content.partition("\n# ")
    try:
        facts = json.loads(comment)
        return Remembered({**facts["digests"], "sha256": line[1]}, facts["size"], facts["mtime_ns"], note)
    except (ValueError, KeyError, TypeError):  # no comment of ours: the file will be read again
        return Remembered({"sha256": line[1]}, -1, -1, note)
