"""Every file that comes from the network: fetched, verified, and kept in a cache folder. No torch.

What has a plain name in the cache is whole and verified. Beside a file <name> there may be <name>.sha256 (what it
hashes to, see digest.py), <name>.lock (one process downloads, the others wait), and <name>.part with <name>.part.json
(while it is being fetched, see transfer.py).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from semseg.config.schema import DownloadConfig
from semseg.errors import DownloadError
from semseg.storage.digest import Digest, digests_of, mismatch, parse_digest, recall, remember
from semseg.storage.transfer import (
    PassingError,
    RefusedError,
    is_first_rank,
    is_http,
    receive,
    shown,
    size_of,
    source_of,
)

MAX_DELAY_S = 60.0  # between two attempts


def fetch(url: str, config: DownloadConfig, *, folder: str = "", digest: str = "", manual: str = "") -> Path:
    """The file at `url`, from the cache if it is there; verified either way.

    Safe to call from many processes at once: one downloads, the others wait and use its file. Bytes that arrived before
    a cut or a kill are kept, and the next attempt or call goes on from there.

    Args:
        folder: of the cache, where the file is kept under the name it has in `url`.
        digest: "sha256:<hex>" (8 digits or more will do), "sha1:<hex>" or "md5:<hex>". Empty: none is known; then the
            SHA-256 of the first download is printed and remembered, and any other from then on is an error.
        manual: ends the sentence on how to get the file by hand: "or set ... to a file you have".

    Raises:
        DownloadError: if no address gives the file, its digest is wrong, or the cache cannot be written. The message
            has every address that was tried, what came back, and how to get the file by hand.
        ConfigError: if `digest` is of another form.
    """
    wanted = parse_digest(digest)
    target = cache_folder(config) / folder / file_name(url)
    by_hand = f"Download it by hand from {shown(url)} and put it at {target}{', ' if manual else ''}{manual}."
    try:
        if target.exists():
            return verified(target, wanted)
        if config.offline:
            raise DownloadError(f"{target}: not in the cache, and download.offline=true. {by_hand}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target):
            if target.exists():  # another process has just downloaded it
                return verified(target, wanted)
            return download(addresses(url, config.mirrors), target, config, wanted, by_hand)
    except OSError as error:
        raise DownloadError(
            f"{target}: {error.strerror or error}. download.cache=<folder> names another place."
        ) from error


def cache_folder(config: DownloadConfig) -> Path:
    """Where downloaded files are kept: download.cache, $SEMSEG_CACHE, $XDG_CACHE_HOME/semseg or ~/.cache/semseg."""
    given = config.cache or os.environ.get("SEMSEG_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "semseg"


# ---- addresses


def file_name(url: str) -> str:
    """The last part of the path of `url`.

    Raises:
        DownloadError: if this is no http or https address, or it does not end in a plain file name.

    >>> file_name("https://example.org/weights/resnet50-11ad3fa6.pth?dl=1")
    'resnet50-11ad3fa6.pth'
    """
    if not is_http(url):
        raise DownloadError(f"{shown(url)}: only addresses that begin with http:// or https:// can be downloaded.")
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if not re.fullmatch(r"[^\\:\x00-\x1f]+", name) or name == "..":
        raise DownloadError(f"{shown(url)}: the address does not end in the name of a file.")
    return name


def addresses(url: str, mirrors: Mapping[str, Sequence[str]]) -> list[str]:
    """`url`, then what it is on every mirror whose prefix fits. A prefix may leave out http:// or https://.

    >>> addresses("http://a.org/x/f.zip", {"http://a.org/": ["https://b.org/a/"], "http://c.org/": ["http://d.org/"]})
    ['http://a.org/x/f.zip', 'https://b.org/a/x/f.zip']
    >>> addresses("http://a.org/x/f.zip", {"a.org": ["https://b.org/a"]})
    ['http://a.org/x/f.zip', 'https://b.org/a/x/f.zip']
    """
    found = [url]
    for prefix, replacements in mirrors.items():
        place = url if "://" in prefix else url.partition("://")[2]
        if place.startswith(prefix):
            found += [replacement + place.removeprefix(prefix) for replacement in replacements]
    return list(dict.fromkeys(found))


# ---- the cached file


def verified(target: Path, wanted: Digest | None) -> Path:
    """`target`, a file of the cache, if it still is what it should be. It is read only if it may have changed.

    Raises:
        DownloadError: if not; the file is left as it is.
        OSError: if it cannot be read.
    """
    known = recall(target)
    is_known = known is not None and known.is_current(target) and (wanted is None or wanted.algorithm in known.digests)
    digests = known.digests if known and is_known else digests_of(target, wanted)
    difference = mismatch(digests, wanted or (known and known.first_seen))
    if difference:
        raise DownloadError(f"{target}: {difference}. Remove the file to download it again.")
    if not is_known:
        with suppress(OSError):  # a cache that is shared read-only is fine
            remember(target, digests)
    if known is None and wanted is None:
        tell(trusted(target, digests))
    return target


def trusted(target: Path, digests: dict[str, str]) -> str:
    """What is said of a file that nothing is known about."""
    return f"{target}: no digest is known for this file; its SHA-256 is remembered: {digests['sha256']}"


# ---- one file, from one of several addresses


def download(urls: list[str], target: Path, config: DownloadConfig, wanted: Digest | None, by_hand: str) -> Path:
    """Make `target` from the first of `urls` that gives it.

    Raises:
        DownloadError: if none does; nothing is left at `target` then.
        OSError: if a file cannot be written.
    """
    part = target.with_name(f"{target.name}.part")
    known = recall(target)  # of a file that was here before
    tried = []
    for url in urls:
        tell(f"downloading {shown(url)} to {target}")
        try:
            digests = fill(part, url, config, wanted or (known and known.first_seen))
        except RefusedError as error:
            tried.append(f"{shown(url)}: {error}")
            continue
        publish(part, target, digests)
        tell(f"{target}: {target.stat().st_size:,} bytes" if wanted or known else trusted(target, digests))
        return target
    raise DownloadError("\n  ".join([f"{target.name} could not be downloaded. Tried:", *tried]) + f"\n{by_hand}")


def publish(part: Path, target: Path, digests: dict[str, str]) -> None:
    """Give the whole, verified `part` its name, and remember its digests."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(target)
    source_of(part).unlink(missing_ok=True)
    remember(target, digests)


def fill(part: Path, url: str, config: DownloadConfig, wanted: Digest | None) -> dict[str, str]:
    """Fetch all of `url` into `part`; returns its digests.

    Raises:
        RefusedError: if the address does not give the file; one with a wrong digest is removed.
        OSError: if `part` cannot be written.
    """
    is_pieced = reach_the_end(part, url, config)
    digests = digests_of(part, wanted)
    if is_pieced and mismatch(digests, wanted):  # pieces of an older and a newer file may have met
        part.unlink()
        reach_the_end(part, url, config)
        digests = digests_of(part, wanted)
    difference = mismatch(digests, wanted)
    if difference:
        part.unlink()
        raise RefusedError(f"{difference}; the file was removed")
    return digests


def reach_the_end(part: Path, url: str, config: DownloadConfig) -> bool:
    """Fetch all of `url` into `part`, in as many attempts as get further; returns whether it was pieced together.

    Raises:
        RefusedError: if the address refuses, or attempts in a row fail without getting further.
        OSError: if `part` cannot be written.
    """
    furthest, failures = size_of(part), 0
    while True:
        try:
            return receive(part, url, config.timeout_s)
        except PassingError as error:
            if error.start_over:
                part.unlink(missing_ok=True)
            size = size_of(part)
            failures = 1 if size > furthest else failures + 1
            furthest = max(furthest, size)
            if failures > config.retries:
                raise RefusedError(f"{error} (attempt {failures}, the last)") from error
            delay_s = min(max(config.delay_s * 2 ** (failures - 1), error.wait_s), MAX_DELAY_S)
            tell(f"{shown(url)}: {error}; trying again in {delay_s:g} s")
            time.sleep(delay_s)


# ---- beside it


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other processes from downloading `target` meanwhile."""
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell(f"{target}: another process is downloading it; waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def tell(line: str) -> None:
    """Print a line, whatever the number of processes once."""
    if is_first_rank():
        print(line, flush=True)
