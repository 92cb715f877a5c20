"""Precision and recall of two classes at every threshold, and the best one on its way into predictions."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.command_line import TINY_NETWORK, run_here
from semseg.checkpoints.format import read_checkpoint
from semseg.data.geometry import Size
from semseg.data.windows import FinishedRows
from semseg.evaluation.inference import ClassMap
from semseg.evaluation.thresholds import (
    NUM_THRESHOLDS,
    ThresholdCounts,
    ThresholdSink,
    apply_threshold,
    compute_curve,
    count_probabilities,
    find_best,
    positive_probability,
)
from semseg.evaluation.tiled import ArraySink


def prediction_of(probability: torch.Tensor) -> ClassMap:
    ids = (probability > 0.5).to(torch.int16)
    return ClassMap(ids, torch.where(ids == 1, probability, 1 - probability))


def make_case() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(-1, 2, (60, 50), generator=generator)
    probability = (torch.rand(60, 50, generator=generator) * 0.6 + 0.3 * (label == 1)).clamp(0, 1)
    return probability, label


def test_the_curve_is_that_of_counting_every_pixel_at_every_threshold() -> None:
    probability, label = make_case()
    counts = ThresholdCounts()
    for rows in (slice(0, 20), slice(20, 60)):
        counts.update(count_probabilities(prediction_of(probability[rows]), label[rows]))
    curve = compute_curve(counts.compute().numpy())
    assert len(curve) == NUM_THRESHOLDS
    assert [row.threshold for row in curve[:3]] == [0.0, 0.001, 0.002]
    for number in (0, 250, 500, 731):
        threshold, precision, recall, f1, iou = curve[number]
        predicted = (probability >= threshold) & (label >= 0)
        hits = int((predicted & (label == 1)).sum())
        assert recall == pytest.approx(hits / int((label == 1).sum()), abs=0.002)
        assert precision == pytest.approx(hits / int(predicted.sum()), abs=0.002)
        assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
        assert iou == pytest.approx(f1 / (2 - f1))
    best = find_best(curve)
    assert best is not None and best.f1 == max(row.f1 for row in curve if row.f1 is not None)


def test_scores_of_nothing_are_none_and_there_is_no_best_threshold_without_the_second_class() -> None:
    counts = ThresholdCounts()
    counts.update(count_probabilities(prediction_of(torch.full((4, 4), 0.3)), torch.zeros(4, 4, dtype=torch.int64)))
    curve = compute_curve(counts.compute().numpy())
    assert (curve[100].precision, curve[100].recall) == (0.0, None)
    assert (curve[900].precision, curve[900].f1) == (None, None)
    assert find_best(curve) is None
    assert find_best([]) is None


def test_of_equal_thresholds_the_nearest_to_one_half_is_best() -> None:
    counts = ThresholdCounts()
    label = torch.tensor([[0, 0, 1, 1]])
    counts.update(count_probabilities(prediction_of(torch.tensor([[0.1, 0.2, 0.8, 0.9]])), label))
    best = find_best(compute_curve(counts.compute().numpy()))
    assert best is not None and (best.threshold, best.f1) == (0.5, 1.0)


def test_a_threshold_changes_the_classes_of_maps_and_rows_alike() -> None:
    probability, _ = make_case()
    prediction = prediction_of(probability)
    torch.testing.assert_close(positive_probability(prediction.ids, prediction.confidence), probability)
    ids = apply_threshold(prediction.ids, prediction.confidence, 0.2)
    assert torch.equal(ids, (positive_probability(prediction.ids, prediction.confidence) >= 0.2).to(torch.int16))
    inner = ArraySink(Size(60, 50))
    sink = ThresholdSink(inner, 0.2)
    for top in (0, 30):
        rows = slice(top, top + 30)
        sink.write_rows(FinishedRows(top, prediction.ids[rows].numpy(), prediction.confidence[rows].numpy(), None))
    assert np.array_equal(inner.ids, ids.numpy())
    assert inner.confidence == pytest.approx(np.where(inner.ids == 1, probability, 1 - probability), abs=1e-6)


@pytest.mark.slow
def test_the_best_threshold_of_validation_is_in_the_checkpoint_and_used_by_prediction(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for number in range(6):
        mask = np.zeros((64, 64), np.uint8)
        mask[10:30, 8 * number : 8 * number + 20] = 1
        image = rng.integers(0, 120, (64, 64, 3)) + 100 * mask[..., None]
        cv2.imwrite(str(tmp_path / "data" / "masks" / f"{number}.png"), mask)
        cv2.imwrite(str(tmp_path / "data" / "images" / f"{number}.png"), image.astype(np.uint8))
    network = ["model/encoder=resnet18", *TINY_NETWORK, "model.encoder.weights=none", "model/decoder=c1"]
    data = ["data=folder", "data.root=data", "data.num_classes=2", "data.first_id=0", "data.ignore=[]"]
    words = [
        *network, *data, "data.val_fraction=0.4", "data.short_edges=[64]", "eval.scales=[64]", "data.num_workers=0",
        "data.steps_per_epoch=4", "trainer.max_epochs=1", "trainer=cpu", "run_dir=run",
    ]  # fmt: skip
    run_here(tmp_path, *words)
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert saved.threshold is not None
    output = run_here(tmp_path, "mode=eval", "ckpt=run", "run_dir=eval", "trainer=cpu")
    assert f"best threshold of {saved.classes.names[1]}: {saved.threshold:g} with F1" in " ".join(output.split())
    best = json.loads((tmp_path / "eval" / "metrics.json").read_text())["best_threshold"]
    assert best["threshold"] == saved.threshold
    with (tmp_path / "eval" / "precision_recall.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == NUM_THRESHOLDS and list(rows[0]) == ["threshold", "precision", "recall", "f1", "iou"]
    assert "Precision and recall" in (tmp_path / "eval" / "report.html").read_text()
    shares = {}
    for name, value in (("plain", "null"), ("auto", "auto"), ("all", "0"), ("none", "1")):
        predict = ["mode=predict", "ckpt=run", "input=data/images", "predict.save=[ids]", f"predict.threshold={value}"]
        output = run_here(tmp_path, *predict, f"run_dir={name}", "trainer=cpu")
        assert ("predict.threshold=auto:" in output) == (name == "auto")
        maps = [np.asarray(Image.open(path)) for path in sorted((tmp_path / name).glob("*_ids.png"))]
        shares[name] = float(np.mean(maps))
    assert shares["all"] == 1 and shares["none"] == 0
    assert shares["auto"] >= shares["plain"] if saved.threshold <= 0.5 else shares["auto"] <= shares["plain"]
    run_here(tmp_path, "mode=convert", "ckpt=run", "output=net.safetensors")
    assert read_checkpoint(tmp_path / "net.safetensors").threshold == saved.threshold


@pytest.mark.slow
@pytest.mark.parametrize("value", ["1.5", "best", "true", "-0.1"])
def test_thresholds_that_are_no_probability_are_refused(tmp_path: Path, value: str) -> None:
    output = run_here(tmp_path, "mode=predict", "ckpt=x", "input=y", f"predict.threshold={value}", code=2)
    assert f"predict.threshold={value.capitalize() if value == 'true' else value}: must be a probability" in output
