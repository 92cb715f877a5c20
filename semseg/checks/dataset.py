"""From the scan of a data set to notices, suggestions and a verdict (mode=check). Reads no files.

Ids are those of the mask files, classes are class indices. `ConfiguredClasses` defines the meaning of the ids; if the
configuration does not define it yet, `suggest_ids` infers it from the ids in the masks.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from semseg.config.schema import DataConfig
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size, canvas_size
from semseg.data.label_map import IGNORED, MAX_CLASSES, MAX_ID, UNSCORED_ID, LabelMap
from semseg.data.labels import read_palette
from semseg.data.overlap import Overlap
from semseg.data.palette import Colour
from semseg.data.plan import SubBatch, TrainPlan
from semseg.data.records import Record, take_evenly
from semseg.data.scan import FIRST_OF_SEVERAL, PairFacts
from semseg.data.sources import Orientations
from semseg.system.text import format_quantity, format_subject

ERROR, WARNING, NOTE = "error", "warning", "note"
READY, WITH_WARNINGS, NOT_READY = "READY", "READY, WITH WARNINGS", "NOT READY"
MAX_IGNORED_FRACTION = 0.9  # a mask with a larger fraction of ignored pixels is reported
MAX_SINGLE_CLASS_FRACTION = 0.2  # a split with a larger fraction of one-class masks is reported
RARE_FRACTION = 0.001  # classes with a smaller fraction of the training pixels are reported
MAX_STRAY_FRACTION = 0.001  # of all pixels: unknown ids that are more likely mistakes than classes
MIN_GREY_GAP, MIN_GREY_LEVEL = 16, 100  # between two grey levels, and of the lightest one; see `map_grey_levels`
VOID = 255  # the id that most tools write for unlabelled pixels
VOIDS = frozenset({VOID, MAX_ID})  # with 8 and with 16 bits
DARK = 0.25  # fraction of white: a 16-bit image with all values below is reported
DARK_IF_ALL = 0.5  # instead of DARK, if it holds for all 16-bit images: they probably have fewer bits
NEARLY_BLACK = 32  # an 8-bit image with all values below uses a fraction of its range
NUM_PALETTES = 64  # of masks that are read
MAX_EXAMPLES = 10  # example files of one notice

ClassOf = Callable[[int], int | None]  # id -> class index, IGNORED, or None for unknown ids
FindPixel = Callable[[Record, int], tuple[int, int]]  # a record and an id in its mask -> (row, column) of a pixel


class ConfiguredClasses(NamedTuple):
    """The meaning of the ids, as configured."""

    label_map: LabelMap
    classes: ClassTable


class Notice(NamedTuple):
    """One finding about the data set."""

    level: str  # error: a run would stop; warning: its result would suffer; note
    text: str
    files: tuple[str, ...] = ()  # examples


class Advice(NamedTuple):
    """Notices, and settings that resolve them."""

    notices: list[Notice]
    suggestions: dict[str, str]  # as in `Diagnosis`


class ScannedSplit(NamedTuple):
    """A split and the content of its files."""

    name: str
    records: Sequence[Record]
    findings: Sequence[PairFacts]  # one for each record
    problems: Sequence[str]  # messages about lines and files that give no record
    orientations: Orientations = Orientations()
    unused: str = ""  # a sentence that counts the files that are neither image nor mask

    @property
    def usable_pairs(self) -> list[tuple[Record, PairFacts]]:
        """Records whose mask could be read, with its content."""
        return [(record, facts) for record, facts in zip(self.records, self.findings, strict=True) if facts.ids]


class Spread(NamedTuple):
    """Smallest, median and largest of some numbers."""

    low: float
    median: float
    high: float


class SplitSummary(NamedTuple):
    """The numbers of one split."""

    name: str
    pairs: int
    wrong: int  # pairs that cannot be used
    heights: Spread  # pixels
    widths: Spread
    aspects: Spread  # width / height
    image_kinds: dict[str, int]
    mask_kinds: dict[str, int]
    ids: dict[int, int]  # id -> pixels
    ignored: float  # fraction of the pixels


class ClassSummary(NamedTuple):
    """The numbers of one class."""

    name: str
    colour: Colour
    pixels: dict[str, int]  # split -> pixels
    images: dict[str, int]  # split -> images with the class
    share: float  # fraction of the scored pixels of the first split
    weight: float  # see `median_frequency_weights`
    id: int  # in the masks; the smallest if several ids map to the class


class Diagnosis(NamedTuple):
    """The result of the check."""

    notices: list[Notice]
    splits: list[SplitSummary]
    classes: list[ClassSummary]  # empty if the meaning of the ids is unknown
    suggestions: dict[str, str]  # configuration key -> value as written on the command line

    @property
    def verdict(self) -> str:
        """One of READY, WITH_WARNINGS and NOT_READY."""
        levels = {notice.level for notice in self.notices}
        return NOT_READY if ERROR in levels else WITH_WARNINGS if WARNING in levels else READY

    @property
    def class_weights(self) -> list[float]:
        """The weight of each class."""
        return [row.weight for row in self.classes]


def diagnose(
    splits: Sequence[ScannedSplit],
    data: DataConfig,
    configured: ConfiguredClasses | None,
    shared: Overlap | None,
    find_pixel: FindPixel,
) -> Diagnosis:
    """Evaluate the scans of all splits.

    Args:
        splits: train first.
        configured: None if the configuration does not define the meaning of the ids.
        shared: images that are in train and in val.
        find_pixel: returns (row, column) of the first pixel of an id in a mask.
    """
    suggestions: dict[str, str] = {}
    # A split that is cut from train has the problems of train, which are reported once.
    others = [split._replace(problems=()) if split.problems == splits[0].problems else split for split in splits[1:]]
    notices = [notice for split in (splits[0], *others) for notice in (*check_files(split), *check_reading(split))]
    if configured is None:
        suggestions |= suggest_ids(sum_ids(splits)) if data.map is None else suggest_number(data.map)
        notices.append(Notice(ERROR, describe_unexplained_ids(sorted(sum_ids(splits)))))
        return Diagnosis(sort_notices(notices), [summarise_split(split, None) for split in splits], [], suggestions)
    class_of = configured.label_map.class_index
    num_classes = configured.label_map.num_classes
    unknown = check_unknown_ids(splits, data, num_classes, class_of, find_pixel)
    shifted = Advice([], {}) if unknown.notices else check_shifted_ids(splits, data, configured.label_map)
    for advice in (unknown, shifted):
        notices += advice.notices
        suggestions |= advice.suggestions
    rows = summarise_classes(splits, configured)
    notices += check_palettes(splits, data, configured)
    notices += [*check_labels(splits, class_of), *check_classes(rows, [split.name for split in splits])]
    if shared:
        files = (*shared.same_path, *shared.same_content)
        notices.append(Notice(WARNING, str(shared), files[:MAX_EXAMPLES]))
    for advice in (check_sizes(splits[0], data), check_splits(splits, data)):
        notices += advice.notices
        suggestions |= advice.suggestions
    hidden = () if configured.label_map.colours is None else (UNSCORED_ID,)  # of colours that are not scored
    summaries = [summarise_split(split, class_of, hidden) for split in splits]
    return Diagnosis(sort_notices(notices), summaries, rows, suggestions)


def sort_notices(notices: Iterable[Notice]) -> list[Notice]:
    """Notices by level, errors first."""
    return sorted(notices, key=lambda notice: (ERROR, WARNING, NOTE).index(notice.level))


# ---- files


def check_files(split: ScannedSplit) -> Iterator[Notice]:
    """Notices about files that cannot be used."""
    if split.problems:
        number = len(split.problems)
        counted = "1 line or file gives no pair" if number == 1 else f"{number} lines or files give no pair"
        text = f"{split.name}: {counted}, such as {split.problems[0]}"
        yield Notice(ERROR, text, tuple(split.problems[:MAX_EXAMPLES]))
    if split.unused:
        yield Notice(NOTE, split.unused)
    unlabelled = [record for record in split.records if record.label is None]
    if unlabelled:
        text = f"{split.name}: {len(unlabelled)} of {len(split.records)} images have no mask and cannot be scored."
        yield Notice(ERROR, text, tuple(record.image for record in unlabelled[:MAX_EXAMPLES]))
    coded = [(record, facts) for record, facts in zip(split.records, split.findings, strict=True) if facts.colours]
    if coded:
        colours = sum((Counter(facts.colours) for _, facts in coded), Counter[str]())
        frequent = [colour for colour, _ in colours.most_common()]
        yield Notice(
            ERROR,
            f"{split.name}: found {format_quantity(len(coded), 'mask')} coded in "
            f"{format_quantity(len(colours), 'colour')} ({join_first(frequent)}). Define them in a class table "
            "in which every class has its own: data.classes=<CSV file with index,name,R,G,B>.",
            first_masks(record for record, _ in coded),
        )
    broken = [facts.problem for facts in split.findings if facts.problem and not facts.colours]
    if broken:
        text = f"{split.name}: {len(broken)} of {len(split.records)} pairs cannot be used, such as {broken[0]}"
        yield Notice(ERROR, text, tuple(broken[:MAX_EXAMPLES]))
    if not split.usable_pairs:
        yield Notice(ERROR, f"{split.name}: no pair of image and mask can be used.")


def check_reading(split: ScannedSplit) -> Iterator[Notice]:
    """Notices about files that are usable, but may be read differently than expected."""
    if split.orientations.problem:
        yield Notice(ERROR, split.orientations.problem)
    elif split.orientations.text:
        level = WARNING if split.orientations.is_mixed else NOTE
        yield Notice(level, f"{split.name}: {split.orientations.text}")
    paged = [
        record for record, facts in pair_facts(split) if FIRST_OF_SEVERAL in f"{facts.image_kind} {facts.mask_kind}"
    ]
    if paged:
        having = format_subject(len(paged), "image or mask has", "images or masks have")
        text = f"{split.name}: {having} several frames or pages; only the first is read."
        yield Notice(WARNING, text, first_images(paged))
    for max_value, bits in ((65535, 16), (255, 8)):
        seen = [
            (record, facts)
            for record, facts in pair_facts(split)
            if facts.largest >= 0 and facts.max_value == max_value
        ]
        limit = NEARLY_BLACK
        if bits == 16:
            largest = max((facts.largest for _, facts in seen), default=0)
            limit = max_value * (DARK_IF_ALL if largest < DARK_IF_ALL * max_value else DARK)
        dark = [(record, facts) for record, facts in seen if facts.largest < limit]
        if dark:
            largest = max(facts.largest for _, facts in dark)
            counted = f"{len(dark)} of {len(seen)} {bits}-bit images"
            text = f"{split.name}: {counted} are black."
            if largest:
                text = (
                    f"{split.name}: {counted} use a fraction of their range: the largest value is {largest} of "
                    f"{max_value} ({largest / max_value:.1%}), which is read as {largest * 255 // max_value} of 255. "
                    "Scale them to the full range."
                )
            yield Notice(WARNING, text, first_images(record for record, _ in dark))


def pair_facts(split: ScannedSplit) -> Iterator[tuple[Record, PairFacts]]:
    """Each record with the content of its files."""
    return zip(split.records, split.findings, strict=True)


def first_images(records: Iterable[Record]) -> tuple[str, ...]:
    """The images of the first few records."""
    return tuple(record.image for record, _ in zip(records, range(MAX_EXAMPLES), strict=False))


# ---- ids


def sum_ids(splits: Iterable[ScannedSplit]) -> Counter[int]:
    """The number of pixels of each id over some splits."""
    total: Counter[int] = Counter()
    for split in splits:
        for _, facts in split.usable_pairs:
            total.update(facts.ids)
    return total


def describe_unexplained_ids(ids: Sequence[int]) -> str:
    """A message about ids whose meaning is not configured.

    >>> describe_unexplained_ids([0, 1, 2])
    'data.num_classes is not set. Found ids 0..2. If 0 means unlabelled, set only data.num_classes=2.'
    """
    class_ids = [raw_id for raw_id in ids if raw_id not in {0, *find_voids(ids)}]
    if not ids:
        return "data.num_classes is not set, and no mask shows the ids."
    message = f"data.num_classes is not set. Found ids {format_ranges(ids)}."
    if map_grey_levels(ids):
        return f"{message} They look like grey levels. In data.map, give null to one that is no class."
    if 0 not in ids or not class_ids or class_ids[-1] < 2 or find_impossible_ids(ids) or are_sparse(class_ids):
        return message
    return f"{message} If 0 means unlabelled, set only data.num_classes={class_ids[-1]}."


def with_zero_unlabelled(suggestions: dict[str, str]) -> dict[str, str]:
    """The suggestions of `suggest_ids` if 0 is no class but means unlabelled; empty if they do not make it a class.

    >>> with_zero_unlabelled({"data.num_classes": "3", "data.first_id": "0", "data.ignore": "[255]"})
    {'data.num_classes': '2', 'data.first_id': '1', 'data.ignore': '[0,255]'}
    """
    num_classes = int(suggestions.get("data.num_classes", 0)) - 1
    if suggestions.get("data.first_id") != "0" or "data.map" in suggestions or num_classes < 2:
        return {}
    ignored = suggestions["data.ignore"].strip("[]")
    return suggestions | {
        "data.num_classes": str(num_classes),
        "data.first_id": "1",
        "data.ignore": f"[0,{ignored}]" if ignored else "[0]",
    }


def suggest_ids(pixels: Counter[int]) -> dict[str, str]:
    """Settings for the probable meaning of ids; none if no settings make them classes.

    >>> suggest_ids(Counter({0: 9, 1: 5, 2: 3, 255: 1}))
    {'data.num_classes': '3', 'data.first_id': '0', 'data.ignore': '[255]'}
    >>> suggest_ids(Counter({0: 9, 1000: 5, 40000: 3, 65535: 1}))["data.map"]
    '{0:0,1000:1,40000:2}'
    """
    ids = sorted(pixels)
    if not ids or find_impossible_ids(ids):
        return {}
    if levels := map_grey_levels(ids):
        return suggest_map(levels, [])
    voids = find_voids(ids)
    class_ids = [raw_id for raw_id in ids if raw_id not in voids]
    if not 0 < len(class_ids) <= MAX_CLASSES or (class_ids == [0] and MAX_ID in voids):  # no white of 16 bits
        return {}
    ignored = [str(raw_id) for raw_id in ids if raw_id not in class_ids]
    if are_sparse(class_ids):
        return suggest_map({raw_id: index for index, raw_id in enumerate(class_ids)}, ignored)
    first = 0 if class_ids[0] == 0 else 1
    if first == 1:
        ignored = ["0", *ignored]
    return {
        "data.num_classes": str(max(2, class_ids[-1] - first + 1)),
        "data.first_id": str(first),
        "data.ignore": f"[{','.join(ignored)}]",
    }


def suggest_number(ids: Mapping[Any, int | None]) -> dict[str, str]:
    """The number of classes of data.map."""
    indices = [int(index) for index in ids.values() if index is not None]
    return {"data.num_classes": str(max(indices) + 1)} if indices else {}


def suggest_map(classes: dict[int, int | None], ignored: Sequence[str]) -> dict[str, str]:
    """Settings for a class index of each id, None: of no class."""
    items = ",".join(f"{raw_id}:{'null' if index is None else index}" for raw_id, index in classes.items())
    return {
        "data.num_classes": str(sum(index is not None for index in classes.values())), "data.first_id": "0",
        "data.ignore": f"[{','.join(ignored)}]", "data.map": f"{{{items}}}",
    }  # fmt: skip


def find_voids(ids: Iterable[int]) -> set[int]:
    """Those of 255 and 65535 that occur and are no number among consecutive ones."""
    found = set(ids)
    return {void for void in VOIDS & found if not {void - 1, void + 1} <= found}


def are_sparse(class_ids: Sequence[int]) -> bool:
    """Whether ids, in their order, are codes of 16 bits rather than consecutive numbers."""
    largest = class_ids[-1]
    return largest > VOID and (2 * len(class_ids) < largest or largest > MAX_CLASSES)


def find_impossible_ids(ids: Iterable[int]) -> list[int]:
    """The ids that no settings can make classes or ignore."""
    return [raw_id for raw_id in ids if not 0 <= raw_id <= MAX_ID]


def map_grey_levels(ids: Sequence[int]) -> dict[int, int | None]:
    """A class for each id, in their order, if ids are grey levels: few and far apart; empty if they number classes.

    255 is a class where the levels are evenly spaced up to it (black, grey and white), and else of no class.

    >>> map_grey_levels([0, 128, 255]), map_grey_levels([0, 100, 150, 255]), map_grey_levels([0, 15, 255])
    ({0: 0, 128: 1, 255: 2}, {0: 0, 100: 1, 150: 2, 255: None}, {})
    """
    gaps = [after - before for before, after in itertools.pairwise(ids)]
    if not gaps or min(gaps) < MIN_GREY_GAP or ids[0] != 0 or ids[-1] > VOID:
        return {}
    is_even = max(gaps) - min(gaps) <= 2 and ids[-1] == VOID  # levels are rounded
    class_ids = [raw_id for raw_id in ids if is_even or raw_id != VOID]
    if class_ids[-1] < MIN_GREY_LEVEL:
        return {}
    classes: dict[int, int | None] = {raw_id: index for index, raw_id in enumerate(class_ids)}
    return classes if is_even else classes | dict.fromkeys(set(ids) - set(class_ids))


def check_unknown_ids(
    splits: Sequence[ScannedSplit],
    data: DataConfig,
    num_classes: int,
    class_of: ClassOf,
    find_pixel: FindPixel,
) -> Advice:
    """Find ids that are neither classes nor ignored."""
    notices = []
    for split in splits:
        unknown = Counter({raw: count for raw, count in sum_ids([split]).items() if class_of(raw) is None})
        if not unknown:
            continue
        affected = [(record, facts) for record, facts in split.usable_pairs if not unknown.keys().isdisjoint(facts.ids)]
        listed = ", ".join(f"{raw} ({count} pixels)" for raw, count in unknown.most_common(5))
        record, facts = affected[0]
        raw_id = next(raw for raw in facts.ids if raw in unknown)
        row, column = find_pixel(record, raw_id)
        text = (
            f"{split.name}: ids {listed} are neither classes nor ignored, in {format_quantity(len(affected), 'mask')}: "
            f"the first is {raw_id} at row {row}, column {column} of {record.label}."
        )
        notices.append(Notice(ERROR, text, first_masks(record for record, _ in affected)))
    pixels = sum_ids(splits)
    unknown_ids = {raw for raw in pixels if class_of(raw) is None}
    if not unknown_ids:
        return Advice(notices, {})
    if impossible := find_impossible_ids(sorted(unknown_ids)):
        text = f"ids {join_first(impossible)} are out of range: 0 to {MAX_ID}. Change them in the masks."
        return Advice([*notices, Notice(NOTE, text)], {})
    if further := find_further_ids(unknown_ids - find_voids(pixels), data, num_classes):
        ids = join_first(further)
        notices.append(
            Notice(NOTE, f"data.classes has {num_classes} classes. If {ids} are classes too, add them there.")
        )
        unknown_ids -= set(further)
        if not unknown_ids:
            return Advice(notices, {})
    return Advice(notices, suggest_settings(unknown_ids, pixels, data, num_classes))


def find_further_ids(unknown_ids: set[int], data: DataConfig, num_classes: int) -> list[int]:
    """The unknown ids that continue those of a class table, which may lack classes; none without a table."""
    further: list[int] = []
    if data.classes is not None and data.map is None:
        while (next_id := data.first_id + num_classes + len(further)) in unknown_ids:
            further.append(next_id)
    return further


def suggest_settings(unknown_ids: set[int], pixels: Counter[int], data: DataConfig, num_classes: int) -> dict[str, str]:
    """Settings under which no id is unknown. A class table keeps its number of classes; the user extends a map.

    Where 0 is ignored it stays ignored, and further ids become classes after those that are set.

    Args:
        unknown_ids: ids that are neither classes nor ignored.
        pixels: pixels by id.
        num_classes: number of classes as configured.
    """
    if data.map is not None:
        return {}
    without_unknown = {"data.ignore": f"[{','.join(map(str, [*data.ignore, *sorted(unknown_ids)]))}]"}
    if data.num_classes is not None and is_stray(unknown_ids, pixels, data.first_id + num_classes):
        return without_unknown
    voids = find_voids(pixels)
    class_ids = [raw_id for raw_id in sorted(pixels) if raw_id not in data.ignore and raw_id not in voids]
    is_extension = data.classes is None and class_ids and class_ids[0] >= data.first_id and not are_sparse(class_ids)
    if is_extension and 0 in data.ignore and not any(data.first_id <= each <= class_ids[-1] for each in data.ignore):
        extended = {"data.num_classes": str(max(num_classes, class_ids[-1] - data.first_id + 1))}
        if unknown_voids := sorted(unknown_ids & voids):
            extended["data.ignore"] = f"[{','.join(map(str, [*data.ignore, *unknown_voids]))}]"
        return extended
    suggested = suggest_ids(pixels)
    is_only_void = unknown_ids <= voids and (class_ids or "data.map" not in suggested)  # no black and white masks
    if suggested and not is_only_void and (data.classes is None or int(suggested["data.num_classes"]) == num_classes):
        if data.classes is not None:
            del suggested["data.num_classes"]  # the table has it
        return suggested
    return without_unknown


def is_stray(unknown_ids: set[int], pixels: Counter[int], next_id: int) -> bool:
    """Whether unknown ids but for voids are more likely mistakes than classes: hardly any pixels, not the next id.

    >>> is_stray({77}, Counter({0: 9999, 1: 5000, 77: 1}), 2), is_stray({2}, Counter({0: 9999, 1: 5000, 2: 1}), 2)
    (True, False)
    """
    others = unknown_ids - find_voids(pixels)
    share = sum(pixels[raw] for raw in others) / max(1, pixels.total())
    return bool(others) and share < MAX_STRAY_FRACTION and next_id not in others


def check_shifted_ids(splits: Sequence[ScannedSplit], data: DataConfig, label_map: LabelMap) -> Advice:
    """Find masks whose ids start at 0 although 0 is ignored, so that the first class would not be learned."""
    if data.map is not None or data.first_id != 1 or 0 not in data.ignore:
        return Advice([], {})
    pixels, num_classes = sum_ids(splits), label_map.num_classes
    scored = [raw_id for raw_id in sorted(pixels) if label_map.class_index(raw_id) not in (None, IGNORED)]
    if not scored or scored != list(range(1, num_classes)) or pixels[0] <= 0.02 * pixels.total():
        return Advice([], {})
    text = (
        f"id {num_classes} never occurs and id 0, which is ignored, takes {pixels[0] / pixels.total():.0%} of the "
        "pixels. Do the masks start at 0?"
    )
    ignored = ",".join(str(raw_id) for raw_id in data.ignore if raw_id != 0)
    settings = {"data.first_id": "0", "data.ignore": f"[{ignored}]"}
    if data.classes is not None:  # the table may have a class that does not occur: the user decides
        words = " ".join(f"{key}={value}" for key, value in settings.items())
        return Advice([Notice(WARNING, f"{text} If so, set {words}.")], {})
    return Advice([Notice(WARNING, text)], settings | {"data.num_classes": str(num_classes)})


def check_palettes(splits: Sequence[ScannedSplit], data: DataConfig, configured: ConfiguredClasses) -> Iterator[Notice]:
    """A notice about palette masks whose colours say that other classes were intended than their indices."""
    paletted = [
        (str(record.label), facts.ids)
        for split in splits
        for record, facts in split.usable_pairs
        if facts.mask_kind.endswith(" P")
    ]
    if data.mask_type == "colors":
        return
    classes = configured.classes if data.has_class_file else None
    if text := find_contradiction(take_evenly(paletted, NUM_PALETTES), configured.label_map, classes):
        way_out = "data.mask_type=colors reads the colours, by a class table that has them"
        yield Notice(WARNING, f"{text}. {way_out}.")


def find_contradiction(
    masks: Iterable[tuple[str, Iterable[int]]], label_map: LabelMap, classes: ClassTable | None
) -> str:
    """How the palettes of masks contradict each other or the colours of the classes; empty if they do not.

    Args:
        masks: paths, and the ids in each.
        classes: None: the colours of classes say nothing.
    """
    class_of_colour = {} if classes is None else {colour: index for index, colour in enumerate(classes.palette)}
    first_of: dict[int, tuple[Colour, str]] = {}
    for path, ids in masks:
        palette = read_palette(path)
        for raw_id in sorted(palette.keys() & ids):
            colour, index = palette[raw_id], label_map.class_index(raw_id)
            if index == IGNORED:
                continue
            other, first = first_of.setdefault(raw_id, (colour, path))
            if other != colour:
                return f"id {raw_id} has the colour {other} in the palette of {first} and {colour} in that of {path}"
            named = class_of_colour.get(colour)
            if classes is not None and index is not None and named not in (None, index):
                shown = f"{classes.names[index]}, and its colour {colour} in the palette that of {classes.names[named]}"
                return f"{path}: id {raw_id} is {shown}"
    return ""


def check_labels(splits: Sequence[ScannedSplit], class_of: ClassOf) -> Iterator[Notice]:
    """Notices about masks with little information."""
    for split in splits:
        ignored = [(record, ignored_fraction(facts, class_of)) for record, facts in split.usable_pairs]
        empty = [record for record, fraction in ignored if fraction > MAX_IGNORED_FRACTION]
        if split is splits[0] and ignored and min(fraction for _, fraction in ignored) == 1:
            text = (
                f"{split.name}: all pixels of all masks are ignored, so that there is nothing to learn. data.first_id, "
                "data.ignore and data.map say which ids are classes."
            )
            yield Notice(ERROR, text, first_masks(empty))
        elif empty:
            counted = f"{len(empty)} of {len(split.usable_pairs)} masks"
            text = f"{split.name}: more than 90 % of the pixels are ignored in {counted}."
            yield Notice(WARNING, text, first_masks(empty))
        single = [record for record, facts in split.usable_pairs if len(count_scored(facts, class_of)) == 1]
        if len(single) > MAX_SINGLE_CLASS_FRACTION * len(split.usable_pairs):
            counted = f"{len(single)} of {len(split.usable_pairs)} masks"
            text = f"{split.name}: {counted} contain only one class. Were they exported correctly?"
            yield Notice(WARNING, text, first_masks(single))


def count_scored(facts: PairFacts, class_of: ClassOf) -> dict[int, int]:
    """Class index -> pixels of one mask; unknown and ignored ids are left out."""
    total: Counter[int] = Counter()
    for raw, count in facts.ids.items():
        index = class_of(raw)
        if index is not None and index != IGNORED:
            total[index] += count
    return dict(total)


def ignored_fraction(facts: PairFacts, class_of: ClassOf) -> float:
    """The fraction of the pixels of one mask that are ignored."""
    return sum(count for raw, count in facts.ids.items() if class_of(raw) == IGNORED) / facts.num_pixels


# ---- classes


def summarise_classes(splits: Sequence[ScannedSplit], configured: ConfiguredClasses) -> list[ClassSummary]:
    """The numbers of each class."""
    classes, class_of, ids = configured.classes, configured.label_map.class_index, configured.label_map.class_ids
    counted = {split.name: [count_scored(facts, class_of) for _, facts in split.usable_pairs] for split in splits}
    first = counted[splits[0].name]
    total = sum(sum(counts.values()) for counts in first)
    weights = median_frequency_weights(first, classes.num_classes)
    rows = []
    for index in range(classes.num_classes):
        pixels = {split: sum(mask.get(index, 0) for mask in masks) for split, masks in counted.items()}
        images = {split: sum(index in mask for mask in masks) for split, masks in counted.items()}
        share = pixels[splits[0].name] / total if total else 0.0
        name, colour = classes.names[index], classes.palette[index]
        rows.append(ClassSummary(name, colour, pixels, images, share, weights[index], ids[index]))
    return rows


def median_frequency_weights(images: Sequence[dict[int, int]], num_classes: int) -> list[float]:
    """Weights of the loss by median frequency (Eigen and Fergus 2015, section 6.3.2).

    The frequency of a class is its fraction of the scored pixels of the images that contain it; its weight is the
    median of all frequencies divided by its own. A class that never occurs has weight 1.

    Args:
        images: class index -> pixels, for each image.

    >>> median_frequency_weights([{0: 90, 1: 10}, {0: 100}], 3)
    [0.5526, 5.25, 1.0]
    >>> median_frequency_weights([{0: 12_000_000, 1: 300, 2: 200}], 3)
    [2.5e-05, 1.0, 1.5]
    """
    class_pixels, image_pixels = [0] * num_classes, [0] * num_classes
    for counts in images:
        scored_pixels = sum(counts.values())
        for index, count in counts.items():
            class_pixels[index] += count
            image_pixels[index] += scored_pixels
    frequencies = [pixels / total if total else 0.0 for pixels, total in zip(class_pixels, image_pixels, strict=True)]
    present = [frequency for frequency in frequencies if frequency]
    median = statistics.median(present) if present else 1.0
    # Rounded to significant digits: beside tiny classes, the weight of the background is far below 1, and not 0.
    return [float(f"{median / frequency:.4g}") if frequency else 1.0 for frequency in frequencies]


def check_classes(rows: Sequence[ClassSummary], splits: Sequence[str]) -> Iterator[Notice]:
    """Notices about ambiguous, absent and rare classes."""
    train, *others = splits
    repeated = [name for name, count in Counter(row.name for row in rows).items() if count > 1]
    if repeated:
        text = f"several classes have the same name, so that tables do not tell them apart: {join_first(repeated)}."
        yield Notice(WARNING, text)
    never = [row.name for row in rows if not row.pixels[train]]
    if never:
        text = (
            f"{train}: {len(never)} of {len(rows)} classes never occur, so they cannot be learned: {join_first(never)}."
        )
        yield Notice(WARNING, text)
    for split in others:
        missing = [row.name for row in rows if row.pixels[train] and not row.pixels[split]]
        if missing:
            absent = format_subject(len(missing), f"class of {train} is", f"classes of {train} are")
            text = f"{split}: {absent} absent, without a score: {join_first(missing)}."
            yield Notice(NOTE, text)
    rare = [row.name for row in rows if 0 < row.share < RARE_FRACTION]
    if rare:
        having = format_subject(len(rare), "class has", "classes have")
        text = f"{train}: {having} less than 0.1 % of the pixels: {join_first(rare)}."
        yield Notice(NOTE, f"{text} loss.class_weights=<check.json> or data.oversample=0.05 may help.")


# ---- sizes and splits


def check_sizes(train: ScannedSplit, data: DataConfig) -> Advice:
    """Check whether images are enlarged much."""
    if not train.usable_pairs or data.resize != "short_edge":
        return Advice([], {})
    short = statistics.median(min(facts.height, facts.width) for _, facts in train.usable_pairs)
    if short >= 0.75 * min(data.short_edges):
        return Advice([], {})
    edges = sorted({max(8, round(short * factor / 8) * 8) for factor in (0.75, 0.875, 1, 1.125, 1.25)})
    text = (
        f"images are small: the median of their short sides is {short:g} pixels. data.short_edges={data.short_edges} "
        "enlarges them, which costs time and adds no detail."
    )
    middle = edges[len(edges) // 2]
    return Advice(
        [Notice(NOTE, text)], {"data.short_edges": f"[{','.join(map(str, edges))}]", "eval.scales": f"[{middle}]"}
    )


def check_splits(splits: Sequence[ScannedSplit], data: DataConfig) -> Advice:
    """Check that there is a validation split, and the length of an epoch."""
    notices, suggestions = [], {}
    if "val" not in [split.name for split in splits]:
        notices.append(Notice(WARNING, "there is no validation split: the best epoch cannot be determined."))
        suggestions["data.val_fraction"] = "0.1"
    pairs = len(splits[0].usable_pairs)
    if pairs and data.steps_per_epoch and data.steps_per_epoch * data.batch_size > 20 * pairs:
        passes = data.steps_per_epoch * data.batch_size / pairs
        steps = max(1, round(10 * pairs / data.batch_size))
        notices.append(
            Notice(NOTE, f"an epoch of {data.steps_per_epoch} steps makes {passes:.0f} passes over {pairs} images.")
        )
        suggestions["data.steps_per_epoch"] = str(steps)
    return Advice(notices, suggestions)


def padding_fraction(
    plan: TrainPlan, list_members: Callable[[SubBatch], list[Size]], size_divisor: int, num_sub_batches: int
) -> float:
    """The fraction of padding, 0..1, in the first sub-batches of a plan.

    Args:
        list_members: gives the sizes of the images of a sub-batch.
    """
    filled, whole = 0, 0
    for number in range(num_sub_batches):
        members = list_members(plan.sub_batch(number))
        canvas = canvas_size(members, size_divisor)
        filled += sum(size.height * size.width for size in members)
        whole += len(members) * canvas.height * canvas.width
    return 1 - filled / whole


# ---- summaries


def summarise_split(split: ScannedSplit, class_of: ClassOf | None, hidden: Sequence[int] = ()) -> SplitSummary:
    """The numbers of one split, without ids of ours, `hidden`, that stand in no file."""
    seen = [facts for facts in split.findings if facts.height]
    pixels = sum_ids([split])
    ignored = sum(count for raw, count in pixels.items() if class_of and class_of(raw) == IGNORED)
    wrong = sum(1 for facts in split.findings if facts.problem)
    return SplitSummary(
        split.name,
        len(split.records),
        wrong,
        summarise_values([facts.height for facts in seen]),
        summarise_values([facts.width for facts in seen]),
        summarise_values([facts.width / facts.height for facts in seen]),
        dict(Counter(facts.image_kind for facts in split.findings if facts.image_kind).most_common()),
        dict(Counter(facts.mask_kind for facts in split.findings if facts.mask_kind).most_common()),
        {raw: count for raw, count in sorted(pixels.items()) if raw not in hidden},
        ignored / pixels.total() if pixels else 0.0,
    )


def summarise_values(values: Sequence[float]) -> Spread:
    """Smallest, median and largest value; zeros if there are none."""
    return Spread(min(values), statistics.median(values), max(values)) if values else Spread(0, 0, 0)


def first_masks(records: Iterable[Record]) -> tuple[str, ...]:
    """The masks of the first few records."""
    return tuple(str(record.label) for record, _ in zip(records, range(MAX_EXAMPLES), strict=False))


def format_ranges(ids: Sequence[int]) -> str:
    """Ascending integers, with consecutive ones joined.

    >>> format_ranges([0, 1, 2, 7, 9, 10])
    '0..2, 7, 9, 10'
    """
    groups: list[list[int]] = []
    for raw_id in ids:
        if groups and raw_id == groups[-1][-1] + 1:
            groups[-1].append(raw_id)
        else:
            groups.append([raw_id])
    texts = [f"{group[0]}..{group[-1]}" if len(group) > 2 else ", ".join(map(str, group)) for group in groups]
    return join_first(texts)


def join_first(items: Sequence[Any], max_items: int = 8) -> str:
    """Items joined by commas; long lists are shortened."""
    more = f" and {len(items) - max_items} more" if items[max_items:] else ""
    return ", ".join(map(str, items[:max_items])) + more
