"""Stage 1 for a whole data set: the records of each split, the classes and the label map. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import yaml

from semseg.config.mix import MixPart, read_mix
from semseg.config.overrides import DESCRIPTION_FILE
from semseg.config.schema import BUILT_IN_CLASSES, SPLITS, DataConfig, SplitConfig
from semseg.data import store
from semseg.data.bands import BandOptions, band_options
from semseg.data.classes import ClassTable, built_in_classes
from semseg.data.folders import Naming, read_folder_pairs
from semseg.data.folds import assign_folds, name_group
from semseg.data.header_cache import find_pixel_type, readable_headers
from semseg.data.headers import Header
from semseg.data.label_map import IGNORED, ColourIds, LabelMap
from semseg.data.labels import GreyColours, has_colours
from semseg.data.list_files import find_row_splits, match_split, read_odgt_list, read_table_list
from semseg.data.orientation import (
    Evidence,
    collect_evidence,
    describe_orientations,
    labels_are_upright,
    set_label_orientation,
)
from semseg.data.records import (
    Problem,
    Record,
    check_bad_fraction,
    hint_sentence,
    require_path,
    require_records,
    separate_problems,
    split_by_hash,
    take_evenly,
)
from semseg.data.scenes import make_scenes
from semseg.errors import ConfigError, DataError
from semseg.storage.ranks import print_once

# Overrides with which the paths of lists and folders are relative to the working directory, as data.images is.
ROOT_OF_LISTS = {"data.images": "null", "data.masks": "null", "data.root": "."}
NUM_LOOKED_AT = 64  # masks of a split, to see whether they are coded in colours
MIN_CLASSES = 2  # of a network
MAX_LISTED_CLASSES = 20  # in messages
MAX_NAMED_PROBLEMS = 20  # of a split, with data.on_bad=skip
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")


def find_other_types(bands: BandOptions | None, images: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """A sentence about each set of images whose values are of another type than those of the first set.

    The first readable image of a set decides. Nothing is said of images without ranges of values, of which any type is
    read as 8 bits.

    Args:
        images: key of a set -> paths.
    """
    if bands is None or bands.ranges is None:
        return
    (first, trained), *others = ((key, find_pixel_type(paths)) for key, paths in images.items())
    for key, dtype in others:
        if trained and dtype and dtype != trained:
            yield (
                f"{key}: its images hold {dtype} values, those of {first} {trained} ones. Convert them: the same "
                "number must mean the same in every image."
            )


class Orientations(NamedTuple):
    """What is known of the images of a split that have an EXIF orientation."""

    text: str = ""  # a sentence; empty if there are none
    is_mixed: bool = False  # whether some labels are drawn on the stored and some on the upright image, by their sizes
    problem: str = ""  # why the grid of the other labels is unknown


class DataSource:
    """A data set on disk, as `data` in the configuration describes it.

    Creating one reads no images. A data set with `data.make` is drawn first if it does not exist.

    Args:
        classes: None: as the configuration says.
        is_part: of data.mix, whose only class may be one of several.

    Raises:
        ConfigError: if the configuration does not define the classes.
        DataError: if the class table is missing or broken, or has one class.
    """

    def __init__(self, config: DataConfig, classes: ClassTable | None = None, *, is_part: bool = False) -> None:
        self.config = config
        self.root = Path.cwd() if config.images else store.resolve_path(config.root)
        if config.make is not None:
            make_scenes(self.root, num_train=config.make.num_train, num_val=config.make.num_val, seed=config.make.seed)
        self.classes = load_class_table(config, self.root) if classes is None else classes
        if self.classes.num_classes < MIN_CLASSES and not is_part:
            raise DataError(
                f"data.classes={config.classes}: names one class, and a network needs at least {MIN_CLASSES}. Add that "
                "of the other pixels, such as background."
            )
        make_label_map(config, self.classes)  # whose settings are checked now
        self.bands = band_options(config)  # None: images are 8-bit RGB
        self._pixel_types: dict[str, str] = {}  # by split
        self.orientations: dict[str, Orientations] = {}  # by split, for splits that were read
        self._records: dict[str, list[Record]] = {}
        self._training_records: list[Record] = []  # with those of data.mix, once they were read
        self._parts: list[MixedSource] | None = None  # data.mix, once it was opened
        self._unused: dict[str, store.UnusedFiles] = {}

    @cached_property
    def label_map(self) -> LabelMap:
        """The meaning of the ids, or the colours, of mask files; looks at some of them where both are possible."""
        return make_label_map(self.config, self.classes, self._has_coloured_masks)

    def _has_coloured_masks(self, greys: GreyColours) -> bool:
        """Whether one of some masks is coded in colours: of every split, so that all modes read masks alike."""
        for split in filter(self._is_configured, SPLITS):
            masks = [record.label for record in self._peek(split) if record.label]
            looked_at = take_evenly(masks, NUM_LOOKED_AT)
            if any(has_colours(mask, greys, max_pixels=self.config.max_pixels) for mask in looked_at):
                return True
        return False

    def records(self, split: str) -> list[Record]:
        """Records of "train", "val" or "test"; read on the first call.

        Raises:
            DataError: if the split is not configured, its files are missing or wrong, or it is empty.
        """
        if split not in self._records:
            files = self._files_to_read(split)
            records = self._select(split, files, self._require(split, self._read(split, files)), is_survey=False)
            if not records:
                raise self._empty_split_error(split)
            self._records[split] = records
        return self._records[split]

    def _require(self, split: str, items: Iterable[Record | Problem]) -> list[Record]:
        """The records among the lines and files of a split.

        With data.on_bad=skip, the others are left out and named; else there must be none.

        Raises:
            DataError: with the first problem, or with their number if they are more than data.max_bad allows.
        """
        if self.config.on_bad != "skip":
            return require_records(items)
        records, problems = separate_problems(items)
        if split == "train" or self._is_configured(split):  # of a split that is cut from train, train names them
            for problem in problems[:MAX_NAMED_PROBLEMS]:
                print_once(f"left out: {problem.message}")
            if len(problems) > MAX_NAMED_PROBLEMS:
                print_once(f"left out: {len(problems) - MAX_NAMED_PROBLEMS} more of {split}; mode=check lists them.")
        check_bad_fraction(len(problems), len(records) + len(problems), self.config.max_bad)
        return records

    @property
    def parts(self) -> list[MixedSource]:
        """The further data sets of training (data.mix), opened at the first call.

        Raises:
            ConfigError: if a class of one of them has no counterpart in this data set.
            DataError: if a class table is missing or broken.
        """
        if self._parts is None:
            self._parts = [
                open_part(number, part, self.classes) for number, part in enumerate(read_mix(self.config), start=1)
            ]
        return self._parts

    @property
    def shares(self) -> list[float]:
        """The fraction of the training images that each data set has, this one first; [1.0] without data.mix."""
        shares = [part.share for part in read_mix(self.config)]
        return [1 - sum(shares), *shares]

    def used_records(self, split: str) -> list[Record]:
        """The records that a run reads of a split: `training_records` of "train".

        Raises:
            DataError: as `records`.
        """
        return self.training_records() if split == "train" else self.records(split)

    def training_records(self) -> list[Record]:
        """The records of "train", and behind them those of data.mix; read on the first call.

        Raises:
            DataError: as `records`; the message about another data set begins with its key.
        """
        if not self.config.mix:
            return self.records("train")
        if not self._training_records:
            records = list(self.records("train"))
            for part in self.parts:
                records += part.read_records()
            self._training_records = records
        return self._training_records

    def bands_of(self, split: str) -> BandOptions | None:
        """The bands of the images of a split, all of which must have the type of the first one; None: 8-bit RGB.

        Raises:
            DataError: as `records`.
        """
        if self.bands is None:
            return None
        if split not in self._pixel_types:
            self._pixel_types[split] = find_pixel_type(record.image for record in self.used_records(split))
        return replace(self.bands, dtype=self._pixel_types[split])

    def require_paths(self, split: str) -> None:
        """Check that the list or the folders of a split exist, which takes no time.

        Raises:
            DataError: if the split is not configured, or one of them is missing.
        """
        if split == "train":
            for part in self.parts:
                part.require_paths()
        files, hint = self._files_to_read(split), self._hint_for(split)
        if files.list:
            require_path(store.is_folder(self.root), "data folder", self.root, hint)
            require_path(store.is_file(self._resolve(files.list)), "list of images", self._resolve(files.list), hint)
            return
        for kind, name in (("folder of images", files.images), ("folder of masks", files.masks)):
            if name:
                require_path(store.is_folder(self._resolve(name)), kind, self._resolve(name), hint)

    def has(self, split: str) -> bool:
        """Whether the configuration defines `split`."""
        return self._is_configured(split) or (split == "val" and (self.config.val_fraction > 0 or self._has_fold))

    def survey(self, split: str) -> tuple[list[Record], list[str]]:
        """The records of a split, and a message for each line or file that gives none.

        Raises:
            DataError: if the split is not configured, a list or folder is missing, or it is empty.
        """
        files = self._files_to_read(split)
        records, problems = separate_problems(self._read(split, files))
        records = self._select(split, files, records, is_survey=True, may_be_few=bool(problems))
        if not records and not problems:
            raise self._empty_split_error(split)
        return records, [problem.message for problem in problems]

    def describe_unused(self, split: str) -> str:
        """A sentence that counts the files of a split's folders that are neither image nor mask; empty if none are.

        Folders that the split shares with train count for train. Call it after `records` or `survey`.
        """
        unused = self._unused.get(split)
        if not unused or not unused.count:
            return ""
        names = unused.describe(self.root)
        return f"{split}: not used below {self.root}: {names}."

    def find_named_splits(self) -> dict[str, str]:
        """Overrides that use the splits which folders below the images of train, or rows of its list, are named after.

        They are searched where val has neither folder nor list: val would be cut from all folders, and the rows of
        other splits would not be used. Empty if there are none.
        """
        train, val = self._split_files("train"), self._split_files("val")
        is_val_given = self._has_fold or val.list or val.images or val.stems
        if train.list and is_table_list(train.list) and not is_val_given:
            others = find_row_splits(self._resolve(train.list)) - {"train"}
            used = [split for split in SPLITS if split in others and not self._is_configured(split)]
            return {f"data.{split}.list": train.list for split in used} if "val" in others else {}
        if self._has_fold or train.list or train.stems or val.list or val.images or not (train.images and train.masks):
            return {}
        names = store.list_folder(self._resolve(train.images), store.UnusedFiles())
        folder_of = {split: name for name in names if (split := match_split(name))}
        if len(folder_of) < 2 or "train" not in folder_of:
            return {}
        parents = {"images": train.images, "masks": train.masks}
        keys = {
            f"data.{split}.{key}": f"{parent}/{name}"
            for split, name in folder_of.items()
            for key, parent in parents.items()
        }
        return keys | (ROOT_OF_LISTS if self.config.images else {})

    # ---- reading

    def _is_configured(self, split: str) -> bool:
        files = self._split_files(split)
        return bool(files.list or files.images) and not (split == "val" and self._has_fold)

    def _split_files(self, split: str) -> SplitConfig:
        """Lists and folders of a split as configured."""
        files: SplitConfig = getattr(self.config, split)
        if self.config.images and (split == "train" or files == self.config.train):
            return replace(files, list=None, images=self.config.images, masks=self.config.masks)
        if files.stems and not (files.list or files.images) and split != "train":  # some of the files of train
            train = self._split_files("train")
            return replace(files, images=train.images, masks=files.masks or train.masks)
        return files

    def _hint_for(self, split: str) -> str:
        """data.hint, which names the keys of train where files are missing, with those of a split that has its own."""
        return self.config.hint.replace("data.train.", f"data.{split if self._is_configured(split) else 'train'}.")

    def _files_to_read(self, split: str) -> SplitConfig:
        """Lists and folders that `split` is read from; those of train if it is cut from train.

        Raises:
            DataError: if the split is not configured.
        """
        if not self.has(split):
            raise DataError(f"data.{split}: set data.{split}.list, or data.{split}.images and data.{split}.masks.")
        if not self._is_configured(split):
            return self._split_files("train")
        self._unused[split] = store.UnusedFiles()
        return self._split_files(split)

    def _read(self, split: str, files: SplitConfig) -> Iterator[Record | Problem]:
        hint = self._hint_for(split)
        if files.list and is_table_list(files.list):
            named = split if self._is_configured(split) else "train"  # from whose rows val is cut
            return read_table_list(self._resolve(files.list), self.root, named, hint=hint)
        if files.list:
            return read_odgt_list(self._resolve(files.list), self.root, hint=hint)
        if not (files.images and files.masks):
            raise ConfigError(f"data.{split}: images={files.images} needs masks too: data.{split}.masks=<folder>.")
        stems = self._resolve(files.stems) if files.stems else None
        if self.bands is None:
            naming = Naming(self.config.image_suffix, self.config.mask_suffix, stems)
        else:
            naming = Naming(self.bands.main_suffix, self.config.mask_suffix, stems, self.bands.other_suffixes)
        images, masks = self._resolve(files.images), self._resolve(files.masks)
        return read_folder_pairs(images, masks, naming=naming, hint=hint, unused=self._unused.get(split))

    def _select(
        self,
        split: str,
        files: SplitConfig,
        records: Sequence[Record],
        *,
        is_survey: bool,
        may_be_few: bool = False,
    ) -> list[Record]:
        """The records of `split` among those of its files, with the orientation of their labels.

        With `may_be_few`, all of those that cannot be split into train and val belong to train.
        """
        if split == "train":
            records = self._without_stems_of_val(files, records)
        records = self._resolve_orientations(split, files, records, is_survey=is_survey)
        is_cut = (self.config.val_fraction > 0 or self._has_fold) and not self._is_configured("val")
        if is_cut and split in ("train", "val"):
            try:
                kept, held_out = self._cut(records)
            except DataError:
                if not may_be_few:
                    raise
                kept, held_out = list(records), []
            if split == "val":
                self.orientations[split] = Orientations()  # train reports them
            records = held_out if split == "val" else kept
        return records[: self.config.limit]

    def _without_stems_of_val(self, files: SplitConfig, records: Sequence[Record]) -> Sequence[Record]:
        """The records of train without those that data.val.stems takes from all of its files."""
        val: SplitConfig = self.config.val
        if not val.stems or val.list or val.images or files.stems or self._has_fold:
            return records
        held_out = separate_problems(self._read("val", self._split_files("val")))[0]
        names = {record.image for record in held_out}
        return [record for record in records if record.image not in names]

    def _cut(self, records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
        """The records of train and of val, both of which are read from the files of train."""
        pattern = self.config.group
        if self.config.fold is not None and self.config.folds is not None:
            folds = assign_folds(records, self.split_root, self.config.folds, pattern)
            sides = [
                [
                    record
                    for record, fold in zip(records, folds, strict=True)
                    if (fold == self.config.fold) == is_held_out
                ]
                for is_held_out in (False, True)
            ]
            return sides[0], sides[1]
        groups = None if pattern is None else [name_group(record.image, self.split_root, pattern) for record in records]
        return split_by_hash(records, self.config.val_fraction, self.split_root, groups)

    @property
    def split_root(self) -> Path:
        """The folder below which the paths of images decide their side, or their fold.

        With data.images, `root` is the working directory, on which the sides must not depend.
        """
        return self._resolve(self.config.images) if self.config.images else self.root

    @property
    def _has_fold(self) -> bool:
        """Whether val is a fold of train, whatever else the configuration says of it."""
        return self.config.fold is not None

    def _empty_split_error(self, split: str) -> DataError:
        return DataError(f"data.{split}: no images found below {self.root}.")

    def _resolve(self, path: str) -> Path:
        """A path of the configuration, which may be relative to the root."""
        return store.resolve_path(self.root / store.resolve_path(path))

    # ---- orientation

    def _resolve_orientations(
        self, split: str, files: SplitConfig, records: Sequence[Record], *, is_survey: bool
    ) -> list[Record]:
        """The records with the grid of their labels, for images with an EXIF orientation.

        Raises:
            DataError: if the grid is unknown; a survey records that in `orientations` instead.
        """
        records, evidence, headers = self._collect_evidence(files, records)
        problem, is_upright = "", False
        try:
            is_upright = labels_are_upright(
                self.config.label_orientation, evidence, lambda: self._evidence_of_other_splits(split), split
            )
        except DataError as error:
            if not is_survey:
                raise
            problem = str(error)
        is_mixed = bool(evidence.stored and evidence.upright)
        text = describe_orientations(evidence, is_upright=is_upright)
        self.orientations[split] = Orientations(text, is_mixed, problem)
        return set_label_orientation(records, headers, is_upright=is_upright)

    def _collect_evidence(
        self, files: SplitConfig, records: Sequence[Record]
    ) -> tuple[list[Record], Evidence, dict[str, Header]]:
        """Records with their orientation, what their sizes show, and the headers of rotated images and their masks."""
        if files.list and not is_table_list(files.list) and self.config.label_orientation != "stored":
            # An odgt list has sizes, but no orientations.
            headers = readable_headers((record.image for record in records), self.root)
            records = [
                record._replace(orientation=headers[record.image].orientation) if record.image in headers else record
                for record in records
            ]
        rotated = [record for record in records if record.orientation != 1 and record.label]
        if not rotated:
            return list(records), Evidence(), {}
        headers = readable_headers((record.image for record in rotated), self.root)
        headers |= readable_headers((record.label for record in rotated if record.label), self.root)
        return list(records), collect_evidence(rotated, headers), headers

    def _peek(self, split: str) -> list[Record]:
        """The records in the files of a split; none if they cannot be read, which is reported where they are needed."""
        try:
            return separate_problems(self._read(split, self._split_files(split)))[0]
        except (DataError, ConfigError):
            return []

    def _evidence_of_other_splits(self, split: str) -> Evidence:
        """What the sizes of the other splits show."""
        total = Evidence()
        for other in SPLITS:
            if other == split or not self._is_configured(other):
                continue
            _, evidence, _ = self._collect_evidence(self._split_files(other), self._peek(other))
            total = Evidence(total.stored + evidence.stored, total.upright + evidence.upright)
        return total


class MixedSource:
    """One of the further data sets of a training (data.mix).

    Args:
        number: of its records; the main data set is 0.
        label_map: its raw ids to the class indices of the main data set.
    """

    def __init__(self, number: int, part: MixPart, source: DataSource, label_map: LabelMap) -> None:
        self.number, self.key, self.share = number, part.key, part.share
        self.source, self.label_map = source, label_map

    def read_records(self) -> list[Record]:
        """The records of its training images; messages about them begin with the key, too.

        Raises:
            DataError: as `DataSource.records`; the message begins with the key.
        """
        with name_part(self.key):
            records = self.source.records("train")
        return [
            record._replace(label_map=self.label_map, source=self.number, origin=self._name_origin(record))
            for record in records
        ]

    def _name_origin(self, record: Record) -> str:
        """Where a record comes from; a folder is not named, because the paths of its files name it."""
        is_folder = Path(record.origin) in Path(record.image).parents
        return self.key if is_folder else f"{self.key}: {record.origin}"

    def describe_unused(self) -> str:
        """As `DataSource.describe_unused` for its training images."""
        text = self.source.describe_unused("train")
        return f"{self.key}: {text}" if text else ""

    def require_paths(self) -> None:
        """Check that its list or its folders exist, which takes no time.

        Raises:
            DataError: if one of them is missing.
        """
        with name_part(self.key):
            self.source.require_paths("train")


@contextmanager
def name_part(key: str) -> Iterator[None]:
    """Begin messages about data with the key of their data set.

    Raises:
        DataError: for one that is raised inside.
    """
    try:
        yield
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


def open_part(number: int, part: MixPart, classes: ClassTable) -> MixedSource:
    """Open one of the further data sets.

    Args:
        classes: those of the main data set.

    Raises:
        ConfigError: if one of its classes has no counterpart there, or it has other classes that the entry does not
            name.
        DataError: if its class table is missing or broken.
    """
    with name_part(part.key):
        source = DataSource(part.data, None if part.has_own_classes else classes, is_part=True)
        has_ids_of_main = part.has_own_classes or part.data.map or part.data.classes is None
        described = None if has_ids_of_main else find_described_classes(part.data.root)
    if described is not None and [*map(fold_name, described.names)] != [*map(fold_name, classes.names)]:
        raise ConfigError(
            f"{part.key}: {Path(str(part.data.root), DESCRIPTION_FILE)} names classes of its own, which are not those "
            "of the main data set in their order. Add their table to the entry, as `classes`: they are matched by name."
        )
    if not part.has_own_classes:
        return MixedSource(number, part, source, source.label_map)
    indices = match_classes(part, source.classes, classes)
    return MixedSource(number, part, source, source.label_map.translate(indices, classes.num_classes))


def find_described_classes(root: str | None) -> ClassTable | None:
    """The classes in the description of a folder, as mode=import writes it; None if there is none, or it names none.

    Raises:
        DataError: if the class table is missing or broken.
    """
    file = Path(root or "", DESCRIPTION_FILE)
    if root is None or not store.is_file(file):
        return None
    try:
        content = yaml.safe_load(store.read_file(file))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    table = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(table, str) or table in BUILT_IN_CLASSES:
        return built_in_classes(table) if isinstance(table, str) else None
    return ClassTable.from_file(file.parent / table)


def match_classes(part: MixPart, own: ClassTable, main: ClassTable) -> list[int]:
    """The class index in the main data set of each class of another one, by name; -1: not scored.

    Names are compared without upper and lower case and spaces around them; class_map takes precedence.

    Raises:
        ConfigError: for a class without a counterpart, and for names in class_map that do not exist.
    """
    index_of = {fold_name(name): index for index, name in enumerate(main.names)}
    given = {fold_name(name): target for name, target in part.class_map.items()}
    names = [fold_name(name) for name in own.names]
    listed = ", ".join(main.names[:MAX_LISTED_CLASSES]) + (", ..." if main.num_classes > MAX_LISTED_CLASSES else "")
    for name, target in part.class_map.items():
        if fold_name(name) not in names:
            raise ConfigError(f"{part.key}.class_map: {name} is no class of {part.data.classes}.")
        if target is not None and fold_name(target) not in index_of:
            raise ConfigError(
                f"{part.key}.class_map: {name}: {target} is no class of the main data set, which has {listed}."
            )
    indices = []
    for name, shown in zip(names, own.names, strict=True):
        target = given.get(name, shown)
        index = IGNORED if target is None else index_of.get(fold_name(target))
        if index is None:
            raise ConfigError(
                f"{part.key}: its class {shown} ({part.data.classes}) is no class of the main data set, which has "
                f"{listed}. Map it: {part.key}.class_map={{{shown}: <one of these, or null: not scored>}}."
            )
        indices.append(index)
    return indices


def fold_name(name: str) -> str:
    """A class name for comparison: without spaces around it, and without upper and lower case."""
    return name.strip().casefold()


def require_masks(split: str, records: Sequence[Record]) -> None:
    """Reject a split that cannot be scored.

    Raises:
        DataError: if an image has no mask.
    """
    unlabelled = [record for record in records if record.label is None]
    if unlabelled:
        raise DataError(
            f"{unlabelled[0].origin}: {unlabelled[0].image} has no mask, so it cannot be scored ({len(unlabelled)} of "
            f"{len(records)} images of data.{split} have none). Add the masks, remove these images, or do without the "
            f"split: data.{split}.list=null data.{split}.images=null."
        )


def describe_named_splits(keys: dict[str, str]) -> str:
    """A sentence about the result of `DataSource.find_named_splits`."""
    overrides = " ".join(f"{key}={value}" for key, value in keys.items())
    if "data.val.list" in keys:
        return f"the list of train has rows of other splits, which are not used. To use them: {overrides}"
    return (
        "the images of train lie in folders named after several splits, and train uses all of them. To use each folder "
        f"for its split: {overrides}"
    )


def is_table_list(name: str) -> bool:
    """Whether a list is a CSV file or a file of JSON lines with columns; else it is an odgt list."""
    return Path(name).suffix.lower() in TABLE_SUFFIXES


def load_class_table(config: DataConfig, root: Path) -> ClassTable:
    """The classes: a built-in table, a file (below the root or not), or numbered names.

    Raises:
        ConfigError: if neither data.classes nor data.num_classes is set, or they contradict each other.
        DataError: if the file or the folder of the data set is missing, or the file is broken.
    """
    if config.classes is None:
        if config.num_classes is None:
            raise ConfigError("data.num_classes must be set, or data.classes=<CSV file with index,name,R,G,B>.")
        return ClassTable.from_names([f"class {index}" for index in range(config.num_classes)])
    if config.classes in BUILT_IN_CLASSES:
        table = built_in_classes(config.classes)
    else:
        path = store.resolve_path(root / store.resolve_path(config.classes))
        if not store.is_file(path) and not store.is_folder(root):  # otherwise the table would be blamed
            hint = f"data.root=<folder> names it.{hint_sentence(config.hint)}"
            require_path(exists=False, kind="data folder", path=root, hint=hint)
        table = ClassTable.from_file(path)
    if config.num_classes not in (None, table.num_classes):
        raise ConfigError(
            f"data.num_classes={config.num_classes}, but data.classes={config.classes} has {table.num_classes}. "
            "Set one of them to null."
        )
    return table


def make_output_label_map(config: DataConfig, classes: ClassTable, output_format: str) -> LabelMap:
    """The meaning of the ids in predictions: those of the label files, or 1 to K with predict.format=ade20k."""
    return LabelMap(classes.num_classes) if output_format == "ade20k" else make_label_map(config, classes)


def make_label_map(
    config: DataConfig, classes: ClassTable, find_colours: Callable[[GreyColours], bool] = lambda greys: False
) -> LabelMap:
    """The meaning of the ids, or the colours, of mask files.

    Args:
        find_colours: whether masks of the data set are coded in colours; called where that is possible.

    Raises:
        ConfigError: if the configuration contradicts itself.
    """
    ids = None
    if config.map is not None:
        ids = {int(raw_id): None if index is None else int(index) for raw_id, index in config.map.items()}
    plain = LabelMap(classes.num_classes, config.first_id, config.ignore, ids)
    always = config.mask_type == "colors"
    has_distinct_colours = len(set(classes.palette)) == classes.num_classes
    if not always and (config.mask_type == "ids" or not config.has_class_file or not has_distinct_colours):
        return plain
    unscored = [(red, green, blue) for red, green, blue in config.ignore_colors]
    greys = {colour[0] for colour in (*classes.palette, *unscored) if len(set(colour)) == 1}
    without_id = {level for level in greys if plain.class_index(level) is None}
    codes_grey = always or find_colours(GreyColours(greys, without_id))
    colours = ColourIds(classes.palette, plain.class_ids, unscored, always=always, codes_grey=codes_grey)
    return LabelMap(classes.num_classes, config.first_id, config.ignore, ids, colours)
