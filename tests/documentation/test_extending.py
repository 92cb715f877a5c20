"""The programs of docs/extending.md run unchanged: networks and data from outside the package."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from helpers.command_line import RUN, TINY, TINY_NETWORK, run, run_here
from helpers.fork_server import FORK_CHILDREN, run_python
from helpers.in_process import logged_losses
from semseg.training.loggers.csv import read_rows

SMALL = [*TINY, *TINY_NETWORK]
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
    assert set(PROGRAMS) == {
        "my_encoder.py", "my_decoder.py", "my_network.py", "my_loss.py", "my_scores.py", "my_augmentation.py",
        "my_callback.py", "polygons.py",
    }  # fmt: skip
    for name, text in PROGRAMS.items():
        lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert len(lines) < 40, name


@pytest.mark.long
def test_a_custom_encoder_trains_on_two_ranks_and_is_evaluated(tmp_path: Path) -> None:
    program = write_program("my_encoder.py", tmp_path)
    words = [word for word in TINY if "encoder" not in word and "accelerator" not in word]
    own = ["model/encoder=custom", "model.encoder.name=stages", "trainer=ddp_cpu"]
    printed = start(program, *words, *own, "+model.encoder.width=8", "run_dir=run", "trainer.devices=2")
    assert "stages + c1" in printed and "python my_encoder.py mode=eval ckpt=run" in printed
    assert "mean IoU" in start(program, "mode=eval", "ckpt=run", "run_dir=scores")
    assert "stages" in run_here(tmp_path, "mode=eval", "ckpt=run", code=1)  # run.py has no such network, and says so
    wrong = start(program, *words, *own, "+model.encoder.widht=8", code=2)
    assert "widht" in wrong and "width" in wrong


@pytest.mark.slow
def test_a_custom_decoder_trains_and_predicts(tmp_path: Path) -> None:
    program = write_program("my_decoder.py", tmp_path)
    words = [word for word in SMALL if "decoder" not in word]
    start(program, *words, "model/decoder=custom", "model.decoder.name=added", "run_dir=run")
    start(program, "mode=predict", "ckpt=run", "input=scenes/images/validation", "run_dir=seen")
    assert len(list((tmp_path / "seen").rglob("*_panel*"))) == 7


@pytest.mark.slow
def test_a_custom_network_trains_on_two_ranks_and_is_used(tmp_path: Path) -> None:
    program = write_program("my_network.py", tmp_path)
    words = [word for word in SMALL if not word.startswith(("model", "~model")) and "accelerator" not in word]
    own = ["model=custom", "model.library=lraspp", "trainer=ddp_cpu", "trainer.devices=2"]
    printed = start(program, *words, *own, "model.options.width=8", "run_dir=run", "trainer.max_steps=1")
    assert "network     lraspp: " in printed and "python my_network.py mode=eval ckpt=run" in printed
    start(program, "mode=predict", "ckpt=run", "input=scenes/images/validation", "run_dir=seen")
    assert len(list((tmp_path / "seen").rglob("*_panel*"))) == 7
    assert "lraspp" in run_here(tmp_path, "mode=eval", "ckpt=run", code=1)  # run.py has no such network, and says so
    wrong = start(program, *words, *own[:2], "model.options.widht=8", code=2)
    assert "widht" in wrong and "model.options.width" in wrong


@pytest.mark.slow
def test_a_custom_loss_trains_on_two_ranks_resumes_and_is_not_needed_afterwards(tmp_path: Path) -> None:
    program = write_program("my_loss.py", tmp_path)
    words = [word for word in SMALL if "accelerator" not in word] + ["run_dir=run", "loss.terms.cross_entropy=0"]
    ranks, own = ["trainer=ddp_cpu", "trainer.devices=2"], "loss.terms.tversky={factor: 0.5, missed: 0.8}"
    printed = start(program, *words, *ranks, own)
    assert ", 0.5 tversky, " in printed  # where the start of a run names our losses
    losses = logged_losses(tmp_path / "run")
    assert all(0 < loss < 0.5 for loss in losses.values())
    resume = [*words, *ranks, "trainer.max_epochs=2"]
    assert "resuming from" in start(program, *resume, own)
    assert set(losses) < set(logged_losses(tmp_path / "run"))
    # Without the program, the term is named, and nothing of the run changes.
    refused = run_here(tmp_path, *resume, own, code=2)
    assert "loss.terms.tversky" in refused and "docs/extending.md" in refused
    refused = run(tmp_path, *resume, "loss.terms.cross_entropy=1", code=2)
    assert "loss.terms.tversky" in refused and "docs/extending.md" in refused
    assert "mean IoU" in run_here(tmp_path, "mode=eval", "ckpt=run", "run_dir=scores")
    wrong = start(program, *words, "loss.terms.tversky={mised: 0.8}", "run_dir=other", code=2)
    assert "loss.terms.tversky" in wrong and "mised" in wrong
    hint = start(program, *words, "loss=tversky", code=2)
    assert "loss.terms.tversky=1" in hint


@pytest.mark.slow
def test_custom_scores_are_logged_chosen_by_and_written(tmp_path: Path) -> None:
    program = write_program("my_scores.py", tmp_path)
    by = ["checkpoint.monitor=val/outlines", "checkpoint.mode=min", "callbacks=early_stopping"]
    words = [*SMALL, "run_dir=run", "trainer.max_epochs=2", *by, "callbacks.early_stopping.monitor=val/kappa"]
    printed = start(program, *words, "after_training=[eval]")
    assert "best val/outlines" in printed and "Agreement beyond chance (Cohen 1960)" in printed
    rows = [row for row in read_rows(tmp_path / "run/logs/metrics.csv") if "val/miou" in row]
    distances = [float(row["val/outlines"]) for row in rows if "val/outlines" in row]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["monitor"] == "val/outlines" and result["score"] == pytest.approx(min(distances))
    metrics = json.loads((tmp_path / "run/eval/metrics.json").read_text())
    assert metrics["own_units"] == {"kappa": "%", "outlines": "px"}
    assert metrics["own_scores"]["outlines"] == pytest.approx(min(distances), rel=1e-6)
    assert any(float(row["val/kappa"]) == pytest.approx(metrics["own_scores"]["kappa"], abs=1e-6) for row in rows)
    page = (tmp_path / "run/eval/report.html").read_text()
    assert "outlines" in page and '<span class="unit">px</span>' in page
    # Programs without the scores read the checkpoint, but cannot watch them.
    assert "kappa" not in run_here(tmp_path, "mode=eval", "ckpt=run", "run_dir=scores")
    assert "val/outlines" in run_here(tmp_path, *SMALL, *by, code=2)
    assert start(program, "mode=eval", "ckpt=run", "run_dir=twice", "trainer=ddp_cpu", "trainer.devices=2")
    assert json.loads((tmp_path / "twice/metrics.json").read_text())["own_scores"] == metrics["own_scores"]


@pytest.mark.long
def test_a_custom_augmentation_gives_the_same_run_with_any_number_of_workers(tmp_path: Path) -> None:
    program = write_program("my_augmentation.py", tmp_path)
    for name, value, workers in (("none", "0", 0), ("alone", "48", 0), ("workers", "{side: 48}", 2)):
        start(program, *SMALL, f"run_dir={name}", f"augment.cutout={value}", f"data.num_workers={workers}")
    none, alone, workers = (logged_losses(tmp_path / name) for name in ("none", "alone", "workers"))
    assert alone == workers != none
    assert "augment.cutout" in run_here(tmp_path, *SMALL, "augment.cutout=48", code=2)


@pytest.mark.slow
def test_a_custom_callback_is_called_and_its_arguments_are_checked(tmp_path: Path) -> None:
    program = write_program("my_callback.py", tmp_path)
    start(program, *SMALL, "run_dir=run", "callbacks.gradient.every=1")
    norms = [row["gradient/decoder"] for row in read_rows(tmp_path / "run/logs/metrics.csv")]
    assert len(norms) == 2 and all(float(norm) > 0 for norm in norms)
    wrong = start(program, *SMALL, "run_dir=other", "callbacks.gradient.evry=1", code=2)
    assert "callbacks.gradient" in wrong and "evry" in wrong
    assert "not allowed" in start(program, *SMALL, "+callbacks.gradient._target_=os.system", code=2)
    assert "mean IoU" in run_here(tmp_path, "mode=eval", "ckpt=run", "run_dir=scores")


@pytest.mark.long
def test_the_jobs_of_a_sweep_know_what_the_program_adds(tmp_path: Path) -> None:
    program = write_program("my_loss.py", tmp_path)
    printed = start(program, "-m", *SMALL, "loss.terms.tversky=0.1,0.5", "sweep_dir=sweep")
    assert "2 finished" in printed


@pytest.mark.slow
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
    printed = run_here(tmp_path, "mode=check", *data, "data.ignore=[255]", "data.val_fraction=0.34")
    assert "car" in printed and "READY" in printed.upper()
