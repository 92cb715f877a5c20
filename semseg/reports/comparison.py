"""Compare finished evaluations by the files that they wrote. No torch.

The first run is the base; a difference is the score of another run minus the score of the base. Intervals are from a
paired bootstrap over the images, see evaluation/paired_bootstrap.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg.data.seeding import generator_for
from semseg.errors import ConfigError
from semseg.evaluation.image_files import COUNTS_FILE
from semseg.evaluation.paired_bootstrap import (
    MIN_INTERVAL_IMAGES,
    NUM_RESAMPLES,
    DifferenceIntervals,
    Interval,
    compute_difference_intervals,
    score_counts,
)
from semseg.reports.compared_runs import HEADLINE_NAMES, ComparedRun, is_score
from semseg.reports.configurations import KeyDifference, compare_configurations, read_configuration
from semseg.system.text import escape_unprintable, format_quantity

VIEWS = ("scales", "flip", "window", "stride")  # how a network sees images: its scores are comparable all the same
CONDITIONS = ("data", "split", "mean_iou_rule")  # to be the same, unless the pixel counts of the same images are known
BETTER, WORSE, UNCLEAR = "better", "worse", "unclear"  # what an interval says about a difference


class ScoreRow(NamedTuple):
    """One score of every run."""

    name: str
    values: tuple[float | None, ...]  # one for each run, 0..1
    intervals: tuple[Interval | None, ...] = ()  # of the differences; empty where none are computed

    @property
    def differences(self) -> tuple[float | None, ...]:
        """The differences of all runs but the first to the first."""
        base = self.values[0]
        return tuple(None if base is None or value is None else value - base for value in self.values[1:])

    @property
    def change(self) -> float | None:
        """The largest absolute difference; None if no scores can be compared."""
        return max((abs(value) for value in self.differences if value is not None), default=None)

    @property
    def judged_differences(self) -> list[Difference]:
        """The differences with their intervals."""
        intervals = self.intervals or (None,) * len(self.differences)
        return [Difference(value, interval) for value, interval in zip(self.differences, intervals, strict=True)]


class Difference(NamedTuple):
    """The difference of a score to the base."""

    value: float | None  # None: there is no score
    interval: Interval | None  # 95 %

    @property
    def verdict(self) -> str:
        """BETTER or WORSE if the interval excludes 0; UNCLEAR if it does not, or if there is none."""
        if self.value is None or self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return UNCLEAR
        return BETTER if self.interval[0] > 0 else WORSE


class Comparison(NamedTuple):
    """Several runs side by side; the first is the base."""

    runs: tuple[ComparedRun, ...]
    notes: tuple[str, ...]  # why numbers may not be comparable
    headline: tuple[ScoreRow, ...]
    classes: tuple[ScoreRow, ...]  # IoU, in the order of the classes
    images: tuple[ScoreRow, ...]  # mean IoU of the images that are in all runs, the largest change first
    configuration: tuple[KeyDifference, ...]  # what differs in how the networks were trained
    num_images: int | None  # that the scores are over, if it is the same number for all runs
    has_intervals: bool
    is_comparable: bool = True  # whether the scores of all runs are of the same labels, by the same rule

    @property
    def class_ids(self) -> list[Any] | None:
        """The ids of the classes in the base's label files; None if an older evaluation did not store them."""
        ids = [entry.get("id") for entry in self.runs[0].metrics["classes"]]
        return None if None in ids else ids

    @property
    def configuration_summary(self) -> str:
        """A sentence about configurations in which no key differs."""
        unknown = [run.name for run in self.runs if read_configuration(run.metrics, run.folder) is None]
        if unknown:
            return f"It is not known how the network of {', '.join(unknown)} was trained."
        return "The networks were trained with the same configuration."

    @property
    def verdicts(self) -> list[str]:
        """A sentence about the first score of every run but the base."""
        if not self.headline:
            return []
        first, base = self.headline[0], self.runs[0].name
        if not self.is_comparable:
            return ["The scores are not comparable, so there is no verdict."]
        return [
            f"{run.name} against {base}: {first.name} {describe_difference(difference, self.num_images)}"
            for run, difference in zip(self.runs[1:], first.judged_differences, strict=True)
        ]


def describe_difference(difference: Difference, num_images: int | None) -> str:
    """Describe a difference, its interval, and what follows from both."""
    if difference.value is None:
        return "cannot be compared."
    if difference.value == 0 and difference.interval == (0, 0):
        return "is the same, whichever images are drawn."
    points = f"{100 * difference.value:+.2f} points"
    if difference.interval is None:
        return f"{points}, without an interval: whether other images would agree is not known."
    low, high = (100 * bound for bound in difference.interval)
    over = "the images" if num_images is None else format_quantity(num_images, "image")
    conclusions = {
        BETTER: f"better, as far as {over} can tell.",
        WORSE: f"worse, as far as {over} can tell.",
        UNCLEAR: f"{over} cannot tell which is better.",
    }
    return f"{points} (95 % interval {low:+.2f} to {high:+.2f}): {conclusions[difference.verdict]}"


def compare_runs(runs: Sequence[ComparedRun], seed: int = 0, defaults: Mapping[str, Any] | None = None) -> Comparison:
    """Put the runs side by side.

    Args:
        seed: of the resamples of the images.
        defaults: of the keys of a configuration, as nested mappings.

    Raises:
        ConfigError: if their classes differ.
    """
    names = [class_names(run) for run in runs]
    for run, others in zip(runs[1:], names[1:], strict=True):
        if others != names[0]:
            raise ConfigError(f"runs: {describe_class_difference(runs[0].name, names[0], run.name, others)}")
    images = build_image_rows(runs)
    common = find_common_counts(runs)
    different = find_different_conditions(runs)
    has_same_labels = not isinstance(common, str)
    notes = [*note_different_conditions(runs, different, has_same_labels), *note_missing_images(runs, len(images))]
    headline, classes, num_images = build_headline_rows(runs), build_class_rows(runs, names[0]), common_count(runs)
    has_intervals = False
    if isinstance(common, str):
        notes.append(common)
    else:
        num_images, rule = len(common[0]), runs[0].rule
        if has_different_images(runs):
            listed = ", ".join(f"{run.name}: {len(run.counts.files)}" for run in runs if run.counts)
            shared = format_quantity(num_images, "image")
            notes.append(f"the runs have {shared} in common ({listed}): all scores are over those.")
        if has_different_images(runs) or "mean_iou_rule" in different:
            headline, classes = score_common_images(common, rule, headline, classes)
        base, *others = common
        intervals = compute_difference_intervals(base, others, [rule] * len(runs), generator_for(seed))
        headline, classes = add_intervals(headline, classes, intervals)
        has_intervals = num_images >= MIN_INTERVAL_IMAGES
        if not has_intervals:
            notes.append(f"telling two runs apart takes at least {MIN_INTERVAL_IMAGES} images, not {num_images}.")
    configuration = compare_configurations([read_configuration(run.metrics, run.folder) for run in runs], defaults)
    return Comparison(
        tuple(runs),
        tuple(notes),
        headline,
        classes,
        images,
        tuple(configuration),
        num_images,
        has_intervals,
        is_comparable=has_same_labels or not (different.keys() & set(CONDITIONS) or has_all_counts(runs)),
    )


# ---- intervals


def find_common_counts(runs: Sequence[ComparedRun]) -> list[NDArray[np.signedinteger]] | str:
    """Return the counts (N, 3, K) of the images that all runs have, in the same order; or why there are none."""
    without = [run.name for run in runs if run.counts is None]
    tables = [run.counts for run in runs if run.counts is not None]
    if without:
        return f"no {COUNTS_FILE} in {', '.join(without)}, so no intervals: evaluate again to get them."
    positions = [{file: index for index, file in enumerate(table.files)} for table in tables]
    common = [file for file in tables[0].files if all(file in table for table in positions)]
    if not common:
        return "the runs have no image in common, so no intervals."
    counts = [table.counts[[rows[file] for file in common]] for table, rows in zip(tables, positions, strict=True)]
    num_changed = max(int((counts[0][:, 1] != other[:, 1]).any(1).sum()) for other in counts[1:])
    if num_changed:
        return (
            f"the labels of {num_changed} of {len(common)} images are not the same in all runs, "
            "so the scores are not comparable, and there are no intervals."
        )
    return counts


def has_different_images(runs: Sequence[ComparedRun]) -> bool:
    """Whether the runs were evaluated on different images."""
    files = [set(run.counts.files) for run in runs if run.counts is not None]
    return any(others != files[0] for others in files[1:])


def common_count(runs: Sequence[ComparedRun]) -> int | None:
    """Return the number of images that all evaluations are over; None if it differs or is not known."""
    numbers = {run.metrics.get("images") for run in runs}
    number = numbers.pop()
    return number if not numbers and isinstance(number, int) else None


def has_all_counts(runs: Sequence[ComparedRun]) -> bool:
    """Whether the pixel counts of every run are known."""
    return all(run.counts is not None for run in runs)


def score_common_images(
    common: Sequence[NDArray[np.signedinteger]], rule: str, headline: Sequence[ScoreRow], classes: Sequence[ScoreRow]
) -> tuple[tuple[ScoreRow, ...], tuple[ScoreRow, ...]]:
    """Compute headline scores and IoUs over the images in `common` by one rule, in place of each run's own."""
    scores = [score_counts(counts.sum(0, keepdims=True, dtype=np.int64), rule) for counts in common]
    keys = {name: key for key, name in HEADLINE_NAMES.items()}
    return (
        tuple(
            row._replace(values=tuple(finite_or_none(score.headline[keys[row.name]][0]) for score in scores))
            for row in headline
            if row.name in keys  # the counts do not give custom scores
        ),
        tuple(
            row._replace(values=tuple(finite_or_none(score.iou[0, index]) for score in scores))
            for index, row in enumerate(classes)
        ),
    )


def finite_or_none(value: float) -> float | None:
    """Return the number as a float, or None for NaN."""
    return float(value) if np.isfinite(value) else None


def add_intervals(
    headline: Sequence[ScoreRow], classes: Sequence[ScoreRow], intervals: Sequence[DifferenceIntervals]
) -> tuple[tuple[ScoreRow, ...], tuple[ScoreRow, ...]]:
    """Add the intervals of the differences to all rows."""
    keys = {name: key for key, name in HEADLINE_NAMES.items()}
    return (
        tuple(
            row._replace(intervals=tuple(found.headline.get(keys.get(row.name, "")) for found in intervals))
            for row in headline
        ),
        tuple(
            row._replace(intervals=tuple(found.iou[index] for found in intervals)) for index, row in enumerate(classes)
        ),
    )


# ---- rows


def build_class_rows(runs: Sequence[ComparedRun], names: Sequence[str]) -> tuple[ScoreRow, ...]:
    """Return the IoU of every class."""
    return tuple(
        ScoreRow(name, tuple(run.metrics["classes"][index].get("iou") for run in runs))
        for index, name in enumerate(names)
    )


def class_names(run: ComparedRun) -> list[str]:
    """Return the names of the classes in the order of their indices."""
    return [escape_unprintable(entry["name"]) for entry in run.metrics["classes"]]


def describe_class_difference(base: str, base_names: list[str], other: str, other_names: list[str]) -> str:
    """Describe the first difference between two lists of classes."""
    if len(base_names) != len(other_names):
        return f"{base} has {len(base_names)} classes, but {other} has {len(other_names)}; they cannot be compared."
    index = next(index for index, (a, b) in enumerate(zip(base_names, other_names, strict=True)) if a != b)
    return (
        f"class {index} is {base_names[index]!r} in {base}, but {other_names[index]!r} in {other}; "
        "runs with different classes cannot be compared."
    )


def build_headline_rows(runs: Sequence[ComparedRun]) -> tuple[ScoreRow, ...]:
    """Return the headline scores that all runs have, with the fractions among custom scores."""
    ours = [
        ScoreRow(name, tuple(run.metrics[key] for run in runs))
        for key, name in HEADLINE_NAMES.items()
        if all(key in run.metrics for run in runs)
    ]
    tables = [read_own_fractions(run.metrics) for run in runs]
    common = [name for name in tables[0] if all(name in table for table in tables)]
    return (*ours, *(ScoreRow(escape_unprintable(name), tuple(table[name] for table in tables)) for name in common))


def read_own_fractions(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Read the scores from 0 to 1 that a program has added."""
    scores, units = metrics.get("own_scores"), metrics.get("own_units")
    if not isinstance(scores, dict) or not isinstance(units, dict):
        return {}
    return {name: value for name, value in scores.items() if units.get(name) == "%" and is_score(value)}


def build_image_rows(runs: Sequence[ComparedRun]) -> tuple[ScoreRow, ...]:
    """Return the images that all runs scored, the largest change first."""
    tables = [run.images for run in runs if run.images is not None]
    if len(tables) < len(runs):
        return ()
    common = [file for file in tables[0] if all(file in table for table in tables[1:])]
    rows = [ScoreRow(file, tuple(table[file] for table in tables)) for file in common]
    return tuple(sorted(rows, key=change_sort_key))


def change_sort_key(row: ScoreRow) -> tuple[bool, float]:
    """Sort key: the largest change first, rows that cannot be compared last."""
    return (row.change is None, -(row.change or 0.0))


def find_different_conditions(runs: Sequence[ComparedRun]) -> dict[str, str]:
    """The settings of the evaluations that differ, each with its value in every run, for a sentence."""
    return {
        key: ", ".join(f"{run.name}: {format_setting(key, run.metrics)}" for run in runs)
        for key in (*CONDITIONS, *VIEWS)
        if any(run.metrics.get(key) != runs[0].metrics.get(key) for run in runs)
    }


def note_different_conditions(
    runs: Sequence[ComparedRun], different: Mapping[str, str], has_same_labels: bool
) -> Iterator[str]:
    """Write a sentence for each setting of the evaluations that differs.

    Args:
        different: the settings, from `find_different_conditions`.
        has_same_labels: whether the pixel counts of all runs are known for images with the same labels.
    """
    for key, listed in different.items():
        if key in VIEWS:
            consequence = ": the differences are those of the networks with these settings."
        elif not has_same_labels:
            consequence = ", so the scores are not comparable."
        elif key == "mean_iou_rule":
            consequence = f": all scores are by the rule of {runs[0].name}."
        else:
            consequence = ", but the labels of the images in common are the same."
        yield f"{key} differs ({listed}){consequence}"


def note_missing_images(runs: Sequence[ComparedRun], num_common: int) -> list[str]:
    """Write a sentence if only some images are compared, or none."""
    without = [run.name for run in runs if run.images is None]
    if without:
        return [f"no per_image.csv in {', '.join(without)}: images are not compared."]
    counts = [len(run.images or ()) for run in runs]
    if all(count == num_common for count in counts):
        return []
    if has_all_counts(runs):
        return []  # all scores are recomputed over the common images
    listed = ", ".join(f"{run.name}: {count}" for run, count in zip(runs, counts, strict=True))
    return [
        f"the runs have {format_quantity(num_common, 'image')} in common ({listed}). Only those are compared image by "
        "image; all other scores are over each run's own images."
    ]


def format_setting(key: str, metrics: Mapping[str, Any]) -> str:
    """Format a value of metrics.json for a sentence."""
    return "not stored" if key not in metrics else "none" if metrics[key] is None else str(metrics[key])


def comparison_to_dict(comparison: Comparison) -> Mapping[str, Any]:
    """Return the content of compare.json."""
    return {
        "runs": [{"name": run.name, "folder": str(run.folder)} for run in comparison.runs],
        "base": comparison.runs[0].name,
        "num_images": comparison.num_images,
        "resamples": NUM_RESAMPLES if comparison.has_intervals else 0,
        "notes": list(comparison.notes),
        "configuration": [
            {"key": row.key, "values": list(row.values), "is_minor": row.is_minor} for row in comparison.configuration
        ],
        "headline": [row_to_dict(row) for row in comparison.headline],
        "classes": [row_to_dict(row) for row in comparison.classes],
        "images": [row_to_dict(row) for row in comparison.images],
    }


def row_to_dict(row: ScoreRow) -> dict[str, Any]:
    """Return a row with its differences, and with their intervals where they are computed."""
    entries: dict[str, Any] = {"name": row.name, "values": list(row.values), "differences": list(row.differences)}
    if row.intervals:
        entries["intervals"] = [interval and list(interval) for interval in row.intervals]
        entries["verdicts"] = [difference.verdict for difference in row.judged_differences]
    return entries


def build_csv_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the rows of compare.csv: the IoU of each class in every run, and the differences to the base."""
    names, ids = [run.name for run in comparison.runs], comparison.class_ids
    return [
        {"index": index}
        | ({} if ids is None else {"id": ids[index]})
        | {"name": row.name}
        | {f"iou {name}": value for name, value in zip(names, row.values, strict=True)}
        | {
            key: value
            for name, difference in zip(names[1:], row.judged_differences, strict=True)
            for key, value in difference_cells(name, difference).items()
        }
        for index, row in enumerate(comparison.classes)
    ]


def difference_cells(name: str, difference: Difference) -> dict[str, float | None]:
    """Return the cells of compare.csv for the difference of one run."""
    low, high = difference.interval or (None, None)
    return {f"difference {name}": difference.value, f"low {name}": low, f"high {name}": high}
