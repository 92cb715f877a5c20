"""trainer.precision outside of Lightning."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semseg.data.classes import ClassTable
from semseg.data.label_map import LabelMap
from semseg.nets.precision import choose_weight_type
from semseg.nets.registry import build_segmenter
from semseg.prediction.predictor import PredictionSettings, Predictor


@pytest.mark.parametrize(
    ("precision", "computed"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
    ],
)
def test_prediction_computes_in_the_precision_of_the_trainer(precision: str, computed: torch.dtype) -> None:
    net = build_segmenter("resnet18", "c1", 3).eval().to(choose_weight_type(precision))
    seen: list[torch.dtype] = []
    net.encoder.register_forward_hook(lambda _, inputs, maps: seen.append(maps[-1].dtype))
    names = ["a", "b", "c"]
    classes = ClassTable(names, np.zeros((3, 3), np.uint8))
    predictor = Predictor(net, classes, LabelMap(3), PredictionSettings(scales=[32]), precision=precision)
    result = predictor.predict(np.zeros((32, 48, 3), np.uint8))
    assert seen == [computed]
    assert result.ids.shape == (32, 48)
