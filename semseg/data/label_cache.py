"""Labels kept in a folder as runs of equal classes: a PNG takes as long to decode as the image it belongs to.

A label is mostly areas of one class, so that a few thousand runs say everything about a million pixels, and a place is
looked up among them without unpacking the rest.
"""

from __future__ import annotations

import os
import warnings
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from semseg.data.geometry import Size
from semseg.data.label_map import LabelMap
from semseg.data.store import stamp
from semseg.errors import ConfigError
from semseg.storage.atomic import atomic_write

FORMAT = 2  # of the files; part of their names
MOST_RUNS = 4  # pixels to a run, at least: a label of more runs is noise, and smaller as it is


class Runs(NamedTuple):
    """A label as runs of equal classes, row after row."""

    size: Size
    starts: NDArray[np.uint32]  # (R,) where each begins, counted in pixels from the top left
    classes: NDArray[np.int16]  # (R,) class index, -1 = not scored

    @classmethod
    def of(cls, label: NDArray[np.int16]) -> Runs:
        """The runs of a label (H, W) of less than 2^32 pixels.

        >>> Runs.of(np.array([[0, 0, 1], [1, 1, -1]], np.int16)).starts.tolist()
        [0, 2, 5]
        """
        pixels = label.ravel()
        changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
        starts = np.concatenate([[0], changes]).astype(np.uint32)
        return cls(Size(*label.shape), starts, pixels[starts])

    def whole(self) -> NDArray[np.int16]:
        """The label, int16 (H, W)."""
        lengths = np.diff(self.starts, append=np.uint32(self.size.height * self.size.width))
        return np.repeat(self.classes, lengths).reshape(self.size)

    def at(self, rows: NDArray[np.integer], columns: NDArray[np.integer]) -> NDArray[np.int16]:
        """What stands in these rows and columns, int16 (len(rows), len(columns))."""
        places = (rows[:, None] * self.size.width + columns).astype(np.uint32)
        return self.classes[np.searchsorted(self.starts, places, side="right") - 1]


class LabelCache:
    """A folder of `Runs`, a file for each label, named by its path, time, length and the meaning of its ids.

    Many processes may use it at once. What is damaged counts as missing; nothing is ever removed.

    Args:
        label_map: by which the labels are read; another one finds nothing of this one's.

    Raises:
        ConfigError: if the folder cannot be made.
    """

    def __init__(self, folder: str | Path, label_map: LabelMap) -> None:
        self.folder, self.label_map = Path(folder).expanduser(), label_map
        self._can_write = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.label_cache={folder}: the folder cannot be made ({error.strerror}).") from error

    def place(self, path: str | Path) -> Path | None:
        """The file for a label as it is now; None if there is no such label."""
        try:
            parts = (FORMAT, self.label_map.fingerprint, *stamp(path), os.path.abspath(path))  # noqa: PTH100 (in a loop)
        except OSError:
            return None
        name = sha256("\n".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / name[:2] / f"{name[2:40]}.safetensors"

    def get(self, place: Path) -> Runs | None:
        """What is kept in a file; None if that is nothing, or damaged."""
        try:
            kept = load(place.read_bytes())
            size, starts, classes = kept["size"], kept["starts"], kept["classes"]
            is_whole = kept["check"].tolist() == [checksum(size, starts, classes)]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return Runs(Size(*size.tolist()), starts, classes) if is_whole else None

    def put(self, place: Path, label: NDArray[np.int16]) -> None:
        """Keep a label, unless it is noise. A folder that cannot be written to is told once, and then left alone."""
        runs = Runs.of(label)
        if not self._can_write or len(runs.starts) * MOST_RUNS > label.size:
            return
        size = np.array(runs.size, np.uint32)
        check = np.array([checksum(size, runs.starts, runs.classes)], np.uint32)
        parts = {"size": size, "starts": runs.starts, "classes": runs.classes, "check": check}
        try:
            with atomic_write(place, durable=False) as temporary:
                temporary.write_bytes(save(parts))
        except OSError as error:
            self._can_write = False
            warnings.warn(
                f"data.label_cache={self.folder}: cannot be written to ({error.strerror}); labels that are not there "
                "yet are read from their own files.",
                stacklevel=1,
            )


def checksum(*parts: NDArray) -> int:
    """CRC-32 of the bytes of all parts."""
    value = 0
    for part in parts:
        value = crc32(part.tobytes(), value)
    return value
