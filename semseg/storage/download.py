"""Files from the network: fetched, verified, and kept in a cache folder. No torch.

A file that has its plain name in the cache is complete and verified. Beside a file <name> there may be <name>.sha256
(the digest of the first download, see digest.py), <name>.lock (one process downloads, the others wait), and
<name>.part with <name>.part.json (an incomplete download, see transfer.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from semseg.config.schema import DownloadConfig
from semseg.errors import DownloadError
from semseg.storage.atomic import atomic_write
from semseg.storage.digest import Digest, parse_digest, read_recorded_digest, record_digest
from semseg.storage.ranks import print_once
from semseg.storage.transfer import RefusedError, download_file, hide_secrets, is_http, source_path


def fetch_file(url: str, config: DownloadConfig, *, folder: str = "", digest: str = "", manual: str = "") -> Path:
    """The file at `url`, from the cache if it is there; verified either way.

    Many processes may call it at once: one downloads, the others wait and use its file. Bytes that arrived before a cut
    or a kill are kept, and the next attempt or call resumes there.

    Args:
        folder: of the cache, where the file is kept under the name it has in `url`.
        digest: "sha256:<hex>" (8 digits or more are enough), "sha1:<hex>" or "md5:<hex>". Empty: none is known; the
            SHA-256 of the first download is printed and recorded, and any other one is an error from then on.
        manual: ends the sentence on how to get the file by hand: "or set ... to a file you have".

    Raises:
        DownloadError: if no address provides the file, its digest is wrong, or the cache cannot be written. The message
            lists every address that was tried, the answers, and how to get the file by hand.
        ConfigError: if `digest` has another form.
    """
    expected = parse_digest(digest)
    target = cache_folder(config) / folder / parse_file_name(url)
    by_hand = f"Download it by hand from {hide_secrets(url)} to {target}{', ' if manual else ''}{manual}."
    try:
        if target.exists():
            return verify_cached_file(target, expected)
        if config.offline:
            raise DownloadError(f"{target}: not in the cache, and download.offline=true. {by_hand}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock_download(target):
            if target.exists():  # another process has just downloaded it
                return verify_cached_file(target, expected)
            return download_to_cache(list_addresses(url, config.mirrors), target, config, expected, by_hand)
    except OSError as error:
        raise DownloadError(f"{target}: {error.strerror or error}. Set download.cache to another folder.") from error


def cache_folder(config: DownloadConfig) -> Path:
    """Where downloaded files are kept: download.cache, $SEMSEG_CACHE, $XDG_CACHE_HOME/semseg or ~/.cache/semseg."""
    folder = config.cache or os.environ.get("SEMSEG_CACHE")
    return Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "semseg").expanduser()


def parse_file_name(url: str) -> str:
    """The last part of the path of `url`.

    Raises:
        DownloadError: if it is no http or https address, or does not end in a plain file name.

    >>> parse_file_name("https://example.org/weights/resnet50-11ad3fa6.pth?dl=1")
    'resnet50-11ad3fa6.pth'
    """
    if not is_http(url):
        raise DownloadError(f"{hide_secrets(url)}: only http:// and https:// addresses can be downloaded.")
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if not re.fullmatch(r"[^\\:\x00-\x1f]+", name) or name == "..":
        raise DownloadError(f"{hide_secrets(url)}: the address does not end in the name of a file.")
    return name


def list_addresses(url: str, mirrors: Mapping[str, Sequence[str]]) -> list[str]:
    """`url`, then its address on every mirror whose prefix matches. A prefix may omit http:// or https://.

    >>> list_addresses("http://a.org/x/f.zip", {"http://a.org/": ["https://b.org/a/"], "http://c.org/": ["http://d/"]})
    ['http://a.org/x/f.zip', 'https://b.org/a/x/f.zip']
    >>> list_addresses("http://a.org/x/f.zip", {"a.org": ["https://b.org/a"]})
    ['http://a.org/x/f.zip', 'https://b.org/a/x/f.zip']
    """
    addresses = [url]
    for prefix, replacements in mirrors.items():
        location = url if "://" in prefix else url.partition("://")[2]
        if location.startswith(prefix):
            addresses += [replacement + location.removeprefix(prefix) for replacement in replacements]
    return list(dict.fromkeys(addresses))


def verify_cached_file(target: Path, expected: Digest | None) -> Path:
    """`target`, a file of the cache, if it has the expected digest, or the recorded one if none is expected.

    Raises:
        DownloadError: if not; the file is left as it is.
        OSError: if it cannot be read.
    """
    expected = expected or read_recorded_digest(target)
    if expected is None:
        record_first_digest(target)
    elif mismatch := expected.find_mismatch(target):
        raise DownloadError(f"{target}: {mismatch}. Remove the file to download it again.")
    return target


def record_first_digest(target: Path) -> None:
    """Record the digest of a file that nobody has given one for, and print it."""
    try:
        digest = record_digest(target)
    except OSError:  # a read-only cache, shared by many users, is fine
        return
    print_once(f"{target}: no digest is known for this file; its SHA-256 is recorded: {digest}")


def download_to_cache(
    urls: list[str], target: Path, config: DownloadConfig, expected: Digest | None, by_hand: str
) -> Path:
    """Create `target` from the first of `urls` that provides it.

    Raises:
        DownloadError: if none does; nothing is left at `target` then.
        OSError: if a file cannot be written.
    """
    part = target.with_name(f"{target.name}.part")
    expected = expected or read_recorded_digest(target)  # from an earlier download
    failures = []
    for url in urls:
        print_once(f"downloading {hide_secrets(url)} to {target}")
        try:
            download_file(url, part, timeout_s=config.timeout_s, retries=config.retries, delay_s=config.delay_s)
            if expected and (mismatch := expected.find_mismatch(part)):
                part.unlink()
                raise RefusedError(f"{mismatch}; the file was removed")
        except RefusedError as error:
            failures.append(f"{hide_secrets(url)}: {error}")
            continue
        with atomic_write(target) as temporary:
            part.replace(temporary)
        source_path(part).unlink(missing_ok=True)
        if expected:
            print_once(f"{target}: {target.stat().st_size:,} bytes")
        else:
            record_first_digest(target)
        return target
    raise DownloadError("\n  ".join([f"{target.name} could not be downloaded. Tried:", *failures]) + f"\n{by_hand}")


@contextmanager
def lock_download(target: Path) -> Iterator[None]:
    """Keep other processes from downloading `target` at the same time."""
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print_once(f"{target}: another process is downloading it; waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
