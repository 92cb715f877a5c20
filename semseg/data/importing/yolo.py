"""YOLO polygons (data.yaml and a text file for each image), and Ultralytics' masks (`masks_dir`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from semseg.config.schema import SPLITS, ImportConfig
from semseg.data import store
from semseg.data.folders import IMAGE_SUFFIXES, leave_out_arrays_beside_images
from semseg.data.importing.files import EntryError, find_other_case, find_split, read_text_lines
from semseg.data.importing.image_finder import EndIndex, ImageFinder
from semseg.data.importing.model import IGNORED_VALUE, AnnotatedImage, Annotation, Export, MaskFile, RelativePolygon
from semseg.data.label_map import IGNORED, MAX_CLASSES
from semseg.data.labels import read_label
from semseg.data.list_files import SPLIT_NAMES
from semseg.data.records import Problem
from semseg.errors import DataError, one_line
from semseg.system.text import format_quantity, format_subject

MAX_YAML_BYTES = 2**18
SLACK = 0.02  # coordinates may lie outside of 0..1 by this much: rounding, and points at the edge


def is_yolo_file(path: Path) -> bool:
    """Whether a YAML file describes a data set of YOLO."""
    try:
        content = read_yaml(path)
    except DataError:
        return False
    return "names" in content and any(key in content for names in SPLIT_NAMES.values() for key in names)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file with all scalars as text: unquoted `on` and `yes` are names of classes.

    Raises:
        DataError: if it cannot be read, or is no mapping.
    """
    try:
        content = store.read_file(path)
        if len(content) > MAX_YAML_BYTES:
            raise DataError(f"{path}: has {len(content)} bytes, too many for a description of a data set.")
        found = yaml.BaseLoader(content.decode("utf-8-sig")).get_single_data()  # makes texts, lists and mappings only
    except (OSError, UnicodeDecodeError, RecursionError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, DataError):
            raise
        reason = one_line(error)
        raise DataError(f"{path}: cannot be read as YAML ({reason}). Export it again.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: must hold keys and values, such as names: [cat, dog].")
    return found


def read_yolo(root: Path, file: Path, finder: ImageFinder, options: ImportConfig) -> Export:
    """A data set of YOLO.

    Raises:
        DataError: if its description is wrong, or a folder is missing.
    """
    content = read_yaml(file)
    items: list[AnnotatedImage | Problem] = []
    reader = YoloReader(file, content, finder, options)
    opened = [
        (split, reader.open_entry(split, entry, content.get("path")))
        for split in SPLITS
        for entry in list_entries(content, split)
    ]  # all, before the first image is looked for: each notes the names of its images
    for split, entry in opened:
        items += [reader.read_image(path, split) for path in reader.find_images(entry, split)]
    if not items:
        raise DataError(f"{file}: names no images: train, val and test are missing or empty.")
    if reader.num_unlabelled == len(items):
        example = swap_folder(Path(reader.last), "labels").with_suffix(".txt")
        raise DataError(f"{file}: no image has a label file, such as {example}. Are the labels in another folder?")
    return Export("YOLO", reader.names, None, items, tuple(reader.describe()), smaller_on_top=True)


def read_names(file: Path, content: dict[str, Any]) -> tuple[str, ...]:
    """The names of the classes: a list, or a mapping of their numbers.

    Raises:
        DataError: if they are neither, have gaps, or are not as many as `nc` says.
    """
    names = content["names"]
    if isinstance(names, dict):
        try:
            names = {int(key): name for key, name in names.items()}
        except ValueError:
            raise DataError(f"{file}: names must be a list, or a mapping such as 0: cat.") from None
        if sorted(names) != list(range(len(names))):
            raise DataError(f"{file}: the numbers of names must be 0, 1, 2, ... without gaps.")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{file}: names must be a list of texts, or a mapping such as 0: cat.")
    if len(names) > MAX_CLASSES:
        raise DataError(f"{file}: has {len(names)} names; at most {MAX_CLASSES} classes are possible.")
    if "nc" in content and content["nc"] != str(len(names)):
        raise DataError(f"{file}: nc={content['nc']!s:.20}, but there are {len(names)} names. Correct one of them.")
    return tuple(names)


def count_keypoint_values(file: Path, content: dict[str, Any]) -> int:
    """The numbers that follow the box in a line of a data set of poses (`kpt_shape`); 0 for others.

    Raises:
        DataError: if kpt_shape is wrong.
    """
    shape = content.get("kpt_shape")
    if not shape:
        return 0
    try:
        num_points, num_values = map(int, shape if isinstance(shape, list) else ())
    except (TypeError, ValueError):
        raise DataError(f"{file}: kpt_shape must be the numbers of points and of their values: [17, 3].") from None
    return num_points * num_values


def list_entries(content: dict[str, Any], split: str) -> list[str]:
    """The folders and lists of a split."""
    entries = next((content[key] for key in SPLIT_NAMES[split] if content.get(key)), [])
    return [str(entry) for entry in (entries if isinstance(entries, list) else [entries])]


class Entry(NamedTuple):
    """An entry of `train`, `val` or `test`, read: a folder of images, or a list of their names."""

    path: Path | None  # None: there is no such folder or list
    images: Sequence[Path] = ()  # of a folder
    names: Sequence[str] = ()  # the lines of a list


class YoloReader:
    """Images and labels of a data set of YOLO.

    Args:
        file: data.yaml.
        content: of the file.

    Raises:
        DataError: if names or kpt_shape are wrong.
    """

    def __init__(self, file: Path, content: dict[str, Any], finder: ImageFinder, options: ImportConfig) -> None:
        self.file, self.finder, self.options = file, finder, options
        self.names = read_names(file, content)
        # Of Ultralytics' semantic task; None: labels are text files.
        self.masks_dir = content["masks_dir"] if isinstance(content.get("masks_dir"), str) else None
        self.num_keypoint_values = count_keypoint_values(file, content)
        self.num_boxes, self.num_unlabelled = 0, 0
        self.missing: list[str] = []  # entries of `test` that do not exist
        self.last = file  # image that was read
        self.lists: set[Path] = set()  # of images
        self.used: set[Path] = set()  # label files of images
        self.unused = store.UnusedFiles()  # arrays beside images

    # ---- images

    def open_entry(self, split: str, entry: str, base: Any) -> Entry:
        """Read an entry of `train`, `val` or `test`, and note the names of its images.

        Roboflow names a test split that it has not exported, too; so that one may be missing.

        Raises:
            DataError: if it does not exist, cannot be read, or is a folder without an image.
        """
        path = self.resolve(entry, base)
        if path is None and split == "test":
            self.missing.append(entry)
            return Entry(None)
        if path is None:
            raise DataError(
                f"{self.file}: {split}: there is no {entry} below {self.file.parent}. Correct it, relative to the "
                "folder of this file, or remove the line."
            )
        if store.is_folder(path):
            found = [each for each in store.list_files_below(path) if each.suffix.lower() in IMAGE_SUFFIXES]
            if not found:
                raise DataError(f"{self.file}: {split}: there is no image in {path}.")
            found = leave_out_arrays_beside_images(found, self.unused)
            self.finder.expect(map(self.name_image, found))
            return Entry(path, images=found)
        self.lists.add(path)
        names = [line.strip() for line in read_text_lines(path)]
        self.finder.expect(names)
        return Entry(path, names=names)

    def find_images(self, entry: Entry, split: str) -> list[Path]:
        """The images of an entry.

        Raises:
            DataError: naming the line of a list whose image is not found.
        """
        images = list(entry.images)
        for number, name in enumerate(entry.names, start=1):
            try:
                images += [self.finder.find(name, split)] if name else []
            except EntryError as error:
                raise DataError(f"{entry.path}:{number}: {error}.") from None
        return images

    def resolve(self, entry: str, base: Any) -> Path | None:
        """The folder or list of an entry, which never leads out of the export; None if it does not exist.

        It is relative to `path`, which is relative to a folder of the user who wrote it; to the YAML file; or, as
        Roboflow writes ../train/images, to the YAML file without the dots.
        """
        folder, plain = self.file.parent, PurePosixPath(entry.replace("\\", "/"))
        is_absolute = plain.is_absolute() or PureWindowsPath(entry).is_absolute()
        parts = [part for part in plain.parts if part not in ("..", ".", "/")]
        bases = list(dict.fromkeys([self.finder.folder, folder]))
        if isinstance(base, str):
            named = [part for part in PurePosixPath(base.replace("\\", "/")).parts if part not in ("..", ".", "/")]
            bases[:0] = [folder.joinpath(*named[start:]) for start in range(len(named))]
        for candidate in bases:
            for start in range(len(parts) if is_absolute else 1):
                path = candidate.joinpath(*parts[start:])
                if store.is_folder(path) or store.is_file(path):
                    return path
        return None

    # ---- labels

    def read_image(self, path: Path, split: str) -> AnnotatedImage | Problem:
        """An image and what its label file holds."""
        image = AnnotatedImage(str(path), self.name_image(path), split, None, str(path))
        self.last = path
        if self.masks_dir is not None:
            mask = self.find_mask(path)
            if mask is None:
                return Problem(f"{path}: has no mask {path.stem}.png below {self.masks_dir}.")
            return image._replace(mask=MaskFile(str(mask), partial(read_mask, len(self.names))))
        try:
            label = self.find_label(path, split)
        except EntryError as error:
            return Problem(f"{path}: {error}.")
        if label is None:
            self.num_unlabelled += 1
            return image
        self.used.add(label)
        try:
            annotations = tuple(self.read_label(label))
        except (EntryError, DataError) as error:
            return Problem(str(error))
        return image._replace(annotations=annotations, origin=str(label))

    def find_label(self, image: Path, split: str) -> Path | None:
        """The label file of an image; None if it has none.

        Images below import.images have the labels of the export, and those beside them only if it has none.

        Raises:
            EntryError: if several files may be it, or its name differs in upper and lower case.
        """
        if not image.is_relative_to(self.file.parent) and len(self.labels_of_export):
            return self.labels_of_export.find(image, split)
        beside = swap_folder(image, "labels").with_suffix(".txt")
        found = next((each for each in (beside, image.with_suffix(".txt")) if store.is_file(each)), None)
        if found is None and (similar := find_other_case(beside)):
            raise EntryError(f"its label file is called {similar}: upper and lower case differ. Rename one")
        return found

    @cached_property
    def labels_of_export(self) -> LabelsOfExport:
        """The label files for images that are not in the export."""
        files = (path for path in store.list_files_below(self.file.parent) if path not in self.lists)
        return LabelsOfExport(self.file.parent, files, self.finder)

    def name_image(self, path: Path) -> str:
        base = self.file.parent if path.is_relative_to(self.file.parent) else self.finder.folder
        return path.relative_to(base).as_posix()

    def find_mask(self, path: Path) -> Path | None:
        candidates = (swap_folder(path, str(self.masks_dir)).with_suffix(suffix) for suffix in (".png", ".PNG"))
        return next((candidate for candidate in candidates if store.is_file(candidate)), None)

    def read_label(self, label: Path) -> Iterator[Annotation]:
        """The polygons of a label file.

        Raises:
            EntryError: naming the file and line, if one is wrong.
        """
        for number, line in enumerate(read_text_lines(label), start=1):
            if not line.strip():
                continue
            name = f"line {number}"
            try:
                class_index, *numbers = self.parse_line(line)
            except EntryError as error:
                raise EntryError(f"{label}:{number}: {error}.") from None
            if len(numbers) == 4:
                self.num_boxes += 1
                x, y, width, height = (np.array(numbers) / (1, 1, 2, 2)).tolist()
                numbers = [x - width, y - height, x + width, y - height, x + width, y + height, x - width, y + height]
            ring = np.clip(np.array(numbers, np.float64).reshape(-1, 2), 0, 1)
            yield Annotation(int(class_index), (RelativePolygon(ring),), name)

    def parse_line(self, line: str) -> list[float]:
        """The class and the coordinates of a line, which are fractions of the width and height.

        Raises:
            EntryError: if they are not.
        """
        words = line.split()
        try:
            class_index, *numbers = map(float, words)
        except (ValueError, OverflowError):
            raise EntryError("must be a class and numbers") from None
        if not class_index.is_integer():
            raise EntryError(f"has class {class_index:g}, which is no whole number")
        if not 0 <= class_index < len(self.names):
            raise EntryError(f"has class {class_index:.0f}, but there are {len(self.names)} names")
        if self.num_keypoint_values:
            if len(numbers) != 4 + self.num_keypoint_values:
                raise EntryError(
                    f"has {len(numbers)} numbers, a box with the points of kpt_shape {4 + self.num_keypoint_values}"
                )
            numbers = numbers[:4]
        if not all(-SLACK <= number <= 1 + SLACK for number in numbers):
            raise EntryError("has coordinates outside of 0..1, which are fractions of the width and height")
        if len(numbers) == 4:
            if self.options.boxes == "refuse":
                raise EntryError("is a box: this is a data set for detection. To draw boxes: import.boxes=draw")
        elif len(numbers) < 6 or len(numbers) % 2:
            raise EntryError(f"has {len(numbers)} coordinates, a polygon has an even number of at least 6")
        return [class_index, *numbers]

    def count_unused_labels(self) -> int:
        """The number of label files, in folders `labels` of images that were read, that belong to none of them."""
        folders = {label.parent for label in self.used if "labels" in label.parts}
        files = (each for folder in folders for each in store.list_files_below(folder))
        return sum(is_label(each) and each not in self.used and each.parent in folders for each in files)

    def describe(self) -> Iterator[str]:
        """Sentences about what was decided."""
        if num_unused := self.count_unused_labels():
            yield f"{format_quantity(num_unused, 'label file')} without an image that is read: left out."
        if self.unused.count:
            yield f"{format_quantity(self.unused.count, '.npy file')} beside images of the same names: left out."
        for entry in self.missing:
            yield f"There is no {entry}: its test images are left out."
        if self.num_boxes:
            boxes = format_subject(self.num_boxes, "line is a box", "lines are boxes")
            yield f"{boxes} without an outline, drawn as a rectangle."
        if self.num_unlabelled:
            unlabelled = format_subject(self.num_unlabelled, "image has", "images have")
            yield f"{unlabelled} no label file, which means: no object."


class LabelsOfExport:
    """The label files of an export that have the name of an image, for images below import.images.

    Args:
        root: of the export.
        files: below it.
        finder: has the images.
    """

    def __init__(self, root: Path, files: Iterable[Path], finder: ImageFinder) -> None:
        self.root, self.finder = root, finder
        self.images: EndIndex[Path] = EndIndex()
        self.labels: EndIndex[Path] = EndIndex()
        self.by_case: dict[str, Path] = {}
        for path in finder.paths:
            self.images.add(path, self.parts_of_image(path))
        stems = {path.stem.casefold() for path in finder.paths}
        for path in files:
            if is_label(path) and path.stem.casefold() in stems:
                self.labels.add(path, self.parts_of_label(path))
                self.by_case.setdefault(path.stem.casefold(), path)

    def __len__(self) -> int:
        return len(self.labels)

    def find(self, image: Path, split: str) -> Path | None:
        """The label file whose folders agree best with those of an image; of several, that of the split.

        One that agrees better with another image, or is in a folder of another split, is not its label.

        Raises:
            EntryError: if several agree equally well, or its name differs in upper and lower case.
        """
        found = self.labels.find_best(self.parts_of_image(image))
        split_of = {path: find_split(*path.relative_to(self.root).parts[:-1]) for path in found}
        found = [path for path in found if image in self.images.find_best(self.parts_of_label(path))]
        found = [path for path in found if split_of[path] == split] or [path for path in found if not split_of[path]]
        if len(found) > 1:
            raise EntryError(f"its label file may be {found[0]} or {found[1]}. Rename one, and its image")
        similar = self.by_case.get(image.stem.casefold())
        if not found and similar is not None and similar.stem != image.stem:
            raise EntryError(f"its label file is called {similar.name}: upper and lower case differ. Rename one")
        return found[0] if found else None

    def parts_of_image(self, path: Path) -> list[str]:
        """The parts of the path of an image that those of its label have, too."""
        return [part for part in path.relative_to(self.finder.folder).with_suffix("").parts if part != "images"]

    def parts_of_label(self, path: Path) -> list[str]:
        """The parts of the path of a label file that those of its image have, too."""
        return [part for part in path.relative_to(self.root).with_suffix("").parts if part != "labels"]


def is_label(path: Path) -> bool:
    """Whether a file is the label of an image, by its name; tools write the names of the classes beside them."""
    return path.suffix.lower() == ".txt" and path.name != "classes.txt"


def swap_folder(path: Path, name: str) -> Path:
    """The path with the last folder `images` replaced.

    >>> swap_folder(Path("a/images/train/b.jpg"), "labels").as_posix()
    'a/labels/train/b.jpg'
    """
    parts = list(path.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = name
            break
    return Path(*parts)


def read_mask(num_classes: int, path: str, max_pixels: int) -> NDArray[np.int32]:
    """The class of every pixel of a mask of `masks_dir`; 255 is ignored.

    Raises:
        DataError: if it cannot be read, or has another value.
    """
    raw = read_label(path, max_pixels=max_pixels).astype(np.int32)
    wrong = (raw >= num_classes) & (raw != IGNORED_VALUE) | (raw < 0)
    if wrong.any():
        value = int(raw[wrong][0])
        raise DataError(
            f"{path}: value {value} ({int((raw == value).sum())} pixels) is no class: there are {num_classes} names."
        )
    return np.where(raw == IGNORED_VALUE, np.int32(IGNORED), raw)
