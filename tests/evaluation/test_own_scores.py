"""Scores that programs add: of the confusion matrix, or of each image; a fraction, or a number with a unit."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from torch import Tensor

from helpers.command_line import TINY, TINY_NETWORK, run_here
from semseg.config.load import load_config
from semseg.config.schema import EvalConfig
from semseg.config.tables import list_own_scores
from semseg.data.batch import EvalSample
from semseg.data.classes import ClassTable
from semseg.errors import ConfigError
from semseg.evaluation.evaluator import Evaluator
from semseg.evaluation.inference import ClassMap
from semseg.evaluation.own_scores import (
    IMAGE_METRICS,
    METRICS,
    ImageMeans,
    Measure,
    check_measures,
    score_image,
    score_split,
)
from semseg.evaluation.result import EvaluationResult, build_result
from semseg.evaluation.result_files import write_result_files
from semseg.evaluation.tables import class_score_table, summary_table
from semseg.reports.evaluation_page import EvaluationReport, render_evaluation_page
from semseg.reports.run_card import RunCard

MATRIX = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])


def kappa(matrix: Tensor) -> Tensor:
    """Agreement beyond chance (Cohen 1960)."""
    counts = matrix.double()
    total, by_chance = counts.sum(), counts.sum(0) @ counts.sum(1)
    return (total * counts.trace() - by_chance) / (total**2 - by_chance)


def recall(matrix: Tensor) -> Tensor:
    return matrix.diag().double() / matrix.sum(1)


def wrong_pixels(prediction: Tensor, label: Tensor) -> float | None:
    scored = label >= 0
    return float((prediction != label)[scored].sum()) if scored.any() else None


@pytest.fixture(autouse=True)
def added() -> Iterator[None]:
    own = {"kappa": kappa, "recall": recall}
    with patch.dict(METRICS, own), patch.dict(IMAGE_METRICS, wrong=Measure(wrong_pixels, "px")):
        yield


def test_a_score_is_a_number_or_one_for_each_class_and_nan_is_nothing_to_score() -> None:
    first, second, third = score_split(MATRIX, {"wrong": 2.0})
    assert (first.name, first.unit, first.meaning) == ("kappa", "%", "Agreement beyond chance (Cohen 1960)")
    assert first.value == pytest.approx((8 * 7 - 32) / (64 - 32))  # by hand: rows 4, 4, 0; columns 3, 5, 0
    assert second.per_class == [0.75, 1.0, None] and second.value == 0.875
    assert (third.value, third.unit, third.per_class) == (2.0, "px", None)
    assert MATRIX.tolist() == [[3, 1, 0], [0, 4, 0], [0, 0, 0]]


def test_the_score_of_images_is_the_mean_over_those_that_have_one() -> None:
    means = ImageMeans()
    label = torch.tensor([[0, 1], [2, -1]])
    for prediction in (torch.tensor([[0, 1], [0, 0]]), torch.tensor([[1, 0], [0, 0]])):
        means.update(score_image(prediction.to(torch.int16), label))
    means.update(score_image(torch.zeros(2, 2), torch.full((2, 2), -1)))
    assert means.compute() == {"wrong": 2.0}  # 1 and 3
    means.reset()
    means.update({"wrong": None})
    assert means.compute() == {"wrong": None}


@pytest.mark.parametrize("returned", ["often", [0.5, 0.5], torch.zeros(2, 2), [None, "a", 1], object()])
def test_what_is_no_score_is_refused_at_the_start(returned: Any) -> None:
    METRICS["mine"] = lambda matrix: returned
    with pytest.raises(ConfigError, match="mine"):
        check_measures(3)


@pytest.mark.parametrize("name", ["miou", "pixels", "a/b", "wrong"])
def test_a_name_that_is_taken_or_cannot_be_a_column_is_refused(name: str) -> None:
    METRICS[name] = kappa
    with pytest.raises(ConfigError, match="metrics"):
        list_own_scores()


def result_of(*predictions: Tensor) -> EvaluationResult:
    evaluator = Evaluator(EvalConfig(), 3, torch.device("cpu"))
    label = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    for position, prediction in enumerate(predictions):
        sample = EvalSample([], label, torch.tensor([2, 4]), f"/data/{position}.png", position)
        evaluator.add([sample], [[ClassMap(prediction, torch.ones(prediction.shape))]])
    classes = ClassTable(["sky", "road", "car"], [(0, 0, 0), (1, 1, 1), (2, 2, 2)])
    return build_result(evaluator.result(), classes, [0, 1, 2], rule="present", root=Path("/data"))


def text_of(table: object) -> str:
    stream = StringIO()
    Console(file=stream, width=200).print(table)
    return stream.getvalue()


def test_own_scores_are_in_files_tables_and_the_page_with_their_units(tmp_path: Path) -> None:
    first = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    result = result_of(first, first.flip(1).clone(), torch.tensor([[0] * 4, [1] * 4]))
    write_result_files(tmp_path, result, {})
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["own_scores"]["wrong"] == pytest.approx(2 / 3) and metrics["own_units"]["wrong"] == "px"
    assert metrics["own_scores"]["recall"] == pytest.approx((10 / 12 + 1) / 2) and metrics["own_units"]["recall"] == "%"
    assert metrics["classes"][0]["recall"] == pytest.approx(10 / 12) and metrics["classes"][2]["recall"] is None
    with (tmp_path / "per_image.csv").open(newline="") as file:
        assert [row["wrong"] for row in csv.DictReader(file)] == ["1.0", "1.0", "0.0"]
    with (tmp_path / "per_class.csv").open(newline="") as file:
        assert [row["recall"] for row in csv.DictReader(file)] == [str(10 / 12), "1.0", ""]
    summary = text_of(summary_table(result))
    assert "0.6667 px" in summary and "91.67" in summary and "Agreement beyond chance" in summary
    assert "recall" in text_of(class_score_table(result, "t"))
    card = RunCard("python run.py", "{}", {}, "", "cpu", "", None)
    page = render_evaluation_page(EvaluationReport("t", "s", result, 3, (), (), card))
    assert '0.6667 <span class="unit">px</span>' in page and '91.67 <span class="unit">%</span>' in page
    assert '<th class="number">recall</th>' in page and ">83.33</td>" in page


def test_without_own_scores_the_files_are_as_they_were(tmp_path: Path) -> None:
    METRICS.clear(), IMAGE_METRICS.clear()
    write_result_files(tmp_path, result_of(torch.zeros(2, 4, dtype=torch.int64)), {})
    assert not {"own_scores", "own_units"} & set(json.loads((tmp_path / "metrics.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("key", ["checkpoint.monitor", "callbacks=early_stopping callbacks.early_stopping.monitor"])
def test_an_own_score_can_be_monitored_and_an_unknown_one_is_refused(key: str) -> None:
    load_config(f"{key}=val/kappa".split())
    with pytest.raises(ConfigError, match=r"Did you mean .*=val/kappa"):
        load_config(f"{key}=val/kapa".split())


@pytest.mark.slow
def test_a_run_logs_own_scores_keeps_the_best_by_one_and_stops_by_another(tmp_path: Path) -> None:
    words = [*TINY, *TINY_NETWORK, "run_dir=run", "trainer.max_epochs=3", "callbacks=early_stopping"]
    words += ["checkpoint.monitor=val/wrong", "checkpoint.mode=min", "callbacks.early_stopping.monitor=val/falling"]
    number = iter(range(100))
    METRICS["falling"] = lambda matrix: -float(next(number))
    printed = run_here(tmp_path, *words, "callbacks.early_stopping.patience=1")
    with (tmp_path / "run/logs/metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/miou"]]
    assert len(rows) == 2 and all(row["val/kappa"] and row["val/recall"] for row in rows)  # stopped after the second
    wrong = [float(row["val/wrong"]) for row in rows]
    assert json.loads((tmp_path / "run/result.json").read_text()) == {
        "score": pytest.approx(min(wrong)), "monitor": "val/wrong", "mode": "min",
    }  # fmt: skip
    best = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)
    assert best["epoch"] == wrong.index(min(wrong))
    assert "best val/wrong" in printed and f"wrong {int(wrong[0])}." in printed
