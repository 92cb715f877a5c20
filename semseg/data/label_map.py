"""Raw ids of label files to class indices and back. No torch.

A label file holds raw ids; the network, the loss and the scores use class indices 0 .. K - 1 and -1 for pixels that are
not scored. `LabelMap` is the only place where one becomes the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from semseg.data.palette import Colour, pack_colours
from semseg.errors import ConfigError, DataError

IGNORED = -1
MAX_CLASSES = 2**15 - 1  # class indices are kept as int16
_UNKNOWN = -2
MAX_ID = 2**16 - 1  # the largest raw id
UNSCORED_ID = MAX_ID  # the raw id of colours that are not scored
MISSING_ID = 255  # of pixels without a class in predictions, if the data set ignores no id
_MAX_LISTED = 6  # classes at each end of a shortened list


class ColourIds:
    """Decodes colour-coded masks: maps each colour to the raw id of its class.

    Args:
        palette: K distinct colours.
        ids: K raw ids.
        unscored: colours that are not scored; a class of the same colour takes precedence.
        always: whether grey images are colour-coded as well; if not, their channels hold ids.
        codes_grey: whether an RGB image of greys that all have a meaning is colour-coded, too. That is so in a data set
            of colours, where an image of background alone may be black.

    Raises:
        ConfigError: if two classes have the same colour.
    """

    def __init__(
        self,
        palette: Sequence[Colour],
        ids: Sequence[int],
        unscored: Sequence[Colour],
        *,
        always: bool,
        codes_grey: bool = False,
    ) -> None:
        id_of = dict.fromkeys(_pack(unscored), UNSCORED_ID)
        classes = dict(zip(_pack(palette), ids, strict=True))
        if len(classes) < len(palette):
            duplicate = next(colour for colour in palette if palette.count(colour) > 1)
            raise ConfigError(
                f"data.classes: two classes have the colour {duplicate}, so colour-coded masks (data.mask_type) cannot "
                "distinguish them."
            )
        id_of |= classes
        self.always, self.codes_grey = always, codes_grey
        self._colours = np.array(sorted(id_of), np.uint32)
        self._ids = np.array([id_of[int(colour)] for colour in self._colours], np.uint16)
        self.fingerprint = crc32(self._colours.tobytes() + self._ids.tobytes() + bytes([always, codes_grey]))

    def explains_grey(self, pixels: NDArray[np.uint8]) -> bool:
        """Whether RGB pixels (H, W, 3) that are all grey are colours of the table, and not ids."""
        return self.codes_grey and bool(np.isin(np.unique(pixels[..., 0]) * np.uint32(0x010101), self._colours).all())

    def __call__(self, pixels: NDArray[np.uint8], path: str | Path) -> NDArray[np.uint16]:
        """(H, W, 3) RGB to raw ids (H, W).

        Raises:
            DataError: for an unknown colour, with the position of its first pixel.
        """
        packed = pack_colours(pixels)
        position = np.searchsorted(self._colours, packed).clip(max=len(self._colours) - 1)
        unknown = self._colours[position] != packed
        if unknown.any():
            row, column = np.argwhere(unknown)[0].tolist()
            raise DataError(
                f"{path}: the colour {tuple(pixels[row, column].tolist())} at row {row}, column {column} is "
                f"not in data.classes ({int(unknown.sum())} such pixels). Add it there, or to data.ignore_colors."
            )
        return self._ids[position]


def _pack(colours: Sequence[Colour]) -> list[int]:
    return pack_colours(np.array(colours, np.uint8).reshape(-1, 3)).tolist()


class LabelMap:
    """Maps raw ids of label files to class indices: id `first_id` is class 0, ids in `ignore` are not scored.

    The defaults are those of ADE20K: 0 is unlabelled, 1 .. K are the classes.

    Args:
        ids: raw id -> class index, or None for ids that are not scored; replaces `first_id`.
        colours: decodes colour-coded masks; None if they are not supported.

    Raises:
        ConfigError: if an id is both a class and ignored, an id or index is out of range, or a class has no id.

    >>> LabelMap(num_classes=3)(np.array([[0, 1, 3]], np.uint8), "label.png")
    array([[-1,  0,  2]], dtype=int16)
    """

    def __init__(
        self,
        num_classes: int,
        first_id: int = 1,
        ignore: Iterable[int] = (0,),
        ids: Mapping[int, int | None] | None = None,
        colours: ColourIds | None = None,
    ) -> None:
        self.num_classes, self.first_id, self.ignore = num_classes, first_id, tuple(sorted(set(ignore)))
        self.colours, self._is_mapped = colours, ids is not None
        table = self._consecutive_table() if ids is None else self._mapped_table(ids)
        if colours is not None:
            table[UNSCORED_ID] = IGNORED
        self._use_table(table)
        self.fingerprint = crc32(table.tobytes(), 0 if colours is None else colours.fingerprint)

    def _use_table(self, table: NDArray[np.int16]) -> None:
        """Translate by this table, and back."""
        self._table = table  # raw id -> class index, 128 KiB
        raw_ids = np.flatnonzero(table >= 0)[::-1]
        self._raw = np.zeros(self.num_classes + 1, np.uint16)  # the last one, at -1, is for pixels that are not scored
        self._raw[table[raw_ids]] = raw_ids  # the lowest id of each class is written last
        self._raw[IGNORED] = next(iter(self.ignored_ids), MISSING_ID if table[MISSING_ID] < 0 else MAX_ID)

    def _consecutive_table(self) -> NDArray[np.int16]:
        """The table for consecutive ids from `first_id`."""
        num_classes, first_id = self.num_classes, self.first_id
        last_id = first_id + num_classes - 1
        is_valid = 1 <= num_classes <= MAX_CLASSES and first_id >= 0 and last_id <= MAX_ID
        if not is_valid or any(not 0 <= raw_id <= MAX_ID for raw_id in self.ignore):
            raise ConfigError(
                f"data.num_classes={num_classes} with data.first_id={first_id} and data.ignore={list(self.ignore)} "
                f"is out of range: allowed are 1 to {MAX_CLASSES} classes and raw ids 0 to {MAX_ID}."
            )
        conflicting = [raw_id for raw_id in self.ignore if first_id <= raw_id <= last_id]
        if conflicting:
            raise ConfigError(
                f"data.ignore contains {_join_first(conflicting)}, "
                f"but data.first_id={first_id} and data.num_classes={num_classes} "
                f"make raw ids {first_id}..{last_id} classes. "
                "Change data.ignore (for example [255], or []) or data.first_id."
            )
        table = np.full(MAX_ID + 1, _UNKNOWN, np.int16)
        table[list(self.ignore)] = IGNORED
        table[first_id : last_id + 1] = np.arange(num_classes)
        return table

    def _mapped_table(self, ids: Mapping[int, int | None]) -> NDArray[np.int16]:
        """The table for an explicit mapping.

        The id 0, which data sets ignore by default, may be a class all the same.
        """
        table = np.full(MAX_ID + 1, _UNKNOWN, np.int16)
        outside = [raw_id for raw_id in self.ignore if not 0 <= raw_id <= MAX_ID]
        if outside:
            raise ConfigError(f"data.ignore: {_join_first(outside)} is out of range: raw ids are 0 to {MAX_ID}.")
        conflicting = [raw_id for raw_id in self.ignore if raw_id and ids.get(raw_id) is not None]
        if conflicting:
            raise ConfigError(
                f"data.ignore contains {_join_first(conflicting)}, which data.map makes a class. Remove it from one of "
                "them."
            )
        unscored = [raw_id for raw_id, index in ids.items() if index is None]
        table[[*self.ignore, *unscored]] = IGNORED
        for raw_id, index in ids.items():
            if not 0 <= raw_id < UNSCORED_ID or not 0 <= (index or 0) < self.num_classes:
                raise ConfigError(
                    f"data.map: {raw_id}: {index} is out of range: raw ids are 0 to {UNSCORED_ID - 1}, class indices 0 "
                    f"to {self.num_classes - 1}, null for ids that are not scored."
                )
            if index is not None:
                table[raw_id] = index
        missing = sorted(set(range(self.num_classes)) - set(table.tolist()))
        if missing:
            raise ConfigError(f"data.map: classes {_join_first(missing)} of {self.num_classes} have no raw id.")
        return table

    def translate(self, indices: Sequence[int], num_classes: int) -> LabelMap:
        """This map with other class indices: those of another table with `num_classes` classes.

        Args:
            indices: the new index of each class, -1: not scored. Several may be equal, and not all need occur.
        """
        translated = copy(self)
        table = self._table.copy()
        is_class = table >= 0
        table[is_class] = np.asarray(indices, np.int16)[table[is_class]]
        translated.num_classes = num_classes
        translated._use_table(table)
        translated.fingerprint = crc32(table.tobytes(), self.fingerprint)
        return translated

    def __call__(self, raw: NDArray[np.integer], path: str | Path) -> NDArray[np.int16]:
        """Class indices of raw ids, any shape; -1 = not scored.

        Raises:
            DataError: if an id is neither a class nor ignored; the message names `path` and the most frequent such ids.
        """
        is_small = raw.dtype in (np.uint8, np.uint16)
        clipped = raw if is_small else np.clip(raw, 0, MAX_ID)
        index = np.take(self._table, clipped)
        has_unknown = bool((index == _UNKNOWN).any())
        if has_unknown or not (is_small or np.array_equal(clipped, raw)):
            raise self._unknown_ids_error(raw, path)
        return index

    def check_ids(self, raw: NDArray[np.integer], path: str | Path) -> None:
        """Reject ids that are neither classes nor ignored, without translating the others.

        Raises:
            DataError: as `__call__`.
        """
        lowest, highest = int(raw.min()), int(raw.max())
        in_range = lowest >= 0 and highest <= MAX_ID
        # Usually every id between the lowest and the highest is known; only otherwise is each pixel looked up.
        if not in_range or (self._table[lowest : highest + 1] == _UNKNOWN).any():
            self(raw, path)

    def class_index(self, raw_id: int) -> int | None:
        """The class index of an id: -1 if it is not scored, None if the id is unknown."""
        index = int(self._table[raw_id]) if 0 <= raw_id <= MAX_ID else _UNKNOWN
        return None if index == _UNKNOWN else index

    def __repr__(self) -> str:
        ids = self.class_ids
        return f"<LabelMap: {len(ids)} classes, ids from {min(ids)} to {max(ids)}>"

    def describe(self, names: Sequence[str]) -> str:
        """The meaning of the ids in one line; a long list is shortened in the middle.

        >>> LabelMap(2, first_id=1, ignore=[0, 255]).describe(["cat", "dog"])
        '1 cat, 2 dog; not scored: 0, 255'
        """
        known = np.flatnonzero(self._table >= 0).tolist()
        entries = [f"{raw_id} {names[self._table[raw_id]]}" for raw_id in known]
        if len(entries) > 2 * _MAX_LISTED:
            entries = [*entries[:_MAX_LISTED], "...", *entries[-_MAX_LISTED:]]
        return f"{', '.join(entries)}; not scored: {', '.join(map(str, self.ignored_ids)) or 'none'}"

    def to_raw(self, index: NDArray[np.integer]) -> NDArray[np.uint16]:
        """Class indices to raw ids, for files that other programs read; -1, not scored, to the first of `ignored_ids`.

        If several ids map to one class, the smallest of them is used. Without ignored ids, -1 becomes 255, or 65535 if
        255 is a class.

        >>> LabelMap(2, first_id=1, ignore=[0]).to_raw(np.array([0, 1, -1])).tolist()
        [1, 2, 0]
        >>> LabelMap(2, first_id=0, ignore=[]).to_raw(np.array([0, 1, -1])).tolist()
        [0, 1, 255]
        """
        return self._raw[index]

    @property
    def class_ids(self) -> list[int]:
        """The raw id of each class, by class index, as `to_raw` returns it.

        >>> LabelMap(2, ignore=[], ids={26: 0, 7: 1, 11: 1, 255: None}).class_ids
        [26, 7]
        """
        return self._raw[: self.num_classes].tolist()

    @property
    def ignored_ids(self) -> list[int]:
        """The raw ids that are not scored, ascending: those of `ignore` and those that `ids` maps to None.

        >>> LabelMap(2, ignore=[0], ids={26: 0, 7: 1, 11: 1, 255: None}).ignored_ids
        [0, 255]
        """
        # UNSCORED_ID stands for ignored colours and appears in no file.
        return [raw_id for raw_id in np.flatnonzero(self._table == IGNORED).tolist() if raw_id != UNSCORED_ID]

    def _unknown_ids_error(self, raw: NDArray[np.integer], path: str | Path) -> DataError:
        ids, counts = np.unique(raw, return_counts=True)
        last_id = self.first_id + self.num_classes - 1
        known = np.array([self.class_index(raw_id) is not None for raw_id in ids.tolist()])
        unknown = sorted(zip(counts[~known].tolist(), ids[~known].tolist(), strict=True), reverse=True)
        listed = ", ".join(f"{raw_id} ({count} pixels)" for count, raw_id in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        if self._is_mapped:
            return DataError(
                f"{path}: label ids {listed}{more} are in neither data.map nor data.ignore={list(self.ignore)}. "
                "Add them to one of the two."
            )
        return DataError(
            f"{path}: label ids {listed}{more} are neither classes nor ignored: data.num_classes={self.num_classes} "
            f"and data.first_id={self.first_id} allow {self.first_id}..{last_id}, data.ignore={list(self.ignore)}. "
            "Raise data.num_classes, set data.first_id to the raw id of the first class, "
            "or add the ids that should not be scored to data.ignore."
        )


def ignore_missing(index: NDArray[np.integer], is_valid: NDArray[np.bool_] | None) -> None:
    """Give pixels of a prediction that have no values no class, in place.

    Args:
        index: (H, W) class indices.
        is_valid: (H, W) where the image has values; None: everywhere.
    """
    if is_valid is not None:
        index[~is_valid] = IGNORED


def _join_first(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers[:5]) + (", ..." if len(numbers) > 5 else "")
