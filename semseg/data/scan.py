"""The content of a data set's files: reads every mask, and the header of every image. For mode=check.

Threads read the masks (decoders release the interpreter's lock). Results are cached by the time and length of both
files, so that a second scan reads only what is new.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from semseg.data.band_images import check_header, read_bands
from semseg.data.band_windows import open_windows
from semseg.data.bands import BandOptions
from semseg.data.header_cache import cache_file, load_cache, read_header_only, save_cache
from semseg.data.headers import Header
from semseg.data.images import MAX_PIXELS, check_rgb_raster, read_header, read_image, read_largest
from semseg.data.label_map import ColourIds
from semseg.data.label_windows import check_whole_size, open_id_windows
from semseg.data.labels import read_label
from semseg.data.objects import measure_objects
from semseg.data.open_pairs import is_read_by_window
from semseg.data.pairs import size_mismatch_message
from semseg.data.palette import pack_colours
from semseg.data.records import Record
from semseg.data.store import file_stamp
from semseg.data.windows import WHOLE_PIXELS, row_strips, spread_windows
from semseg.errors import DataError
from semseg.system.processors import count_processors

MAX_COLOURS = 256  # a mask with more colours is taken for a photo
CACHE_FORMAT = 6  # version of the cached rows
NUM_MASKS_MEASURED = 400  # masks whose objects are measured
NUM_SAMPLED = 64  # images whose pixels are read, in addition to all 16-bit images
NUM_PROBES = 16  # of an image that is too large to be read whole, whose pixels are read
FIRST_OF_SEVERAL = ", first of several"  # ends the kind of a file with several frames or pages


class PairFacts(NamedTuple):
    """What one image and its mask contain."""

    height: int  # height of the image in pixels, as it is read; 0 if it cannot be read
    width: int
    image_kind: str  # "JPEG RGB"; empty if the image cannot be read
    mask_kind: str  # "PNG L"; empty if the mask cannot be read, or there is none
    ids: dict[int, int]  # id in the mask -> pixels
    colours: dict[str, int]  # colour-coded masks: "#ff8000" -> pixels
    problem: str = ""  # why the pair cannot be trained on; ids that are no class are not checked here
    largest: int = -1  # largest pixel value; -1 if the pixels are not read
    max_value: int = 255  # largest value of the image's bit depth: 255 or 65535
    objects: dict[int, dict[int, int]] = {}  # noqa: RUF012 - id -> bin of the side -> objects; of NUM_MASKS_MEASURED masks

    @property
    def num_pixels(self) -> int:
        """Pixels of the mask; 0 if it has no ids."""
        return sum(self.ids.values())


def scan_pairs(
    records: Sequence[Record],
    folder: Path,
    *,
    max_pixels: int = MAX_PIXELS,
    colours: ColourIds | None = None,
    bands: BandOptions | None = None,
    is_native: bool = False,
    cache_dir: str | Path | None = None,
) -> Iterator[PairFacts]:
    """The content of every record, in their order.

    Args:
        folder: the folder of the data set; it names the cache file.
        colours: decodes colour-coded masks.
        bands: of the images; None: they are 8-bit RGB.
        is_native: whether large images are read by window, which data.max_pixels does not limit.
        cache_dir: None: `writable_cache_folder`.
    """
    cache = cache_file("masks", folder, cache_dir)
    cached = load_cache(cache)
    new_entries: dict[str, list[object]] = {}
    with ThreadPoolExecutor(count_processors()) as pool:
        step, stride = (max(1, math.ceil(len(records) / count)) for count in (NUM_SAMPLED, NUM_MASKS_MEASURED))
        futures = [
            pool.submit(
                _scan_or_load,
                record,
                cached,
                max_pixels,
                colours,
                bands,
                reads_pixels=number % step == 0,
                measures_objects=number % stride == 0,
                is_native=is_native,
            )
            for number, record in enumerate(records)
        ]
        try:
            for record, future in zip(records, futures, strict=True):
                facts, stamps = future.result()
                # Other problems may be of the machine, and end: a missing package, an error of a disk.
                is_lasting = not facts.problem or facts.colours
                if stamps and is_lasting:
                    new_entries[_cache_key(record)] = [stamps, _to_row(facts)]
                yield facts
        finally:
            pool.shutdown(cancel_futures=True)
            if any(cached.get(key) != entry for key, entry in new_entries.items()):
                save_cache(cache, cached | new_entries)


def _scan_or_load(
    record: Record,
    cached: dict[str, object],
    max_pixels: int,
    colours: ColourIds | None,
    bands: BandOptions | None,
    *,
    reads_pixels: bool,
    measures_objects: bool,
    is_native: bool,
) -> tuple[PairFacts, list[int]]:
    """The facts about a record, and the stamps by which a change of its files shows; none if a file is missing."""
    table = 0 if colours is None else colours.fingerprint
    settings = [CACHE_FORMAT, max_pixels, table, reads_pixels, measures_objects, *record.size]
    scan = partial(
        scan_pair, record, max_pixels, colours, bands, reads_pixels=reads_pixels, measures_objects=measures_objects
    )
    if is_native and math.prod(record.size) > min(WHOLE_PIXELS, max_pixels):
        settings.append(is_native)
        scan = partial(scan_large_pair, record, max_pixels, colours, bands, scan)
    if bands is not None:
        settings.append(crc32(repr(bands).encode()))
        if bands.other_suffixes:  # the other files may change
            return scan(), []
    try:
        stamps = [*settings, *file_stamp(record.image), *file_stamp(record.label or record.image)]
    except OSError:
        return scan(), []
    facts = _from_entry(cached.get(_cache_key(record)), stamps)
    return facts or scan(), stamps


def _from_entry(entry: object, stamps: list[int]) -> PairFacts | None:
    """The facts in an entry of the cache; None if it is invalid or has other stamps."""
    match entry:
        case [
            entry_stamps,
            [
                int() as height,
                int() as width,
                str() as image,
                str() as mask,
                dict() as ids,
                dict() as colours,
                str() as problem,
                int() as largest,
                int() as max_value,
                dict() as objects,
            ],
        ] if entry_stamps == stamps:
            counts = {int(raw): count for raw, count in ids.items()}
            sides = {int(raw): {int(bin): count for bin, count in bins.items()} for raw, bins in objects.items()}
            return PairFacts(height, width, image, mask, counts, colours, problem, largest, max_value, sides)
    return None


def _to_row(facts: PairFacts) -> list[object]:
    """Facts as a JSON file stores them."""
    row: list[object] = list(facts)
    row[PairFacts._fields.index("ids")] = {str(raw): count for raw, count in facts.ids.items()}
    objects = {str(raw): {str(bin): count for bin, count in sides.items()} for raw, sides in facts.objects.items()}
    row[PairFacts._fields.index("objects")] = objects
    return row


def _cache_key(record: Record) -> str:
    return f"{record.image}|{record.label}"


def scan_pair(
    record: Record,
    max_pixels: int = MAX_PIXELS,
    colours: ColourIds | None = None,
    bands: BandOptions | None = None,
    *,
    reads_pixels: bool = True,
    measures_objects: bool = True,
) -> PairFacts:
    """The content of the files of one record; does not raise for broken files.

    Args:
        reads_pixels: read the pixels of 8-bit images too; those of 16-bit images are always read.
        measures_objects: measure the connected components of every id.
    """
    facts = PairFacts(0, 0, "", "", {}, {})
    try:
        image = read_header(record.image, max_pixels=max_pixels)
        facts = facts._replace(height=image.stored.height, width=image.stored.width, image_kind=_describe_kind(image))
        if bands is not None:
            check_header(record.image, image, bands.files[0], bands)
            if reads_pixels or bands.other_suffixes:
                read_bands(record.image, bands, max_pixels)
        elif image.raster is not None:
            check_rgb_raster(record.image, image.raster)
        if bands is None and (reads_pixels or image.bits == 16):
            largest, max_value = read_largest(record.image, max_pixels=max_pixels)
            facts = facts._replace(largest=largest, max_value=max_value)
        if record.label is None:
            return facts
        mask = read_header(record.label, max_pixels=max_pixels)
        facts = facts._replace(mask_kind=_describe_kind(mask))
        if mask.upright not in (image.stored, image.upright):
            raise DataError(
                f"{record.image} is {image.stored}, its mask {record.label} is {mask.upright} (height x width)."
            )
        facts = facts._replace(height=mask.upright.height, width=mask.upright.width)
        if record.size not in (image.stored, mask.upright):
            raise DataError(
                f"{record.image}: the list says {record.size} (height x width), the file is {image.stored}."
            )
        if colours is None and mask.kind.endswith((" RGB", " RGBA")) and not mask.lossy:
            facts = facts._replace(colours=count_colours(read_image(record.label, max_pixels=max_pixels)))
        raw = read_label(record.label, max_pixels=max_pixels, colours=colours)
        ids, objects = count_ids(raw), measure_objects(raw) if measures_objects else {}
    except DataError as error:
        return facts._replace(problem=str(error))
    return facts._replace(ids=ids, colours={}, objects=objects)  # a grey mask may be stored as RGB


def scan_large_pair(
    record: Record,
    max_pixels: int,
    colours: ColourIds | None,
    bands: BandOptions | None,
    otherwise: Callable[[], PairFacts],
) -> PairFacts:
    """As `scan_pair`, for an image that may be read by window: so are NUM_PROBES of its pixels, and all of its mask.

    Objects are not measured.

    Args:
        otherwise: gives the facts of an image that has to be read whole.
    """
    facts = PairFacts(0, 0, "", "", {}, {})
    try:
        if not is_read_by_window(record, bands, max_pixels):
            return otherwise()
        image = read_header_only(record.image)
        facts = facts._replace(height=image.stored.height, width=image.stored.width, image_kind=_describe_kind(image))
        windows = open_windows(record.image, bands)
        assert windows is not None, "it is read by window"
        with windows:
            if record.size != image.stored:
                raise DataError(size_mismatch_message(record, image.stored))
            for window in spread_windows(image.stored, NUM_PROBES):
                windows.read(*window)
        if record.label is None:
            return facts
        mask = read_header_only(record.label)
        facts = facts._replace(mask_kind=_describe_kind(mask))
        if mask.upright != image.stored:
            raise DataError(
                f"{record.image} is {image.stored}, its mask {record.label} is {mask.upright} (height x width)."
            )
        ids = count_ids_of_file(record.label, colours, max_pixels)
    except DataError as error:
        return facts._replace(problem=str(error))
    return facts._replace(ids=ids)


def count_ids_of_file(path: str, colours: ColourIds | None, max_pixels: int) -> dict[int, int]:
    """The number of pixels of each id of a large mask, which is read by window if its format allows.

    Raises:
        DataError: if it cannot be read, or has more than `max_pixels` and has to be read whole.
    """
    counts = Counter[int]()
    for _, ids in read_ids(path, colours, max_pixels):
        counts.update(count_ids(ids))
    return dict(sorted(counts.items()))


def read_ids(path: str, colours: ColourIds | None, max_pixels: int) -> Iterator[tuple[int, NDArray[np.integer]]]:
    """The ids of a mask in strips of rows, each with the number of its first row: in one strip if it is read whole.

    Raises:
        DataError: as `count_ids_of_file`.
    """
    windows = open_id_windows(path, colours, above=min(WHOLE_PIXELS, max_pixels))
    if windows is None:
        check_whole_size(path, max_pixels)
        yield 0, read_label(path, max_pixels=max_pixels, colours=colours)
        return
    try:
        for window in row_strips(windows.size):
            yield window.top, windows.read_ids(window)
    finally:
        windows.close()


def _describe_kind(header: Header) -> str:
    """Format and mode, and whether only the first of several frames or pages is read."""
    return header.kind + FIRST_OF_SEVERAL if header.has_frames else header.kind


def count_ids(raw: NDArray[np.integer]) -> dict[int, int]:
    """The number of pixels of each id."""
    if raw.dtype == np.uint8:
        counts = np.bincount(raw.ravel(), minlength=256)
        present = np.flatnonzero(counts)
        return dict(zip(present.tolist(), counts[present].tolist(), strict=True))
    present, counts = np.unique(raw, return_counts=True)
    return dict(zip(present.tolist(), counts.tolist(), strict=True))


def count_colours(pixels: NDArray[np.uint8]) -> dict[str, int]:
    """The number of pixels of each colour of (H, W, 3) RGB; empty if there are more than MAX_COLOURS."""
    present, counts = np.unique(pack_colours(pixels), return_counts=True)
    if len(present) > MAX_COLOURS:
        return {}
    return {f"#{colour:06x}": count for colour, count in zip(present.tolist(), counts.tolist(), strict=True)}


def repeat_factors(present: Sequence[set[int]], threshold: float) -> NDArray[np.float64]:
    """Repeats of each image so that rare classes are seen more often: repeat factor sampling (Gupta et al. 2019, 3.2).

    The factor of a class that occurs in a fraction f of the images is max(1, sqrt(threshold / f)); the factor of an
    image is the largest of its classes.

    Args:
        present: the classes of each image.
        threshold: fraction of the images, 0..1; classes that occur in more of them have factor 1.

    Returns:
        One number for each image, at least 1.

    >>> repeat_factors([{0}, {0}, {0}, {0, 1}], threshold=1.0).tolist()
    [1.0, 1.0, 1.0, 2.0]
    """
    num_images = Counter(index for classes in present for index in classes)
    factors = {index: max(1.0, math.sqrt(threshold * len(present) / count)) for index, count in num_images.items()}
    return np.array([max((factors[index] for index in classes), default=1.0) for classes in present])


def find_first_pixel(path: str, raw_id: int, colours: ColourIds | None, max_pixels: int) -> tuple[int, int]:
    """(row, column) of the first pixel with an id that occurs in a mask.

    Raises:
        DataError: as `count_ids_of_file`.
    """
    for top, ids in read_ids(path, colours, max_pixels):
        is_id = ids == raw_id
        if is_id.any():
            row, column = np.unravel_index(int(is_id.argmax()), ids.shape)
            return top + int(row), int(column)
    raise ValueError(f"{path} has no id {raw_id}")
