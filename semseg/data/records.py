"""Stage 1: from a list file or a pair of folders to records. Opens headers at most, decodes no pixels. No torch."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from semseg.data import store
from semseg.data.geometry import Size
from semseg.data.headers import Header, HeaderError, header_of, open_image
from semseg.errors import DataError
from semseg.files import replacing

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


class Record(NamedTuple):
    """One image of a data set and what is known of it without decoding."""

    image: str  # path
    label: str | None  # path; None: nothing to score against
    size: Size  # as it will be read; from the list, or from the file header
    origin: str  # where the record comes from, for error messages: "train.odgt:12" or a folder
    orientation: int = 1  # EXIF's of the image, 1..8, where its header was read
    is_upright: bool = False  # the label lies on the upright picture, where its size fits the stored one too


# ---- from a list


def records_from_odgt(
    list_file: str | Path, root: str | Path, *, hint: str = "", problems: list[str] | None = None
) -> list[Record]:
    """Records of an odgt list: one JSON object a line with fpath_img, fpath_segm, width, height.

    Paths are relative to `root` and stay inside it; absolute ones are taken if they lie inside. fpath_segm may be
    null. Sizes are trusted here and checked when the file is read. Blank lines, a byte order mark and CRLF are fine; an
    image listed twice counts twice.

    Args:
        hint: ends the sentence about missing data: the command or page that gets it.
        problems: what is wrong with single lines goes here, and they are left out; None: the first one raises.

    Raises:
        DataError: if the root or the list is missing, the list is empty, or a line does not fit ("file:line: ...").
    """
    list_file, root = Path(list_file), Path(root)
    _require(store.is_folder(root), "data folder", root, hint)
    _require(store.is_file(list_file), "list of images", list_file, hint)
    base = os.path.normpath(root.absolute())
    records = []
    for number, line in enumerate(store.read_file(list_file).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            with _collected(problems):
                records.append(_parse_line(line, base, f"{list_file}:{number}"))
    if not records and not problems:
        raise DataError(f"{list_file}: the list names no image.{_sentence(hint)}")
    return records


def _parse_line(line: bytes, base: str, where: str) -> Record:
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: the line is not UTF-8 text (byte {error.start}). Save the list as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not one JSON object ({error.msg}, column {error.colno}). Each line is an object of its own, "
            'without a comma after it: {"fpath_img": "a.jpg", "fpath_segm": "a.png", "width": 640, "height": 480}.'
        ) from None
    if not isinstance(entry, dict):
        raise DataError(f"{where}: a line must be a JSON object, this is a {type(entry).__name__}.")
    missing = [key for key in ("fpath_img", "fpath_segm", "width", "height") if key not in entry]
    if missing:
        raise DataError(f"{where}: key {', '.join(missing)} is missing; found {', '.join(entry) or 'none'}.")
    size = Size(_length(entry, "height", where), _length(entry, "width", where))
    label = None if entry["fpath_segm"] is None else _inside(entry, "fpath_segm", base, where)
    return Record(_inside(entry, "fpath_img", base, where), label, size, where)


def _length(entry: dict[str, object], key: str, where: str) -> int:
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(f"{where}: {key} must be a whole number of pixels above 0, got {value!r}.")
    return value


def _inside(entry: dict[str, object], key: str, base: str, where: str) -> str:
    value = entry[key]
    if not isinstance(value, str) or not value or "\0" in value:
        raise DataError(f"{where}: {key} must be a path, got {value!r}.")
    path = os.path.normpath(os.path.join(base, value))  # noqa: PTH118 (pathlib costs seconds on long lists)
    if not path.startswith(base.rstrip(os.sep) + os.sep):
        raise DataError(f"{where}: {key} {value!r} leaves the data folder {base}. Set data.root to a folder above it.")
    return path


def records_from_table(
    list_file: str | Path,
    root: str | Path,
    split: str,
    *,
    hint: str = "",
    cache_dir: str | Path | None = None,
    problems: list[str] | None = None,
) -> list[Record]:
    """Records of a CSV file with columns image and mask, or a file with a JSON object {"image", "mask"} on each line.

    Paths are relative to `root` and stay inside it; an empty mask means that there is none. A third column, or key,
    `split` says for each row which split it belongs to; rows of others than `split` are passed over. Sizes come from
    the headers, as in `records_from_folders`.

    Raises:
        DataError: as `records_from_odgt`.
    """
    list_file, root = Path(list_file), Path(root)
    _require(store.is_folder(root), "data folder", root, hint)
    _require(store.is_file(list_file), "list of images", list_file, hint)
    base = os.path.normpath(root.absolute())
    pairs: list[tuple[str, str | None, str]] = []
    for number, row in _rows(list_file, problems):
        where = f"{list_file}:{number}"
        if row.get("split") not in (None, "", split):
            continue
        with _collected(problems):
            label = _inside(row, "mask", base, where) if row.get("mask") else None
            pairs.append((_inside(row, "image", base, where), label, where))
    if not pairs and not problems:
        raise DataError(f"{list_file}: the list names no image of {split}.{_sentence(hint)}")
    headers = _headers([image for image, _, _ in pairs], root, cache_dir, problems)
    turned = [label for image, label, _ in pairs if image in headers and label and _is_turned(headers[image])]
    mask_headers = _headers(turned, root, cache_dir, problems)
    return [
        _record(image, label, where, headers[image], mask_headers.get(label or ""))
        for image, label, where in pairs
        if image in headers
    ]


def _rows(list_file: Path, problems: list[str] | None) -> Iterator[tuple[int, dict[str, object]]]:
    """Line numbers and rows of a CSV or JSON-lines file."""
    try:
        text = store.read_text(list_file)
    except UnicodeDecodeError as error:
        raise DataError(f"{list_file}: not UTF-8 text (byte {error.start}). Save the list as UTF-8.") from None
    if list_file.suffix.lower() == ".csv":
        rows = csv.DictReader(text.splitlines())
        if not {"image", "mask"} <= set(rows.fieldnames or ()):
            raise DataError(f"{list_file}:1: columns image and mask are needed; found {rows.fieldnames}.")
        for row in rows:
            yield rows.line_num, {key: value for key, value in row.items() if key is not None}
        return
    for number, line in enumerate(text.splitlines(), start=1):
        with _collected(problems):
            if line.strip():
                yield number, _json_row(line, f"{list_file}:{number}")


def _json_row(line: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not one JSON object ({error.msg}, column {error.colno}).") from None
    if not isinstance(row, dict) or "image" not in row:
        raise DataError(f'{where}: a line must be an object like {{"image": "a.jpg", "mask": "a.png"}}.')
    return row


# ---- from folders


class Naming(NamedTuple):
    """How images and masks are called in a layout."""

    image_suffix: str = ""  # end of an image's stem: _leftImg8bit; others are no images of it
    mask_suffix: str = ""
    stems: Path | None = None  # a text file with a stem on each line; others are not meant


def records_from_folders(
    images: str | Path,
    masks: str | Path | None = None,
    *,
    hint: str = "",
    naming: Naming | None = None,
    cache_dir: str | Path | None = None,
    problems: list[str] | None = None,
) -> list[Record]:
    """Records of all images below a folder, each with the mask of the same relative path without suffix.

    `images/a/b.jpg` belongs to `masks/a/b.png`. Names that begin with a dot are passed over. Sizes come from the file
    headers; they are remembered in `cache_dir` (default: $XDG_CACHE_HOME/semseg) by path, time and length of the
    file. An image whose EXIF orientation exchanges height and width counts with the size at which it will be read:
    that of its mask, or upright if there are no masks.

    Args:
        naming: how names of images and masks differ, and which are meant; None: they are equal, and all are.
        problems: what is wrong with single files goes here, and they are left out; None: the first one raises.

    Raises:
        DataError: if a folder is missing or empty, an image has no mask or a mask no image, two files have the same
            stem, or a header cannot be read.
    """
    images = Path(images)
    _require(store.is_folder(images), "folder of images", images, hint)
    naming = naming or Naming()
    image_files = _by_stem(images, naming.image_suffix, problems)
    if naming.stems is not None:
        image_files = _chosen(image_files, naming.stems, images, problems)
    if not image_files:
        kinds = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise DataError(f"{images}: no image in this folder or below it (looked for {kinds}).{_sentence(hint)}")
    if masks is None:
        headers = _headers(list(image_files.values()), images, cache_dir, problems)
        return [Record(path, None, header.upright, str(images), header.orientation) for path, header in headers.items()]
    masks = Path(masks)
    _require(store.is_folder(masks), "folder of masks", masks, hint)
    mask_files = _by_stem(masks, naming.mask_suffix, problems)
    if naming.stems is not None:
        mask_files = {stem: path for stem, path in mask_files.items() if stem in image_files}
    if problems is None:
        _require_pairs(images, image_files, masks, mask_files)
    else:
        problems += [
            f"{path}: has no mask below {masks}." for stem, path in image_files.items() if stem not in mask_files
        ]
        problems += [
            f"{path}: has no image below {images}." for stem, path in mask_files.items() if stem not in image_files
        ]
    paths = [path for stem, path in image_files.items() if stem in mask_files]
    headers = _headers(paths, images, cache_dir, problems)
    pairs = [(stem, path) for stem, path in image_files.items() if path in headers]
    turned = [mask_files[stem] for stem, path in pairs if _is_turned(headers[path])]
    mask_headers = _headers(turned, masks, cache_dir, problems) if turned else {}
    return [
        _record(path, mask_files[stem], str(images), headers[path], mask_headers.get(mask_files[stem]))
        for stem, path in pairs
    ]


def record_of_image(path: str | Path) -> Record:
    """The record of one image without a label, for prediction; its size is the upright one.

    Raises:
        DataError: if the header cannot be read.
    """
    return Record(str(path), None, _read_header(str(path)).upright, "input")


def _chosen(files: dict[str, str], stems_file: Path, folder: Path, problems: list[str] | None) -> dict[str, str]:
    """The files that a list of stems names, in its order."""
    _require(store.is_file(stems_file), "list of stems", stems_file, "")
    found = {}
    for number, line in enumerate(store.read_text(stems_file).splitlines(), start=1):
        stem = line.strip()
        with _collected(problems):
            if stem and stem not in files:
                raise DataError(f"{stems_file}:{number}: there is no image {stem} below {folder}.")
            found |= {stem: files[stem]} if stem else {}
    return found


def _by_stem(folder: Path, suffix: str, problems: list[str] | None) -> dict[str, str]:
    """Image files below `folder` whose stem ends with `suffix`: relative path without both (with /) -> path, sorted."""
    found: dict[str, str] = {}
    for path in store.files_below(folder):
        parts = path.relative_to(folder)
        if path.suffix.lower() not in IMAGE_SUFFIXES or any(part.startswith(".") for part in parts.parts):
            continue
        if not path.stem.endswith(suffix):
            continue
        stem = parts.with_suffix("").as_posix().removesuffix(suffix)
        with _collected(problems):
            if stem in found:
                raise DataError(
                    f"{path} and {found[stem]} differ in their suffix only: which one is meant? Remove one."
                )
            found[stem] = str(path)
    return found


def _require_pairs(images: Path, image_files: dict[str, str], masks: Path, mask_files: dict[str, str]) -> None:
    without_mask = [stem for stem in image_files if stem not in mask_files]
    without_image = [stem for stem in mask_files if stem not in image_files]
    if not without_mask and not without_image:
        return
    raise DataError(
        f"{len(without_mask)} of {len(image_files)} images in {images} have no mask{_first(without_mask)}; "
        f"{len(without_image)} of {len(mask_files)} masks in {masks} have no image{_first(without_image)}. "
        "A pair has the same path below its folder, suffix apart (a/b.jpg and a/b.png)."
    )


def _first(stems: Sequence[str]) -> str:
    return f" ({', '.join(stems[:3])}{', ...' if len(stems) > 3 else ''})" if stems else ""


def _is_turned(header: Header) -> bool:
    return header.stored != header.upright


def _record(image: str, label: str | None, origin: str, header: Header, mask: Header | None) -> Record:
    """The record of an image, with the size at which it is read with this mask."""
    size = header.upright if mask is not None and mask.upright == header.upright else header.stored
    return Record(image, label, size, origin, header.orientation)


def headers_of(records: Sequence[Record], folder: Path, cache_dir: str | Path | None = None) -> dict[str, Header]:
    """Headers of all images of some records; those that cannot be read are left out, for the reading to name them."""
    return _headers([record.image for record in records], folder, cache_dir, [])


def mask_headers_of(records: Sequence[Record], folder: Path, cache_dir: str | Path | None = None) -> dict[str, Header]:
    """Headers of all masks of some records, in the same way."""
    return _headers([record.label for record in records if record.label], folder, cache_dir, [])


def _headers(
    paths: Sequence[str], folder: Path, cache_dir: str | Path | None, problems: list[str] | None
) -> dict[str, Header]:
    """Headers of image files; only those that are new or changed since the last scan of `folder` are opened."""
    cache = cache_file("sizes", folder, cache_dir)
    known = _load_cache(cache)
    stamps: dict[str, list[int]] = {}
    for path in paths:
        with _collected(problems):
            stamps[path] = _stamp_of(path)
    fresh = {path: known[path] for path in stamps if path in known and known[path][:2] == stamps[path]}
    to_read = [path for path in stamps if path not in fresh]
    if to_read:
        with ThreadPoolExecutor(8) as pool:
            for path, waiting in [(path, pool.submit(_read_header, path)) for path in to_read]:
                with _collected(problems):
                    header = waiting.result()
                    fresh[path] = [*stamps[path], *header.stored, header.orientation]
        save_cache(cache, known | fresh)
    return {path: Header("", Size(*fresh[path][2:4]), fresh[path][4]) for path in paths if path in fresh}


def _stamp_of(path: str) -> list[int]:
    try:
        return store.stamp(path)
    except OSError as error:
        raise DataError(f"{path}: there is no such file ({error.strerror}).") from None


def _read_header(path: str) -> Header:
    try:
        with store.opened(path) as file, open_image(file) as image:
            return header_of(image, file)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except HeaderError as error:
        raise DataError(f"{path}: the header cannot be read as an image: it {error}.") from None
    except OSError as error:
        raise DataError(f"{path}: the header cannot be read as an image ({error}).") from error


def cache_file(kind: str, folder: Path, cache_dir: str | Path | None) -> Path:
    """Where what is known of the files below `folder` is kept; `cache_dir` None: $XDG_CACHE_HOME/semseg or ~/.cache."""
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "semseg"
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return Path(cache_dir) / f"{kind}-{name}.json"


def _load_cache(cache: Path) -> dict[str, list[int]]:
    """path -> [mtime_ns, bytes, height and width as stored, orientation]; empty if it cannot be read."""
    return {path: row for path, row in load_cache(cache).items() if _is_row(row)}


def load_cache(cache: Path) -> dict[str, Any]:
    """The entries of a cache file; none if it cannot be read."""
    try:
        entries = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _is_row(row: object) -> bool:
    return isinstance(row, list) and len(row) == 5 and all(type(number) is int and number > 0 for number in row)


def save_cache(cache: Path, entries: Mapping[str, Any]) -> None:
    """Write a cache file, whole or not at all; nothing happens if it cannot be written."""
    try:
        with replacing(cache, durable=False) as temporary:
            temporary.write_text(json.dumps(entries), encoding="utf-8")
    except OSError:
        return  # a read-only or full home must not stop anyone: the next scan reads the headers again


# ---- both


def split_by_hash(records: Sequence[Record], fraction: float, root: str | Path) -> tuple[list[Record], list[Record]]:
    """Parts records into (kept, held out), about `fraction` of them held out.

    A record's side depends on its path below `root` alone: adding or removing other files does not move it, nor does
    moving the whole data set. Neither side is left empty if there are two records or more.

    Raises:
        ValueError: if fraction is not between 0 and 1.
        DataError: if there are fewer than two records.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be above 0 and below 1, got {fraction}")
    if len(records) < 2:
        raise DataError(f"{root}: {len(records)} image cannot be split into training and validation: add images.")
    places = [_hash_place(os.path.relpath(record.image, root)) for record in records]
    threshold = min(max(fraction, min(places)), max(places) - 2.0**-53)
    kept = [record for record, place in zip(records, places, strict=True) if place > threshold]
    held_out = [record for record, place in zip(records, places, strict=True) if place <= threshold]
    return kept, held_out


def _hash_place(path: str) -> float:
    """A number in [0, 1) that depends on a relative path only."""
    digest = hashlib.sha256(path.replace(os.sep, "/").encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


@contextmanager
def _collected(problems: list[str] | None) -> Iterator[None]:
    """A DataError ends in `problems`, if there is such a list."""
    try:
        yield
    except DataError as error:
        if problems is None:
            raise
        problems.append(str(error))


def _require(is_there: bool, what: str, path: Path, hint: str) -> None:
    if not is_there:
        raise DataError(f"{what} not found: {path} (looked at {path.absolute()}).{_sentence(hint)}")


def _sentence(hint: str) -> str:
    return f" {hint}" if hint else ""
