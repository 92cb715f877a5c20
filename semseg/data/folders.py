"""Stage 1: records from a folder of images and a folder of masks. Opens headers at most. No torch."""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from semseg.data import store
from semseg.data.header_cache import scan_headers
from semseg.data.records import (
    Problem,
    Record,
    has_swapped_sides,
    hint_sentence,
    is_below,
    record_from_headers,
    require_path,
    separate_problems,
)
from semseg.data.store import UnusedFiles
from semseg.errors import DataError

LOSSY_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".webp", ".avif", ".jp2", ".j2k", ".jpx",
})  # fmt: skip
ARRAY_SUFFIX = ".npy"
IMAGE_SUFFIXES = LOSSY_SUFFIXES | {
    ".png",
    ".bmp",
    ".dib",
    ".tif",
    ".tiff",
    ".gif",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ARRAY_SUFFIX,
}
PREDICTED_IDS = "_ids"  # what mode=predict adds to the stem of an image for its class map
UNREADABLE_SUFFIXES = frozenset({".heic", ".heif", ".hif"})  # photographs that neither Pillow nor OpenCV reads


class Naming(NamedTuple):
    """How images and masks are named in a layout."""

    image_suffix: str = ""  # end of the stem of every image, such as _leftImg8bit; other files are not images
    mask_suffix: str = ""
    stems: Path | None = None  # a text file with one stem per line; other files are not used
    band_suffixes: tuple[str, ...] = ()  # ends of the stems of further files of an image, which hold other bands

    def is_band_file(self, path: Path) -> bool:
        """Whether a file holds further bands of an image that another file stands for."""
        is_main = bool(self.image_suffix) and path.stem.endswith(self.image_suffix)
        return not is_main and path.stem.endswith(self.band_suffixes)


class _FilesByStem(NamedTuple):
    """Files by their path below a folder without suffixes, and files whose stem is taken already."""

    paths: dict[str, str]
    problems: list[Problem]


def read_folder_pairs(
    images: str | Path,
    masks: str | Path | None = None,
    *,
    hint: str = "",
    naming: Naming | None = None,
    cache_dir: str | Path | None = None,
    unused: UnusedFiles | None = None,
) -> Iterator[Record | Problem]:
    """Records of all images below a folder, each with the mask of the same relative path without suffix.

    `images/a/b.jpg` belongs to `masks/a/b.png`, whatever the Unicode form of the names. Links to folders are followed;
    hidden files are skipped. If both folders are the same, or one contains the other, files that end with
    `naming.mask_suffix` are masks and the others images; without suffixes a.png is the mask of a.jpg. Sizes come from
    the file headers, which are cached in `cache_dir` (default: `writable_cache_folder`) by path, time and length of the
    file. If the EXIF orientation of an image exchanges height and width, its size is the one at which it will be read:
    that of its mask, or upright if there are no masks.

    Args:
        naming: how names of images and masks differ, and which are used; None: they are equal, and all are used.
        unused: collects the files and folders that are neither image nor mask.

    Yields:
        A record for each pair, and a problem for each image without mask, mask without image, second file of the same
        stem, stem without image and unreadable header.

    Raises:
        DataError: if a folder is missing or contains no image.
    """
    images, masks = Path(images), None if masks is None else Path(masks)
    require_path(store.is_folder(images), "folder of images", images, hint)
    require_path(masks is None or store.is_folder(masks), "folder of masks", masks or images, hint)
    naming, unused = naming or Naming(), UnusedFiles() if unused is None else unused
    image_paths, mask_paths = _find_images_and_masks(images, masks, naming, unused)
    if naming.band_suffixes:
        image_paths = [path for path in image_paths if not naming.is_band_file(path)]
    image_files, problems = _group_by_stem(image_paths, images, naming.image_suffix, unused)
    yield from problems
    has_problems = bool(problems)
    if naming.stems is not None:
        require_path(store.is_file(naming.stems), "list of stems", naming.stems, "")
        stems, unknown = separate_problems(_select_stems(image_files, naming.stems, images))
        yield from unknown
        has_problems = has_problems or bool(unknown)
        for stem in image_files.keys() - set(stems):
            unused.add(f"not in {naming.stems.name}", image_files[stem])
        image_files = {stem: image_files[stem] for stem in stems}
    if not image_files and not has_problems:
        kinds = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise DataError(
            f"{images}: no image in this folder or below it (looked for {kinds})."
            f"{_describe_unused(unused, images)}{hint_sentence(hint)}"
        )
    if masks is None:
        headers, unreadable = scan_headers(list(image_files.values()), images, cache_dir)
        yield from map(Problem, unreadable)
        for path, header in headers.items():
            yield Record(path, None, header.upright, str(images), header.orientation)
        return
    mask_files, problems = _group_by_stem(mask_paths, masks, naming.mask_suffix, unused)
    yield from problems
    mask_files = _use_stems_of_images(image_files, mask_files)
    if naming.stems is not None:
        mask_files = {stem: path for stem, path in mask_files.items() if stem in image_files}
    yield from _find_unpaired(images, image_files, masks, mask_files, unused)
    paired = {stem: path for stem, path in image_files.items() if stem in mask_files}
    headers, unreadable = scan_headers(list(paired.values()), images, cache_dir)
    yield from map(Problem, unreadable)
    readable = {stem: path for stem, path in paired.items() if path in headers}
    swapped = [mask_files[stem] for stem, path in readable.items() if has_swapped_sides(headers[path])]
    mask_headers, unreadable = scan_headers(swapped, masks, cache_dir) if swapped else ({}, [])
    yield from map(Problem, unreadable)
    for stem, path in readable.items():
        mask = mask_files[stem]
        yield record_from_headers(path, mask, str(images), headers[path], mask_headers.get(mask))


# ---- finding files


def _find_images_and_masks(
    images: Path, masks: Path | None, naming: Naming, unused: UnusedFiles
) -> tuple[list[Path], list[Path]]:
    """The files that may be images, and those that may be masks; no file is both."""
    image_paths = _find_images(images, unused)
    if masks is None:
        return image_paths, []
    image_folder, mask_folder = os.path.realpath(images), os.path.realpath(masks)
    if image_folder == mask_folder:
        photos = {path.with_suffix("") for path in image_paths if path.suffix.lower() in LOSSY_SUFFIXES}
        mask_set = {path for path in image_paths if _is_mask(path, naming, has_photo=path.with_suffix("") in photos)}
        return [path for path in image_paths if path not in mask_set], [p for p in image_paths if p in mask_set]
    if is_below(mask_folder, image_folder):
        image_paths = [path for path in image_paths if not _lies_in(path, mask_folder)]
    mask_paths = _find_images(masks, unused)
    if is_below(image_folder, mask_folder):
        mask_paths = [path for path in mask_paths if not _lies_in(path, image_folder)]
    return image_paths, mask_paths


def _lies_in(path: Path, folder: str) -> bool:
    return is_below(os.path.realpath(path.parent) + os.sep, folder)


def _find_images(folder: Path, unused: UnusedFiles) -> list[Path]:
    """Files with the suffix of an image at any depth, sorted."""
    paths = []
    for path in store.list_files_below(folder, unused):
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            paths.append(path)
        elif suffix in UNREADABLE_SUFFIXES:
            unused.add(f"{suffix}, which is not read: save as JPEG or PNG", path)
        else:
            unused.add(suffix or "without suffix", path)
    return leave_out_arrays_beside_images(paths, unused)


def leave_out_arrays_beside_images(paths: Sequence[Path], unused: UnusedFiles) -> list[Path]:
    """The image files without arrays that lie beside an image of the same name: its features, logits or a cache of it.

    Ultralytics writes such a cache, with red and blue exchanged.
    """
    arrays = [path for path in paths if path.suffix.lower() == ARRAY_SUFFIX]
    if not arrays or len(arrays) == len(paths):
        return list(paths)
    pictures = {path.with_suffix("") for path in paths if path.suffix.lower() != ARRAY_SUFFIX}
    beside = {path for path in arrays if path.with_suffix("") in pictures}
    for path in sorted(beside):
        unused.add(f"{ARRAY_SUFFIX} beside images of the same names", path)
    return [path for path in paths if path not in beside]


def _is_mask(path: Path, naming: Naming, *, has_photo: bool) -> bool:
    """Whether a file in a folder of images and masks is a mask.

    Args:
        has_photo: whether a file of a lossy format has the same stem.
    """
    if naming.image_suffix != naming.mask_suffix:
        ends = {True: naming.mask_suffix, False: naming.image_suffix}
        matching = [is_mask for is_mask, end in ends.items() if path.stem.endswith(end)]
        return max(matching, key=lambda is_mask: len(ends[is_mask]), default=False)
    if path.suffix.lower() == ".png":
        return True
    return path.suffix.lower() not in LOSSY_SUFFIXES and has_photo


def _select_stems(files: dict[str, str], stems_file: Path, folder: Path) -> Iterator[str | Problem]:
    """The stems of `files` that a list names, in its order; a suffix and backslashes of Windows do not matter."""
    by_form = {unicodedata.normalize("NFC", stem): stem for stem in files}
    try:
        text = store.read_text(stems_file)
    except UnicodeDecodeError as error:
        raise DataError(f"{stems_file}: not UTF-8 text (byte {error.start}). Save the list as UTF-8.") from None
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        name = line.strip()
        path = name.replace("\\", "/")
        spellings = (name, path, os.path.splitext(path)[0])  # noqa: PTH122
        known = (by_form.get(unicodedata.normalize("NFC", spelling)) for spelling in spellings)
        stem = next((stem for stem in known if stem is not None), None)
        if stem is not None:
            yield stem
        elif name and not name.startswith("#"):
            yield Problem(f"{stems_file}:{number}: there is no image {name} below {folder}.")


# ---- pairing


def _group_by_stem(paths: Sequence[Path], folder: Path, suffix: str, unused: UnusedFiles) -> _FilesByStem:
    """Files whose stem ends with `suffix`, by their path below `folder` without suffixes (with /)."""
    files = _FilesByStem({}, [])
    for path in paths:
        if not path.stem.endswith(suffix):
            unused.add(f"with a name that does not end in {suffix}", path)
            continue
        stem = path.relative_to(folder).with_suffix("").as_posix().removesuffix(suffix)
        if stem in files.paths and suffix == PREDICTED_IDS and is_copy_for_maps(files.paths[stem], path):
            unused.add("with the same ids as the .png beside it and their place on the map", path)
        elif stem in files.paths:
            message = f"{path} and {files.paths[stem]} differ only in their suffix: remove one of them."
            files.problems.append(Problem(message))
        else:
            files.paths[stem] = str(path)
    return files


def is_copy_for_maps(first: str, second: Path) -> bool:
    """Whether two class maps of an image are those that mode=predict writes of a GeoTIFF, x_ids.png and x_ids.tif."""
    return [first[-4:].lower(), second.suffix.lower()] == [".png", ".tif"]


def _use_stems_of_images(image_files: dict[str, str], mask_files: dict[str, str]) -> dict[str, str]:
    """Masks by the stems of their images, where both differ only in the Unicode form of their letters."""
    unmatched = (stem for stem in image_files if not stem.isascii() and stem not in mask_files)
    by_form = {unicodedata.normalize("NFC", stem): stem for stem in unmatched}
    renamed: dict[str, str] = {}
    for stem, path in mask_files.items():
        image_stem = stem if stem in image_files else by_form.pop(unicodedata.normalize("NFC", stem), stem)
        renamed[image_stem] = path
    return renamed


def _find_unpaired(
    images: Path, image_files: dict[str, str], masks: Path, mask_files: dict[str, str], unused: UnusedFiles
) -> Iterator[Problem]:
    """A problem for each image without mask and each mask without image."""
    lone_images = [stem for stem in image_files if stem not in mask_files]
    lone_masks = [stem for stem in mask_files if stem not in image_files]
    summary = (
        f"{len(lone_images)} of {len(image_files)} images in {images} have no mask{_first_stems(lone_images)}; "
        f"{len(lone_masks)} of {len(mask_files)} masks in {masks} have no image{_first_stems(lone_masks)}. "
        f"A pair has the same path below its folder, suffix apart (a/b.jpg and a/b.png)."
        f"{_describe_other_case(lone_images, lone_masks)}{_describe_unused(unused, images)}"
    )
    yield from (Problem(f"{image_files[stem]}: has no mask below {masks}.", summary) for stem in lone_images)
    yield from (Problem(f"{mask_files[stem]}: has no image below {images}.", summary) for stem in lone_masks)


def _describe_other_case(lone_images: list[str], lone_masks: list[str]) -> str:
    """A sentence about images and masks that would be pairs in one case; empty if there are none."""
    by_case = {stem.casefold(): stem for stem in lone_masks}
    pairs = [(stem, by_case[stem.casefold()]) for stem in lone_images if stem.casefold() in by_case]
    if not pairs:
        return ""
    image, mask = pairs[0]
    return f" {len(pairs)} of them differ in upper and lower case only, such as {image} and {mask}: rename one of each."


def _describe_unused(unused: UnusedFiles, folder: Path) -> str:
    return f" Not used: {unused.describe(folder.parent)}." if unused.count else ""


def _first_stems(stems: Sequence[str]) -> str:
    return f" ({', '.join(stems[:3])}{', ...' if len(stems) > 3 else ''})" if stems else ""
