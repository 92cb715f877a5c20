from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import semseg.evaluation.evaluator
from semseg.config.schema import EvalConfig
from semseg.data.batch import EvalSample
from semseg.evaluation.bootstrap import RESAMPLES_PER_CHUNK, bootstrap, class_counts, percentile_interval
from semseg.evaluation.evaluator import Evaluator, speed_of
from semseg.evaluation.inference import ClassMap
from semseg.evaluation.metrics import boundary_counts, confusion_counts, scores_from

LABEL = torch.tensor([[0, 0, 1, 1], [-1, -1, 2, 2]])
RIGHT = torch.tensor([[0, 0, 1, 1], [0, 0, 2, 2]])
WRONG = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 1]])  # 3 of the 6 scored pixels are right


def predicted(ids: torch.Tensor) -> ClassMap:
    return ClassMap(ids, torch.ones(ids.shape))


def sample(index: int, label: torch.Tensor = LABEL) -> EvalSample:
    return EvalSample([], label, torch.tensor(label.shape), f"images/{index}.jpg", index)


def evaluator(**settings: object) -> Evaluator:
    return Evaluator(EvalConfig(scales=[300, 450], **settings), 3, torch.device("cpu"))  # pyright: ignore[reportArgumentType]


def test_each_subset_of_the_scales_is_counted_separately() -> None:
    counting = evaluator(also_scales=[[450]])
    counting.add([sample(0)], [[predicted(RIGHT), predicted(WRONG)]])
    counting.add([sample(1)], [[predicted(RIGHT)] * 2])
    all_scales, one_scale = counting.result().counts
    assert all_scales.images == one_scale.images == 2
    assert torch.equal(all_scales.matrix, 2 * confusion_counts(RIGHT, LABEL, 3))
    assert torch.equal(one_scale.matrix, confusion_counts(WRONG, LABEL, 3) + confusion_counts(RIGHT, LABEL, 3))


def test_an_image_is_scored_over_the_classes_it_has() -> None:
    counting = evaluator()
    counting.add([sample(0)], [[predicted(WRONG)]])
    (image,) = counting.result().images
    assert image.pixel_accuracy == 3 / 6
    assert image.mean_iou == pytest.approx((2 / 4 + 1 / 3 + 0) / 3)  # classes 0, 1, 2
    assert (image.path, image.height, image.width) == ("images/0.jpg", 2, 4)
    assert image.seconds > 0
    assert image.class_counts.tolist() == [[2, 1, 0], [2, 2, 2], [4, 2, 0]]  # correct, labelled, predicted


def test_an_image_without_a_scored_pixel_has_no_score() -> None:
    counting = evaluator()
    counting.add([sample(0, torch.full_like(LABEL, -1))], [[predicted(RIGHT)]])
    (image,) = counting.result().images
    assert image.pixel_accuracy is None and image.mean_iou is None


def test_images_are_returned_in_the_order_of_the_split() -> None:
    counting = evaluator()
    for index in (2, 0, 1):
        counting.add([sample(index)], [[predicted(RIGHT)]])
    assert [image.position for image in counting.result().images] == [0, 1, 2]


def test_boundaries_are_counted_only_if_requested() -> None:
    assert evaluator().result().boundary is None
    counting = evaluator(boundary_iou=True, boundary_ratio=0.5)
    counting.add([sample(0)], [[predicted(WRONG)]])
    boundary = counting.result().boundary
    expected = boundary_counts(WRONG, LABEL, 3, 0.5)
    assert boundary is not None
    assert torch.equal(boundary.intersection, expected.intersection) and torch.equal(boundary.union, expected.union)


def test_regions_whose_label_may_be_wrong_are_listed_only_if_requested() -> None:
    assert evaluator().result().label_errors is None
    counting = evaluator(label_errors=True)
    label, ids = torch.zeros(40, 40, dtype=torch.int64), torch.zeros(40, 40, dtype=torch.int16)
    ids[10:20, 10:20] = 2
    sure, given = torch.full((40, 40), 0.8), torch.full((40, 40), 0.1)
    for index in (0, 1):
        counting.add([sample(index, label)], [[ClassMap(ids, sure, given)]])
    errors = counting.result().label_errors
    assert errors is not None and [(error.file, error.predicted) for error in errors] == [
        ("images/0.jpg", 2), ("images/1.jpg", 2)
    ]  # fmt: skip


def test_time_is_split_by_stage_and_drawing_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.accumulate([0, 1, 10, 100, 1000, 10_000])  # seconds between two readings
    monkeypatch.setattr(semseg.evaluation.evaluator.time, "perf_counter", lambda: next(clock))
    counting = evaluator()
    counting.stopwatch.lap("reading")
    counting.add([sample(0)], [[predicted(RIGHT)]])  # 10 s of network, 100 s of scoring
    counting.stopwatch.restart()
    counting.stopwatch.lap("reading")
    result = counting.result()
    assert result.speed.seconds_per_image == {"reading": 10_001, "network": 10, "scoring": 100}
    assert result.images[0].seconds == 110


def test_images_predicted_together_share_the_time_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.accumulate([0, 10, 100, 1000])  # seconds between two readings
    monkeypatch.setattr(semseg.evaluation.evaluator.time, "perf_counter", lambda: next(clock))
    counting = evaluator()
    counting.add(
        [sample(0), sample(1)], [[predicted(RIGHT)], [predicted(WRONG)]]
    )  # 10 s of network, 100 s and 1000 s of scoring
    result = counting.result()
    assert [(image.seconds, image.pixel_accuracy) for image in result.images] == [(105, 1), (1005, 3 / 6)]
    assert result.speed.seconds_per_image == {"reading": 0, "network": 5, "scoring": 550}


def test_the_slowest_rank_sets_the_pace() -> None:
    fast, slow = {"reading": 0.0, "network": 1.0, "scoring": 1.0}, {"reading": 1.0, "network": 2.0, "scoring": 1.0}
    speed = speed_of(8, [fast, slow])
    assert speed.images_per_second == 8 / 4
    assert speed.seconds_per_image == {"reading": 1 / 8, "network": 3 / 8, "scoring": 2 / 8}


# ---- confidence


def matrices(number: int, num_classes: int = 6) -> list[torch.Tensor]:
    """Confusion matrices of images that contain few of the classes, some of them rarely."""
    generator = torch.Generator().manual_seed(number)
    found = []
    for _ in range(number):
        counts = torch.randint(0, 900, (num_classes, num_classes), generator=generator)
        has_class = torch.rand(num_classes, generator=generator) < torch.linspace(0.02, 0.5, num_classes)
        found.append(counts * has_class[:, None] * has_class)
    return found


@pytest.mark.parametrize("rule", ["ade20k", "present", "ground_truth"])
def test_every_resample_is_scored_as_a_data_set_of_its_own(rule: str) -> None:
    images, resamples = matrices(9), RESAMPLES_PER_CHUNK + 30  # the second chunk is not full
    draws = np.random.default_rng(7).integers(9, size=(resamples, 9))
    scores = [scores_from(torch.stack([images[n] for n in draw]).sum(0), rule) for draw in draws]
    means = [score.mean_iou for score in scores if score.mean_iou is not None]
    accuracies = [score.pixel_accuracy for score in scores if score.pixel_accuracy is not None]
    found = bootstrap([class_counts(image) for image in images], rule, resamples, np.random.default_rng(7))
    assert found.mean_iou == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=1e-12)
    assert found.pixel_accuracy == pytest.approx(np.quantile(accuracies, [0.025, 0.975]), rel=1e-12)
    overall = [score.overall for score in scores if score.overall is not None]
    assert found.overall_score == pytest.approx(np.quantile(overall, [0.025, 0.975]), rel=1e-12)


def test_the_same_seed_gives_the_same_interval() -> None:
    counts = [class_counts(image) for image in matrices(20)]
    first, repeated, other = (bootstrap(counts, "present", 100, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == repeated != other


def test_equal_images_have_an_interval_of_length_zero() -> None:
    counts = [class_counts(torch.tensor([[3, 1], [0, 4]]))] * 5
    found = bootstrap(counts, "present", 50, np.random.default_rng(0))
    assert found.mean_iou == pytest.approx((0.775, 0.775))
    assert found.pixel_accuracy == (0.875, 0.875)


def test_nothing_scored_has_no_interval() -> None:
    counts = [class_counts(torch.zeros(3, 3, dtype=torch.int64))] * 2
    found = bootstrap(counts, "ade20k", 10, np.random.default_rng(0))
    assert found.mean_iou is None and found.pixel_accuracy is None


def test_an_interval_covers_the_central_finite_values() -> None:
    assert percentile_interval(np.array([*np.arange(201) / 200, np.nan])) == pytest.approx((0.025, 0.975))
