"""The programs of docs/extending.md run unchanged: networks and data from outside the package."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from helpers.command_line import RUN, TINY, run
from helpers.fork_server import FORK_CHILDREN, run_python

DOCUMENT = RUN.parent / "docs" / "extending.md"
PROGRAMS = dict(re.findall(r"^`(\w+\.py)`\n\n```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE))


def write_program(name: str, folder: Path) -> Path:
    path = folder / name
    path.write_text(PROGRAMS[name])
    return path


def start(program: Path, *words: str, code: int = 0) -> str:
    environment = {"PYTHONPATH": str(RUN.parent), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", FORK_CHILDREN: "1"}
    result = run_python(program.name, *words, cwd=program.parent, env=environment)
    assert result.returncode == code, result.stdout
    return result.stdout


def test_every_program_is_shorter_than_forty_lines() -> None:
    assert set(PROGRAMS) == {"my_encoder.py", "my_decoder.py", "polygons.py"}
    for name, text in PROGRAMS.items():
        lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert len(lines) < 40, name


@pytest.mark.slow
def test_a_custom_encoder_trains_on_two_ranks_and_is_evaluated(tmp_path: Path) -> None:
    program = write_program("my_encoder.py", tmp_path)
    words = [word for word in TINY if "encoder" not in word and "accelerator" not in word]
    own = ["model/encoder=custom", "model.encoder.name=stages", "trainer=ddp_cpu"]
    printed = start(program, *words, *own, "+model.encoder.width=8", "run_dir=run", "trainer.devices=2")
    assert "stages + c1" in printed and "python my_encoder.py mode=eval ckpt=run" in printed
    assert "mean IoU" in start(program, "mode=eval", "ckpt=run", "run_dir=scores")
    assert "stages" in run(tmp_path, "mode=eval", "ckpt=run", code=1)  # run.py has no such network, and says so
    wrong = start(program, *words, *own, "+model.encoder.widht=8", code=2)
    assert "widht" in wrong and "width" in wrong


@pytest.mark.slow
def test_a_custom_decoder_trains_and_predicts(tmp_path: Path) -> None:
    program = write_program("my_decoder.py", tmp_path)
    words = [word for word in TINY if "decoder" not in word]
    start(program, *words, "model/decoder=custom", "model.decoder.name=added", "run_dir=run")
    start(program, "mode=predict", "ckpt=run", "input=scenes/images/validation", "run_dir=seen")
    assert len(list((tmp_path / "seen").rglob("*_panel*"))) == 7


def test_polygon_labels_become_masks(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for name in "abc":
        cv2.imwrite(str(photos / f"{name}.jpg"), rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        shapes = [
            {"label": "road", "points": [[0, 24], [63, 24], [63, 47], [0, 47]]},
            {"label": "car", "points": [[10, 20], [30, 20], [30, 40], [10, 40]]},
        ]
        (photos / f"{name}.json").write_text(json.dumps({"height": 48, "width": 64, "shapes": shapes}))
    start(write_program("polygons.py", tmp_path), "photos", "my_data")
    mask = cv2.imread(str(tmp_path / "my_data/masks/a.png"), cv2.IMREAD_UNCHANGED)
    assert (mask[0, 0], mask[47, 0], mask[30, 20]) == (255, 1, 0)  # not labelled, road, car
    data = ["data=folder", "data.root=my_data", "data.classes=classes.csv", "data.first_id=0"]
    printed = run(tmp_path, "mode=check", *data, "data.ignore=[255]", "data.val_fraction=0.34")
    assert "car" in printed and "READY" in printed.upper()
