"""Files from the network: fetched and verified by pooch, and kept in a cache folder. No torch.

A file that has its plain name in the cache is complete and verified. Beside a file <name> there may be <name>.sha256
(the digest of the first download, which `sha256sum -c` reads), <name>.lock (one process downloads, the others wait),
and <name>.part with <name>.part.json (an incomplete download, see transfer.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import pooch
from filelock import FileLock, Timeout

from semseg.config.schema import DownloadConfig
from semseg.errors import ConfigError, DownloadError
from semseg.storage.atomic import atomic_write, make_folder
from semseg.storage.cache import default_cache_folder
from semseg.storage.ranks import print_once
from semseg.storage.transfer import RefusedError, download_file, hide_secrets, is_http, source_path

# SHA-1 and MD5 are what publishers of old files give. A SHA-256 may be abbreviated, as torchvision does in file names.
DIGEST = re.compile(r"sha256:[0-9a-f]{8,64}|sha1:[0-9a-f]{40}|md5:[0-9a-f]{32}")
SHA256_LENGTH = len("sha256:") + 64


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
    digest = digest.lower()
    if digest and not DIGEST.fullmatch(digest):
        raise ConfigError(
            f"digest {digest!r}: must be sha256:<8 to 64 hex digits>, sha1:<40 hex digits> or md5:<32 hex digits>."
        )
    target = cache_folder(config) / folder / parse_file_name(url)
    by_hand = f"Download it by hand from {hide_secrets(url)} to {target}{', ' if manual else ''}{manual}."
    try:
        if target.exists():
            return verify_cached_file(target, digest)
        if config.offline:
            raise DownloadError(f"{target}: not in the cache, and download.offline=true. {by_hand}")
        make_folder(target.parent)
        with lock_download(target):
            if target.exists():  # another process has just downloaded it
                return verify_cached_file(target, digest)
            return download_to_cache(list_addresses(url, config.mirrors), target, config, digest, by_hand)
    except OSError as error:
        raise DownloadError(f"{target}: {error.strerror or error}. Set download.cache to another folder.") from error


def cache_folder(config: DownloadConfig) -> Path:
    """Where downloaded files are kept: download.cache, or else `default_cache_folder`."""
    return Path(config.cache).expanduser() if config.cache else default_cache_folder()


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


def verify_cached_file(target: Path, digest: str) -> Path:
    """`target`, a file of the cache, if it has this digest, or the recorded one if none is given.

    pooch would replace a file with another digest, but it may be the user's own.

    Raises:
        DownloadError: if it has another digest; the file is left as it is.
        OSError: if it cannot be read.
    """
    known = digest or read_recorded_digest(target)
    if not known:
        record_first_digest(target)
    elif mismatch := find_mismatch(target, known):
        raise DownloadError(f"{target}: {mismatch}{describe_record(target, digest)}. Remove it to download it again.")
    return target


def find_mismatch(path: Path, digest: str) -> str:
    """How the digest of a file differs from `digest`; empty if it does not, or none is given."""
    algorithm, _, digits = digest.partition(":")
    found = pooch.file_hash(path, algorithm) if digest else ""
    return "" if found.startswith(digits) else f"its {algorithm} is {found}, but should be {digits}"


def record_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def describe_record(target: Path, digest: str) -> str:
    """Where an expected digest comes from that is not `digest`, for messages."""
    record = record_path(target)
    return "" if digest else f" according to {record} (remove that file too if {target.name} was supposed to change)"


def read_recorded_digest(target: Path) -> str:
    """The digest that an earlier download of `target`, or `sha256sum`, recorded beside it; empty if there is none.

    Raises:
        DownloadError: if the record is damaged.
    """
    record = record_path(target)
    if not record.exists():
        return ""
    match = re.match(r"([0-9a-f]{64})\s", record.read_text(encoding="utf-8", errors="replace"))
    if match is None:
        raise DownloadError(f"{record}: contains no SHA-256 in the format of sha256sum. Remove this file.")
    return f"sha256:{match[1]}"


def record_first_digest(target: Path) -> None:
    """Print and record the SHA-256 of a file for which no digest is known."""
    digest = pooch.file_hash(target)
    with suppress(OSError):  # a read-only cache, shared by many users, is fine
        with atomic_write(record_path(target)) as temporary:
            temporary.write_text(f"{digest}  {target.name}\n", encoding="utf-8")
        print_once(f"{target}: no digest is known for this file; its SHA-256 is recorded: {digest}")


def download_to_cache(urls: list[str], target: Path, config: DownloadConfig, digest: str, by_hand: str) -> Path:
    """Create `target` from the first of `urls` that provides it.

    Raises:
        DownloadError: if none does; nothing is left at `target` then.
        OSError: if a file cannot be written.
    """
    known = digest or read_recorded_digest(target)  # of an earlier download
    prefix = known if known.startswith("sha256:") and len(known) < SHA256_LENGTH else ""  # pooch needs all digits
    pooch.get_logger().setLevel("WARNING")  # its lines repeat ours
    failures = []
    for url in urls:
        print_once(f"downloading {hide_secrets(url)} to {target}")
        # As Any, because pooch's type for a downloader has the arguments of a processor.
        downloader: Any = partial(download_for_pooch, target=target, config=config, prefix=prefix)
        try:
            pooch.retrieve(url, known.removeprefix(prefix) or None, target.name, target.parent, downloader=downloader)
        except RefusedError as error:
            failures.append(f"{hide_secrets(url)}: {error}")
            continue
        except ValueError as error:  # another digest; pooch has removed the file
            failures.append(f"{hide_secrets(url)}: {error}{describe_record(target, digest)}")
            continue
        if known:
            print_once(f"{target}: {target.stat().st_size:,} bytes")
        else:
            record_first_digest(target)
        return target
    raise DownloadError(f"{target.name} could not be downloaded. {'; '.join(failures)}.\n{by_hand}")


def download_for_pooch(url: str, output: str, _: object, *, target: Path, config: DownloadConfig, prefix: str) -> None:
    """Write all of `url` to `output`, by way of a part file that an interrupted or killed process leaves for the next.

    Raises:
        RefusedError: if `url` does not provide the file, or its digest does not begin with `prefix`.
    """
    Path(output).unlink()  # the empty file that pooch has made, which a killed process would leave
    part = target.with_name(f"{target.name}.part")
    download_file(url, part, timeout_s=config.timeout_s, retries=config.retries, delay_s=config.delay_s)
    source_path(part).unlink(missing_ok=True)
    if mismatch := find_mismatch(part, prefix):
        part.unlink()
        raise RefusedError(f"{mismatch}; the file was removed")
    part.replace(output)


def lock_download(target: Path) -> AbstractContextManager[object]:
    """Keep other processes from downloading `target` at the same time."""
    lock = FileLock(f"{target}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print_once(f"{target}: another process is downloading it; waiting")
        return lock.acquire()
