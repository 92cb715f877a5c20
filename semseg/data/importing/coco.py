"""COCO JSON: polygons and run lengths of objects, and panoptic PNG files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg.config.schema import ImportConfig
from semseg.data import store
from semseg.data.geometry import Size
from semseg.data.images import read_image
from semseg.data.importing.files import (
    EntryError,
    describe_entry,
    find_split,
    get,
    get_or,
    list_json_files,
    read_json_file,
)
from semseg.data.importing.image_finder import ImageFinder
from semseg.data.importing.model import (
    UNLABELLED,
    AnnotatedImage,
    Annotation,
    Export,
    MaskFile,
    Polygon,
    Runs,
    Shape,
    make_rectangle,
    make_ring,
)
from semseg.data.label_map import IGNORED
from semseg.data.records import Problem
from semseg.errors import DataError
from semseg.system.text import format_quantity, format_subject

COCO_KEYS = (b'"images"', b'"annotations"', b'"categories"')


class Category(NamedTuple):
    """A class of the export."""

    id: int
    name: str
    parent: str  # supercategory


def find_coco_files(files: list[Path]) -> list[Path]:
    """The COCO files among the JSON files of an export: those that have all three lists."""
    return list_json_files(files, b"{", lambda content: all(key in content for key in COCO_KEYS))


def read_coco(root: Path, files: list[Path], finder: ImageFinder, options: ImportConfig) -> Export:
    """All COCO files of an export, one for each split.

    Raises:
        DataError: if a file cannot be read, two files are for the same split, or categories contradict each other.
    """
    splits = choose_files(root, files)
    contents = {path: read_json_file(path) for path in splits}
    categories: dict[int, str] = {}
    parents = set[str]()
    for path, content in contents.items():
        for category in read_categories(path, content):
            if category.parent != category.name:  # a class of COCO may be called as its group: person
                parents.update({category.parent} - {""})
            if categories.setdefault(category.id, category.name) != category.name:
                raise DataError(
                    f"{path}: category {category.id} is {category.name!r} and {categories[category.id]!r}, here or in "
                    "another file. Correct it, or import the files one by one: input=<file>."
                )
    notes: list[str] = []
    used = set[Any]().union(*map(find_used_categories, contents.values()))
    for number, name in list(categories.items()):
        if name in parents and number not in used and len(categories) > 1:  # Roboflow's name of the data set
            notes.append(f"The category {name!r} only groups others, and is no class.")
            del categories[number]
    index_of = {number: index for index, number in enumerate(sorted(categories))}
    items: list[AnnotatedImage | Problem] = []
    readers = [
        CocoReader(path, contents[path], split=split, index_of=index_of, finder=finder, options=options)
        for path, split in splits.items()
    ]  # all, before the first image is looked for: each notes the names of its images
    for reader in readers:
        items += reader.read_images()
        notes += reader.describe()
    has_masks = any(isinstance(item, AnnotatedImage) and item.mask is not None for item in items)  # images, too
    num_read = len({item.path for item in items if isinstance(item, AnnotatedImage)})
    if not has_masks and finder.count > num_read:
        left = format_quantity(finder.count - num_read, "image")
        notes.append(f"{left} in no COCO file, or wrong there: left out.")
    names = tuple(categories[number] for number in sorted(categories))
    return Export("COCO", names, None, items, tuple(notes), smaller_on_top=True)


def choose_files(root: Path, files: list[Path]) -> dict[Path, str]:
    """The files to read, each with its split: of several for a split, instances rather than captions or keypoints.

    Raises:
        DataError: if two are left for one split.
    """
    by_split: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        by_split[find_split(*path.relative_to(root).with_suffix("").parts)].append(path)
    chosen = {}
    for split, paths in by_split.items():
        preferred = [path for path in paths if path.name.startswith("instances")] or paths
        if len(preferred) > 1:
            names = " and ".join(str(path) for path in preferred[:2])
            what = f"the split {split}" if split else "images without a split"
            raise DataError(f"{names}: both are COCO files for {what}. Choose one: input=<file>.")
        chosen[preferred[0]] = split
    return chosen


def read_categories(path: Path, content: Any) -> Iterator[Category]:
    """The categories of a file.

    Raises:
        DataError: if one is wrong.
    """
    try:
        for position, entry in enumerate(get(content, "categories", list)):
            try:
                yield Category(get(entry, "id", int), get(entry, "name", str), get_or(entry, "supercategory", str, ""))
            except EntryError as error:
                raise EntryError(f"category {describe_entry(entry, 'id', position)} {error}") from None
    except EntryError as error:
        raise DataError(f"{path}: {error}. Export it again.") from None


def find_used_categories(content: Any) -> set[Any]:
    """The ids of categories that annotations or segments have."""
    annotations = content.get("annotations") if isinstance(content, dict) else None
    entries = [entry for entry in annotations or [] if isinstance(entry, dict)] if isinstance(annotations, list) else []
    segments = [
        each for entry in entries if isinstance(entry.get("segments_info"), list) for each in entry["segments_info"]
    ]
    found = (entry.get("category_id") for entry in [*entries, *segments] if isinstance(entry, dict))
    return {number for number in found if _is_key(number)}


class CocoReader:
    """One COCO file.

    Args:
        index_of: class index of each category.
    """

    def __init__(
        self,
        path: Path,
        content: Any,
        *,
        split: str,
        index_of: dict[int, int],
        finder: ImageFinder,
        options: ImportConfig,
    ) -> None:
        self.path, self.split, self.index_of, self.finder, self.options = path, split, index_of, finder, options
        try:
            self.images, self.annotations = get(content, "images", list), get(content, "annotations", list)
        except EntryError as error:
            raise DataError(f"{path}: {error}. Export it again.") from None
        names = (entry.get("file_name") for entry in self.images if isinstance(entry, dict))
        finder.expect(name for name in names if isinstance(name, str))
        self.num_crowds, self.num_boxes = 0, 0
        self.panoptic: ImageFinder | None = None

    def read_images(self) -> Iterator[AnnotatedImage | Problem]:
        """Every image of the file, with its annotations, in the order of the file."""
        by_image: dict[Any, list[Any]] = defaultdict(list)
        known = {entry.get("id") for entry in self.images if isinstance(entry, dict) and _is_key(entry.get("id"))}
        for position, entry in enumerate(self.annotations):
            owner = entry.get("image_id") if isinstance(entry, dict) else None
            if not _is_key(owner) or owner not in known:
                name = describe_entry(entry, "id", position)
                alike = next((key for key in known if str(key) == str(owner)), None)
                advice = "Remove it." if alike is None else f"The id {alike!r:.60} is: write both as numbers."
                yield Problem(f"{self.path}: annotation {name} has image_id {owner!r:.60}, which is no image. {advice}")
                continue
            by_image[owner].append(entry)
        seen, paths = set[Any](), dict[str, Any]()
        for position, entry in enumerate(self.images):
            origin = f"{self.path}: image {describe_entry(entry, 'id', position)}"
            try:
                name, number = get(entry, "file_name", str), entry.get("id")
                if not _is_key(number):
                    raise EntryError("has no id")
                if number in seen:
                    raise EntryError("has the id of another image")
                seen.add(number)
                image = self.read_image(entry, name, by_image.get(number, []), origin)
                if paths.setdefault(image.path, number) != number:
                    raise EntryError(f"has the file of image {paths[image.path]}, {image.path}. Merge the two")
                yield image
            except EntryError as error:
                yield Problem(f"{origin}: {error}.")

    def read_image(self, entry: Any, name: str, annotations: list[Any], origin: str) -> AnnotatedImage:
        """One image.

        Raises:
            EntryError: if it, or one of its annotations, cannot be read.
        """
        path = self.finder.find(name, self.split)
        is_sized = entry.get("height") is not None
        size = Size(get(entry, "height", int), get(entry, "width", int)) if is_sized else None
        image = AnnotatedImage(str(path), self.finder.relative(path), self.split, size, origin)
        if any(isinstance(each, dict) and "segments_info" in each for each in annotations):
            return image._replace(mask=self.read_segments(annotations))
        drawn = [self.read_annotation(each, position) for position, each in enumerate(annotations)]
        return image._replace(annotations=tuple(each for each in drawn if each is not None))

    def read_annotation(self, entry: Any, position: int) -> Annotation | None:
        """One annotation; None for one without a region.

        Raises:
            EntryError: if it cannot be read.
        """
        name = f"annotation {describe_entry(entry, 'id', position)}"
        try:
            class_index = self.find_class(entry)
            shapes = tuple(self.read_shapes(entry))
        except (EntryError, ValueError) as error:
            raise EntryError(f"{name}: {error}") from None
        return Annotation(class_index, shapes, name) if shapes else None

    def find_class(self, entry: Any) -> int:
        """The class of an annotation or segment; IGNORED for crowds, if they are to be ignored."""
        category = get(entry, "category_id", int)
        if category not in self.index_of:
            raise EntryError(f"has category_id {category}, which is no category")
        is_crowd = entry.get("iscrowd") is True or bool(entry.get("iscrowd") and get(entry, "iscrowd", int))
        self.num_crowds += is_crowd
        return IGNORED if is_crowd and self.options.crowd == "ignore" else self.index_of[category]

    def read_shapes(self, entry: Any) -> Iterator[Shape]:
        """The regions of an annotation, which together are its pixels."""
        value = entry.get("segmentation")
        if not value:  # missing, null or empty: of a detection, or of an object without pixels
            if not entry.get("bbox"):
                return
            if self.options.boxes == "refuse":
                raise EntryError("is a box without an outline. Draw boxes as rectangles with import.boxes=draw")
            box = get(entry, "bbox", list)
            if len(box) != 4 or not all(isinstance(number, int | float) for number in box):
                raise EntryError("bbox must be [x, y, width, height]")
            self.num_boxes += 1
            yield make_rectangle(*box)
        elif isinstance(value, dict):
            yield read_runs(value)
        elif isinstance(value, list):
            for ring in value if isinstance(value[0], list) else [value]:  # some tools write a single ring flat
                yield Polygon((make_ring(ring),))
        else:
            raise EntryError("segmentation must be a list of polygons or an object with counts")

    def read_segments(self, annotations: list[Any]) -> MaskFile:
        """The panoptic PNG file of an image.

        Raises:
            EntryError: if it is not found, or segments are wrong.
        """
        if len(annotations) != 1:
            raise EntryError("has several panoptic annotations")
        entry = annotations[0]
        classes: dict[int, int] = {}
        for position, segment in enumerate(get(entry, "segments_info", list)):
            try:
                classes[get(segment, "id", int)] = self.find_class(segment)
            except EntryError as error:
                raise EntryError(f"segment {describe_entry(segment, 'id', position)} {error}") from None
        path = self.find_panoptic(get(entry, "file_name", str))
        return MaskFile(str(path), partial(decode_panoptic, classes))

    def find_panoptic(self, name: str) -> Path:
        """The PNG file of a panoptic annotation: in the folder named after the JSON file, or below that of the file."""
        if self.panoptic is None:
            beside = self.path.with_suffix("")
            self.panoptic = ImageFinder(beside if store.is_folder(beside) else self.path.parent)
        return self.panoptic.find(name)

    def describe(self) -> Iterator[str]:
        """Sentences about what was decided."""
        if self.num_crowds:
            chosen = "ignored" if self.options.crowd == "ignore" else "drawn as their class (import.crowd=ignore: not)"
            yield f"{self.path.name}: {self.num_crowds} regions of many objects (iscrowd) are {chosen}."
        if self.num_boxes:
            boxes = format_subject(self.num_boxes, "annotation is a box", "annotations are boxes")
            yield f"{self.path.name}: {boxes} without an outline, drawn as a rectangle."


def _is_key(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def read_runs(value: dict[str, Any]) -> Runs:
    """Run lengths as they are in JSON, compressed or not.

    Raises:
        EntryError: if they are neither.
    """
    size = value.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise EntryError("segmentation must have size: [height, width]")
    counts = value.get("counts")
    if isinstance(counts, str):
        return Runs(counts, Size(*size))
    if not isinstance(counts, list) or not all(type(count) is int and 0 <= count < 2**40 for count in counts):
        raise EntryError("counts must be text or a list of whole numbers of at least 0")
    return Runs(np.array(counts, np.int64), Size(*size))


def decode_panoptic(classes: dict[int, int], path: str, max_pixels: int) -> NDArray[np.int32]:
    """The class of every pixel of a panoptic PNG: a segment's id is red + 256 green + 65536 blue; 0 is nothing.

    Raises:
        DataError: if the file cannot be read, or has a segment that the JSON file lacks.
    """
    if Path(path).suffix.lower() != ".png":
        raise DataError(f"{path}: panoptic segments are PNG files.")
    pixels = read_image(path, max_pixels=max_pixels)
    segments, inverse, counts = np.unique(
        pixels.astype(np.uint32) @ np.array([1, 256, 65536], np.uint32), return_inverse=True, return_counts=True
    )
    unknown = [number for number, each in enumerate(segments.tolist()) if each and each not in classes]
    if unknown:
        first = unknown[0]
        raise DataError(
            f"{path}: segment {segments[first]} ({counts[first]} pixels) is not in segments_info. Export it again."
        )
    table = np.array([classes.get(each, UNLABELLED) for each in segments.tolist()], np.int32)
    return table[inverse].reshape(pixels.shape[:2])
