"""Roboflow's semantic segmentation: <name>.jpg, <name>_mask.png and _classes.csv in a folder for each split."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from semseg.config.schema import ImportConfig
from semseg.data import store
from semseg.data.folders import IMAGE_SUFFIXES
from semseg.data.importing.files import find_split, read_text_lines
from semseg.data.importing.model import UNLABELLED, AnnotatedImage, Export, MaskFile
from semseg.data.labels import read_label
from semseg.data.records import Problem
from semseg.errors import ConfigError, DataError

CLASSES_FILE, MASK_SUFFIX = "_classes.csv", "_mask"
NO_CLASS = 0  # value of pixels without a class


def find_class_files(files: list[Path]) -> list[Path]:
    """The files `_classes.csv` of an export."""
    return [path for path in files if path.name == CLASSES_FILE]


def read_roboflow(root: Path, files: list[Path], options: ImportConfig) -> Export:
    """The masks of all folders that have a `_classes.csv`.

    Raises:
        ConfigError: if import.images is set.
        DataError: if classes contradict each other, or there is no mask.
    """
    if options.images is not None:
        raise ConfigError(f"import.images={options.images}: in exports of Roboflow, masks lie beside their images.")
    classes: dict[int, str] = {}
    items: list[AnnotatedImage | Problem] = []
    for file in files:
        found = read_classes(file)
        if classes and found != classes:
            raise DataError(f"{file}: has other classes than {files[0]}. Export all splits together.")
        classes = found
    values = sorted(classes)
    index_of = {value: index for index, value in enumerate(values)}
    for file in files:
        others = [other.parent for other in files if other.parent.is_relative_to(file.parent) and other != file]
        items += list(read_folder(root, file.parent, index_of, others))
    if not items:
        raise DataError(f"{root}: no image has a mask <name>{MASK_SUFFIX}.png beside it. Export the masks again.")
    return Export("Roboflow", tuple(classes[value] for value in values), None, items)


def read_classes(file: Path) -> dict[int, str]:
    """The name of each value of the masks. The header is `Pixel Value, Class`, with a blank.

    Raises:
        DataError: if a line is wrong.
    """
    rows = csv.reader(read_text_lines(file), skipinitialspace=True)
    classes: dict[int, str] = {}
    try:
        for row in rows:
            cells = [cell.strip() for cell in row]
            if rows.line_num == 1 and [cell.lower() for cell in cells] != ["pixel value", "class"]:
                raise DataError(f"{file}:1: the header must be Pixel Value, Class.")
            if rows.line_num == 1 or not any(cells):
                continue
            if len(cells) != 2 or not cells[0].isdecimal() or not 0 <= int(cells[0]) <= 255 or not cells[1]:
                raise DataError(f"{file}:{rows.line_num}: a line must be a value from 0 to 255 and a class.")
            if int(cells[0]) in classes or cells[1] in classes.values():
                raise DataError(f"{file}:{rows.line_num}: the value or class is listed twice. Remove one of them.")
            classes[int(cells[0])] = cells[1]
    except csv.Error as error:
        raise DataError(f"{file}:{rows.line_num}: the line is not valid CSV ({error}).") from None
    if not classes:
        raise DataError(f"{file}: lists no classes.")
    return classes


def read_folder(
    root: Path, folder: Path, index_of: dict[int, int], without: Sequence[Path]
) -> Iterator[AnnotatedImage | Problem]:
    """The images of a folder with their masks, but for those of folders that are read on their own."""
    paths = [
        path
        for path in store.list_files_below(folder)
        if path.suffix.lower() in IMAGE_SUFFIXES and not any(path.is_relative_to(other) for other in without)
    ]
    masks = {path.with_name(path.stem.removesuffix(MASK_SUFFIX)): path for path in paths if is_mask(path)}
    by_case = {str(stem).casefold(): stem for stem in masks}
    split, read = find_split(*folder.relative_to(root).parts), partial(read_mask_values, index_of)
    used = set[Path]()
    for path in (path for path in paths if not is_mask(path)):
        stem = path.with_suffix("")
        mask = masks.get(stem)
        if mask is None:
            similar = by_case.get(str(stem).casefold())
            if similar is not None:
                name = masks[similar].name
                yield Problem(f"{path}: its mask is called {name}: upper and lower case differ. Rename one of them.")
                used.add(similar)
            else:
                yield Problem(f"{path}: has no mask {path.stem}{MASK_SUFFIX}.png beside it. Export the masks again.")
            continue
        used.add(stem)
        name = path.relative_to(root).as_posix()
        yield AnnotatedImage(str(path), name, split, None, str(path), mask=MaskFile(str(mask), read))
    yield from (Problem(f"{mask}: has no image beside it.") for stem, mask in masks.items() if stem not in used)


def is_mask(path: Path) -> bool:
    return path.stem.endswith(MASK_SUFFIX) and path.suffix.lower() == ".png"


def read_mask_values(index_of: dict[int, int], path: str, max_pixels: int) -> NDArray[np.int32]:
    """The class of every pixel of a mask; 0 is unlabelled if it is no class.

    Raises:
        DataError: if it cannot be read, or has another value.
    """
    raw = read_label(path, max_pixels=max_pixels).astype(np.int64)
    values, inverse, counts = np.unique(raw, return_inverse=True, return_counts=True)
    table = {NO_CLASS: UNLABELLED} | index_of
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if value not in table:
            raise DataError(f"{path}: value {value} ({count} pixels) is not in {CLASSES_FILE}. Export it again.")
    return np.array([table[value] for value in values.tolist()], np.int32)[inverse].reshape(raw.shape)
