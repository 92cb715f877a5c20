from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.in_process import configured
from semseg.config.schema import LossConfig, LossTermsConfig
from semseg.errors import ConfigError
from semseg.nets.interfaces import Logits
from semseg.training.losses import LOSSES, build_class_weights, build_terms, cross_entropy, segmentation_loss


def test_uniform_logits_cost_the_logarithm_of_the_number_of_classes() -> None:
    logits = Logits(torch.zeros(1, 4, 2, 2), None)
    loss = segmentation_loss(logits, torch.tensor([[[0, 1], [2, -1]]]))
    assert float(loss.total) == pytest.approx(math.log(4))
    assert int(loss.scored) == 3


def test_the_auxiliary_loss_weighs_four_tenths() -> None:
    zeros, label = torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)
    loss = segmentation_loss(Logits(zeros, zeros), label, deepsup_weight=0.4)
    assert float(loss.total) == pytest.approx(1.4 * math.log(4))


def test_an_auxiliary_map_of_another_size_is_resized_to_the_label() -> None:
    aux = torch.randn(1, 3, 4, 6)
    label = torch.randint(0, 3, (1, 2, 3))
    main = torch.zeros(1, 3, 2, 3)
    resized = F.interpolate(aux, size=(2, 3), mode="bilinear", align_corners=False)
    expected = math.log(3) + F.cross_entropy(resized, label)
    assert float(segmentation_loss(Logits(main, aux), label, 1.0).total) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.reliability
def test_c11_a_sub_batch_with_nothing_to_score_gives_zero_and_zero_gradients() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = segmentation_loss(Logits(logits, logits), torch.full((2, 4, 4), -1))
    loss.total.backward()
    assert float(loss.total) == 0
    assert logits.grad is not None and float(logits.grad.abs().max()) == 0


@pytest.mark.reliability
def test_c12_no_gradient_reaches_pixels_that_are_not_scored() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    segmentation_loss(Logits(logits, None), torch.tensor([[[0, -1], [-1, 2]]])).total.backward()
    assert logits.grad is not None
    assert float(logits.grad[0, :, 0, 1].abs().max()) == 0
    assert float(logits.grad[0, :, 0, 0].abs().max()) > 0


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(1, 5, 64, 64).bfloat16()
    label = torch.randint(0, 5, (1, 64, 64))
    loss = segmentation_loss(Logits(logits, None), label)
    assert loss.total.dtype == torch.float32
    assert float(loss.total) == pytest.approx(float(F.cross_entropy(logits.float(), label)), rel=1e-6)


def test_accuracy_counts_whole_pixels() -> None:
    logits = torch.tensor([[[[9.0, 0.0]], [[0.0, 9.0]]]])  # predicts 0, 1
    loss = segmentation_loss(Logits(logits, None), torch.tensor([[[0, 0]]]))
    assert (int(loss.correct), int(loss.scored)) == (1, 2)


# ---- the other terms


def some_logits(*, seed: int = 0, size: tuple[int, int] = (5, 6)) -> tuple[Tensor, Tensor]:
    """Logits (2, 4, ...) in float64 and a label of three of the four classes, a sixth of it not scored."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, *size, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 3, (2, *size), generator=generator)
    label[:, 0] = -1
    return logits, label


def of(terms: dict[str, float], **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss with these terms, as a function of logits and label."""
    config = LossConfig(terms=LossTermsConfig(**({"cross_entropy": 0.0} | terms)), **options)
    built = build_terms(config, 4)
    return lambda logits, label: segmentation_loss(Logits(logits, None), label, terms=built).total


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 3.0]])
def test_cross_entropy_is_torch_s_own_mean(weights: list[float] | None, smoothing: float) -> None:
    logits, label = some_logits()
    found = of({"cross_entropy": 1.0}, class_weights=weights, label_smoothing=smoothing)(logits, label)
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    expected = F.cross_entropy(logits, label, weight, ignore_index=-1, label_smoothing=smoothing)
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_ohem_keeps_pixels_below_the_threshold_or_the_hardest_ones() -> None:
    # True classes with probabilities 0.9, 0.6, 0.5, 0.2; the last pixel is not scored.
    probabilities = torch.tensor([0.9, 0.6, 0.5, 0.2, 0.01], dtype=torch.float64)
    logits = torch.stack([probabilities.log(), (1 - probabilities).log(), *2 * [torch.full((5,), -1e9)]])[None, :, None]
    label = torch.tensor([[[0, 0, 0, 0, -1]]])
    costs = -probabilities.log()
    hard = of({"ohem": 1.0}, ohem_threshold=0.55, ohem_min_kept=0.0)(logits, label)
    assert float(hard) == pytest.approx(float(costs[2:4].mean()))
    at_least = of({"ohem": 1.0}, ohem_threshold=0.01, ohem_min_kept=0.75)(logits, label)
    assert float(at_least) == pytest.approx(float(costs[1:4].mean()))


def test_focal_is_the_written_out_formula_and_with_gamma_0_cross_entropy() -> None:
    logits, label = some_logits()
    scored = label >= 0
    p = logits.softmax(1).movedim(1, -1)[scored].gather(1, label[scored][:, None])[:, 0]
    assert float(of({"focal": 1.0}, focal_gamma=2.0)(logits, label)) == pytest.approx(
        float((-((1 - p) ** 2) * p.log()).mean())
    )
    plain = F.cross_entropy(logits, label, ignore_index=-1)
    assert float(of({"focal": 1.0}, focal_gamma=0.0)(logits, label)) == pytest.approx(float(plain))


def test_dice_is_the_written_out_formula_over_the_classes_that_are_there() -> None:
    logits, label = some_logits()
    scored = label >= 0
    p, truth = logits.softmax(1).movedim(1, -1)[scored], label[scored]
    parts = []
    for index in range(3):
        is_class = (truth == index).double()
        both = (p[:, index] * is_class).sum()
        parts.append(1 - 2 * both / (p[:, index].square().sum() + is_class.sum()))
    assert float(of({"dice": 1.0})(logits, label)) == pytest.approx(float(sum(parts)) / 3)


def test_lovasz_of_a_decided_prediction_is_one_minus_the_iou() -> None:
    _, label = some_logits()
    prediction = torch.randint(0, 3, label.shape, generator=torch.Generator().manual_seed(1))
    logits = 200.0 * F.one_hot(prediction, 4).movedim(-1, 1).double()
    scored = label >= 0
    ious = []
    for index in range(3):
        here, there = prediction[scored] == index, label[scored] == index
        ious.append(float((here & there).sum() / (here | there).sum()))
    assert float(of({"lovasz": 1.0})(logits, label)) == pytest.approx(1 - sum(ious) / 3)


TERMS = ["cross_entropy", "ohem", "focal", "dice", "lovasz"]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TERMS)
def test_every_term_is_computed_in_float32_under_autocast(name: str, half: torch.dtype) -> None:
    logits, label = some_logits()
    single = logits.float().requires_grad_()
    plain = of({name: 1.0})(single, label)
    with torch.autocast("cpu", half):
        found = of({name: 1.0})(single, label)
    assert found.dtype == torch.float32 and torch.equal(found, plain)
    gradients = [torch.autograd.grad(loss, single)[0] for loss in (found, plain)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", TERMS)
def test_every_term_has_the_right_gradient_ignores_what_is_not_scored_and_is_0_of_nothing(name: str) -> None:
    loss = of({name: 1.0}, class_weights=[1.0, 2.0, 0.5, 3.0], ohem_min_kept=1.0)
    logits, label = some_logits(size=(2, 3))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda given: loss(given, label), logits)
    loss(logits, label).backward()
    assert logits.grad is not None and float(logits.grad[:, :, 0].abs().max()) == 0
    logits.grad = None
    nothing = loss(logits, torch.full_like(label, -1))
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert logits.grad is not None and float(logits.grad.abs().max()) == 0


def test_a_sum_adds_its_terms_by_their_factors() -> None:
    logits, label = some_logits()
    together = of({"cross_entropy": 0.5, "dice": 2.0})(logits, label)
    apart = 0.5 * of({"cross_entropy": 1.0})(logits, label) + 2 * of({"dice": 1.0})(logits, label)
    assert float(together) == pytest.approx(float(apart))


def weighted_mean(costs: list[Tensor], weights: list[float], nothing: Tensor) -> Tensor:
    """The sum of some pixels' costs divided by their weights; 0 if there are none, or none of them counts."""
    return torch.stack(costs).sum() / sum(weights) if sum(weights) else nothing


def pixel_by_pixel(name: str, logits: Tensor, label: Tensor, weights: list[float], smoothing: float) -> Tensor:
    """A term written out for one pixel after the other: smoothing for cross_entropy, gamma 2, ohem of at least half."""
    pixels = [
        (vector - vector.logsumexp(0), index)
        for vector, index in zip(logits.movedim(1, -1).flatten(0, 2), label.flatten().tolist(), strict=True)
        if index >= 0 and not (name == "ohem" and weights[index] == 0)
    ]
    if name == "ohem":  # p below 0.7, or the harder half
        pixels.sort(key=lambda pixel: float(pixel[0][pixel[1]]))
        pixels = [
            (log_p, index)
            for place, (log_p, index) in enumerate(pixels)
            if place < math.ceil(len(pixels) / 2) or float(log_p[index]) <= math.log(0.7)
        ]
    costs = []
    for log_p, index in pixels:
        cost = -weights[index] * log_p[index]
        if name == "cross_entropy":
            smooth = -(log_p * torch.tensor(weights)).sum()
            cost = (1 - smoothing) * cost + smoothing / len(weights) * smooth
        if name == "focal":
            cost = cost * (1 - log_p[index].exp()) ** 2
        costs.append(cost)
    return weighted_mean(costs, [weights[index] for _, index in pixels], 0 * logits.sum())


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", ["cross_entropy", "ohem", "focal"])
def test_d7_value_and_gradient_are_those_of_a_plain_sum_over_pixels(
    name: str, smoothing: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(5)
    num_nothing = 0
    for _ in range(40):
        weights = torch.tensor([0.0, 0.0, 0.5, 3.0])[torch.randint(0, 4, (4,), generator=generator)].tolist()
        logits = 3 * torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64)
        label = torch.randint(-1, 4, (1, 2, 2), generator=generator)
        values, gradients = [], []
        for function, given in (
            (of({name: 1.0}, class_weights=weights, label_smoothing=smoothing, ohem_min_kept=0.5), logits.to(dtype)),
            (lambda x, y: pixel_by_pixel(name, x, y, weights, smoothing), logits),  # noqa: B023 - called at once
        ):
            leaf = given.clone().requires_grad_()
            value = function(leaf, label)
            value.backward()
            values.append(float(value))
            assert leaf.grad is not None
            gradients.append(leaf.grad.double())
        rounding = 1e-12 if dtype == torch.float64 else 1e-5
        assert values[0] == pytest.approx(values[1], rel=rounding, abs=rounding)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=rounding, atol=rounding)
        if values[1] == 0:
            num_nothing += 1
            assert values[0] == 0 and not gradients[0].any()
    assert 3 < num_nothing < 37


@pytest.mark.reliability
@pytest.mark.parametrize("name", ["cross_entropy", "ohem", "focal"])
def test_d7_a_loss_of_classes_of_weight_0_alone_is_0_whatever_the_number_of_pixels(name: str) -> None:
    smoothing = 0.1 if name == "cross_entropy" else 0.0
    loss = of({name: 1.0}, class_weights=[0.0, 1.0, 1.0, 1.0], label_smoothing=smoothing)
    for num_pixels in (1, 100, 10_000):
        logits = torch.zeros(1, 4, 1, num_pixels, requires_grad=True)
        value = loss(logits, torch.zeros(1, 1, num_pixels, dtype=torch.int64))
        value.backward()
        assert float(value) == 0
        assert logits.grad is not None and not logits.grad.any()


@pytest.mark.reliability
def test_d7_ohem_keeps_no_pixel_of_weight_0_in_the_place_of_one_that_counts() -> None:
    # Ten wrong pixels of a class of weight 0, ten right ones of another: a tenth of the latter is one pixel.
    logits = torch.zeros(1, 4, 1, 20, dtype=torch.float64)
    logits[:, 1] = 5.0
    label = torch.tensor([[10 * [0] + 10 * [1]]])
    loss = of({"ohem": 1.0}, class_weights=[0.0, 1.0, 1.0, 1.0], ohem_min_kept=0.1)
    assert float(loss(logits, label)) == pytest.approx(math.log(1 + 3 * math.exp(-5)))


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 4.0, 1e30, 1e300])
def test_only_the_ratios_of_class_weights_matter(scale: float) -> None:
    logits, label = some_logits()
    plain = of({"cross_entropy": 1.0}, class_weights=[1.0, 2.0, 0.5, 3.0])(logits.float(), label)
    scaled = of({"cross_entropy": 1.0}, class_weights=[scale, 2 * scale, 0.5 * scale, 3 * scale])(logits.float(), label)
    assert float(scaled) == pytest.approx(float(plain), rel=1e-6)


def test_class_weights_are_read_from_what_the_doctor_wrote(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    path.write_text(json.dumps({"class_weights": [1, 2, 0.5, 3]}))
    assert build_class_weights(str(path), 4) is not None
    with pytest.raises(ConfigError, match="4 numbers for 5 classes"):
        build_class_weights(str(path), 5)
    for content in ("", "[]", '{"class_weights": ["a"]}', '{"class_weights": [-1]}', '{"class_weights": [0]}'):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"loss\.class_weights=.*check\.json"):
            build_class_weights(str(path), 1)
    path.write_text('{"class_weights": []}')
    with pytest.raises(ConfigError, match="holds no weights, because the data set was not ready"):
        build_class_weights(str(path), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss.terms.cross_entropy=0"], "at least one must have a factor above 0"),
        (["loss.terms.dice=-1"], "loss.terms.dice=-1"),
        (["loss.class_weights=[1,-2]"], "a list of numbers of at least 0"),
        (["loss.class_weights=3"], "a list of numbers of at least 0"),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(*words)


# ---- terms that programs add


def own_focal(logits: Tensor, label: Tensor, gamma: float = 2.0) -> Tensor:
    costs = F.cross_entropy(logits, label, ignore_index=-1, reduction="none")
    scored = label >= 0
    return ((1 - torch.exp(-costs[scored])) ** gamma * costs[scored]).mean()


def of_own(function: Callable[..., Any], value: Any, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    config = LossConfig(terms=LossTermsConfig(cross_entropy=0.0, own={"mine": value}), **options)
    with patch.dict(LOSSES, mine=function):
        built = build_terms(config, 4)
    return lambda logits, label: segmentation_loss(Logits(logits, logits), label, deepsup_weight=0.4, terms=built).total


def test_a_term_of_a_program_is_summed_like_ours_with_its_factor_and_options() -> None:
    logits, label = some_logits()
    ours = of({"focal": 1.0}, focal_gamma=3.0)(logits, label)
    found = of_own(own_focal, {"factor": 0.5, "gamma": 3.0})(logits, label)
    assert float(found) == pytest.approx(0.5 * 1.4 * float(ours))  # main, and 0.4 of the auxiliary logits
    assert float(of_own(own_focal, 2.0)(logits, label)) == pytest.approx(2.8 * float(of({"focal": 1.0})(logits, label)))


def test_the_sum_is_described_by_its_terms_whatever_its_name() -> None:
    assert LossTermsConfig().formula == "cross_entropy"
    own = {"mine": {"factor": 0.5, "gamma": 3.0}, "off": 0}
    assert LossTermsConfig(cross_entropy=0, dice=2.0, own=own).formula == "2 dice + 0.5 mine"


def test_a_term_gets_class_weights_and_the_average_if_it_has_such_parameters() -> None:
    weights = [1.0, 2.0, 0.5, 3.0]
    logits, label = some_logits()
    found = of_own(cross_entropy, 1.0, class_weights=weights)(logits, label)
    ours = of({"cross_entropy": 1.0}, class_weights=weights)(logits, label)
    assert float(found) == pytest.approx(1.4 * float(ours))
    with pytest.raises(ConfigError, match=r"loss\.class_weights: none of mine"):
        of_own(own_focal, 1.0, class_weights=weights)


@pytest.mark.parametrize("returned", [torch.zeros(2, 5, 6), 0.5, None])
def test_a_term_that_returns_more_than_one_number_is_refused_and_not_summed(returned: Any) -> None:
    with pytest.raises(ConfigError, match=r"loss\.terms\.mine: returned"):
        of_own(lambda logits, label: returned, 1.0)(*some_logits())


def test_a_term_that_is_in_no_table_or_lacks_the_option_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss\.terms\.mine.*gama"):
        of_own(own_focal, {"gama": 1.0})
    with pytest.raises(ConfigError, match=r"'absent'.*dice"):
        build_terms(LossConfig(terms=LossTermsConfig(own={"absent": 1.0})), 4)
