"""The data doctor: from what a scan of a data set found to notices, suggestions and a verdict. Reads no files.

Ids are those of the mask files, classes are class indices. `known` tells what an id means; where the configuration does
not say it yet, `suggested_ids` reads it off the ids that are there.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from semseg.config.schema import DataConfig
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size, canvas_size, scaled_size
from semseg.data.label_map import IGNORED, LabelMap
from semseg.data.overlap import Overlap
from semseg.data.palette import Colour
from semseg.data.plan import TrainPlan
from semseg.data.records import Record
from semseg.data.scan import FIRST_OF_SEVERAL, PairFacts
from semseg.data.sources import Orientations

ERROR, WARNING, NOTE = "error", "warning", "note"
READY, WITH_WARNINGS, NOT_READY = "READY", "READY, WITH WARNINGS", "NOT READY"
MOSTLY_IGNORED = 0.9  # share of an image's pixels
MANY_OF_ONE_ID = 0.2  # share of the masks
RARE = 0.001  # share of the pixels of train
VOID = 255  # what most tools write where nothing is labelled
DARK = 0.25  # of white: an image that stays below uses a fraction of its 16 bits
HALF = 0.5  # where all images of 16 bits stay below, they have fewer
MAX_FILES = 10  # examples of one notice

Meaning = Callable[[int], int | None]  # id -> class index, IGNORED, or None if it is neither


class Known(NamedTuple):
    """What the configuration says of the ids."""

    label_map: LabelMap
    classes: ClassTable


class Notice(NamedTuple):
    """One thing that was found."""

    level: str  # error: a run would stop; warning: it would suffer; note
    text: str
    files: tuple[str, ...] = ()  # examples


class ScannedSplit(NamedTuple):
    """A split and what was found in it."""

    name: str
    records: Sequence[Record]
    findings: Sequence[PairFacts]  # one for each record
    problems: Sequence[str]  # with lines and files that gave no record
    orientations: Orientations = Orientations()
    unused: str = ""  # a sentence that counts the files which are neither images nor masks

    @property
    def sound(self) -> list[tuple[Record, PairFacts]]:
        """Pairs that have ids."""
        return [(record, found) for record, found in zip(self.records, self.findings, strict=True) if found.ids]


class Lengths(NamedTuple):
    """Of many numbers."""

    low: float
    median: float
    high: float


class SplitSummary(NamedTuple):
    """A split in numbers."""

    name: str
    pairs: int
    wrong: int  # of them, cannot be used
    heights: Lengths  # pixels
    widths: Lengths
    aspects: Lengths  # width / height
    image_kinds: dict[str, int]
    mask_kinds: dict[str, int]
    ids: dict[int, int]  # id -> pixels
    ignored: float  # share of the pixels


class ClassSummary(NamedTuple):
    """A class in numbers."""

    name: str
    colour: Colour
    pixels: dict[str, int]  # split -> pixels
    images: dict[str, int]  # split -> images that have any
    share: float  # of the scored pixels of the first split
    weight: float  # by median frequency; see `class_weights`
    id: int  # in the masks; the smallest if several mean the class


class Diagnosis(NamedTuple):
    """All that the doctor has to say about the files."""

    notices: list[Notice]
    splits: list[SplitSummary]
    classes: list[ClassSummary]  # none if it is not known what the ids mean
    suggestions: dict[str, str]  # key of the configuration -> value as on the command line

    @property
    def verdict(self) -> str:
        """One of READY, WITH_WARNINGS and NOT_READY."""
        levels = {notice.level for notice in self.notices}
        return NOT_READY if ERROR in levels else WITH_WARNINGS if WARNING in levels else READY

    @property
    def class_weights(self) -> list[float]:
        """One for each class."""
        return [row.weight for row in self.classes]


def diagnose(
    splits: Sequence[ScannedSplit],
    data: DataConfig,
    known: Known | None,
    shared: Overlap | None,
    pixel_of: Callable[[Record, int], tuple[int, int]],
) -> Diagnosis:
    """What the scans of all splits say together.

    Args:
        splits: train first.
        known: None: the configuration does not say it.
        shared: images of train that are in val too.
        pixel_of: (row, column) of the first pixel of an id in a mask.
    """
    suggestions: dict[str, str] = {}
    # A split that is cut from another one has its problems.
    told = [split._replace(problems=()) if split.problems == splits[0].problems else split for split in splits[1:]]
    notices = [notice for split in (splits[0], *told) for notice in (*file_notices(split), *pixel_notices(split))]
    if known is None:
        found = suggested_ids(ids_of(splits))
        suggestions |= found
        notices.append(Notice(ERROR, unexplained(sorted(ids_of(splits)))))
        return Diagnosis(ordered(notices), [summary(split, None) for split in splits], [], suggestions)
    meaning = known.label_map.class_index
    for found, advice in (unknown_ids(splits, data, meaning, pixel_of), shifted_ids(splits, data, meaning)):
        notices += found
        suggestions |= advice
    rows = class_rows(splits, known)
    notices += [*label_notices(splits, meaning), *class_notices(rows, [split.name for split in splits])]
    if shared:
        files = (*shared.same_path, *shared.same_content)
        notices.append(Notice(WARNING, str(shared), files[:MAX_FILES]))
    for found, advice in (size_advice(splits[0], data), split_advice(splits, data)):
        notices += found
        suggestions |= advice
    summaries = [summary(split, meaning) for split in splits]
    return Diagnosis(ordered(notices), summaries, rows, suggestions)


def ordered(notices: Iterable[Notice]) -> list[Notice]:
    """The worst first."""
    return sorted(notices, key=lambda notice: (ERROR, WARNING, NOTE).index(notice.level))


# ---- files


def file_notices(split: ScannedSplit) -> Iterator[Notice]:
    """Files that no run could use."""
    if split.problems:
        text = f"{split.name}: {len(split.problems)} lines or files without a pair, such as {split.problems[0]}"
        yield Notice(ERROR, text, tuple(split.problems[:MAX_FILES]))
    if split.unused:
        yield Notice(NOTE, split.unused)
    unlabelled = [record for record in split.records if record.label is None]
    if unlabelled:
        text = f"{split.name}: {len(unlabelled)} of {len(split.records)} images have no mask and cannot be scored."
        yield Notice(ERROR, text, tuple(record.image for record in unlabelled[:MAX_FILES]))
    coded = [(record, found) for record, found in zip(split.records, split.findings, strict=True) if found.colours]
    if coded:
        colours = sum((Counter(found.colours) for _, found in coded), Counter[str]())
        yield Notice(
            ERROR,
            f"{split.name}: {len(coded)} masks are coded in {len(colours)} colours ({listed(most(colours))}). A table "
            "says what they mean: data.classes=<CSV file with index,name,R,G,B>.",
            examples(record for record, _ in coded),
        )
    broken = [found.problem for found in split.findings if found.problem and not found.colours]
    if broken:
        text = f"{split.name}: {len(broken)} of {len(split.records)} pairs cannot be used, such as {broken[0]}"
        yield Notice(ERROR, text, tuple(broken[:MAX_FILES]))
    if not split.sound:
        yield Notice(ERROR, f"{split.name}: not one pair of image and mask can be used.")


def pixel_notices(split: ScannedSplit) -> Iterator[Notice]:
    """Files that a run uses, perhaps not as their owner thinks."""
    if split.orientations.problem:
        yield Notice(ERROR, split.orientations.problem)
    elif split.orientations.text:
        level = WARNING if split.orientations.is_mixed else NOTE
        yield Notice(level, f"{split.name}: {split.orientations.text}")
    paged = [record for record, found in paired(split) if FIRST_OF_SEVERAL in f"{found.image_kind} {found.mask_kind}"]
    if paged:
        text = f"{split.name}: {len(paged)} images or masks hold several frames or pages, of which the first is read."
        yield Notice(WARNING, text, images_of(paged))
    for white, bits in ((65535, 16), (255, 8)):
        seen = [(record, found) for record, found in paired(split) if found.largest >= 0 and found.white == white]
        most = max((found.largest for _, found in seen), default=0)
        limit = HALF if most < HALF * white else DARK
        dark = [(record, found) for record, found in seen if found.largest < limit * white]
        if dark:
            most = max(found.largest for _, found in dark)
            counted = f"{len(dark)} of {len(seen)} 16-bit images" if bits == 16 else f"{len(dark)} 8-bit images"
            text = (
                f"{split.name}: {counted} use a fraction of their depth: the largest value is {most} of {white} "
                f"({most / white:.1%}), {most * 255 // white} of 255 as they are read. Scale them to the whole range."
            )
            yield Notice(WARNING, text, images_of(record for record, _ in dark))


def paired(split: ScannedSplit) -> Iterator[tuple[Record, PairFacts]]:
    """Each record with what was found in it."""
    return zip(split.records, split.findings, strict=True)


def images_of(records: Iterable[Record]) -> tuple[str, ...]:
    """The first few."""
    return tuple(record.image for record, _ in zip(records, range(MAX_FILES), strict=False))


# ---- ids


def ids_of(splits: Iterable[ScannedSplit]) -> Counter[int]:
    """Pixels of each id over some splits."""
    total: Counter[int] = Counter()
    for split in splits:
        for _, found in split.sound:
            total.update(found.ids)
    return total


def unexplained(ids: Sequence[int]) -> str:
    """A sentence about ids of which nothing is known.

    >>> unexplained([0, 1, 2])
    'data.num_classes is not set. Found ids 0..2. If 0 means unlabelled, set data.num_classes=2 and nothing else.'
    """
    meant = [raw_id for raw_id in ids if raw_id not in (0, VOID)]
    told = f"data.num_classes is not set. Found ids {ranges(ids)}."
    if not meant or 0 not in ids:
        return told
    return f"{told} If 0 means unlabelled, set data.num_classes={meant[-1]} and nothing else."


def suggested_ids(pixels: Counter[int]) -> dict[str, str]:
    """What ids that nobody has explained probably mean.

    >>> suggested_ids(Counter({0: 9, 1: 5, 2: 3, 255: 1}))
    {'data.num_classes': '3', 'data.first_id': '0', 'data.ignore': '[255]'}
    """
    ids = sorted(pixels)
    if not ids:
        return {}
    if set(ids) == {0, VOID}:  # black and white
        return {"data.num_classes": "2", "data.first_id": "0", "data.ignore": "[]", "data.map": "{0:0,255:1}"}
    meant = [raw_id for raw_id in ids if raw_id != VOID] or ids
    first = 0 if meant[0] == 0 else 1
    ignored = [str(raw_id) for raw_id in ids if raw_id not in meant]
    if first == 1 and 0 not in meant:
        ignored = ["0", *ignored]
    return {
        "data.num_classes": str(max(2, meant[-1] - first + 1)),
        "data.first_id": str(first),
        "data.ignore": f"[{','.join(ignored)}]",
    }


def unknown_ids(
    splits: Sequence[ScannedSplit],
    data: DataConfig,
    meaning: Meaning,
    pixel_of: Callable[[Record, int], tuple[int, int]],
) -> tuple[list[Notice], dict[str, str]]:
    """Ids that are neither classes nor ignored, and what to set."""
    notices = []
    for split in splits:
        strange = Counter({raw: count for raw, count in ids_of([split]).items() if meaning(raw) is None})
        if not strange:
            continue
        having = [(record, found) for record, found in split.sound if any(meaning(raw) is None for raw in found.ids)]
        shown = ", ".join(f"{raw} ({count} pixels)" for raw, count in strange.most_common(5))
        record, found = having[0]
        raw_id = next(raw for raw in found.ids if meaning(raw) is None)
        row, column = pixel_of(record, raw_id)
        text = (
            f"{split.name}: ids {shown} are neither classes nor ignored, in {len(having)} masks: the first is {raw_id} "
            f"at row {row}, column {column} of {record.label}."
        )
        notices.append(Notice(ERROR, text, examples(record for record, _ in having)))
    strange_ids = {raw for raw in ids_of(splits) if meaning(raw) is None}
    if not strange_ids:
        return notices, {}
    if strange_ids == {VOID}:
        return notices, {"data.ignore": f"[{','.join(map(str, [*data.ignore, VOID]))}]"}
    return notices, suggested_ids(ids_of(splits))


def shifted_ids(
    splits: Sequence[ScannedSplit], data: DataConfig, meaning: Meaning
) -> tuple[list[Notice], dict[str, str]]:
    """Masks that start at 0 where 0 is set to be ignored: the first class would not be learned."""
    pixels = ids_of(splits)
    classes = sorted(raw for raw in pixels if (meaning(raw) or 0) >= 0 and meaning(raw) is not None)
    if not classes or data.first_id != 1 or 0 not in data.ignore or not data.num_classes:
        return [], {}
    is_shifted = classes == list(range(1, data.num_classes)) and pixels[0] > 0.02 * pixels.total()
    if not is_shifted:
        return [], {}
    text = (
        f"id {data.num_classes} never occurs and id 0, which is ignored, takes {pixels[0] / pixels.total():.0%} of the "
        "pixels. Do the masks start at 0?"
    )
    return [Notice(WARNING, text)], suggested_ids(pixels)


def label_notices(splits: Sequence[ScannedSplit], meaning: Meaning) -> Iterator[Notice]:
    """Masks that say little."""
    for split in splits:
        empty = [record for record, found in split.sound if ignored_share(found, meaning) > MOSTLY_IGNORED]
        if empty:
            text = (
                f"{split.name}: more than 90 % of the pixels are ignored in {len(empty)} of {len(split.sound)} masks."
            )
            yield Notice(WARNING, text, examples(empty))
        single = [record for record, found in split.sound if len(scored(found, meaning)) == 1]
        if len(single) > MANY_OF_ONE_ID * len(split.sound):
            text = (
                f"{split.name}: {len(single)} of {len(split.sound)} masks hold one class only. Were they written right?"
            )
            yield Notice(WARNING, text, examples(single))


def scored(found: PairFacts, meaning: Meaning) -> dict[int, int]:
    """Class index -> pixels of one mask; ids without a meaning are left out."""
    total: Counter[int] = Counter()
    for raw, count in found.ids.items():
        index = meaning(raw)
        if index is not None and index != IGNORED:
            total[index] += count
    return dict(total)


def ignored_share(found: PairFacts, meaning: Meaning) -> float:
    """Of the pixels of one mask."""
    return sum(count for raw, count in found.ids.items() if meaning(raw) == IGNORED) / found.num_pixels


# ---- classes


def class_rows(splits: Sequence[ScannedSplit], known: Known) -> list[ClassSummary]:
    """One row for each class."""
    classes, meaning, ids = known.classes, known.label_map.class_index, known.label_map.class_ids
    counted = {split.name: [scored(found, meaning) for _, found in split.sound] for split in splits}
    first = counted[splits[0].name]
    total = sum(sum(counts.values()) for counts in first)
    weights = class_weights(first, classes.num_classes)
    rows = []
    for index in range(classes.num_classes):
        pixels = {split: sum(counts.get(index, 0) for counts in found) for split, found in counted.items()}
        images = {split: sum(index in counts for counts in found) for split, found in counted.items()}
        share = pixels[splits[0].name] / total if total else 0.0
        name, colour = classes.names[index], classes.palette[index]
        rows.append(ClassSummary(name, colour, pixels, images, share, weights[index], ids[index]))
    return rows


def class_weights(images: Sequence[dict[int, int]], num_classes: int) -> list[float]:
    """Weights of the loss by median frequency (Eigen and Fergus 2015, section 6.3.2).

    The frequency of a class is its share of the scored pixels of those images that have it; its weight is the median of
    all frequencies over its own. A class that never occurs gets 1.

    Args:
        images: class index -> pixels, for each image.

    >>> class_weights([{0: 90, 1: 10}, {0: 100}], 3)
    [0.5526, 5.25, 1.0]
    """
    own, around = [0] * num_classes, [0] * num_classes
    for counts in images:
        scored_pixels = sum(counts.values())
        for index, count in counts.items():
            own[index] += count
            around[index] += scored_pixels
    shares = [part / whole if whole else None for part, whole in zip(own, around, strict=True)]
    present = [share for share in shares if share]
    middle = statistics.median(present) if present else 1.0
    return [round(middle / share, 4) if share else 1.0 for share in shares]


def class_notices(rows: Sequence[ClassSummary], splits: Sequence[str]) -> Iterator[Notice]:
    """Classes that are not there, or nearly."""
    train, *others = splits
    never = [row.name for row in rows if not row.pixels[train]]
    if never:
        text = f"{train}: {len(never)} of {len(rows)} classes never occur and cannot be learned: {listed(never)}."
        yield Notice(WARNING, text)
    for split in others:
        missing = [row.name for row in rows if row.pixels[train] and not row.pixels[split]]
        if missing:
            text = f"{split}: {len(missing)} classes of {train} are absent and get no score: {listed(missing)}."
            yield Notice(NOTE, text)
    rare = [row.name for row in rows if 0 < row.share < RARE]
    if rare:
        text = f"{train}: {len(rare)} classes have less than 0.1 % of the pixels each: {listed(rare)}."
        yield Notice(NOTE, f"{text} loss.class_weights=<check.json> or data.oversample=0.05 may help.")


# ---- sizes and splits


def size_advice(train: ScannedSplit, data: DataConfig) -> tuple[list[Notice], dict[str, str]]:
    """Whether images are scaled by much."""
    if not train.sound:
        return [], {}
    short = statistics.median(min(found.height, found.width) for _, found in train.sound)
    if short >= 0.75 * min(data.short_edges):
        return [], {}
    edges = sorted({max(8, round(short * factor / 8) * 8) for factor in (0.75, 0.875, 1, 1.125, 1.25)})
    text = (
        f"images are small: their short side is {short:g} pixels in the middle. data.short_edges={data.short_edges} "
        "enlarges them, which costs time and shows nothing new."
    )
    middle = edges[len(edges) // 2]
    return [Notice(NOTE, text)], {"data.short_edges": f"[{','.join(map(str, edges))}]", "eval.scales": f"[{middle}]"}


def split_advice(splits: Sequence[ScannedSplit], data: DataConfig) -> tuple[list[Notice], dict[str, str]]:
    """Whether there is something to validate on, and how long an epoch is."""
    notices, suggestions = [], {}
    if "val" not in [split.name for split in splits]:
        notices.append(Notice(WARNING, "there is no validation split: no score would tell which epoch is best."))
        suggestions["data.val_fraction"] = "0.1"
    pairs = len(splits[0].sound)
    if pairs and data.steps_per_epoch and data.steps_per_epoch * data.batch_size > 20 * pairs:
        passes = data.steps_per_epoch * data.batch_size / pairs
        steps = max(1, round(10 * pairs / data.batch_size))
        notices.append(
            Notice(NOTE, f"an epoch of {data.steps_per_epoch} steps passes {passes:.0f} times over {pairs} images.")
        )
        suggestions["data.steps_per_epoch"] = str(steps)
    return notices, suggestions


def padding_share(
    plan: TrainPlan, sizes: Sequence[Size], max_long_edge: int, size_divisor: int, num_sub_batches: int
) -> float:
    """How much of the first sub-batches of a plan is padding, 0..1."""
    filled, whole = 0, 0
    for number in range(num_sub_batches):
        sub_batch = plan.sub_batch(number)
        members = [scaled_size(sizes[index], sub_batch.short_edge, max_long_edge) for index in sub_batch.records]
        canvas = canvas_size(members, size_divisor)
        filled += sum(size.height * size.width for size in members)
        whole += len(members) * canvas.height * canvas.width
    return 1 - filled / whole


# ---- summaries


def summary(split: ScannedSplit, meaning: Meaning | None) -> SplitSummary:
    """The numbers of one split."""
    seen = [found for found in split.findings if found.height]
    pixels = ids_of([split])
    ignored = sum(count for raw, count in pixels.items() if meaning and meaning(raw) == IGNORED)
    wrong = sum(1 for found in split.findings if found.problem)
    return SplitSummary(
        split.name,
        len(split.records),
        wrong,
        lengths([found.height for found in seen]),
        lengths([found.width for found in seen]),
        lengths([found.width / found.height for found in seen]),
        dict(Counter(found.image_kind for found in split.findings if found.image_kind).most_common()),
        dict(Counter(found.mask_kind for found in split.findings if found.mask_kind).most_common()),
        dict(sorted(pixels.items())),
        ignored / pixels.total() if pixels else 0.0,
    )


def lengths(values: Sequence[float]) -> Lengths:
    """Smallest, median and largest; zeros of nothing."""
    return Lengths(min(values), statistics.median(values), max(values)) if values else Lengths(0, 0, 0)


def examples(records: Iterable[Record]) -> tuple[str, ...]:
    """The masks of the first few records."""
    return tuple(str(record.label) for record, _ in zip(records, range(MAX_FILES), strict=False))


def most(counts: Counter[str]) -> list[str]:
    """Keys, the most frequent first."""
    return [key for key, _ in counts.most_common()]


def ranges(ids: Sequence[int]) -> str:
    """Ascending whole numbers, neighbours joined.

    >>> ranges([0, 1, 2, 7, 9, 10])
    '0..2, 7, 9, 10'
    """
    groups: list[list[int]] = []
    for raw_id in ids:
        if groups and raw_id == groups[-1][-1] + 1:
            groups[-1].append(raw_id)
        else:
            groups.append([raw_id])
    words = [f"{group[0]}..{group[-1]}" if len(group) > 2 else ", ".join(map(str, group)) for group in groups]
    return listed(words)


def listed(words: Sequence[Any], most_shown: int = 8) -> str:
    """Words with commas, long lists cut."""
    return ", ".join(map(str, words[:most_shown])) + (
        f" and {len(words) - most_shown} more" if words[most_shown:] else ""
    )
