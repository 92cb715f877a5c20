from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from reference import GOLDEN, golden
from semseg.metrics import ConfusionMatrix, confusion_counts, scores_from


def test_rows_are_labels_and_unscored_pixels_count_nowhere() -> None:
    label = torch.tensor([[0, 0, 1], [-1, 2, 2]])
    prediction = torch.tensor([[0, 1, 1], [0, 2, 0]])
    assert confusion_counts(prediction, label, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]


def test_counts_equal_torchmetrics_on_random_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 19, (70, 90), generator=generator)
    label = torch.randint(-1, 19, (70, 90), generator=generator)
    theirs = MulticlassConfusionMatrix(19, ignore_index=-1)(prediction, label)
    assert torch.equal(confusion_counts(prediction, label, 19), theirs)


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
        matrix.update(prediction, label)
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
    assert present.averaged_classes == 2


def as_counts(listed: dict[str, int]) -> dict[int, int]:
    return {int(index): count for index, count in listed.items()}


def test_the_rules_differ_only_in_what_absent_classes_are() -> None:
    # Class 0: half right. Class 1: never labelled, predicted once. Class 2: absent altogether.
    matrix = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0]])
    assert scores_from(matrix, "ade20k").mean_iou == pytest.approx(0.5 / 3)
    assert scores_from(matrix, "present").mean_iou == pytest.approx(0.5 / 2)
    assert scores_from(matrix, "ground_truth").mean_iou == pytest.approx(0.5)
    assert scores_from(matrix).iou == [0.5, 0.0, None]


def test_nothing_scored_gives_no_score_rather_than_nan() -> None:
    scores = scores_from(torch.zeros(3, 3, dtype=torch.int64), "ade20k")
    assert (scores.pixel_accuracy, scores.mean_iou, scores.overall) == (None, None, None)


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
        assert single.averaged_classes == classes
        matrix.update(prediction.clamp(min=0), label)
    both = matrix.compute().matrix
    assert scores_from(both, "ade20k").mean_iou == pytest.approx(0.130006, abs=1e-6)
    assert scores_from(both, "present").mean_iou == pytest.approx(0.487522, abs=1e-6)
    assert scores_from(both).pixel_accuracy == pytest.approx(0.845197, abs=1e-6)
