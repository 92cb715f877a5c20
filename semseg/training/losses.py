"""Stage 6: losses of logits and labels.

A loss is a sum of terms. Pixel-wise terms (cross_entropy, ohem, focal) are means over scored pixels, region terms
(dice, lovasz) are means over the classes that occur; each applies to the main and to the auxiliary logits. Programs add
terms to LOSSES.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from semseg.config.schema import LossConfig
from semseg.config.tables import announce_table
from semseg.data.label_map import IGNORED
from semseg.errors import ConfigError, check_choice, describe_reason
from semseg.nets.interfaces import Logits
from semseg.nets.precision import choose_widest_float
from semseg.training.logit_strips import LogitsOfLabel, as_tensor, fit_to_label, map_rows, sum_over_rows

# (logits (N, K, h, w) in float32 or wider, label (N, h, w), average over ranks) -> scalar
Term = Callable[[Any, Tensor, str], Tensor]


class Loss(NamedTuple):
    """Scalars of one sub-batch. `total` carries the gradient; the others are detached."""

    total: Tensor  # main + deepsup_weight * aux
    correct: Tensor  # int64: scored pixels whose class is right
    scored: Tensor  # int64: pixels with a label


def cross_entropy(
    logits: LogitsOfLabel, label: Tensor, average: str, *, weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """The mean over scored pixels, weighted by the weights (K) of their classes if given.

    With smoothing s, a pixel of class y costs (1 - s) * w[y] * -log p[y] + s / K * sum over all c of w[c] * -log p[c].
    The mean is the sum of these costs over all scored pixels divided by the sum of their w[y], as in torch. If that
    divisor is 0, no pixel counts and the loss is 0, although the smoothed part of a pixel of weight 0 is not 0.
    """
    weights = None if weights is None else weights.to(logits.device, logits.dtype)

    def sum_losses(logits: Tensor, label: Tensor) -> tuple[Tensor]:
        # Summed here, because the kernel's own sum is not deterministic on a GPU (trainer.deterministic).
        return (
            F.cross_entropy(
                logits, label, weights, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
            ).sum(),
        )

    (total,) = sum_over_rows(sum_losses, logits, label)
    return _mean(total, _count_weighted_pixels(label, weights, logits.dtype), average)


def ohem(
    logits: LogitsOfLabel,
    label: Tensor,
    average: str,
    *,
    threshold: float,
    min_kept: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Cross entropy of the hard pixels only: online hard example mining (Shrivastava et al. 2016, section 4) by pixel.

    Pixels whose class has the weight 0 are not scored: they would displace hard pixels that count.

    Args:
        threshold: a pixel is hard if its true class has less than this probability.
        min_kept: the smallest fraction of the scored pixels that is kept, the hardest ones.
    """
    if weights is not None:
        has_weight = weights.to(logits.device)[label.clamp(min=0)] > 0
        label = torch.where(has_weight, label, IGNORED)

    def compute_losses(logits: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(logits, label, ignore_index=IGNORED, reduction="none")

    losses = map_rows(compute_losses, logits, label)
    scored = label != IGNORED
    with torch.no_grad():
        hardest = torch.where(scored, losses, -torch.inf).flatten().sort(descending=True).values
        num_scored = scored.sum().to(choose_widest_float(scored.device))
        count = (num_scored * min_kept).ceil().long()  # on the device, without waiting for it
        limit = losses.new_full((), -math.log(threshold))
        least_hard = hardest.index_select(0, (count - 1).clamp(min=0).view(1)).view(())
        limit = torch.where(count > 0, torch.minimum(limit, least_hard), limit)
        kept = torch.where(scored & (losses >= limit), label, IGNORED)
    return cross_entropy(logits, kept, average, weights=weights)


def focal(logits: LogitsOfLabel, label: Tensor, average: str, *, gamma: float, weights: Tensor | None = None) -> Tensor:
    """(1 - p) ** gamma times the cross entropy -log(p) of the true class (Lin et al. 2017, equations 4 and 5)."""
    weights = None if weights is None else weights.to(logits.device, logits.dtype)

    def sum_losses(logits: Tensor, label: Tensor) -> tuple[Tensor]:
        losses = F.cross_entropy(logits, label, ignore_index=IGNORED, reduction="none")
        # The power's derivative at p = 1 is infinite for gamma < 1.
        missed = (1 - torch.exp(-losses)).clamp(min=torch.finfo(losses.dtype).eps)
        weighted = losses * missed**gamma
        if weights is not None:
            weighted = weighted * weights[label.clamp(min=0)]  # ignored pixels are 0 already
        return (weighted.sum(),)

    (total,) = sum_over_rows(sum_losses, logits, label)
    return _mean(total, _count_weighted_pixels(label, weights, logits.dtype), average)


def dice(logits: LogitsOfLabel, label: Tensor) -> Tensor:
    """1 - the soft Dice coefficient of Milletari et al. 2016 (section 3), averaged over the classes in the label.

    Regions span a whole sub-batch; each rank has its own, whatever loss.average is.
    """

    def sum_regions(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scored = label != IGNORED
        target = F.one_hot(label.clamp(min=0), logits.shape[1]).movedim(-1, 1) * scored[:, None]  # (N, K, h, w)
        predicted = logits.softmax(1) * scored[:, None]
        squares = predicted.square().sum((0, 2, 3))
        return (predicted * target).sum((0, 2, 3)), target.sum((0, 2, 3)), squares  # (K) each

    common, sizes, squares = sum_over_rows(sum_regions, logits, label)
    coefficients = 2 * common / (squares + sizes).clamp(min=1)
    is_present = sizes > 0
    return ((1 - coefficients) * is_present).sum() / is_present.sum().clamp(min=1)


def lovasz(logits: Tensor, label: Tensor) -> Tensor:
    """The Lovasz extension of 1 - IoU of the softmax (Berman et al. 2018, equation 11), over the classes in the label.

    Regions span a whole sub-batch; each rank has its own, whatever loss.average is.
    """
    scored = label != IGNORED
    # The host waits for the device here and at unique(): every class that is absent would cost a sort otherwise.
    truth = label[scored]  # (P)
    probabilities = logits.softmax(1).movedim(1, -1)[scored]  # (P, K)
    losses = [_lovasz_of_class(probabilities[:, index], truth == index) for index in truth.unique().tolist()]
    return torch.stack(losses).mean() if losses else probabilities.sum()


def _lovasz_of_class(probability: Tensor, is_class: Tensor) -> Tensor:
    """Algorithm 1 of Berman et al. 2018 for one class; both (P)."""
    errors, order = (is_class.to(probability.dtype) - probability).abs().sort(descending=True)
    sorted_truth = is_class[order]
    # Counted in int64: exact, and deterministic on a GPU too.
    intersection = sorted_truth.sum() - sorted_truth.cumsum(0)
    union = sorted_truth.sum() + (~sorted_truth).cumsum(0)
    jaccard = 1 - intersection.to(errors.dtype) / union
    # No matrix product: autocast would round its factors to half precision.
    return (errors * torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])).sum()


# The terms by name, ours and custom ones: functions of
#     logits (N, K, h, w), float32 or wider, and label (N, h, w), int64, -1 = not scored
# that return one number with a gradient. Ours, apart from lovasz, take LogitsByStrip too (ROW_TERMS), others get all
# logits at the resolution of the label. They are called for the main and for the auxiliary logits. Parameters called
# `weights` and `average` get the class weights, (K) float32 or None, and loss.average; others are options.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "ohem": ohem,
    "focal": focal,
    "dice": dice,
    "lovasz": lovasz,
}
ROW_TERMS: tuple[Callable[..., Tensor], ...] = (cross_entropy, ohem, focal, dice)
announce_table("loss.terms", LOSSES)


class NamedTerm(NamedTuple):
    """An entry of LOSSES with its options."""

    name: str
    function: Callable[..., Tensor]
    options: dict[str, Any]
    takes_average: bool = True  # whether the function has the parameter `average`

    def __call__(self, logits: LogitsOfLabel, label: Tensor, average: str) -> Tensor:
        """The term of logits (N, K, h, w) and label (N, h, w).

        Raises:
            ConfigError: if the function returns anything but one number.
        """
        given = {"average": average} if self.takes_average else {}
        logits = logits if self.function in ROW_TERMS else as_tensor(logits)
        value = self.function(logits, label, **self.options, **given)
        if not isinstance(value, Tensor) or value.ndim:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"loss.terms.{self.name}: returned {found}. It must return a tensor of one number.")
        return value

    def move(self, device: torch.device) -> NamedTerm:
        """The term with its tensors on `device`."""
        options = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in self.options.items()}
        return self._replace(options=options)


DEFAULT_TERMS: tuple[tuple[float, Term], ...] = ((1.0, NamedTerm("cross_entropy", cross_entropy, {})),)


def build_terms(config: LossConfig, num_classes: int) -> tuple[tuple[float, Term], ...]:
    """The terms of `loss`, each with its factor.

    Raises:
        ConfigError: if there is not one class weight for each class, no term uses them, or a term is not in LOSSES or
            does not take its options.
    """
    weights = build_class_weights(config.class_weights, num_classes)
    terms = [(float(factor), name) for name, factor in config.terms.factors.items() if factor]
    built = [(factor, build_term(name, config, weights)) for factor, name in terms]
    if config.terms.own and weights is not None and not any("weights" in term.options for _, term in built):
        raise ConfigError(f"loss.class_weights: none of {', '.join(name for _, name in terms)} has class weights.")
    return tuple(built)


def move_terms(terms: Sequence[tuple[float, Term]], device: torch.device) -> tuple[tuple[float, Term], ...]:
    """The terms with their class weights on `device`, so that no step uploads them."""
    return tuple((factor, term.move(device) if isinstance(term, NamedTerm) else term) for factor, term in terms)


def build_term(name: str, config: LossConfig, weights: Tensor | None) -> NamedTerm:
    """A term with the options that `loss` has for it.

    Raises:
        ConfigError: if it is not in LOSSES, or does not take these options.
    """
    function = LOSSES[check_choice("loss.terms", name, LOSSES)]
    signature = inspect.signature(function)
    options = dict(collect_options(name, config))
    if "weights" in signature.parameters:
        options["weights"] = weights
    takes_average = "average" in signature.parameters
    try:
        signature.bind(*2 * [None], **options, **({"average": ""} if takes_average else {}))
    except TypeError as error:
        raise ConfigError(f"loss.terms.{name}: its function {signature} does not fit: {error}.") from None
    return NamedTerm(name, function, options, takes_average)


def collect_options(name: str, config: LossConfig) -> Iterator[tuple[str, Any]]:
    """The options of a term: keys of `loss` for ours, and entries beside the factor for those of programs."""
    ours = {
        "cross_entropy": {"smoothing": config.label_smoothing},
        "ohem": {"threshold": config.ohem_threshold, "min_kept": config.ohem_min_kept},
        "focal": {"gamma": config.focal_gamma},
    }
    yield from ours.get(name, {}).items()
    value = config.terms.own.get(name)
    if isinstance(value, dict):
        yield from ((str(option), given) for option, given in value.items() if option != "factor")


def build_class_weights(given: Sequence[float] | str | None, num_classes: int) -> Tensor | None:
    """(K) float32; None without class weights.

    Args:
        given: numbers, or a JSON file with an entry `class_weights`, such as the check.json of mode=check.

    Raises:
        ConfigError: if there is no such file, or not one number for each class.
    """
    if given is None:
        return None
    numbers = read_class_weights(given) if isinstance(given, str) else list(given)
    if len(numbers) != num_classes:
        raise ConfigError(f"loss.class_weights: {len(numbers)} numbers for {num_classes} classes.")
    # Only ratios matter. Scaling by a power of two is exact, and keeps large weights finite in float32.
    _, exponent = math.frexp(max(numbers))
    return torch.tensor([math.ldexp(number, -exponent) for number in numbers], dtype=torch.float32)


def read_class_weights(path: str) -> list[float]:
    """The entry `class_weights` of a JSON file.

    Raises:
        ConfigError: if it cannot be read, or holds anything but numbers of at least 0.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        numbers = [float(number) for number in content["class_weights"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"loss.class_weights={path}: no file with class_weights ({describe_reason(error)})."
        ) from None
    if not numbers:
        raise ConfigError(
            f"loss.class_weights={path}: holds no weights, because the data set was not ready. Check it again."
        )
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ConfigError(f"loss.class_weights={path}: every weight must be a number of at least 0.")
    if not any(numbers):
        raise ConfigError(f"loss.class_weights={path}: at least one weight must be above 0.")
    return numbers


def segmentation_loss(
    logits: Logits,
    label: Tensor,
    deepsup_weight: float = 0.4,
    average: str = "ranks",
    terms: Sequence[tuple[float, Term]] = DEFAULT_TERMS,
) -> Loss:
    """The loss of the main and the auxiliary logits.

    Args:
        logits: main (N, K, h, w), aux (N, K, h', w') or None; any float type.
        label: (N, h, w) int64, -1 = ignored.
        deepsup_weight: factor of the auxiliary loss.
        average: how pixel-wise terms are averaged in a distributed run: "ranks", the mean over ranks of each rank's
            mean over its own scored pixels (as in the original code), or "pixels", the mean over the scored pixels
            of all ranks. With one process both are the same.
        terms: the terms with their factors; cross entropy by default.

    A sub-batch with nothing to score, or whose classes all have the weight 0, has the loss 0 and zero gradients,
    never NaN. `dice` and `lovasz` use no class weights.
    """
    main = fit_to_label(logits.main, label)
    total = _sum_terms(terms, main, label, average)
    if logits.aux is not None and deepsup_weight:
        total = total + deepsup_weight * _sum_terms(terms, fit_to_label(logits.aux, label), label, average)
    return Loss(total, *_count_fitted(main, label))


def count_correct(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of pixels whose class is right, and of those that have one.

    Args:
        logits: (N, K, h, w).
        label: (N, h', w') int64, -1 = ignored.
    """
    return _count_fitted(fit_to_label(logits.detach(), label), label)


def _count_fitted(logits: LogitsOfLabel, label: Tensor) -> tuple[Tensor, Tensor]:
    """As `count_correct`, of logits at the resolution of the label."""

    def find_correct(logits: Tensor, label: Tensor) -> Tensor:
        return logits.argmax(1) == label

    # (N, h, w) -> int64 counts, exact whatever the precision of the logits.
    return map_rows(find_correct, logits, label).sum(), (label != IGNORED).sum()


def _sum_terms(terms: Sequence[tuple[float, Term]], logits: LogitsOfLabel, label: Tensor, average: str) -> Tensor:
    values = [
        factor * term(logits if isinstance(term, NamedTerm) else as_tensor(logits), label, average)
        for factor, term in terms
    ]
    return torch.stack(values).sum()


def _count_weighted_pixels(label: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The number of scored pixels, weighted by the weights of their classes."""
    scored = label != IGNORED
    return scored.sum().to(dtype) if weights is None else (weights[label.clamp(min=0)] * scored).sum()


def _mean(total: Tensor, weight: Tensor, average: str) -> Tensor:
    """The sum `total` of the losses of this rank's pixels as their weighted mean; DDP then averages over ranks.

    0 with zero gradients if no pixel counts: on this rank, or with `average` "pixels" on any rank.
    """
    divisor, num_ranks = weight, 1
    if average == "pixels" and dist.is_available() and dist.is_initialized():
        divisor, num_ranks = weight.clone(), dist.get_world_size()
        dist.all_reduce(divisor)
    is_counted = divisor > 0
    total = torch.where(is_counted, total, 0)  # before the division, whose gradient at 0 is NaN
    return total / (torch.where(is_counted, divisor, 1) / num_ranks)
