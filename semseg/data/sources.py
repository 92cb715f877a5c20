"""Stage 1 for a whole data set: the records of each split, the classes and the label map. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from semseg.config import DataConfig, SplitConfig
from semseg.data.classes import ClassTable, LabelMap, ade20k_classes, camvid_classes
from semseg.data.records import Record, records_from_folders, records_from_odgt, split_by_hash
from semseg.data.scenes import make_scenes
from semseg.errors import ConfigError, DataError

BUILT_IN_CLASSES = {"ade20k": ade20k_classes, "camvid": camvid_classes}


class DataSource:
    """A data set on disk, as `data` in the configuration describes it.

    Making one reads no images. A data set with `data.make` is drawn first if it is not there.

    Raises:
        ConfigError: if the classes cannot be told from the configuration.
        DataError: if files of the class table are missing or broken.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.root = Path(config.root).expanduser()
        if config.make is not None:
            make_scenes(self.root, num_train=config.make.num_train, num_val=config.make.num_val, seed=config.make.seed)
        self.classes = class_table(config, self.root)
        self.label_map = LabelMap(self.classes.num_classes, config.first_id, config.ignore)
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
        place: SplitConfig = getattr(self.config, split)
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
        place: SplitConfig = getattr(self.config, split)
        has_files = bool(place.list or place.images)
        records = self._read_place(split, place if has_files else self.config.train, problems)
        is_cut = self.config.val_fraction > 0 and not (self.config.val.list or self.config.val.images)
        if is_cut and split in ("train", "val"):
            kept, held_out = split_by_hash(records, self.config.val_fraction, self.root)
            records = held_out if split == "val" else kept
        if not records and not problems:
            raise DataError(f"data.{split}: no images found below {self.root}.")
        return records

    def _read_place(self, split: str, place: SplitConfig, problems: list[str] | None) -> list[Record]:
        hint = self.config.hint
        if place.list:
            return records_from_odgt(self.root / place.list, self.root, hint=hint, problems=problems)
        if not (place.images and place.masks):
            raise ConfigError(f"data.{split}: images={place.images} needs masks too: data.{split}.masks=<folder>.")
        return records_from_folders(self.root / place.images, self.root / place.masks, hint=hint, problems=problems)


def class_table(config: DataConfig, root: Path) -> ClassTable:
    """The classes: built in, from a CSV file (below the root or not), or numbered.

    Raises:
        ConfigError: if neither data.classes nor data.num_classes is set, or they disagree.
        DataError: if the file is missing or broken.
    """
    if config.classes is None:
        if config.num_classes is None:
            raise ConfigError("data.num_classes must be set, or data.classes=<CSV file with index,name,R,G,B>.")
        return ClassTable.generated(numbered(config.num_classes))
    built_in = BUILT_IN_CLASSES.get(config.classes)
    table = built_in() if built_in else ClassTable.from_csv(root / Path(config.classes).expanduser())
    if config.num_classes not in (None, table.num_classes):
        raise ConfigError(
            f"data.num_classes={config.num_classes}, but data.classes={config.classes} has {table.num_classes}. "
            "Set one of them to null."
        )
    return table


def numbered(num_classes: int) -> Sequence[str]:
    """Names for classes that have none."""
    return [f"class {index}" for index in range(num_classes)]
