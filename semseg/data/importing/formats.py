"""The table of formats: which an export has, as its files show, and the reader of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from semseg.config.schema import ImportConfig
from semseg.data import store
from semseg.data.importing.coco import find_coco_files, read_coco
from semseg.data.importing.image_finder import ImageFinder
from semseg.data.importing.label_studio import find_label_studio_files, read_label_studio
from semseg.data.importing.labelme import find_labelme_files, read_labelme
from semseg.data.importing.model import Export
from semseg.data.importing.roboflow import find_class_files, read_roboflow
from semseg.data.importing.voc import LABEL_MAP, MASK_FOLDER, is_voc_folder, read_voc
from semseg.data.importing.yolo import is_yolo_file, read_yolo
from semseg.errors import ConfigError, DataError

YAML_SUFFIXES = (".yaml", ".yml")
Found = list[Path]  # the files, or the folder, that an export of a format is read from


class Listing(NamedTuple):
    """What recognises a format: a folder, and the files in it that may hold annotations."""

    root: Path
    files: list[Path]
    is_file: bool = False  # whether the export is one file


class Format(NamedTuple):
    """A format of annotation tools."""

    title: str
    find: Callable[[Listing], Found]  # empty if the export has another format
    read: Callable[[Path, Found, ImageFinder, ImportConfig], Export]
    holds: str  # for messages: what an export of this format has
    options: tuple[str, ...] = ()  # fields of ImportConfig that it reads and some other formats do not


def find_voc_folders(listing: Listing) -> Found:
    """The folder with masks in colours: the export itself, or the one folder in it that has them."""
    if len(listing.files) == 1 and listing.is_file and listing.files[0].name != LABEL_MAP:
        return []
    if is_voc_folder(listing.root):
        return [listing.root]
    below = [listing.root / name for name in store.list_folder(listing.root, store.UnusedFiles())]
    found = [path for path in below if store.is_folder(path) and is_voc_folder(path)]
    return found if len(found) == 1 else []


TOOL_FORMATS = {
    "coco": Format(
        "COCO JSON",
        lambda listing: find_coco_files(listing.files),
        read_coco,
        "a JSON file with images, annotations, categories",
        options=("overlaps", "crowd", "boxes"),
    ),
    "label_studio": Format(
        "Label Studio JSON",
        lambda listing: find_label_studio_files(listing.files),
        read_label_studio,
        "a JSON file with a list of tasks",
        options=("overlaps",),
    ),
    "labelme": Format(
        "LabelMe",
        lambda listing: find_labelme_files(listing.files),
        read_labelme,
        "JSON files with shapes and imagePath",
        options=("overlaps", "line_width"),
    ),
    "roboflow": Format(
        "Roboflow, semantic segmentation",
        lambda listing: find_class_files(listing.files),
        lambda root, found, finder, options: read_roboflow(root, found, options),
        "_classes.csv with Pixel Value, Class",
    ),
    "voc": Format(
        'CVAT "Segmentation mask" or Pascal VOC',
        find_voc_folders,
        lambda root, found, finder, options: read_voc(found[0], finder, options),
        f"{MASK_FOLDER} and {LABEL_MAP}",
    ),
    "yolo": Format(
        "YOLO",
        lambda listing: [path for path in listing.files if path.suffix.lower() in YAML_SUFFIXES and is_yolo_file(path)],
        lambda root, found, finder, options: read_yolo(root, require_one(found), finder, options),
        "a YAML file with names and train",
        options=("overlaps", "boxes"),
    ),
}


class FoundExport(NamedTuple):
    """An export whose format is known."""

    format: str  # a name of TOOL_FORMATS
    root: Path
    files: Found

    @property
    def title(self) -> str:
        return TOOL_FORMATS[self.format].title

    def read(self, options: ImportConfig) -> Export:
        """Read the annotations, and find their images.

        Raises:
            ConfigError: if an option is for other formats, or its folder does not exist.
            DataError: if the export cannot be read at all; entries that cannot be read are its problems.
        """
        self._refuse_other_options(options)
        images = None if options.images is None else store.resolve_path(options.images)
        if images is not None and not store.is_folder(images):
            raise ConfigError(f"import.images={options.images}: there is no such folder.")
        return TOOL_FORMATS[self.format].read(self.root, self.files, ImageFinder(self.root, images), options)

    def _refuse_other_options(self, options: ImportConfig) -> None:
        """Refuse options that differ from their default and that this format does not read."""
        for name in sorted({name for each in TOOL_FORMATS.values() for name in each.options}):
            value = getattr(options, name)
            if name in TOOL_FORMATS[self.format].options or value == getattr(ImportConfig(), name):
                continue
            titles = [each.title for each in TOOL_FORMATS.values() if name in each.options]
            raise ConfigError(f"import.{name}={value}: has no effect on {self.title}. It is for {', '.join(titles)}.")


def list_export(path: Path) -> Listing:
    """The files of an export that may hold annotations.

    Raises:
        DataError: if there is no such file or folder.
    """
    if store.is_folder(path):
        suffixes = (".json", ".csv", *YAML_SUFFIXES)
        files = [each for each in store.list_files_below(path) if each.suffix.lower() in suffixes]
        return Listing(path, files)
    if not store.is_file(path):
        raise DataError(f"input={path}: there is no such file or folder.")
    return Listing(path.parent, [path], is_file=True)


def find_exports(path: Path) -> list[FoundExport]:
    """The formats that the files of a folder, archive or file have; normally one.

    Raises:
        DataError: if there is no such file or folder.
    """
    listing = list_export(path)
    found = ((name, each.find(listing)) for name, each in TOOL_FORMATS.items())
    return [FoundExport(name, listing.root, files) for name, files in found if files]


def choose_export(path: Path, name: str) -> FoundExport:
    """The export at a path.

    Args:
        name: import.format.

    Raises:
        DataError: if it has no format that can be read, or several.
    """
    found = find_exports(path)
    if name != "auto":
        chosen = [each for each in found if each.format == name]
        if not chosen:
            tool = TOOL_FORMATS[name]
            raise DataError(f"input={path}: is no export of {tool.title}, which has {tool.holds}.")
        return chosen[0]
    if not found:
        known = "; ".join(f"{each.title}: {each.holds}" for each in TOOL_FORMATS.values())
        archive = next(iter(sorted(path.glob(f"*{store.ARCHIVE_SUFFIX}"))), None)
        packed = f" To read {archive.name} in it, give input={archive}." if archive is not None else ""
        raise DataError(f"input={path}: no format of an annotation tool is recognised.{packed} Known are {known}.")
    if len(found) > 1:
        titles = " and ".join(each.title for each in found)
        choices = " or ".join(f"import.format={each.format}" for each in found)
        raise DataError(f"input={path}: may be {titles}. Choose one: {choices}.")
    return found[0]


def require_one(files: Sequence[Path]) -> Path:
    """The only file.

    Raises:
        DataError: if there are several.
    """
    if len(files) > 1:
        raise DataError(f"{files[0]} and {files[1]}: both describe a data set of YOLO. Choose one: input=<file>.")
    return files[0]
