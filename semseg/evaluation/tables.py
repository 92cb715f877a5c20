"""Stage 8: the result of an evaluation as tables on the console."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from semseg.evaluation.bootstrap import CONFIDENCE_LEVEL
from semseg.evaluation.evaluator import Speed
from semseg.evaluation.own_scores import FRACTION
from semseg.evaluation.result import EvaluationResult, RuleScore, SummaryScore
from semseg.system.text import escape_unprintable

MISSING_SCORE = "n/a"
RULE_DESCRIPTIONS = {
    "ade20k": "over all {total} classes; an absent class counts as 0",
    "present": "over {averaged} of {total} classes: those in the labels or predicted",
    "ground_truth": "over {averaged} of {total} classes: those in the labels",
}
MAX_ROWS = 40  # if there are more classes, the console shows the best and the worst
MAX_ABSENT_NAMES = 3  # absent classes that the summary names


def format_score(value: float | None) -> str:
    """A fraction in percent with two digits, or n/a."""
    return MISSING_SCORE if value is None else f"{100 * value:.2f}"


def format_own_score(value: float | None, unit: str) -> str:
    """A score that a program adds: a fraction in percent, or a number with its unit.

    >>> format_own_score(0.5, "%"), format_own_score(3.25, "px")
    ('50.00', '3.25 px')
    """
    return format_score(value) if value is None or unit == FRACTION else f"{value:.4g} {unit}".rstrip()


def class_score_table(result: EvaluationResult, title: str) -> Table:
    """One row per class, in percent; if there are more than MAX_ROWS classes, only the best and the worst."""
    names, scores = result.classes.names, result.scores
    columns = {
        "IoU": scores.iou,
        "accuracy": scores.accuracy,
        "precision": scores.precision,
        "Dice": scores.dice,
        **({"boundary IoU": result.boundary.iou} if result.boundary else {}),
        "pixels": scores.pixel_fractions,
    }
    own = {score.name: score for score in scores.own if score.per_class is not None}
    best, worst = select_rows(scores.iou, scores.pixels)
    num_shown = len(best) + len(worst)
    selection = f"; {num_shown} of {len(names)} classes, the best and the worst" if num_shown < len(names) else ""
    table = Table("class", title=Text(title), caption=f"percent{selection}; pixels: fraction of the labelled pixels")
    for column in (*columns, *own):
        table.add_column(column, justify="right")
    for positions in (best, worst):
        for position in positions:
            values = (format_score(values[position]) for values in columns.values())
            own_values = (format_own_score((score.per_class or [])[position], score.unit) for score in own.values())
            table.add_row(Text(escape_unprintable(names[position])), *values, *own_values)
        table.add_section()
    return table


def select_rows(iou: Sequence[float | None], pixels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Positions of the classes to show: all in their order, or the best and the worst by IoU of those scored.

    Of classes with the same IoU, usually 0, the one with the most labelled pixels is the worst.
    """
    if len(iou) <= MAX_ROWS:
        return list(range(len(iou))), []
    by_iou = sorted((-value, pixels[position], position) for position, value in enumerate(iou) if value is not None)
    order = [position for _, _, position in by_iou]
    half = MAX_ROWS // 2
    return order[:half], order[half:][-half:]


def summary_table(result: EvaluationResult) -> Table:
    """The scores of the whole split in percent, each with its meaning."""
    table = Table("score", title=f"summary of {len(result.images)} images")
    table.add_column("%", justify="right")
    table.add_column("meaning")
    for name, value, meaning in summary_rows(result):
        table.add_row(name, value, Text(meaning))
    return table


def summary_rows(result: EvaluationResult) -> Iterator[tuple[str, str, str]]:
    """Name, value and meaning of each score of the whole split, and the mean IoU of every rule if they differ."""
    for score in result.summary_scores:
        yield score.name, format_own_score(score.value, score.unit), describe_score(score)
    if not result.rules_differ:
        return
    for score in result.rule_scores:
        yield f"mean IoU, {score.rule}", format_score(score.mean_iou), describe_rule(score, result.classes.num_classes)


def describe_score(score: SummaryScore) -> str:
    """The meaning of a score, with its confidence interval if there is one."""
    if not score.interval:
        return score.meaning
    low, high = map(format_score, score.interval)
    return f"{score.meaning}; {100 * CONFIDENCE_LEVEL:.0f} % interval {low} to {high}"


def describe_rule(score: RuleScore, num_classes: int) -> str:
    """Which classes a rule averages over, and which are absent."""
    rule = RULE_DESCRIPTIONS[score.rule].format(averaged=score.num_averaged, total=num_classes)
    num_absent = len(score.absent)
    if not num_absent:
        return f"{rule}; no class is absent"
    names = ", ".join(score.absent[:MAX_ABSENT_NAMES])
    return f"{rule}; {num_absent} absent: {names}{', ...' if num_absent > MAX_ABSENT_NAMES else ''}"


def scales_table(result: EvaluationResult, scales: list[int]) -> Table:
    """One row for eval.scales and one for each subset of them, in percent."""
    table = Table("scales", title="scales, from one pass")
    for column in ("mean IoU", "pixel accuracy", "overall score"):
        table.add_column(column, justify="right")
    for edges, scores in [(scales, result.scores), *result.subsets]:
        values = (scores.mean_iou, scores.pixel_accuracy, scores.overall)
        table.add_row(", ".join(map(str, edges)), *map(format_score, values))
    return table


def format_speed(speed: Speed) -> str:
    """Images per second, and the time per image in each stage."""
    stages = ", ".join(f"{stage} {1000 * seconds:.1f} ms" for stage, seconds in speed.seconds_per_image.items())
    return f"{speed.images_per_second:.2f} images per second; per image: {stages}"
