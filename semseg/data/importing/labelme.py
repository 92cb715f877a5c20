"""LabelMe: a JSON file for each image, with shapes."""

from __future__ import annotations

import base64
import binascii
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg.config.schema import ImportConfig
from semseg.data import store
from semseg.data.geometry import Size
from semseg.data.headers import HeaderError, open_image
from semseg.data.images import decode_image
from semseg.data.importing.files import (
    EntryError,
    find_split,
    get,
    get_or,
    list_json_files,
    read_json_file,
    read_text_lines,
)
from semseg.data.importing.image_finder import ImageFinder
from semseg.data.importing.model import (
    UNLABELLED,
    AnnotatedImage,
    Annotation,
    Bitmap,
    Ellipse,
    Export,
    Polygon,
    Shape,
    make_line,
    make_ring,
)
from semseg.data.label_map import IGNORED
from semseg.data.records import Problem
from semseg.errors import DataError
from semseg.system.text import format_subject

KEYS = (b'"shapes"', b'"imagePath"')
BACKGROUND_LABEL = "_background_"
SPECIAL_LABELS = {BACKGROUND_LABEL: UNLABELLED, "__ignore__": IGNORED}
LABELS_FILE = "labels.txt"
MIN_RADIUS = 0.75  # pixels; a smaller disc around the corner of a pixel holds the centre of none


class LabelMeFile(NamedTuple):
    """A JSON file of LabelMe, read."""

    path: Path
    content: Any


def find_labelme_files(files: Sequence[Path]) -> list[Path]:
    """The files of LabelMe among the JSON files of an export."""
    return list_json_files(files, b"{", lambda content: all(key in content for key in KEYS))


def read_labelme(root: Path, files: Sequence[Path], finder: ImageFinder, options: ImportConfig) -> Export:
    """All files of LabelMe; the classes are those of labels.txt if it has all labels, or the labels that occur, sorted.

    Raises:
        DataError: if no file has a label.
    """
    items: list[AnnotatedImage | Problem] = []
    contents: list[LabelMeFile] = []
    labels = set[str]()
    for path in files:
        try:
            content = read_json_file(path)
            named = {get(shape, "label", str).strip() for shape in get(content, "shapes", list)}
            if "" in named:
                raise EntryError("has an empty label")
            labels |= named
            content["imageData"] = bool(content.get("imageData"))  # all of them would fill the memory
            contents.append(LabelMeFile(path, content))
        except EntryError as error:
            items.append(Problem(f"{path}: a shape {error}."))
        except DataError as error:
            items.append(Problem(str(error)))
    special = dict(SPECIAL_LABELS)
    if options.unlabelled == "ignore" and BACKGROUND_LABEL in labels:
        del special[BACKGROUND_LABEL]  # a class: somebody drew it
    listed, labels = [name for name in read_labels_file(root) if name not in special], labels - set(special)
    if BACKGROUND_LABEL in labels and listed:
        listed = list(dict.fromkeys([BACKGROUND_LABEL, *listed]))
    names = listed if labels <= set(listed) else sorted(labels)
    if not names and contents:
        raise DataError(f"{root}: no file of LabelMe in it has a shape with a label. Annotate the images first.")
    reader = LabelMeReader(root, special | {name: index for index, name in enumerate(names)}, finder, options)
    finder.expect(map(reader.name_image, contents))
    for file in contents:
        try:
            items.append(reader.read_file(file))
        except EntryError as error:
            items.append(Problem(f"{file.path}: {error}."))
    notes = [*reader.describe(), *describe_unlisted(listed, labels)]
    num_images = len({item.path for item in items if isinstance(item, AnnotatedImage) and item.content is None})
    if num_left := finder.count - num_images:
        notes.append(f"{format_subject(num_left, 'image has', 'images have')} no JSON file: left out.")
    return Export("LabelMe", tuple(names), None, items, tuple(notes))


def read_labels_file(root: Path) -> list[str]:
    """The labels that labels.txt lists; none without the file."""
    file = root / LABELS_FILE
    listed = [line.strip() for line in read_text_lines(file)] if store.is_file(file) else []
    return [name for name in dict.fromkeys(listed) if name]


def describe_unlisted(listed: list[str], labels: set[str]) -> Iterator[str]:
    """A sentence about labels that labels.txt lacks."""
    unlisted = sorted(labels - set(listed))
    if listed and unlisted:
        yield f"{LABELS_FILE} does not list {', '.join(unlisted)}, so that the classes are in alphabetical order."


class LabelMeReader:
    """Reads the shapes of LabelMe's files.

    Args:
        class_of: the class index of each label.
    """

    def __init__(self, root: Path, class_of: dict[str, int], finder: ImageFinder, options: ImportConfig) -> None:
        self.root, self.class_of, self.finder, self.options = root, class_of, finder, options
        self.num_lines, self.num_decoded = 0, 0

    def read_file(self, file: LabelMeFile) -> AnnotatedImage:
        """The image of a file and its annotations.

        Raises:
            EntryError: if it, or one of its shapes, cannot be read.
        """
        path, content = file
        height, width = (get_or(content, key, int, 0) for key in ("imageHeight", "imageWidth"))
        size = Size(height, width) if height > 0 and width > 0 else None
        annotations = []
        for position, shape in enumerate(content["shapes"]):
            name = f"shape {position + 1}"
            try:
                label = get(shape, "label", str).strip()
                annotations.append(Annotation(self.class_of[label], tuple(self.read_shape(shape)), name))
            except (EntryError, ValueError) as error:
                raise EntryError(f"{name}: {error}") from None
        split = find_split(*path.relative_to(self.root).parts[:-1])
        image = AnnotatedImage("", "", split, size, str(path), tuple(annotations))
        return self.find_image(path, content, image)

    def name_image(self, file: LabelMeFile) -> str:
        """What the export calls the image of a file: its path below the export if it lies beside, or imagePath."""
        given = file.content.get("imagePath")
        if not isinstance(given, str):
            return ""
        beside = find_beside(file.path, given)
        return self.finder.relative(beside) if self.finder.has(beside) else given

    def find_image(self, path: Path, content: Any, image: AnnotatedImage) -> AnnotatedImage:
        """The image, with its file: beside the JSON file, elsewhere below the export, or inside the JSON file.

        Raises:
            EntryError: if there is none.
        """
        given = get(content, "imagePath", str)
        beside = find_beside(path, given)
        try:
            found = beside if self.finder.has(beside) else self.finder.find(given, image.split)
        except EntryError as error:
            if not content["imageData"]:
                raise EntryError(f"{error}, or save the files with image data") from None
            self.num_decoded += 1
            try:
                suffix = find_suffix(read_image_data(path))
            except DataError as problem:
                raise EntryError(str(problem).removeprefix(f"{path}: ").rstrip(".")) from None
            below = path.relative_to(self.root).with_suffix(suffix).as_posix()
            return image._replace(path=str(path), name=below, content=partial(read_image_data, path))
        return image._replace(path=str(found), name=self.finder.relative(found))

    def read_shape(self, shape: Any) -> Iterator[Shape]:
        """The regions of a shape.

        Raises:
            EntryError: if its type is not known, or does not fit its points.
        """
        kind = get_or(shape, "shape_type", str, "polygon")
        points = make_ring(get(shape, "points", list))
        needed = {"polygon": 3, "rectangle": 2, "circle": 2, "line": 2, "linestrip": 2, "point": 1, "points": 1,
                  "oriented_rectangle": 4, "mask": 2}.get(kind)  # fmt: skip
        if needed is None:
            raise EntryError(f"has shape_type {kind!r:.40}, which is not known")
        if len(points) < needed:
            raise EntryError(f"is a {kind} with {len(points)} points, at least {needed} are needed")
        if kind == "rectangle" and len(points) not in (2, 4):
            raise EntryError(f"is a rectangle with {len(points)} points, which are two opposite corners, or all four")
        if not np.isfinite(points).all():
            raise EntryError("has a coordinate that is not finite")
        (x, y), (x2, y2) = points[0].tolist(), points[min(1, len(points) - 1)].tolist()
        radius = self.options.line_width / 2
        if kind in ("polygon", "oriented_rectangle") or (kind == "rectangle" and len(points) == 4):
            yield Polygon((points,))
        elif kind == "rectangle":
            yield Polygon((make_ring([x, y, x2, y, x2, y2, x, y2]),))
        elif kind == "circle":
            distance = math.dist((x, y), (x2, y2))
            yield Ellipse(x, y, distance, distance)
        elif kind == "mask":
            data = get(shape, "mask", str)
            box = Size(round(abs(y2 - y)) + 1, round(abs(x2 - x)) + 1)
            yield Bitmap(round(min(y, y2)), round(min(x, x2)), partial(decode_mask, data, box))
        else:
            self.num_lines += 1
            disc = max(radius, MIN_RADIUS)
            yield from (Ellipse(left, top, disc, disc) for left, top in points.tolist())
            if kind in ("line", "linestrip"):
                for start, end in itertools.pairwise(points):
                    if (start != end).any():
                        yield make_line(start, end, 2 * radius)

    def describe(self) -> Iterator[str]:
        """Sentences about what was decided."""
        if self.num_lines:
            width = self.options.line_width
            yield f"{self.num_lines} lines and points are drawn {width:g} pixels wide (import.line_width)."
        if self.num_decoded:
            decoded = format_subject(self.num_decoded, "image is", "images are")
            yield f"{decoded} not in the export: taken out of its JSON files."


def find_beside(path: Path, given: str) -> Path:
    """Where the image that a JSON file calls `given` is if it lies beside it; the file itself if that is no name."""
    name = given.replace("\\", "/").rpartition("/")[2]
    return path.with_name(name) if name not in ("", ".", "..") and "\0" not in name else path


def decode_base64(text: str, key: str) -> bytes:
    """The bytes of base64 text.

    Raises:
        EntryError: if it is damaged.
    """
    try:
        return base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError) as error:
        raise EntryError(f"{key} is damaged ({error})") from None


def read_image_data(path: Path) -> bytes:
    """The image inside a file of LabelMe.

    Raises:
        DataError: if it is damaged.
    """
    try:
        return decode_base64(get(read_json_file(path), "imageData", str), "imageData")
    except EntryError as error:
        raise DataError(f"{path}: {error}.") from None


def decode_mask(data: str, size: Size, max_pixels: int) -> NDArray[np.bool_]:
    """The mask of a shape, a PNG file of a box of `size`.

    Raises:
        ValueError: if it is damaged or of another size.
    """
    try:
        pixels = decode_image(decode_base64(data, "mask"), "mask", max_pixels=max_pixels, key="the size of the image")
    except DataError as error:
        raise EntryError(str(error).rstrip(".")) from None
    if pixels.shape[:2] != size:
        raise EntryError(f"its mask is {pixels.shape[0]} x {pixels.shape[1]}, its points are for {size}")
    return pixels[..., 0] > 0


def find_suffix(data: bytes) -> str:
    """The suffix for an image by its content.

    Raises:
        EntryError: if it is no image.
    """
    try:
        kind = str(open_image(io.BytesIO(data)).format)
    except HeaderError as error:
        raise EntryError(f"imageData {error}") from None
    return {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")
