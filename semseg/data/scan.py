"""What the files of a data set hold: every mask is read, and the header of every image. For the data doctor.

Masks are read by several threads (decoders leave the interpreter's lock), and what was found is remembered by the
time and length of both files, so that a second scan reads what is new.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg.data.geometry import Size
from semseg.data.headers import Header
from semseg.data.images import MAX_PIXELS, read_header, read_image, read_label, read_largest
from semseg.data.label_map import ColourIds
from semseg.data.records import Record, cache_file, load_cache, save_cache
from semseg.data.store import stamp
from semseg.errors import DataError

MAX_COLOURS = 256  # a mask in more colours is a picture
CACHE_FORMAT = 2  # of the remembered findings
SAMPLED = 64  # images whose pixels are looked at too, besides those of 16 bits
NEARLY_BLACK = 32  # 8-bit values below which an image uses a fraction of its depth
SEVERAL = ", first of several"  # ends the kind of a file of frames or pages


class Finding(NamedTuple):
    """What one image and its mask are."""

    height: int  # of the image in pixels, as it is read; 0 if it cannot be
    width: int
    image_kind: str  # "JPEG RGB"; empty if it cannot be read
    mask_kind: str  # "PNG L"; empty if it cannot be read, or there is none
    ids: dict[int, int]  # of the mask file: id -> pixels
    colours: dict[str, int]  # of a mask that is coded in colours: "#ff8000" -> pixels
    problem: str = ""  # why it cannot be trained on; ids that are no class are not looked at here
    largest: int = -1  # value of the image's pixels, of 16 bits or nearly black; -1: neither, or not looked at
    white: int = 255  # the largest that their depth has: 255 or 65535

    @property
    def pixels(self) -> int:
        """Of the mask, if it has ids."""
        return sum(self.ids.values())


def scan(
    records: Sequence[Record],
    folder: Path,
    *,
    max_pixels: int = MAX_PIXELS,
    colours: ColourIds | None = None,
    cache_dir: str | Path | None = None,
    threads: int | None = None,
) -> Iterator[Finding]:
    """A finding for every record, in their order.

    Args:
        folder: names the cache file; that of the data set.
        colours: what colours of masks stand for, if they are coded so.
        cache_dir: None: $XDG_CACHE_HOME/semseg, or ~/.cache/semseg.
        threads: None: as many as there are processors.
    """
    cache = cache_file("masks", folder, cache_dir)
    known = load_cache(cache)
    fresh: dict[str, list[object]] = {}
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        step = max(1, len(records) // SAMPLED)
        waiting = [
            pool.submit(remembered, record, known, max_pixels, colours, looks=number % step == 0)
            for number, record in enumerate(records)
        ]
        try:
            for record, answer in zip(records, waiting, strict=True):
                found, stamps = answer.result()
                if stamps:
                    fresh[key_of(record)] = [stamps, as_row(found)]
                yield found
        finally:
            pool.shutdown(cancel_futures=True)
            if any(known.get(key) != entry for key, entry in fresh.items()):
                save_cache(cache, known | fresh)


def remembered(
    record: Record, known: dict[str, object], max_pixels: int, colours: ColourIds | None, *, looks: bool
) -> tuple[Finding, list[int]]:
    """The finding of a record, and by what it is told whether its files have changed; nothing if one is missing."""
    table = 0 if colours is None else colours.fingerprint
    try:
        stamps = [
            CACHE_FORMAT,
            max_pixels,
            table,
            looks,
            *record.size,
            *stamp(record.image),
            *(stamp(record.label or record.image)),
        ]
    except OSError:
        return examine(record, max_pixels, colours, looks=looks), []
    match known.get(key_of(record)):
        case [
            then,
            [
                int() as height,
                int() as width,
                str() as image,
                str() as mask,
                dict() as ids,
                dict() as found,
                str() as problem,
                int() as largest,
                int() as white,
            ],
        ] if then == stamps:
            own = {int(raw): count for raw, count in ids.items()}
            return Finding(height, width, image, mask, own, found, problem, largest, white), stamps
    return examine(record, max_pixels, colours, looks=looks), stamps


def as_row(found: Finding) -> list[object]:
    """A finding as JSON gives it back."""
    return list(found._replace(ids={str(raw): count for raw, count in found.ids.items()}))  # pyright: ignore[reportArgumentType]


def key_of(record: Record) -> str:
    """What a finding is remembered by."""
    return f"{record.image}|{record.label}"


def examine(
    record: Record, max_pixels: int = MAX_PIXELS, colours: ColourIds | None = None, *, looks: bool = True
) -> Finding:
    """What the files of one record hold; never raises for a broken file.

    Args:
        looks: at the pixels of the image too; at those of 16 bits it always does.
    """
    found = Finding(0, 0, "", "", {}, {})
    try:
        image = read_header(record.image, max_pixels=max_pixels)
        found = found._replace(height=image.stored.height, width=image.stored.width, image_kind=kind_of(image))
        if looks or image.bits == 16:
            largest, white = read_largest(record.image, max_pixels=max_pixels)
            if white > 255 or largest < NEARLY_BLACK:
                found = found._replace(largest=largest, white=white)
        if record.label is None:
            return found
        mask = read_header(record.label, max_pixels=max_pixels)
        found = found._replace(mask_kind=kind_of(mask))
        if mask.upright not in (image.stored, image.upright):
            raise DataError(
                f"{record.image} is {image.stored}, its mask {record.label} {mask.upright} (height x width)."
            )
        found = found._replace(height=mask.upright.height, width=mask.upright.width)
        if record.size not in (image.stored, mask.upright):
            raise DataError(
                f"{record.image}: the list says {record.size} (height x width), the file is {image.stored}."
            )
        if mask.kind.endswith((" RGB", " RGBA")) and not mask.lossy:
            found = found._replace(colours=colours_of(read_image(record.label, max_pixels=max_pixels)))
        ids = ids_of(read_label(record.label, max_pixels=max_pixels, colours=colours))
    except DataError as error:
        return found._replace(problem=str(error))
    return found._replace(ids=ids, colours={})  # grey though stored in colours


def kind_of(header: Header) -> str:
    """Format and mode, and whether it is only one of several frames or pages that is read."""
    return header.kind + SEVERAL if header.has_frames else header.kind


def ids_of(raw: NDArray[np.integer]) -> dict[int, int]:
    """Pixels of each id."""
    if raw.dtype == np.uint8:
        counts = np.bincount(raw.ravel(), minlength=256)
        present = np.flatnonzero(counts)
        return dict(zip(present.tolist(), counts[present].tolist(), strict=True))
    present, counts = np.unique(raw, return_counts=True)
    return dict(zip(present.tolist(), counts.tolist(), strict=True))


def colours_of(pixels: NDArray[np.uint8]) -> dict[str, int]:
    """Pixels of each colour of (H, W, 3) RGB; none if there are more than MAX_COLOURS."""
    packed = pixels.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    present, counts = np.unique(packed, return_counts=True)
    if len(present) > MAX_COLOURS:
        return {}
    return {f"#{colour:06x}": count for colour, count in zip(present.tolist(), counts.tolist(), strict=True)}


def repeat_factors(present: Sequence[set[int]], threshold: float) -> NDArray[np.float64]:
    """How often each image is to be seen so that rare classes are: repeat factor sampling (Gupta et al. 2019, 3.2).

    A class that is in a share f of the images asks for max(1, sqrt(threshold / f)); an image gets the most that any of
    its classes asks for.

    Args:
        present: the classes of each image.
        threshold: share of the images, 0..1; classes that are in more of them ask for nothing.

    Returns:
        A number of at least 1 for each image.

    >>> repeat_factors([{0}, {0}, {0}, {0, 1}], threshold=1.0).tolist()
    [1.0, 1.0, 1.0, 2.0]
    """
    images = Counter(index for classes in present for index in classes)
    asked = {index: max(1.0, math.sqrt(threshold * len(present) / count)) for index, count in images.items()}
    return np.array([max((asked[index] for index in classes), default=1.0) for classes in present])


def place_of(raw: NDArray[np.integer], raw_id: int) -> tuple[int, int]:
    """(row, column) of the first pixel of an id that is there."""
    row, column = np.unravel_index(int((raw == raw_id).argmax()), raw.shape)
    return int(row), int(column)


def size_of(found: Finding) -> Size:
    """Height and width of a finding's image."""
    return Size(found.height, found.width)
