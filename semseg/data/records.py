"""Stage 1: from a list file or a pair of folders to records. Opens headers at most, decodes no pixels. No torch."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from semseg.data import store
from semseg.data.geometry import Size
from semseg.data.headers import Header, HeaderError, header_of, open_image
from semseg.data.store import Unused
from semseg.errors import DataError
from semseg.storage.atomic import atomic_write

LOSSY_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".webp", ".avif", ".jp2", ".j2k", ".jpx",
})  # fmt: skip
IMAGE_SUFFIXES = LOSSY_SUFFIXES | {".png", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"}
NOT_READ = frozenset({".heic", ".heif", ".hif"})  # photographs that neither Pillow nor OpenCV reads
# What columns, and values of the column of splits, may be called; case and the signs between the parts do not count.
COLUMNS = {
    "image": (
        "image", "img", "images", "filename", "file_name", "file", "filepath", "file_path", "path", "image_path",
        "img_path", "image_file", "image_filename", "image_name", "img_name", "imagepath", "fpath_img",
    ),
    "mask": (
        "mask", "label", "annotation", "masks", "labels", "annotations", "segmentation", "seg", "segmap", "gt",
        "ground_truth", "target", "mask_path", "mask_file", "mask_filename", "mask_name", "maskpath", "label_path",
        "label_file", "label_filename", "label_name", "annotation_path", "annotation_file", "seg_path",
        "segmentation_path", "segmentation_mask", "gt_path", "fpath_segm",
    ),
    "split": ("split", "set", "subset", "partition", "phase", "usage", "dataset", "stage"),
}  # fmt: skip
SPLIT_NAMES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "validation", "valid", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
SEPARATORS = (",", ";", "\t")


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
    null. Sizes are trusted here and checked when the file is read. Blank lines, lines that begin with #, a
    byte order mark and CRLF are fine; an image listed twice counts twice.

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
        if line.strip() and not line.lstrip().startswith(b"#"):
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


def _inside(entry: Mapping[str, object], key: str, base: str, where: str) -> str:
    value = entry[key]
    if not isinstance(value, str) or not value or "\0" in value or not store.is_utf8(value):
        raise DataError(f"{where}: {key} must be a path, got {value!r}.")
    path = _joined(base, value)
    if "\\" in value and not (_is_below(path, base) and store.is_file(path)):
        path = _joined(base, value.replace("\\", "/"))  # written on Windows
    if not (_is_below(path, base) or _is_below(os.path.realpath(path), os.path.realpath(base))):
        raise DataError(f"{where}: {key} {value!r} leaves the data folder {base}. Set data.root to a folder above it.")
    return store.existing(path)


def _joined(base: str, path: str) -> str:
    return os.path.normpath(os.path.join(base, path))  # noqa: PTH118 (pathlib costs seconds on long lists)


def _is_below(path: str, base: str) -> bool:
    return path.startswith(base.rstrip(os.sep) + os.sep)


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
    `split` says for each row which split it belongs to; rows of others than `split` are passed over. Columns, keys and
    splits may be spelled as in `COLUMNS` and `SPLIT_NAMES`; a CSV file may be separated by any of `SEPARATORS`. Lines
    that begin with # are comments. Sizes come from the headers, as in `records_from_folders`.

    Raises:
        DataError: as `records_from_odgt`.
    """
    list_file, root = Path(list_file), Path(root)
    _require(store.is_folder(root), "data folder", root, hint)
    _require(store.is_file(list_file), "list of images", list_file, hint)
    base = os.path.normpath(root.absolute())
    pairs: list[tuple[str, str | None, str]] = []
    others: Counter[str] = Counter()
    for number, row in _rows(list_file, problems):
        where = f"{list_file}:{number}"
        with _collected(problems):
            own = _split_of(row.get("split"), where)
            if own not in ("", split):
                others[own] += 1
                continue
            label = _inside(row, "mask", base, where) if row.get("mask") else None
            pairs.append((_inside(row, "image", base, where), label, where))
    if not pairs and not problems:
        found = "".join(f" It has {count} of {name}." for name, count in others.items())
        raise DataError(f"{list_file}: the list names no image of {split}.{found}{_sentence(hint)}")
    headers = _headers([image for image, _, _ in pairs], root, cache_dir, problems)
    turned = [label for image, label, _ in pairs if image in headers and label and _is_turned(headers[image])]
    mask_headers = _headers(turned, root, cache_dir, problems)
    return [
        _record(image, label, where, headers[image], mask_headers.get(label or ""))
        for image, label, where in pairs
        if image in headers
    ]


def _split_of(value: object, where: str) -> str:
    """The split that a row states; empty if it states none.

    Raises:
        DataError: if there is no such split.
    """
    name = "" if value is None else str(value).strip()
    split = split_named(name)
    if name and not split:
        allowed = "; ".join(f"{split}: {', '.join(spellings)}" for split, spellings in SPLIT_NAMES.items())
        raise DataError(f"{where}: there is no split {value!r}. Allowed spellings: {allowed}.")
    return split


def split_named(name: str) -> str:
    """The split that a name means, whatever its case; empty if it means none.

    >>> split_named("Validation")
    'val'
    """
    return next((split for split, spellings in SPLIT_NAMES.items() if name.strip().lower() in spellings), "")


def _rows(list_file: Path, problems: list[str] | None) -> Iterator[tuple[int, dict[str, object]]]:
    """Line numbers and rows of a CSV or JSON-lines file, with keys as in COLUMNS."""
    try:
        text = store.read_text(list_file)
    except UnicodeDecodeError as error:
        raise DataError(f"{list_file}: not UTF-8 text (byte {error.start}). Save the list as UTF-8.") from None
    if list_file.suffix.lower() == ".jsonl":
        for number, line in enumerate(io.StringIO(text), start=1):
            with _collected(problems):
                if line.strip() and not line.lstrip().startswith("#"):
                    yield number, _json_row(line, f"{list_file}:{number}")
        return
    # Comments become blank lines, so that lines keep their numbers.
    lines = ["\n" if line.startswith(("#", "sep=")) else line for line in io.StringIO(text)]
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    header = lines[first] if lines else ""
    columns: dict[str, str] = {}
    for separator in SEPARATORS:
        columns = _columns(next(csv.reader([header], delimiter=separator, skipinitialspace=True), []), list_file)
        if {"image", "mask"} <= set(columns):
            break
    else:
        raise DataError(
            f"{list_file}:{first + 1}: columns image and mask are needed; found {header.strip()!r}. Allowed spellings: "
            f"{', '.join(COLUMNS['image'])}; {', '.join(COLUMNS['mask'])}."
        )
    rows = csv.DictReader(lines[first:], delimiter=separator, skipinitialspace=True)
    for row in rows:
        number = rows.line_num + first
        with _collected(problems):
            if any(row.get(None) or ()):  # pyright: ignore[reportCallIssue, reportArgumentType] - what has no column
                raise DataError(f"{list_file}:{number}: more values than columns. Quote names that hold {separator!r}.")
            yield number, {name: (row[column] or "").strip() for name, column in columns.items()}


def _columns(names: Sequence[str], where: object) -> dict[str, str]:
    """ "image", "mask", "split" -> the name that a list has for it; those that are missing are left out.

    Raises:
        DataError: if two names stand for the same column, and neither is spelled as here.
    """
    found: dict[str, str] = {}
    plain = {name: "_".join(name.strip().lower().replace("-", " ").replace("_", " ").split()) for name in names}
    for column, spellings in COLUMNS.items():
        fitting = [name for name in names if plain[name] in spellings]
        exact = [name for name in fitting if plain[name] == column]
        if len(exact or fitting) > 1:
            raise DataError(f"{where}: {' and '.join(fitting)} may both be the {column}. Call one of them {column}.")
        if fitting:
            found[column] = (exact or fitting)[0]
    return found


def _json_row(line: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not one JSON object ({error.msg}, column {error.colno}).") from None
    columns = _columns([key for key in row if isinstance(key, str)], where) if isinstance(row, dict) else {}
    if "image" not in columns:
        raise DataError(f'{where}: a line must be an object like {{"image": "a.jpg", "mask": "a.png"}}.')
    return {name: row[key] for name, key in columns.items()}


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
    unused: Unused | None = None,
) -> list[Record]:
    """Records of all images below a folder, each with the mask of the same relative path without suffix.

    `images/a/b.jpg` belongs to `masks/a/b.png`, in whatever Unicode form both names are. Links to folders are followed;
    hidden files are left out. Where both folders are one, or one is in the other, files that end with
    `naming.mask_suffix` are masks and the others images; without suffixes a.png is the mask of a.jpg. Sizes come from
    the file headers; they are remembered in `cache_dir` (default: $XDG_CACHE_HOME/semseg) by path, time and length of
    the file. An image whose EXIF orientation exchanges height and width counts with the size at which it will be read:
    that of its mask, or upright if there are no masks.

    Args:
        naming: how names of images and masks differ, and which are meant; None: they are equal, and all are.
        problems: what is wrong with single files goes here, and they are left out; None: the first one raises.
        unused: takes the files and folders that are neither image nor mask.

    Raises:
        DataError: if a folder is missing or empty, an image has no mask or a mask no image, two files have the same
            stem, or a header cannot be read.
    """
    images, masks = Path(images), None if masks is None else Path(masks)
    _require(store.is_folder(images), "folder of images", images, hint)
    _require(masks is None or store.is_folder(masks), "folder of masks", masks or images, hint)
    naming, unused = naming or Naming(), Unused() if unused is None else unused
    image_paths, mask_paths = _pictures_in(images, masks, naming, unused)
    image_files = _by_stem(image_paths, images, naming.image_suffix, problems, unused)
    if naming.stems is not None:
        image_files = _chosen(image_files, naming.stems, images, problems, unused)
    if not image_files and not problems:
        kinds = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise DataError(
            f"{images}: no image in this folder or below it (looked for {kinds}).{_not_used(unused, images)}"
            f"{_sentence(hint)}"
        )
    if masks is None:
        headers = _headers(list(image_files.values()), images, cache_dir, problems)
        return [Record(path, None, header.upright, str(images), header.orientation) for path, header in headers.items()]
    mask_files = _by_stem(mask_paths, masks, naming.mask_suffix, problems, unused)
    mask_files = _with_stems_of(image_files, mask_files)
    if naming.stems is not None:
        mask_files = {stem: path for stem, path in mask_files.items() if stem in image_files}
    if problems is None:
        _require_pairs(images, image_files, masks, mask_files, unused)
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


def _chosen(
    files: dict[str, str], stems_file: Path, folder: Path, problems: list[str] | None, unused: Unused
) -> dict[str, str]:
    """The files that a list of stems names, in its order; a suffix and Windows' backslashes do not matter."""
    _require(store.is_file(stems_file), "list of stems", stems_file, "")
    forms = {unicodedata.normalize("NFC", stem): stem for stem in files}
    found = {}
    for number, line in enumerate(io.StringIO(store.read_text(stems_file)), start=1):
        stem = line.strip()
        names = (stem, stem.replace("\\", "/"), os.path.splitext(stem.replace("\\", "/"))[0])  # noqa: PTH122
        known = (forms.get(unicodedata.normalize("NFC", name)) for name in names)
        meant = next((name for name in known if name is not None), None)
        if meant is None and (not stem or stem.startswith("#")):
            continue
        with _collected(problems):
            if meant is None:
                raise DataError(f"{stems_file}:{number}: there is no image {stem} below {folder}.")
            found[meant] = files[meant]
    for stem in files.keys() - found.keys():
        unused.add(f"not in {stems_file.name}", files[stem])
    return found


def _pictures_in(images: Path, masks: Path | None, naming: Naming, unused: Unused) -> tuple[list[Path], list[Path]]:
    """The files that may be images, and those that may be masks; no file is both."""
    found = _pictures_below(images, unused)
    if masks is None:
        return found, []
    above, below = os.path.realpath(images), os.path.realpath(masks)
    if above == below:
        photos = {path.with_suffix("") for path in found if path.suffix.lower() in LOSSY_SUFFIXES}
        of_masks = {path for path in found if _is_mask(path, naming, is_beside_photo=path.with_suffix("") in photos)}
        return [path for path in found if path not in of_masks], [path for path in found if path in of_masks]
    if _is_below(below, above):
        found = [path for path in found if not _is_below(os.path.realpath(path.parent) + os.sep, below)]
    masks_found = _pictures_below(masks, unused)
    if _is_below(above, below):
        masks_found = [path for path in masks_found if not _is_below(os.path.realpath(path.parent) + os.sep, above)]
    return found, masks_found


def _pictures_below(folder: Path, unused: Unused) -> list[Path]:
    """Files with the suffix of an image at any depth, sorted."""
    found = []
    for path in store.files_below(folder, unused):
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            found.append(path)
        elif suffix in NOT_READ:
            unused.add(f"{suffix}, which is not read: save as JPEG or PNG", path)
        else:
            unused.add(suffix or "without suffix", path)
    return found


def _is_mask(path: Path, naming: Naming, *, is_beside_photo: bool) -> bool:
    """Whether a file in a folder of both is a mask; a photo: of a lossy format, with the same stem."""
    if naming.image_suffix != naming.mask_suffix:
        ends = {True: naming.mask_suffix, False: naming.image_suffix}
        fitting = [is_mask for is_mask, end in ends.items() if path.stem.endswith(end)]
        return max(fitting, key=lambda is_mask: len(ends[is_mask]), default=False)
    if path.suffix.lower() == ".png":
        return True
    return path.suffix.lower() not in LOSSY_SUFFIXES and is_beside_photo


def _by_stem(
    paths: Sequence[Path], folder: Path, suffix: str, problems: list[str] | None, unused: Unused
) -> dict[str, str]:
    """Files whose stem ends with `suffix`: path below `folder` without suffixes (with /) -> path."""
    found: dict[str, str] = {}
    for path in paths:
        if not path.stem.endswith(suffix):
            unused.add(f"with a name that does not end in {suffix}", path)
            continue
        stem = path.relative_to(folder).with_suffix("").as_posix().removesuffix(suffix)
        with _collected(problems):
            if stem in found:
                raise DataError(
                    f"{path} and {found[stem]} differ in their suffix only: which one is meant? Remove one."
                )
            found[stem] = str(path)
    return found


def _with_stems_of(image_files: dict[str, str], mask_files: dict[str, str]) -> dict[str, str]:
    """Masks under the stems of their images where both differ in the Unicode form of their letters alone."""
    alone = (stem for stem in image_files if not stem.isascii() and stem not in mask_files)
    forms = {unicodedata.normalize("NFC", stem): stem for stem in alone}
    found: dict[str, str] = {}
    for stem, path in mask_files.items():
        meant = stem if stem in image_files else forms.pop(unicodedata.normalize("NFC", stem), stem)
        found[meant] = path
    return found


def _require_pairs(
    images: Path, image_files: dict[str, str], masks: Path, mask_files: dict[str, str], unused: Unused
) -> None:
    without_mask = [stem for stem in image_files if stem not in mask_files]
    without_image = [stem for stem in mask_files if stem not in image_files]
    if not without_mask and not without_image:
        return
    raise DataError(
        f"{len(without_mask)} of {len(image_files)} images in {images} have no mask{_first(without_mask)}; "
        f"{len(without_image)} of {len(mask_files)} masks in {masks} have no image{_first(without_image)}. "
        f"A pair has the same path below its folder, suffix apart (a/b.jpg and a/b.png).{_not_used(unused, images)}"
    )


def _not_used(unused: Unused, folder: Path) -> str:
    return f" Not used: {unused.words(folder.parent)}." if unused.count else ""


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
            for path, waiting in [(path, pool.submit(read_record_header, path)) for path in to_read]:
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


def read_record_header(path: str) -> Header:
    """Size and orientation of one image, from its header alone; much faster than reading it.

    Raises:
        DataError: if there is no such file, or its header cannot be read.
    """
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
        with atomic_write(cache, durable=False) as temporary:
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
        raise DataError(
            f"{what} not found: {path} (looked at {path.absolute()}).{_what_is_there(path)}{_sentence(hint)}"
        )


def _what_is_there(path: Path) -> str:
    """A sentence about the nearest folder above a path that is missing: what it holds instead."""
    above = next(
        (parent for parent in path.absolute().parents if os.path.lexists(parent) or store.is_folder(parent)), None
    )
    if above is None or above == above.parent:
        return ""
    if not store.is_folder(above):
        return f" {above} is a file; of archives, only whole .zip files are read in place."
    unused = Unused()
    names = store.names_in(above, unused)
    told = f" In {above} there are: {', '.join(names[:8])}{', ...' if names[8:] else ''}." if names else ""
    return told + (f" Not used: {unused.words()}." if unused.count else "")


def _sentence(hint: str) -> str:
    return f" {hint}" if hint else ""
