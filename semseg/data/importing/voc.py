"""Masks in colours with a label map: CVAT's "Segmentation mask 1.1", and Pascal VOC."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg.config.schema import ImportConfig
from semseg.data import store
from semseg.data.classes import built_in_classes, parse_label_map_line
from semseg.data.folders import IMAGE_SUFFIXES
from semseg.data.images import check_png, open_checked, read_header, read_image, read_image_bytes
from semseg.data.importing.files import EntryError, find_split, read_text_lines
from semseg.data.importing.image_finder import ImageFinder
from semseg.data.importing.model import IGNORED_VALUE, UNLABELLED, AnnotatedImage, Export, MaskFile
from semseg.data.label_map import IGNORED
from semseg.data.labels import read_label
from semseg.data.palette import Colour, pack_colours, unpack_colour, voc_colour
from semseg.data.records import Problem
from semseg.errors import DataError
from semseg.system.text import format_subject

MASK_FOLDER, LABEL_MAP, LISTS = "SegmentationClass", "labelmap.txt", Path("ImageSets", "Segmentation")
OLD_MASK_FOLDER = "SegmentationClassPNG"  # of LabelMe before version 5, whose SegmentationClass has arrays
CLASS_NAMES = "class_names.txt"
VOC_COLOURS = 255  # of classes; the last one is the border
BLACK: Colour = (0, 0, 0)
WHITE: Colour = (255, 255, 255)
BORDER: Colour = (224, 224, 192)  # the border of objects in Pascal VOC, index 255
GREY_MODES = ("1", "L", "I", "I;16", "I;16B")  # of Pillow
MASK_SUFFIXES = (".png", ".PNG")
MASK_FOLDERS = (f"{MASK_FOLDER}*", "SegmentationObject*")  # whose files are not images


class LabelMapRow(NamedTuple):
    """A class of labelmap.txt."""

    name: str
    colour: Colour


def is_voc_folder(root: Path) -> bool:
    """Whether a folder has the masks of Pascal VOC or CVAT."""
    return store.is_folder(root / MASK_FOLDER)


def read_voc(root: Path, finder: ImageFinder, options: ImportConfig) -> Export:
    """The masks of `SegmentationClass` or `SegmentationClassPNG`, with the splits of `ImageSets/Segmentation`.

    Raises:
        DataError: if the label map is wrong, or there are no masks.
    """
    rows, notes = read_voc_classes(root)
    folder = root / (OLD_MASK_FOLDER if store.is_folder(root / OLD_MASK_FOLDER) else MASK_FOLDER)
    splits = read_splits(root / LISTS)
    files = [path for path in store.list_files_below(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
    masks = [path for path in files if path.suffix in MASK_SUFFIXES]
    if not masks:
        raise DataError(f"{folder}: there is no PNG file. Export the masks again.")
    read = partial(decode_colours, tuple(rows), GreyMasks(masks, rows))
    others = [path for path in files if path.suffix not in MASK_SUFFIXES]
    items: list[AnnotatedImage | Problem] = [
        Problem(f"{path}: masks are PNG files, so that all colours are exact. Export it again.") for path in others
    ]
    stems = {path: path.relative_to(folder).with_suffix("").as_posix() for path in masks}
    finder.expect(stems.values())
    seen, num_missing = set(stems.values()), 0
    for path, stem in stems.items():
        if splits and stem not in splits:
            continue
        try:
            image = find_image(stem, finder)
        except EntryError as error:
            items.append(Problem(f"{path}: {error}."))
            num_missing += 1
            continue
        mask = MaskFile(str(path), read)
        items += [
            AnnotatedImage(str(image), finder.relative(image), split, None, str(path), mask=mask)
            for split in splits.get(stem, [""])
        ]
    items += [Problem(f"{root / LISTS}: lists {stem}, which has no mask.") for stem in splits if stem not in seen]
    if splits and (num_unlisted := len(seen - set(splits))):
        notes.append(
            f"{format_subject(num_unlisted, 'mask is', 'masks are')} in no list of {LISTS.as_posix()} and left out."
        )
    num_left = finder.count_stems(MASK_FOLDERS) - (len(seen) - num_missing)
    if num_left > 0:
        notes.append(f"{format_subject(num_left, 'image has', 'images have')} no mask: left out.")
    palette = tuple(row.colour for row in rows)
    return Export("masks of CVAT or Pascal VOC", tuple(row.name for row in rows), palette, items, tuple(notes))


def read_voc_classes(root: Path) -> tuple[list[LabelMapRow], list[str]]:
    """The classes of labelmap.txt or of class_names.txt, which LabelMe writes, or those of Pascal VOC, and notes.

    Raises:
        DataError: if one of these files is wrong.
    """
    if store.is_file(file := root / LABEL_MAP):
        return read_label_map(file), []
    if store.is_file(file := root / CLASS_NAMES):
        names = [line.strip() for line in read_text_lines(file) if line.strip()]
        if len(names) != len(set(names)) or not 0 < len(names) <= VOC_COLOURS:
            raise DataError(f"{file}: must list 1 to {VOC_COLOURS} different names of classes, one in each line.")
        note = f"The classes are those of {CLASS_NAMES}, in the colours of Pascal VOC."
        return [LabelMapRow(name, voc_colour(index)) for index, name in enumerate(names)], [note]
    table = built_in_classes("voc2012")
    rows = [LabelMapRow(*row) for row in zip(table.names, table.palette, strict=True)]
    return rows, [f"There is no {LABEL_MAP}: the classes and colours of Pascal VOC 2012 are used."]


class GreyMasks:
    """Whether the grey masks of an export hold indices of classes or their colours: as the first one that says so.

    A mask says so if its values can be one of them only; one of background alone has the value 0 either way.
    """

    def __init__(self, paths: Sequence[Path], rows: Sequence[LabelMapRow]) -> None:
        self.paths = paths
        self.greys = {colour[0] for colour in colour_table(rows) if len(set(colour)) == 1}
        self.indices = set(range(len(rows)))
        self._lock = Lock()  # masks are read by several threads
        self._hold_indices: bool | None = None

    def hold_indices(self, max_pixels: int) -> bool:
        """Read masks, on the first call, until one decides; they hold colours if none does."""
        with self._lock:
            if self._hold_indices is None:
                answers = (self._holds_indices(path, max_pixels) for path in self.paths)
                self._hold_indices = next((answer for answer in answers if answer is not None), False)
            return self._hold_indices

    def _holds_indices(self, path: Path, max_pixels: int) -> bool | None:
        """None if a mask is not grey, can hold both or neither, or cannot be read."""
        with suppress(DataError):  # raised where the mask is imported
            if read_header(path, max_pixels=max_pixels).kind.partition(" ")[2] in GREY_MODES:
                values = set(np.unique(read_label(path, max_pixels=max_pixels)).tolist()) - {IGNORED_VALUE}
                can_be_indices = values <= self.indices
                return can_be_indices if can_be_indices != (values <= self.greys) else None
        return None


def colour_table(rows: Sequence[LabelMapRow]) -> dict[Colour, int]:
    """The class index of each colour; black without a class is unlabelled."""
    return {BLACK: UNLABELLED, BORDER: IGNORED} | {row.colour: index for index, row in enumerate(rows)}


def find_image(stem: str, finder: ImageFinder) -> Path:
    """The image of a mask, whatever its suffix.

    Raises:
        EntryError: if there is none, or there are several.
    """
    found = finder.find_stem(stem, without=MASK_FOLDERS)
    if not found:
        raise EntryError(
            f"there is no image {stem} below {finder.folder}. CVAT exports images only with 'Save images': "
            "export again, or set import.images to their folder"
        )
    if len(found) > 1:
        raise EntryError(f"its image may be {found[0]} or {found[1]}. Set import.images to the folder of the right one")
    return found[0]


def read_label_map(file: Path) -> list[LabelMapRow]:
    """The rows of labelmap.txt: `name:red,green,blue:parts:actions`; names may hold colons.

    Raises:
        DataError: if a line is wrong, two classes have the same name or colour, or there are none.
    """
    rows: list[LabelMapRow] = []
    for number, line in enumerate(read_text_lines(file), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            name, colour = parse_label_map_line(line.strip(), len(rows))
        except ValueError:
            raise DataError(
                f"{file}:{number}: a line must be like cat:250,50,83:: (name:red,green,blue:parts:actions)."
            ) from None
        for row in rows:
            if row.name == name:
                raise DataError(f"{file}:{number}: the class {name!r} is listed twice. Remove one of them.")
            if row.colour == colour:
                raise DataError(
                    f"{file}:{number}: {row.name!r} and {name!r} have the same colour {colour}, so their pixels cannot "
                    "be told apart. Give them different colours in the tool and export again."
                )
        rows.append(LabelMapRow(name, colour))
    if not rows:
        raise DataError(f"{file}: lists no classes.")
    return rows


def read_splits(folder: Path) -> dict[str, list[str]]:
    """The splits of each stem in the lists of a folder; lists that name no split, as default.txt, give "".

    trainval.txt and lists of that kind are left out if train.txt and val.txt are there.
    """
    splits: dict[str, list[str]] = {}
    if not store.is_folder(folder):
        return splits
    files = [path for path in store.list_files_below(folder) if path.suffix.lower() == ".txt"]
    named = {path: find_split(path.stem) for path in files}
    chosen = [path for path in files if named[path]] or files
    for path in chosen:
        for line in read_text_lines(path):
            stem = line.strip().replace("\\", "/")
            if stem:
                parts = [part for part in PurePosixPath(stem).parts if part not in ("..", ".", "/")]
                if PurePosixPath(stem).suffix.lower() in IMAGE_SUFFIXES:  # lists name stems; some tools write files
                    parts[-1] = PurePosixPath(parts[-1]).stem
                listed = splits.setdefault("/".join(parts), [])
                listed += [named[path]] if named[path] not in listed else []
    return splits


def decode_colours(rows: Sequence[LabelMapRow], grey_masks: GreyMasks, path: str, max_pixels: int) -> NDArray[np.int32]:
    """The class of every pixel of a mask in the colours of a label map; black ones without a class are unlabelled.

    Of a file with a palette, the colours of the palette count and not the indices, which other tools number as they
    like.

    Args:
        grey_masks: says whether a grey file has the indices of the classes or their colours.

    Raises:
        DataError: if it cannot be read, or has another colour.
    """
    data = read_image_bytes(path)
    image, header = open_checked(path, data, max_pixels)
    check_png(path, data)
    if header.lossy:
        raise DataError(f"{path}: labels must not be compressed with {header.lossy}. Export PNG files.")
    table = colour_table(rows)
    if image.mode in GREY_MODES:
        grey = read_label(path, max_pixels=max_pixels)  # the numbers of the file, whatever its bits
        if grey_masks.hold_indices(max_pixels):
            return _look_up_indices(grey, len(rows), path)
        table = {WHITE: IGNORED} | table  # 255 of an index mask whose other values are colours of classes as well
        pixels = np.repeat(grey[..., None], 3, axis=2)
    else:
        pixels = read_image(path, max_pixels=max_pixels, upright=True)
    found, inverse, counts = np.unique(pack_colours(pixels), return_inverse=True, return_counts=True)
    classes = []
    for code, count in zip(found.tolist(), counts.tolist(), strict=True):
        colour = unpack_colour(code)
        if colour not in table:
            raise DataError(
                f"{path}: the colour {colour} ({count} pixels) is not in {LABEL_MAP}. Add its class there, or export "
                "the masks and the label map together."
            )
        classes.append(table[colour])
    return np.array(classes, np.int32)[inverse].reshape(pixels.shape[:2])


def _look_up_indices(grey: NDArray[np.integer], num_classes: int, path: str) -> NDArray[np.int32]:
    labels = np.where(grey == IGNORED_VALUE, np.int32(IGNORED), grey.astype(np.int32))
    if labels.max(initial=0) >= num_classes:
        value = int(labels.max())
        raise DataError(f"{path}: value {value} is no class: {LABEL_MAP} has {num_classes}. Export the masks again.")
    return labels
