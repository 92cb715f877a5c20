"""trainer.precision where a trained network is used: in evaluation, prediction and serving."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.in_process import SHORT_RUN, TinyEncoder, configured, fit
from semseg.build import open_predictor
from semseg.data.classes import ClassTable
from semseg.data.label_map import LabelMap
from semseg.modes import eval as evaluate
from semseg.modes.serve import predict_ids
from semseg.nets.precision import choose_weight_type
from semseg.nets.registry import ENCODERS, Constructor, build_segmenter
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


@pytest.fixture
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, and its data set in the folder `scenes` beside it."""
    folder = tmp_path_factory.mktemp("trained")
    words = [f"data.root={folder / 'scenes'}", "data.steps_per_epoch=1", "trainer.limit_val_batches=0"]
    fit(configured(*SHORT_RUN, *words, f"run_dir={folder / 'run'}"))
    return folder / "run"


@pytest.mark.slow
def test_evaluation_prediction_and_serving_compute_in_the_precision_of_the_trainer(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    encode = TinyEncoder.forward

    def encode_and_watch(encoder: TinyEncoder, image: Tensor) -> list[Tensor]:
        maps = encode(encoder, image)
        seen.append(maps[-1].dtype)
        return maps

    monkeypatch.setattr(TinyEncoder, "forward", encode_and_watch)
    words = [f"ckpt={trained}", "trainer=cpu", "trainer.precision=bf16-mixed", "trainer.enable_progress_bar=false"]
    with patch.dict(ENCODERS, {"tiny": Constructor("helpers.in_process", "TinyEncoder")}):
        evaluated = ["mode=eval", *words, "eval.scales=[32]", f"run_dir={tmp_path}"]
        evaluate.run(configured(*evaluated), evaluated)
        assert len(seen) == 2 and set(seen) == {torch.bfloat16}  # the image, and once more for the page
        for mode in ("predict", "serve"):
            given = [f"mode={mode}", *words, *(["input=a.jpg"] if mode == "predict" else [])]
            predictor = open_predictor(configured(*given), given)
            image = np.zeros((32, 48, 3), np.uint8)
            ids = predictor.predict(image).ids if mode == "predict" else predict_ids(predictor, image)
            assert ids.shape == (32, 48)
            assert len(seen) > 2 and set(seen) == {torch.bfloat16}
            del seen[2:]
