"""Stage 1 for a whole data set: the records of each split, the classes and the label map. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from semseg.config.schema import SPLITS, DataConfig, SplitConfig
from semseg.data import store
from semseg.data.classes import ClassTable, built_in_classes
from semseg.data.headers import Header
from semseg.data.label_map import ColourIds, LabelMap
from semseg.data.orientation import Evidence, evidence_of, labels_are_upright, settled, told
from semseg.data.records import (
    Naming,
    Record,
    headers_of,
    mask_headers_of,
    records_from_folders,
    records_from_odgt,
    records_from_table,
    split_by_hash,
    split_named,
)
from semseg.data.scenes import make_scenes
from semseg.errors import ConfigError, DataError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
BUILT_IN_CLASSES = ("ade20k", "camvid", "cityscapes", "voc2012", "cocostuff")


class Orientations(NamedTuple):
    """What is known of the photographs of a split that EXIF turns."""

    text: str = ""  # a sentence; empty: there are none
    is_mixed: bool = False  # some labels lie on the stored pixels, some on the upright picture, as their sizes show
    problem: str = ""  # why it is not known on which the others lie


class DataSource:
    """A data set on disk, as `data` in the configuration describes it.

    Making one reads no images. A data set with `data.make` is drawn first if it is not there.

    Raises:
        ConfigError: if the classes cannot be told from the configuration.
        DataError: if files of the class table are missing or broken.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.root = Path.cwd() if config.images else store.path_of(config.root)
        if config.make is not None:
            make_scenes(self.root, num_train=config.make.num_train, num_val=config.make.num_val, seed=config.make.seed)
        self.classes = class_table(config, self.root)
        self.label_map = label_map(config, self.classes)
        self._records: dict[str, list[Record]] = {}
        self.orientations: dict[str, Orientations] = {}  # of each split that was surveyed
        self._unused: dict[str, store.Unused] = {}

    def records(self, split: str) -> list[Record]:
        """Records of "train", "val" or "test"; read on the first call.

        Raises:
            DataError: if the split is not configured, its files are missing, or it is empty.
        """
        if split not in self._records:
            self._records[split] = self._read(split)
        return self._records[split]

    def has(self, split: str) -> bool:
        """Whether the configuration says where `split` is."""
        place = self._place(split)
        return bool(place.list or place.images) or (split == "val" and self.config.val_fraction > 0)

    def survey(self, split: str) -> tuple[list[Record], list[str]]:
        """Records of a split without those that are in any way wrong, and what is wrong with each of them.

        Raises:
            DataError: if the split is not configured, or a list or folder is missing.
        """
        problems: list[str] = []
        return self._read(split, problems), problems

    def unused(self, split: str) -> str:
        """A sentence that counts the files of a split's folders which are neither images nor masks; empty if none are.

        Folders that the split shares with train are those of train. Call it after `records` or `survey`.
        """
        found = self._unused.get(split)
        if not found or not found.count:
            return ""
        names = found.words(self.root)
        return f"{split}: {found.count} files or folders below {self.root} are not used: {names}."

    def split_folders(self) -> dict[str, str]:
        """Keys that use the folders of splits which lie side by side in the images of train; none if there are none.

        They are looked for where train is a folder and no folder is set for val: val would be cut from all of them.
        """
        place, val = self._place("train"), self._place("val")
        if place.list or place.stems or val.list or val.images or not (place.images and place.masks):
            return {}
        names = store.names_in(self._path(place.images), store.Unused())
        found = {split: name for name in names if (split := split_named(name))}
        if len(found) < 2 or "train" not in found:
            return {}
        places = {"images": place.images, "masks": place.masks}
        keys = {
            f"data.{split}.{key}": f"{folder}/{name}" for split, name in found.items() for key, folder in places.items()
        }
        return keys | ({"data.images": "null", "data.masks": "null"} if self.config.images else {})

    def _read(self, split: str, problems: list[str] | None = None) -> list[Record]:
        if not self.has(split):
            raise DataError(f"data.{split}: set data.{split}.list, or data.{split}.images and data.{split}.masks.")
        place = self._place(split)
        has_files = bool(place.list or place.images)
        if has_files:
            self._unused[split] = store.Unused()
        place = place if has_files else self._place("train")
        records = self._read_place(split, place, problems)
        records = self._settle_orientations(split, place, records, is_survey=problems is not None)
        val = self._place("val")
        is_cut = self.config.val_fraction > 0 and not (val.list or val.images)
        if is_cut and split in ("train", "val"):
            kept, held_out = split_by_hash(records, self.config.val_fraction, self.root)
            if split == "val":
                self.orientations[split] = Orientations()  # those of train
            records = held_out if split == "val" else kept
        if not records and not problems:
            raise DataError(f"data.{split}: no images found below {self.root}.")
        return records[: self.config.limit]

    def _settle_orientations(
        self, split: str, place: SplitConfig, records: Sequence[Record], *, is_survey: bool
    ) -> list[Record]:
        """The records with the grid of their labels, where the image is turned by EXIF.

        Raises:
            DataError: if that cannot be known; a survey says so in `orientations` instead.
        """
        records, found, headers = self._evidence(place, records)
        problem, is_upright = "", False
        try:
            is_upright = labels_are_upright(
                self.config.label_orientation, found, lambda: self._evidence_elsewhere(split), split
            )
        except DataError as error:
            if not is_survey:
                raise
            problem = str(error)
        is_mixed = bool(found.stored and found.upright)
        self.orientations[split] = Orientations(told(found, upright=is_upright), is_mixed, problem)
        return settled(records, headers, upright=is_upright)

    def _evidence(
        self, place: SplitConfig, records: Sequence[Record]
    ) -> tuple[list[Record], Evidence, dict[str, Header]]:
        """Records with their orientation, what their sizes show, and the headers of turned images and their masks."""
        if place.list and not is_table(place.list) and self.config.label_orientation != "stored":
            headers = headers_of(records, self.root)  # an odgt list has sizes, but no orientations
            records = [
                record._replace(orientation=headers[record.image].orientation) if record.image in headers else record
                for record in records
            ]
        turned = [record for record in records if record.orientation != 1 and record.label]
        if not turned:
            return list(records), Evidence(), {}
        headers = headers_of(turned, self.root) | mask_headers_of(turned, self.root)
        return list(records), evidence_of(turned, headers), headers

    def _evidence_elsewhere(self, split: str) -> Evidence:
        """What the sizes of the other splits show."""
        found = Evidence()
        for other in SPLITS:
            place = self._place(other)
            if other == split or not (place.list or place.images):
                continue
            try:
                records = self._read_place(other, place, [])
            except (DataError, ConfigError):
                continue  # is told when that split is asked for
            more = self._evidence(place, records)[1]
            found = Evidence(found.stored + more.stored, found.upright + more.upright)
        return found

    def _place(self, split: str) -> SplitConfig:
        place: SplitConfig = getattr(self.config, split)
        if self.config.images and (split == "train" or place == self.config.train):
            return replace(place, list=None, images=self.config.images, masks=self.config.masks)
        return place

    def _read_place(self, split: str, place: SplitConfig, problems: list[str] | None) -> list[Record]:
        hint = self.config.hint
        if place.list and is_table(place.list):
            return records_from_table(self._path(place.list), self.root, split, hint=hint, problems=problems)
        if place.list:
            return records_from_odgt(self._path(place.list), self.root, hint=hint, problems=problems)
        if not (place.images and place.masks):
            raise ConfigError(f"data.{split}: images={place.images} needs masks too: data.{split}.masks=<folder>.")
        stems = self._path(place.stems) if place.stems else None
        naming = Naming(self.config.image_suffix, self.config.mask_suffix, stems)
        folders = (self._path(folder) for folder in (place.images, place.masks))
        unused = self._unused.get(split)
        return records_from_folders(*folders, naming=naming, hint=hint, problems=problems, unused=unused)

    def _path(self, path: str) -> Path:
        """A path of the configuration, which may be relative to the root."""
        return store.path_of(self.root / store.path_of(path))


def require_masks(split: str, records: Sequence[Record]) -> None:
    """Refuse a split that cannot be scored.

    Raises:
        DataError: if an image has no mask.
    """
    without = [record for record in records if record.label is None]
    if without:
        raise DataError(
            f"{without[0].origin}: {without[0].image} has no mask, so it cannot be scored ({len(without)} of "
            f"{len(records)} images of data.{split} have none). Add the masks, remove these images, or do without the "
            f"split: data.{split}.list=null data.{split}.images=null."
        )


def split_folders_words(keys: dict[str, str]) -> str:
    """What `DataSource.split_folders` found, in a sentence."""
    given = " ".join(f"{key}={value}" for key, value in keys.items())
    return (
        f"the images of train lie in folders of several splits, all of which train uses. To use each as named: {given}"
    )


def is_table(name: str) -> bool:
    """Whether a list is a table of columns, or of JSON lines with columns; else it is an odgt list."""
    return Path(name).suffix.lower() in TABLE_SUFFIXES


def class_table(config: DataConfig, root: Path) -> ClassTable:
    """The classes: built in, from a file (below the root or not), or numbered.

    Raises:
        ConfigError: if neither data.classes nor data.num_classes is set, or they disagree.
        DataError: if the file is missing or broken.
    """
    if config.classes is None:
        if config.num_classes is None:
            raise ConfigError("data.num_classes must be set, or data.classes=<CSV file with index,name,R,G,B>.")
        return ClassTable.from_names(numbered(config.num_classes))
    is_built_in = config.classes in BUILT_IN_CLASSES
    table = (
        built_in_classes(config.classes)
        if is_built_in
        else ClassTable.from_file(store.path_of(root / store.path_of(config.classes)))
    )
    if config.num_classes not in (None, table.num_classes):
        raise ConfigError(
            f"data.num_classes={config.num_classes}, but data.classes={config.classes} has {table.num_classes}. "
            "Set one of them to null."
        )
    return table


def label_map(config: DataConfig, classes: ClassTable) -> LabelMap:
    """What the ids, or the colours, of mask files mean.

    Raises:
        ConfigError: if the configuration contradicts itself.
    """
    ids = None
    if config.map is not None:
        ids = {int(raw_id): None if index is None else int(index) for raw_id, index in config.map.items()}
    plain = LabelMap(classes.num_classes, config.first_id, config.ignore, ids)
    always = config.mask_type == "colors"
    has_file = config.classes is not None and config.classes not in BUILT_IN_CLASSES
    if not always and (config.mask_type == "ids" or not has_file or len(set(classes.palette)) < classes.num_classes):
        return plain
    raw_ids = plain.class_ids
    unscored = [(red, green, blue) for red, green, blue in config.ignore_colors]
    colours = ColourIds(classes.palette, raw_ids, unscored, always=always)
    return LabelMap(classes.num_classes, config.first_id, config.ignore, ids, colours)


def numbered(num_classes: int) -> Sequence[str]:
    """Names for classes that have none."""
    return [f"class {index}" for index in range(num_classes)]
