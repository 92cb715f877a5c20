"""Stage 1 for a whole data set: the records of each split, the classes and the label map. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from semseg.config import DataConfig, SplitConfig
from semseg.data.classes import ClassTable, ColourIds, LabelMap, built_in_classes
from semseg.data.records import (
    Naming,
    Record,
    records_from_folders,
    records_from_odgt,
    records_from_table,
    split_by_hash,
)
from semseg.data.scenes import make_scenes
from semseg.errors import ConfigError, DataError

BUILT_IN_CLASSES = ("ade20k", "camvid", "cityscapes", "voc2012", "cocostuff")


class DataSource:
    """A data set on disk, as `data` in the configuration describes it.

    Making one reads no images. A data set with `data.make` is drawn first if it is not there.

    Raises:
        ConfigError: if the classes cannot be told from the configuration.
        DataError: if files of the class table are missing or broken.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.root = Path.cwd() if config.images else Path(config.root).expanduser()
        if config.make is not None:
            make_scenes(self.root, num_train=config.make.num_train, num_val=config.make.num_val, seed=config.make.seed)
        self.classes = class_table(config, self.root)
        self.label_map = label_map(config, self.classes)
        self._records: dict[str, list[Record]] = {}

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

    def _read(self, split: str, problems: list[str] | None = None) -> list[Record]:
        if not self.has(split):
            raise DataError(f"data.{split}: set data.{split}.list, or data.{split}.images and data.{split}.masks.")
        place = self._place(split)
        has_files = bool(place.list or place.images)
        records = self._read_place(split, place if has_files else self._place("train"), problems)
        val = self._place("val")
        is_cut = self.config.val_fraction > 0 and not (val.list or val.images)
        if is_cut and split in ("train", "val"):
            kept, held_out = split_by_hash(records, self.config.val_fraction, self.root)
            records = held_out if split == "val" else kept
        if not records and not problems:
            raise DataError(f"data.{split}: no images found below {self.root}.")
        return records[: self.config.limit]

    def _place(self, split: str) -> SplitConfig:
        place: SplitConfig = getattr(self.config, split)
        if self.config.images and (split == "train" or place == self.config.train):
            return replace(place, list=None, images=self.config.images, masks=self.config.masks)
        return place

    def _read_place(self, split: str, place: SplitConfig, problems: list[str] | None) -> list[Record]:
        hint = self.config.hint
        if place.list and Path(place.list).suffix.lower() in (".csv", ".jsonl"):
            return records_from_table(self.root / place.list, self.root, split, hint=hint, problems=problems)
        if place.list:
            return records_from_odgt(self.root / place.list, self.root, hint=hint, problems=problems)
        if not (place.images and place.masks):
            raise ConfigError(f"data.{split}: images={place.images} needs masks too: data.{split}.masks=<folder>.")
        stems = self.root / place.stems if place.stems else None
        naming = Naming(self.config.image_suffix, self.config.mask_suffix, stems)
        folders = (self.root / Path(folder).expanduser() for folder in (place.images, place.masks))
        return records_from_folders(*folders, naming=naming, hint=hint, problems=problems)


def class_table(config: DataConfig, root: Path) -> ClassTable:
    """The classes: built in, from a file (below the root or not), or numbered.

    Raises:
        ConfigError: if neither data.classes nor data.num_classes is set, or they disagree.
        DataError: if the file is missing or broken.
    """
    if config.classes is None:
        if config.num_classes is None:
            raise ConfigError("data.num_classes must be set, or data.classes=<CSV file with index,name,R,G,B>.")
        return ClassTable.generated(numbered(config.num_classes))
    is_built_in = config.classes in BUILT_IN_CLASSES
    table = (
        built_in_classes(config.classes)
        if is_built_in
        else ClassTable.from_file(root / Path(config.classes).expanduser())
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
