"""Stage 1: sizes and orientations from image headers, remembered between runs. Decodes no pixels. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from semseg.config.preprocessing import PIXEL_TYPES
from semseg.data import store
from semseg.data.geometry import Size
from semseg.data.headers import Header, HeaderError, header_of, open_image, read_raster_header
from semseg.errors import DataError
from semseg.storage.atomic import atomic_write
from semseg.storage.cache import writable_cache_folder

_NUM_THREADS = 8  # readers of headers


class HeaderScan(NamedTuple):
    """The headers of some image files, by path, and one message for each file whose header cannot be read."""

    headers: dict[str, Header]  # size and orientation only: `kind` is empty
    problems: list[str]


def scan_headers(paths: Sequence[str], folder: Path, cache_dir: str | Path | None = None) -> HeaderScan:
    """Headers of image files. Only files that are new or changed since the last scan of `folder` are opened."""
    cache = cache_file("sizes", folder, cache_dir)
    cached = {path: row for path, row in load_cache(cache).items() if _is_header_row(row)}
    stamps: dict[str, list[int]] = {}
    problems: list[str] = []
    for path in paths:
        try:
            stamps[path] = store.file_stamp(path)
        except OSError as error:
            problems.append(f"{path}: there is no such file ({error.strerror}).")
        except DataError as error:
            problems.append(str(error))
    rows = {path: cached[path] for path in stamps if path in cached and cached[path][:2] == stamps[path]}
    unread = [path for path in stamps if path not in rows]
    if unread:
        pool = ThreadPoolExecutor(_NUM_THREADS)
        try:
            for path, future in [(path, pool.submit(read_header_only, path)) for path in unread]:
                try:
                    header = future.result()
                except DataError as error:
                    problems.append(str(error))
                else:
                    rows[path] = [*stamps[path], *header.stored, header.orientation]
        finally:  # after Ctrl-C too, at once
            pool.shutdown(cancel_futures=True)
            save_cache(cache, cached | rows)
    return HeaderScan({path: _header_from_row(rows[path]) for path in paths if path in rows}, problems)


def readable_headers(paths: Iterable[str], folder: Path) -> dict[str, Header]:
    """The headers that can be read; the others are reported when the images themselves are read."""
    return scan_headers(list(paths), folder).headers


def read_header_only(path: str) -> Header:
    """The header of one image without its pixels, which is much faster than decoding it.

    Raises:
        DataError: if there is no such file, or its header cannot be read.
    """
    try:
        with store.open_file(path) as file:
            raster = read_raster_header(file)
            if raster is not None:
                return raster
            with open_image(file) as image:
                return header_of(image, file)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except HeaderError as error:
        raise DataError(f"{path}: the header cannot be read as an image: it {error}.") from None
    except OSError as error:
        raise DataError(f"{path}: the header cannot be read as an image ({error}).") from error


def find_pixel_type(paths: Iterable[str]) -> str:
    """The type of PIXEL_TYPES that the first readable image holds; empty if none can be read."""
    for path in paths:
        try:
            header = read_header_only(path)
        except DataError:
            continue
        if header.raster is None:
            return "uint16" if header.bits == 16 else "uint8"
        if header.raster.dtype in PIXEL_TYPES:
            return header.raster.dtype
    return ""


def _is_header_row(row: object) -> bool:
    """Whether an entry of the cache is [mtime_ns, bytes, stored height, stored width, orientation]."""
    return isinstance(row, list) and len(row) == 5 and all(type(number) is int and number > 0 for number in row)


def _header_from_row(row: list[int]) -> Header:
    return Header("", Size(*row[2:4]), row[4])


# ---- cache files


def cache_file(kind: str, folder: Path, cache_dir: str | Path | None) -> Path:
    """The file that caches facts about the files below `folder`.

    Args:
        cache_dir: None: `writable_cache_folder`.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return Path(cache_dir or writable_cache_folder()) / f"{kind}-{name}.json"


def load_cache(cache: Path) -> dict[str, Any]:
    """The entries of a cache file; empty if it cannot be read."""
    try:
        entries = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def save_cache(cache: Path, entries: Mapping[str, Any]) -> None:
    """Write a cache file, whole or not at all. A file that cannot be written is skipped."""
    try:
        with atomic_write(cache, durable=False) as temporary:
            temporary.write_text(json.dumps(entries), encoding="utf-8")
    except OSError:
        return  # a read-only or full home directory must not stop a run: the next scan reads the headers again
