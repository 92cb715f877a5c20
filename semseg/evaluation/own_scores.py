"""Stage 7: custom scores, which programs register. They stand beside ours in the log, tables, files and pages."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from semseg.config.tables import METRICS_SECTION, announce_table, list_own_names
from semseg.errors import ConfigError
from semseg.nets.precision import choose_widest_float

NO_SCORES: Mapping[str, float | None] = {}  # of an image, without custom scores
FRACTION = "%"  # the unit of scores from 0 to 1, which tables and pages show in percent


class Measure(NamedTuple):
    """A function of METRICS or IMAGE_METRICS whose numbers are not fractions."""

    function: Callable[..., Any]
    unit: str  # shown behind the numbers: px; empty if they have none

    @property
    def meaning(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0].rstrip(".")


# Functions of a confusion matrix (K, K), int64 on the CPU, whose rows are labels, summed over all images and ranks.
# They return a number, or one for each class. None, NaN and infinite values: nothing was scored.
METRICS: dict[str, Callable[[Tensor], Any] | Measure] = {}
# Functions of the prediction and the label of an image, both (H, W), int64 on the CPU, -1 = not scored (label only).
# They return a number; the score is the mean over the images that have one.
IMAGE_METRICS: dict[str, Callable[[Tensor, Tensor], Any] | Measure] = {}
announce_table(METRICS_SECTION, METRICS)
announce_table(METRICS_SECTION, IMAGE_METRICS)


class OwnScore(NamedTuple):
    """A score of a split that a program adds."""

    name: str
    value: float | None  # None: nothing was scored
    unit: str = FRACTION
    meaning: str = ""
    per_class: list[float | None] | None = None  # None unless it is a mean over classes


class ImageMeans(Metric):
    """The means of IMAGE_METRICS over images and ranks, in float64 where the device has it."""

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.names = tuple(IMAGE_METRICS)
        # One more, because ranks cannot exchange tensors without elements.
        for name, dtype in (("sums", torch.float64), ("counts", torch.int64)):
            self.add_state(name, torch.zeros(len(self.names) + 1, dtype=dtype), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> nn.Module:
        """Move the sums to another device, in the type that it has."""
        sum_type = choose_widest_float(fn(torch.zeros(())).device)
        self.sums, self._defaults["sums"] = self.sums.to(sum_type), self._defaults["sums"].to(sum_type)  # pyright: ignore
        return super()._apply(fn, *args, **kwargs)

    def update(self, scores: Mapping[str, float | None]) -> None:
        """Add the scores of one image, from `score_image`."""
        for index, name in enumerate(self.names):
            value = scores[name]
            if value is not None:
                self.sums[index] += value
                self.counts[index] += 1

    def compute(self) -> dict[str, float | None]:
        """The mean of each score over the images that have one; None if no image has."""
        pairs = zip(self.names, self.sums.tolist(), self.counts.tolist(), strict=False)
        return {name: total / count if count else None for name, total, count in pairs}


def score_image(prediction: Tensor, label: Tensor) -> dict[str, float | None]:
    """The scores of IMAGE_METRICS for one image; empty without custom ones.

    Args:
        prediction: (H, W) class indices, any integer type and device.
        label: (H, W) class indices, -1 = not scored.

    Raises:
        ConfigError: if a function returns anything but one number.
    """
    if not IMAGE_METRICS:
        return {}
    maps = [ids.to("cpu", torch.int64) for ids in (prediction, label)]
    return {name: read_number(name, measure.function(*maps)) for name, measure in iterate_measures(IMAGE_METRICS)}


def score_split(matrix: Tensor, image_means: Mapping[str, float | None]) -> tuple[OwnScore, ...]:
    """All custom scores.

    Args:
        matrix: (K, K) int64, rows are labels.
        image_means: from `ImageMeans`.

    Raises:
        ConfigError: if a function returns neither a number nor one for each class.
    """
    scores = [
        build_score(name, measure, measure.function(matrix.cpu().clone()), len(matrix))
        for name, measure in iterate_measures(METRICS)
    ]
    for name, measure in iterate_measures(IMAGE_METRICS):
        meaning = measure.meaning or "mean over images"
        scores.append(OwnScore(name, image_means[name], measure.unit, meaning))
    return tuple(scores)


def check_measures(num_classes: int) -> None:
    """Call every function once, so that one that cannot work stops a run at its start.

    Raises:
        ConfigError: if a function does not return what it should; other exceptions are those of the function.
    """
    list_own_names(METRICS_SECTION)  # raises for invalid names
    nothing = torch.zeros(8, 8, dtype=torch.int64)
    score_split(torch.ones(num_classes, num_classes, dtype=torch.int64), score_image(nothing, nothing))


def iterate_measures(table: Mapping[str, Callable[..., Any] | Measure]) -> Iterator[tuple[str, Measure]]:
    """The names and functions of a table, each with its unit."""
    for name, entry in table.items():
        yield name, entry if isinstance(entry, Measure) else Measure(entry, FRACTION)


def build_score(name: str, measure: Measure, found: Any, num_classes: int) -> OwnScore:
    """The score from what a function of METRICS returned.

    Raises:
        ConfigError: if that is neither a number nor one for each class.
    """
    values = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(values, Sequence) or isinstance(values, str):
        return OwnScore(name, read_number(name, values), measure.unit, measure.meaning)
    if len(values) != num_classes:
        raise ConfigError(f"METRICS[{name!r}]: returned {len(values)} numbers for {num_classes} classes.")
    per_class = [read_number(name, value) for value in values]
    scored = [value for value in per_class if value is not None]
    mean = sum(scored) / len(scored) if scored else None
    return OwnScore(name, mean, measure.unit, measure.meaning or "mean over classes", per_class)


def read_number(name: str, value: Any) -> float | None:
    """A number that a function returned; None for None, NaN and infinite values.

    Raises:
        ConfigError: if it is no number.
    """
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{name}: returned {type(value).__name__}. A score must be a number, or None.") from None
    return number if math.isfinite(number) else None
