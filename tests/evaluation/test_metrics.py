from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MulticlassPrecision,
)

from helpers.reference import GOLDEN, golden
from semseg.evaluation.metrics import BoundaryIoU, ConfusionMatrix, boundary_counts, confusion_counts, scores_from


def random_maps(num_classes: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A prediction, and a label of which some pixels are not scored."""
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(0, num_classes, (height, width), generator=generator)
    return prediction, torch.randint(-1, num_classes, (height, width), generator=generator)


def patches(num_classes: int, height: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """As `random_maps`, in regions of many pixels; the prediction is right on most of them."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(-1, num_classes, (height // 8, width // 8)).astype(np.int16)
    label = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)
    prediction = np.where(generator.random(label.shape) < 0.02, 0, np.roll(label, 2, axis=1)).clip(min=0)
    return torch.from_numpy(prediction), torch.from_numpy(label)


def test_rows_are_labels_and_unscored_pixels_count_nowhere() -> None:
    label = torch.tensor([[0, 0, 1], [-1, 2, 2]])
    prediction = torch.tensor([[0, 1, 1], [0, 2, 0]])
    assert confusion_counts(prediction, label, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]


def test_counts_equal_torchmetrics_on_random_maps() -> None:
    prediction, label = random_maps(19, 70, 90)
    theirs = MulticlassConfusionMatrix(19, ignore_index=-1)(prediction, label)
    assert torch.equal(confusion_counts(prediction, label, 19), theirs)


@pytest.mark.parametrize("num_classes", [2, 180, 181, 1000])  # 180: the last whose cells are numbered in 16 bits
def test_the_last_class_is_counted_whatever_their_number(num_classes: int) -> None:
    last = num_classes - 1
    counts = confusion_counts(torch.tensor([last, 0, last]), torch.tensor([last, last, -1]), num_classes)
    assert counts[last, last] == 1 and counts[last, 0] == 1 and counts.sum() == 2
    assert counts.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_any_integer_type_of_prediction_counts_alike(dtype: torch.dtype) -> None:
    label = torch.tensor([149, 0, -1])
    counts = confusion_counts(torch.tensor([149, 149, 3]).to(dtype), label, 150)
    assert counts[149, 149] == 1 and counts[0, 149] == 1 and counts.sum() == 2


def test_the_published_scores_are_reproduced() -> None:
    reference, maps = golden("metrics.json"), np.load(GOLDEN / "metrics.npz")
    matrix = ConfusionMatrix(150)
    for index, pair in enumerate(reference["pairs"]):
        prediction, label = (torch.from_numpy(maps[f"{kind}{index}"].astype(np.int64)) for kind in ("pred", "label"))
        single = confusion_counts(prediction, label, 150)
        assert {i: int(n) for i, n in enumerate(single.diag()) if n} == as_counts(pair["intersection"])
        union = single.sum(0) + single.sum(1) - single.diag()
        assert {i: int(n) for i, n in enumerate(union) if n} == as_counts(pair["union"])
        accuracy = scores_from(single).pixel_accuracy
        assert accuracy == pytest.approx(pair["accuracy"], abs=1e-9)
        matrix.update(single)
    scores = scores_from(matrix.compute().matrix, "ade20k")
    assert scores.mean_iou == pytest.approx(reference["mean_iou"], abs=1e-9)
    assert scores.pixel_accuracy == pytest.approx(reference["pixel_accuracy"], abs=1e-9)
    assert scores.iou == pytest.approx(list(reference["iou"].values()), abs=1e-9)


def test_one_pair_with_two_classes_shows_what_the_published_rule_does() -> None:
    reference, maps = golden("metrics.json"), np.load(GOLDEN / "metrics.npz")
    group = reference["groups"][0]
    index = [pair["name"] for pair in reference["pairs"]].index(group["pairs"][0])
    prediction, label = (torch.from_numpy(maps[f"{kind}{index}"].astype(np.int64)) for kind in ("pred", "label"))
    counts = confusion_counts(prediction, label, 150)
    assert scores_from(counts, "ade20k").mean_iou == pytest.approx(group["mean_iou"], abs=1e-9)
    present = scores_from(counts, "present")
    assert present.mean_iou == pytest.approx(group["mean_iou_over_classes_with_union"], abs=1e-9)
    assert present.num_averaged == 2


def as_counts(listed: dict[str, int]) -> dict[int, int]:
    return {int(index): count for index, count in listed.items()}


def test_the_rules_differ_only_in_what_absent_classes_are() -> None:
    # Class 0: half right. Class 1: never labelled, predicted once. Class 2: absent altogether.
    matrix = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0]])
    assert scores_from(matrix, "ade20k").mean_iou == pytest.approx(0.5 / 3)
    assert scores_from(matrix, "present").mean_iou == pytest.approx(0.5 / 2)
    assert scores_from(matrix, "ground_truth").mean_iou == pytest.approx(0.5)
    assert scores_from(matrix).iou == [0.5, 0.0, None]


@pytest.mark.reliability
def test_c13_each_rule_names_the_classes_that_are_absent_to_it() -> None:
    matrix = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0]])
    absent = {rule: scores_from(matrix, rule).absent for rule in ("ade20k", "present", "ground_truth")}
    assert absent == {"ade20k": [2], "present": [2], "ground_truth": [1, 2]}


def test_all_scores_of_a_small_matrix_by_hand() -> None:
    # Class 0: 3 right of 4 labelled, 3 predicted. Class 1: 4 right of 4 labelled, 5 predicted.
    scores = scores_from(torch.tensor([[3, 1], [0, 4]]))
    assert scores.iou == [3 / 4, 4 / 5]
    assert scores.accuracy == [3 / 4, 1.0]
    assert scores.precision == [1.0, 4 / 5]
    assert scores.dice == [6 / 7, 8 / 9]
    assert scores.mean_dice == pytest.approx((6 / 7 + 8 / 9) / 2)
    assert scores.frequency_weighted_iou == pytest.approx(0.5 * 3 / 4 + 0.5 * 4 / 5)
    assert scores.pixel_fractions == [0.5, 0.5]


@pytest.mark.parametrize("seed", range(3))
def test_all_scores_equal_those_of_torchmetrics(seed: int) -> None:
    prediction, label = random_maps(19, 70, 90, seed)
    scores = scores_from(confusion_counts(prediction, label, 19))

    def theirs(metric: type, average: str) -> float | list[float]:
        return metric(19, average=average, ignore_index=-1)(prediction, label).tolist()

    def equals(expected: float | list[float]) -> object:
        return pytest.approx(expected, rel=1e-5)  # theirs are float32

    assert scores.iou == equals(theirs(MulticlassJaccardIndex, "none"))
    assert scores.mean_iou == equals(theirs(MulticlassJaccardIndex, "macro"))
    assert scores.frequency_weighted_iou == equals(theirs(MulticlassJaccardIndex, "weighted"))
    assert scores.accuracy == equals(theirs(MulticlassAccuracy, "none"))
    assert scores.mean_accuracy == equals(theirs(MulticlassAccuracy, "macro"))
    assert scores.pixel_accuracy == equals(theirs(MulticlassAccuracy, "micro"))
    assert scores.precision == equals(theirs(MulticlassPrecision, "none"))
    assert scores.dice == equals(theirs(MulticlassF1Score, "none"))  # F1 and Dice are two names of one number
    assert scores.mean_dice == equals(theirs(MulticlassF1Score, "macro"))


@pytest.mark.reliability
def test_c13_nothing_scored_gives_no_score_rather_than_nan() -> None:
    scores = scores_from(torch.zeros(3, 3, dtype=torch.int64), "ade20k")
    assert (scores.pixel_accuracy, scores.mean_iou, scores.overall) == (None, None, None)
    assert (scores.mean_accuracy, scores.mean_dice, scores.frequency_weighted_iou) == (None, None, None)
    assert scores.iou == scores.accuracy == scores.precision == scores.dice == [None] * 3


def test_the_overall_score_is_the_mean_of_miou_and_accuracy() -> None:
    scores = scores_from(torch.tensor([[3, 1], [0, 4]]))
    assert scores.overall == pytest.approx((7 / 8 + (3 / 4 + 4 / 5) / 2) / 2)


@pytest.mark.shared
def test_golden_figures_of_the_ade20k_samples(shared) -> None:
    from PIL import Image

    folder, matrix = shared / "ade20k_samples", ConfusionMatrix(150)
    expected = {"ADE_val_00000278": (0.866967, 0.504949, 12), "ADE_val_00001519": (0.824185, 0.480053, 28)}
    for name, (accuracy, iou, classes) in expected.items():
        prediction, label = (
            torch.from_numpy(np.array(Image.open(folder / kind / "validation" / f"{name}.png"), np.int64)) - 1
            for kind in ("predictions", "annotations")
        )
        single = scores_from(confusion_counts(prediction.clamp(min=0), label, 150), "present")
        assert single.pixel_accuracy == pytest.approx(accuracy, abs=1e-6)
        assert single.mean_iou == pytest.approx(iou, abs=1e-6)
        assert single.num_averaged == classes
        matrix.update(confusion_counts(prediction.clamp(min=0), label, 150))
    both = matrix.compute().matrix
    assert scores_from(both, "ade20k").mean_iou == pytest.approx(0.130006, abs=1e-6)
    assert scores_from(both, "present").mean_iou == pytest.approx(0.487522, abs=1e-6)
    assert scores_from(both).pixel_accuracy == pytest.approx(0.845197, abs=1e-6)


# ---- boundaries


def boundary_by_the_authors(mask: np.ndarray, ratio: float) -> np.ndarray:
    """The boundary region of one mask: shrink it by one pixel, again and again, from the edge of the image too."""
    height, width = mask.shape
    distance = max(1, round(ratio * math.sqrt(height**2 + width**2)))
    framed = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    inner = cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1]
    return mask & (inner == 0)


@pytest.mark.parametrize("ratio", [0.001, 0.02, 0.1, 1.0])  # 0.001: one pixel; 1.0: every pixel is near an outline
@pytest.mark.parametrize("seed", range(3))
def test_boundary_counts_equal_those_of_one_mask_after_the_other(seed: int, ratio: float) -> None:
    prediction, label = patches(5, 96, 136, seed)
    counts = boundary_counts(prediction, label, 5, ratio)
    predicted, labelled = prediction.numpy(), label.numpy()
    for index in range(5):
        truth = boundary_by_the_authors(labelled == index, ratio)
        found = boundary_by_the_authors((predicted == index) & (labelled >= 0), ratio)
        assert counts.intersection[index] == (truth & found).sum()
        assert counts.union[index] == (truth | found).sum()


def test_the_boundary_of_a_square_is_a_frame_of_its_pixels() -> None:
    label = torch.zeros(30, 40, dtype=torch.int64)  # diagonal 50: 0.02 of it is 1 pixel
    label[10:20, 10:20] = 1
    counts = boundary_counts(label, label, 3)
    assert counts.union[1] == 100 - 64
    assert counts.union[0] == (30 * 40 - 28 * 38) + (12 * 12 - 10 * 10)  # the edge of the image, and around the square
    assert counts.iou == [1.0, 1.0, None]
    assert counts.mean_iou == 1.0


def test_a_boundary_of_one_pixel_feels_a_shift_that_the_area_hardly_does() -> None:
    label = torch.zeros(300, 400, dtype=torch.int64)
    label[:, 200:] = 1
    shifted = label.roll(3, dims=1)
    area, outline = scores_from(confusion_counts(shifted, label, 2)), boundary_counts(shifted, label, 2, 0.002)
    assert area.mean_iou is not None and outline.mean_iou is not None
    assert area.mean_iou > 0.95 and outline.mean_iou < 0.7


def test_boundary_counts_of_images_add_up() -> None:
    images = [boundary_counts(*patches(4, 64, 72, seed), 4) for seed in range(3)]
    metric = BoundaryIoU(4)
    for counts in images:
        metric.update(counts)
    total = metric.compute()
    assert torch.equal(total.intersection, torch.stack([counts.intersection for counts in images]).sum(0))
    assert torch.equal(total.union, torch.stack([counts.union for counts in images]).sum(0))
    assert total.union.dtype == torch.int64
