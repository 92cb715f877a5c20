"""Networks whose activations overflow: probabilities that are NaN are named, and never count as sure."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from helpers.command_line import TINY_ENCODERS, run_here
from helpers.random_checkpoints import write_random_checkpoints
from semseg.checkpoints.format import read_checkpoint, write_ckpt
from semseg.nets.registry import ENCODERS

pytestmark = pytest.mark.slow
QUICK = ["data.num_workers=0", "trainer=cpu"]


@pytest.fixture(autouse=True)
def tiny_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "tiny", TINY_ENCODERS["tiny"])


@pytest.mark.parametrize("resize", ["short_edge", "native"])
def test_probabilities_that_are_nan_are_named_and_left_out_as_unsure(tmp_path: Path, resize: str) -> None:
    words = [] if resize == "short_edge" else ["data.resize=native", "data.crop=[32,32]"]
    write_random_checkpoints(tmp_path, *words)
    saved = read_checkpoint(tmp_path / "a.ckpt")
    huge = {name: 1e38 * value if value.ndim == 4 else value for name, value in saved.weights.items()}
    write_ckpt(tmp_path / "a.ckpt", saved._replace(weights=huge))
    message = "the probabilities of the network are NaN, because its activations overflow"
    with pytest.warns(UserWarning, match=message):
        run_here(tmp_path, "mode=eval", "ckpt=a.ckpt", *QUICK, "run_dir=scored")
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos" / "a.png"), np.full((40, 50, 3), 90, np.uint8))
    sure = ["data.ignore=[255]", "predict.min_confidence=0.01", "predict.save=[ids]", "trainer=cpu"]
    with pytest.warns(UserWarning, match=message):
        run_here(tmp_path, "mode=predict", "ckpt=a.ckpt", "input=photos", *sure, "run_dir=drawn")
    (file,) = (tmp_path / "drawn").rglob("a_ids.png")
    assert (cv2.imread(str(file), cv2.IMREAD_UNCHANGED) == 255).all()
