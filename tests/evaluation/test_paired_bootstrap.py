from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from semseg.config.schema import MIOU_RULES
from semseg.data.seeding import generator_for
from semseg.evaluation.bootstrap import class_counts
from semseg.evaluation.metrics import Scores, scores_from
from semseg.evaluation.paired_bootstrap import (
    MIN_INTERVAL_IMAGES,
    compute_difference_intervals,
    count_images_of_classes,
    score_counts,
)

HEADLINE = {
    "mean_iou": "mean_iou", "pixel_accuracy": "pixel_accuracy", "overall_score": "overall",
    "mean_accuracy": "mean_accuracy", "frequency_weighted_iou": "frequency_weighted_iou", "mean_dice": "mean_dice",
}  # fmt: skip


def confusions(num_images: int, right: float, seed: int = 0, num_classes: int = 4) -> list[torch.Tensor]:
    """Confusion matrices of images with 400 pixels, of which the fraction `right` is correct; class 3 is rare."""
    labels = np.random.default_rng(5).integers(0, num_classes - 1, size=(num_images, 400))
    labels[::3, :4] = num_classes - 1
    random = np.random.default_rng(seed)
    guesses = np.where(random.random(labels.shape) < right, labels, random.integers(0, num_classes - 1, labels.shape))
    matrices = np.zeros((num_images, num_classes, num_classes), np.int64)
    for image in range(num_images):
        np.add.at(matrices[image], (labels[image], guesses[image]), 1)
    return list(torch.from_numpy(matrices))


def stack_counts(matrices: list[torch.Tensor]) -> NDArray[np.int32]:
    return np.stack([class_counts(matrix) for matrix in matrices])


@pytest.mark.parametrize("rule", MIOU_RULES)
def test_scores_of_counts_equal_those_of_the_confusion_matrix(rule: str) -> None:
    matrices = [*confusions(3, 0.7), torch.diag(torch.tensor([5, 0, 3, 0])), torch.zeros(4, 4, dtype=torch.int64)]
    matrices.append(torch.tensor([[4, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))  # class 1 only predicted
    found = score_counts(stack_counts(matrices), rule)
    for row, matrix in enumerate(matrices):
        expected: Scores = scores_from(matrix, rule)
        for name, attribute in HEADLINE.items():
            value = getattr(expected, attribute)
            assert found.headline[name][row] == pytest.approx(np.nan if value is None else value, nan_ok=True), name
        assert found.iou[row] == pytest.approx([np.nan if v is None else v for v in expected.iou], nan_ok=True)


@pytest.mark.parametrize("rule", MIOU_RULES)
def test_intervals_equal_those_of_a_direct_computation_of_every_resample(rule: str) -> None:
    base, other = confusions(9, 0.7, seed=1), confusions(9, 0.75, seed=2)
    resamples = 70  # more than a chunk
    (found,) = compute_difference_intervals(
        stack_counts(base), [stack_counts(other)], [rule, rule], np.random.default_rng(3), resamples
    )
    generator = np.random.default_rng(3)
    draws = [draw for size in (64, 6) for draw in generator.integers(9, size=(size, 9))]
    pairs = [[scores_from(sum_of([run[i] for i in draw]), rule) for run in (base, other)] for draw in draws]
    for name, attribute in HEADLINE.items():
        differences = [getattr(after, attribute) - getattr(before, attribute) for before, after in pairs]
        assert found.headline[name] == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975]))), name
    for index in range(3):
        differences = [after.iou[index] - before.iou[index] for before, after in pairs]  # pyright: ignore
        assert found.iou[index] == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))


def sum_of(matrices: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(matrices).sum(0)


def test_a_real_difference_is_found_and_no_difference_is_not() -> None:
    base, same, better = (stack_counts(confusions(30, right, seed)) for right, seed in ((0.7, 1), (0.7, 2), (0.75, 3)))
    null, real = compute_difference_intervals(base, [same, better], ["present"] * 3, generator_for(304))
    for name in ("mean_iou", "pixel_accuracy"):
        low, high = null.headline[name] or (1, -1)
        assert low < 0 < high
        low, high = real.headline[name] or (-1, -1)
        assert low > 0 and high < 0.12


def test_an_interval_of_pairs_is_narrower_than_one_that_ignores_the_pairs() -> None:
    # Hard and easy images: what both runs have in common does not count as uncertainty.
    matrices = [m for right in (0.3, 0.6, 0.95) for m in confusions(10, right, seed=int(100 * right))]
    base = stack_counts(matrices)
    other = base.copy()
    other[:, 0] = np.minimum(base[:, 0] + 1, base[:, 1])
    (found,) = compute_difference_intervals(base, [other], ["present"] * 2, generator_for(1))
    low, high = found.headline["pixel_accuracy"] or (-1, -1)
    assert low > 0 and high - low < 0.002


def test_few_images_give_no_interval() -> None:
    base, other = (stack_counts(confusions(12, 0.7, seed)) for seed in (1, 2))
    assert count_images_of_classes(base, other).tolist() == [12, 12, 12, 4]  # every third has class 3
    (found,) = compute_difference_intervals(base, [other], ["present"] * 2, generator_for(1))
    assert [interval is None for interval in found.iou] == [False, False, False, True]
    (few,) = compute_difference_intervals(
        base[: MIN_INTERVAL_IMAGES - 1], [other[: MIN_INTERVAL_IMAGES - 1]], ["present"] * 2, generator_for(1)
    )
    assert set(few.headline.values()) == {None} and set(few.iou) == {None}


def test_equal_predictions_differ_by_exactly_nothing() -> None:
    base = stack_counts(confusions(8, 0.7))
    (found,) = compute_difference_intervals(base, [base.copy()], ["present"] * 2, generator_for(1))
    assert set(found.headline.values()) == {(0.0, 0.0)}


@pytest.mark.slow
@pytest.mark.parametrize(("num_images", "low", "high"), [(8, 0.85, 0.95), (100, 0.91, 0.98)])
def test_intervals_contain_the_true_difference_about_as_often_as_they_say(
    num_images: int, low: float, high: float
) -> None:
    random = np.random.default_rng(0)
    base, other = simulate_runs(5000, random)
    before, after = (score_counts(run.sum(0, keepdims=True), "present").headline for run in (base, other))
    hits = []
    for _ in range(200):
        draw = random.integers(len(base), size=num_images)
        (found,) = compute_difference_intervals(base[draw], [other[draw]], ["present"] * 2, random, resamples=200)
        for name in ("mean_iou", "pixel_accuracy"):
            bounds = found.headline[name] or (0, 0)
            hits.append(bounds[0] <= after[name][0] - before[name][0] <= bounds[1])
    assert low < np.mean(hits) < high


def simulate_runs(num_images: int, random: np.random.Generator) -> list[NDArray[np.int32]]:
    """(N, 3, 7) counts of two runs, for which the same images are easy; the second is better by a point."""
    labelled = np.round(10_000 * random.dirichlet(np.full(7, 0.7), num_images))
    ease = random.beta(6, 2, (num_images, 1))
    runs = []
    for gain in (0, 0.01):
        accuracy = np.clip(ease + gain + random.normal(0, 0.07, labelled.shape), 0, 1)
        correct = np.round(labelled * accuracy)
        wrong = (labelled - correct).sum(1, keepdims=True) * random.dirichlet(np.full(7, 0.7), num_images)
        runs.append(np.stack([correct, labelled, correct + np.round(wrong)], 1).astype(np.int32))
    return runs
