"""A cache of labels, run-length encoded: decoding the PNG of a label takes as long as decoding its image.

A label consists mostly of large areas of one class, so that a few thousand runs describe a million pixels, and single
pixels can be looked up without decoding the others.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from semseg.data.geometry import Size
from semseg.data.label_map import LabelMap
from semseg.data.store import file_stamp, resolve_path
from semseg.errors import ConfigError
from semseg.storage.atomic import atomic_write

AUTOMATIC_FOLDER = "labels"  # of the cache: data.label_cache=auto, with a folder for each data set
TAG = "CACHEDIR.TAG"  # marks it for programs that make backups: https://bford.info/cachedir/
TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# Labels that semseg has read. May be removed at any time.\n"
MAX_AUTOMATIC_BYTES = 10 * 2**30  # of all data sets together
LEAST_FREE_BYTES = 2 * 2**30  # of the disk: automatic folders do not grow below it
NUM_SUBFOLDERS = 256  # of a cache, by the first two digits of the names
SAVES_PER_CHECK = 64  # of the size of an automatic folder, in each process
FORMAT = 3  # version of the files; part of their names
MIN_PIXELS_PER_RUN = 4  # labels with shorter runs on average compress badly and are not cached


class LabelRuns(NamedTuple):
    """A run-length encoded label, row by row."""

    size: Size
    starts: NDArray[np.uint32]  # (R,) index of the first pixel of each run, from the top left
    classes: NDArray[np.int16]  # (R,) class index, -1 = not scored

    @classmethod
    def from_label(cls, label: NDArray[np.int16]) -> LabelRuns:
        """Encode a label (H, W) of less than 2^32 pixels.

        >>> LabelRuns.from_label(np.array([[0, 0, 1], [1, 1, -1]], np.int16)).starts.tolist()
        [0, 2, 5]
        """
        pixels = label.ravel()
        changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
        starts = np.concatenate([[0], changes]).astype(np.uint32)
        return cls(Size(*label.shape), starts, pixels[starts])

    def to_array(self) -> NDArray[np.int16]:
        """The label, int16 (H, W)."""
        lengths = np.diff(self.starts, append=np.uint32(self.size.height * self.size.width))
        return np.repeat(self.classes, lengths).reshape(self.size)

    def select(self, rows: NDArray[np.integer], columns: NDArray[np.integer]) -> NDArray[np.int16]:
        """The classes at these rows and columns, int16 (len(rows), len(columns))."""
        pixels = (rows[:, None] * self.size.width + columns).astype(np.uint32)
        return self.classes[np.searchsorted(self.starts, pixels, side="right") - 1]


class LabelCache:
    """A folder with one file of `LabelRuns` per label, named by the label's path, time, length and label map.

    Many processes may use it at the same time. Damaged files count as missing; nothing is ever deleted.

    Args:
        label_map: decodes the labels; entries of other label maps are not found.
        max_bytes: about the size beyond which no label is added; None: no limit. A folder of `prepare_automatic_cache`
            has MAX_AUTOMATIC_BYTES.

    Raises:
        ConfigError: if the folder cannot be created.
    """

    def __init__(self, folder: str | Path, label_map: LabelMap, max_bytes: int | None = None) -> None:
        self.folder, self.label_map = resolve_path(folder), label_map
        is_automatic = (self.folder.parent / TAG).is_file()
        self.max_bytes = MAX_AUTOMATIC_BYTES if max_bytes is None and is_automatic else max_bytes
        self._can_write, self._num_saved = True, 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.label_cache={folder}: the folder cannot be created ({error.strerror}).") from error

    def entry_path(self, path: str | Path, label_map: LabelMap | None = None) -> Path | None:
        """The cache file for the current version of a label; None if the label does not exist.

        Args:
            label_map: decodes this label; None: that of the cache.
        """
        try:
            parts = (FORMAT, (label_map or self.label_map).fingerprint, *file_stamp(path), os.path.abspath(path))  # noqa: PTH100 (in a loop)
        except OSError:
            return None
        name = sha256("\n".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / name[:2] / f"{name[2:40]}.safetensors"

    def load(self, entry: Path) -> LabelRuns | None:
        """The label in a cache file; None if the file is missing or damaged."""
        try:
            arrays = load_tensors(entry.read_bytes())
            size, starts, classes = arrays["size"], arrays["starts"], arrays["classes"]
            is_valid = arrays["check"].tolist() == [crc32_of_arrays(size, starts, classes)]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return LabelRuns(Size(*size.tolist()), starts, classes) if is_valid else None

    def save(self, entry: Path, label: NDArray[np.int16]) -> None:
        """Store a label, unless it compresses badly. A folder that is not writable is reported once and not used."""
        runs = LabelRuns.from_label(label)
        if not self._can_write or len(runs.starts) * MIN_PIXELS_PER_RUN > label.size:
            return
        if self.max_bytes is not None and self._num_saved % SAVES_PER_CHECK == 0:
            is_full = NUM_SUBFOLDERS * count_bytes(entry.parent) > self.max_bytes
            if is_full or shutil.disk_usage(self.folder).free < LEAST_FREE_BYTES:
                self._can_write = False  # what is there is still read
                return
        self._num_saved += 1
        size = np.array(runs.size, np.uint32)
        check = np.array([crc32_of_arrays(size, runs.starts, runs.classes)], np.uint32)
        arrays = {"size": size, "starts": runs.starts, "classes": runs.classes, "check": check}
        try:
            with atomic_write(entry, durable=False) as temporary:
                temporary.write_bytes(save_tensors(arrays))
        except OSError as error:
            self._can_write = False
            warnings.warn(
                f"data.label_cache={self.folder}: cannot be written to ({error.strerror}); labels that are not cached "
                "yet are read from their own files.",
                stacklevel=1,
            )


def prepare_automatic_cache(cache: Path, root: Path, max_bytes: int = MAX_AUTOMATIC_BYTES) -> Path | None:
    """The folder of the cache for the labels of a data set, created; None if it cannot be, or the disk is almost full.

    If the folders of all data sets together are larger than `max_bytes`, those that were not used for longest are
    removed. A run that uses one of them reads its labels again.

    Args:
        cache: the folder of the cache.
        root: of the data set.
    """
    base = cache / AUTOMATIC_FOLDER
    folder = base / sha256(os.path.abspath(root).encode("utf-8", "surrogateescape")).hexdigest()[:16]  # noqa: PTH100 - names with ..
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (base / TAG).is_file():
            with atomic_write(base / TAG, durable=False) as temporary:
                temporary.write_text(TAG_TEXT, encoding="ascii")
        os.utime(folder)  # the time of its last use
        others = sorted((other for other in base.iterdir() if other.is_dir() and other != folder), key=get_use)
        sizes = {other: estimate_bytes(other) for other in others}
        used = sum(sizes.values()) + estimate_bytes(folder)
        for other in others:  # the one that was not used for longest first
            if used > max_bytes or shutil.disk_usage(base).free < LEAST_FREE_BYTES:
                used -= sizes[other]
                shutil.rmtree(other, ignore_errors=True)
        return folder if shutil.disk_usage(base).free >= LEAST_FREE_BYTES and os.access(folder, os.W_OK) else None
    except OSError:
        return None


def get_use(folder: Path) -> float:
    """When a folder of `prepare_automatic_cache` was used last; 0 if another process has removed it."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def estimate_bytes(folder: Path) -> int:
    """About the size of a cache: that of a 16th of it, which the names spread evenly, 16 times."""
    return 16 * sum(count_bytes(folder / f"{number:02x}") for number in range(0, NUM_SUBFOLDERS, 16))


def count_bytes(folder: Path) -> int:
    """The size of the files in a folder; 0 if there is none."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # another process has renamed or removed it
                total += entry.stat().st_size
    return total


def crc32_of_arrays(*arrays: NDArray) -> int:
    """CRC-32 of the bytes of all arrays."""
    value = 0
    for array in arrays:
        value = crc32(array.tobytes(), value)
    return value
