"""An index of the classes in the labels of training: some pixels of every class of every label.

Crops of large images are centred on such pixels (data.crop_foreground): of the crops of 512 x 512 pixels of an image of
5000 x 5000, one in a hundred contains a given small object. The index is made once, by mode=check or by the first run,
and kept beside the other caches; labels that are new or changed are read again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from semseg.data.header_cache import cache_file
from semseg.data.images import MAX_PIXELS
from semseg.data.label_cache import LabelCache
from semseg.data.label_map import LabelMap
from semseg.data.label_windows import LabelWindows, open_label
from semseg.data.records import Record
from semseg.data.store import file_stamp
from semseg.errors import DataError
from semseg.storage.atomic import atomic_write
from semseg.system.processors import count_processors

MAX_POSITIONS = 64  # pixels that are kept of each class of a label, equally spaced among its pixels
INDEX_FORMAT = 1  # version of the cache file


class Pixel(NamedTuple):
    """A pixel of an image."""

    row: int
    column: int


class LabelClasses(NamedTuple):
    """The classes in one label, in ascending order."""

    classes: NDArray[np.int16]  # (E)
    counts: NDArray[np.int64]  # (E) pixels
    positions: NDArray[np.uint32]  # (P, 2) row and column; min(count, MAX_POSITIONS) of each class, one after the other


NO_CLASSES = LabelClasses(np.zeros(0, np.int16), np.zeros(0, np.int64), np.zeros((0, 2), np.uint32))


def find_classes(label: NDArray[np.int16]) -> LabelClasses:
    """The classes in a label (H, W), whose pixels that are not scored are -1.

    >>> find_classes(np.array([[0, 0, 2], [-1, 2, 2]], np.int16)).counts.tolist()
    [2, 3]
    """
    counts = np.bincount(label.ravel().astype(np.int64) + 1)[1:]
    classes = np.flatnonzero(counts)
    positions = [NO_CLASSES.positions]
    for index in classes:
        pixels = np.flatnonzero(label.ravel() == index)
        chosen = np.unravel_index(pixels[_spread(len(pixels))], label.shape)
        positions.append(np.stack(chosen, axis=1).astype(np.uint32))
    return LabelClasses(classes.astype(np.int16), counts[classes].astype(np.int64), np.concatenate(positions))


def find_classes_in_strips(label: LabelWindows) -> LabelClasses:
    """As `find_classes`, for a label that is read by window, twice: to count pixels, and to find those that are kept.

    Raises:
        DataError: if the file is damaged, or holds an id that is neither a class nor ignored.
    """
    counts = np.zeros(label.label_map.num_classes, np.int64)
    for _, ids in label.read_strips():
        counts += np.bincount(ids.ravel().astype(np.int64) + 1, minlength=len(counts) + 1)[1:]
    classes = np.flatnonzero(counts)
    chosen = {int(index): _spread(int(counts[index])) for index in classes}  # numbers among the pixels of the class
    found: dict[int, list[NDArray[np.uint32]]] = {index: [] for index in chosen}
    seen = dict.fromkeys(chosen, 0)
    for window, ids in label.read_strips():
        for index, numbers in chosen.items():
            pixels = np.flatnonzero(ids.ravel() == index)
            inside = numbers[(numbers >= seen[index]) & (numbers < seen[index] + len(pixels))] - seen[index]
            rows, columns = np.unravel_index(pixels[inside], ids.shape)
            found[index].append(np.stack([rows + window.top, columns], axis=1).astype(np.uint32))
            seen[index] += len(pixels)
    positions = [NO_CLASSES.positions, *(part for parts in found.values() for part in parts)]
    return LabelClasses(classes.astype(np.int16), counts[classes], np.concatenate(positions))


def _spread(count: int) -> NDArray[np.int64]:
    """MAX_POSITIONS of `count` pixels by their numbers, equally spaced, or all of them."""
    return np.linspace(0, count - 1, min(count, MAX_POSITIONS)).round().astype(np.int64)


class ForegroundIndex:
    """Pixels of every class of every label.

    Args:
        labels: the classes of each record, in the order of the records.
    """

    def __init__(self, labels: Sequence[LabelClasses]) -> None:
        self.classes = np.concatenate([NO_CLASSES.classes, *(label.classes for label in labels)])
        self.counts = np.concatenate([NO_CLASSES.counts, *(label.counts for label in labels)])
        self.positions = np.concatenate([NO_CLASSES.positions, *(label.positions for label in labels)])
        self.label_starts = np.cumsum([0, *(len(label.classes) for label in labels)])  # (R + 1) of the entries
        self.position_starts = np.concatenate([[0], np.cumsum(np.minimum(self.counts, MAX_POSITIONS))])  # (E + 1)
        totals = np.bincount(self.classes, self.counts)
        self.rarity = 1 / np.sqrt(np.maximum(totals, 1))  # (K) by which a class of a label is drawn

    def draw(self, record: int, rng: np.random.Generator) -> Pixel | None:
        """A pixel of a class of a record; None if its label has no classes.

        A class is drawn with a probability proportional to 1 / sqrt(its pixels in all labels), then one of its pixels.
        """
        first, last = self.label_starts[record : record + 2]
        class_draw, pixel_draw = rng.random(2)
        if first == last:
            return None
        weights = np.cumsum(self.rarity[self.classes[first:last]])
        entry = first + min(int(np.searchsorted(weights, class_draw * weights[-1], side="right")), last - first - 1)
        start, end = self.position_starts[entry : entry + 2]
        row, column = self.positions[start + int(pixel_draw * (end - start))].tolist()
        return Pixel(row, column)


def build_foreground_index(
    records: Sequence[Record],
    folder: Path,
    label_map: LabelMap,
    *,
    max_pixels: int = MAX_PIXELS,
    label_cache: LabelCache | None = None,
    cache_dir: str | Path | None = None,
) -> ForegroundIndex:
    """The index of the labels of records, from the cache as far as they have not changed.

    A label that cannot be read has no classes: what is wrong with it shows when it is trained on.

    Args:
        folder: of the data set; it names the cache file.
        cache_dir: None: `writable_cache_folder`.
    """
    cache = cache_file("foreground", folder, cache_dir).with_suffix(".safetensors")
    cached = load_labels(cache)

    def find(record: Record) -> tuple[str, LabelClasses]:
        assert record.label is not None, "a record to train on has a label"
        try:
            own = record.label_map or label_map
            key = json.dumps([record.label, own.fingerprint, *file_stamp(record.label)])
            if key in cached:
                return key, cached[key]
            with open_label(record.label, own, max_pixels=max_pixels, cache=label_cache) as label:
                is_by_window = isinstance(label, LabelWindows)
                return key, find_classes_in_strips(label) if is_by_window else find_classes(label.to_array())
        except (OSError, DataError):
            return "", NO_CLASSES

    with ThreadPoolExecutor(count_processors()) as pool:
        found = list(pool.map(find, records))
    entries = {key: labels for key, labels in found if key}
    if any(key not in cached for key in entries):
        save_labels(cache, cached | entries)
    return ForegroundIndex([labels for _, labels in found])


def load_labels(cache: Path) -> dict[str, LabelClasses]:
    """The entries of a cache file by key; none if it is missing, damaged or of another version."""
    try:
        arrays = load_tensors(cache.read_bytes())
        if arrays["format"].tolist() != [INDEX_FORMAT]:
            return {}
        keys = json.loads(arrays["keys"].tobytes())
        entries, pixels = arrays["entries"].tolist(), arrays["pixels"].tolist()
        found, entry, pixel = {}, 0, 0
        for key, num_entries, num_pixels in zip(keys, entries, pixels, strict=True):
            classes, counts = (arrays[name][entry : entry + num_entries] for name in ("classes", "counts"))
            found[key] = LabelClasses(classes, counts, arrays["positions"][pixel : pixel + num_pixels])
            entry, pixel = entry + num_entries, pixel + num_pixels
            if np.minimum(counts, MAX_POSITIONS).sum() != len(found[key].positions):
                return {}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return {}
    return found


def save_labels(cache: Path, labels: dict[str, LabelClasses]) -> None:
    """Write a cache file, whole or not at all. Where it cannot be written, the labels are read again."""
    arrays = {
        "format": np.array([INDEX_FORMAT], np.int64),
        "keys": np.frombuffer(json.dumps(list(labels)).encode(), np.uint8),
        "entries": np.array([len(label.classes) for label in labels.values()], np.int64),
        "pixels": np.array([len(label.positions) for label in labels.values()], np.int64),
        **{
            name: np.concatenate([getattr(NO_CLASSES, name), *(getattr(label, name) for label in labels.values())])
            for name in LabelClasses._fields
        },
    }
    try:
        with atomic_write(cache, durable=False) as temporary:
            temporary.write_bytes(save_tensors(arrays))
    except OSError:
        return
