"""A newcomer's first minutes: eight commands, no edits, no network. The first of them, `make install`, is behind us."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.command_line import RUN

pytestmark = pytest.mark.slow

TRAIN = (
    "data=folder data.root=mine data.num_classes=11 run_dir=runs/mine trainer=cpu data.steps_per_epoch=20"
    " model=resnet18_dilated8_c1_deepsup model.encoder.weights=none data.batch_size=2 data.short_edges=[96]"
    " trainer.max_epochs=1 trainer.log_every_n_steps=1 eval.scales=[64] data.num_workers=0 checkpoint.every_n_steps=2"
)


def start(folder: Path, words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(RUN), *shlex.split(words)]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def command(folder: Path, words: str) -> str:
    process = start(folder, words)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def steps_of(run_dir: Path) -> list[int]:
    log = run_dir / "logs" / "metrics.csv"
    return [int(line.partition(",")[0]) for line in log.read_text().splitlines()[1:]] if log.is_file() else []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_from_the_doctor_to_a_prediction_in_eight_commands(folder: Path) -> None:
    assert "READY to train" in command(folder, "mode=doctor")

    quickstart = "experiment=quickstart trainer.max_epochs=1 trainer.check_val_every_n_epoch=1 data.steps_per_epoch=8"
    printed = command(folder, f"{quickstart} run_dir=runs/first data.make.num_train=12 data.make.num_val=4")
    assert "best mean IoU" in printed and "to predict" in printed
    assert (folder / "runs/first/eval/report.html").is_file() and list(folder.glob("runs/first/predict/*"))

    scenes = next(folder.glob("data/*"))  # what the newcomer has: a folder of pictures and one of masks
    for kind, name in (("images", "images"), ("annotations", "masks")):
        shutil.copytree(next((scenes / kind).glob("train*")), folder / "mine" / name)

    printed = command(folder, "mode=check data=folder data.root=mine data.num_classes=11")
    assert "to train" in printed and "READY" in printed.upper()

    process = start(folder, TRAIN)
    deadline = time.monotonic() + 120
    # The log may lag behind by seconds; the first checkpoint is there after two steps.
    while not list(folder.glob("runs/mine/checkpoints/*.ckpt")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "To go on: python run.py" in printed
    again = printed.split("To go on: python run.py ")[1].splitlines()[0]
    before = torch.load(folder / "runs/mine/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 0 < before < 20

    printed = command(folder, again)
    assert steps_of(folder / "runs/mine") == list(range(20))
    assert "best mean IoU" in printed

    printed = command(folder, "mode=eval ckpt=runs/mine run_dir=runs/scores")
    assert json.loads((folder / "runs/scores/metrics.json").read_text())["images"] >= 1
    assert "<html" in (folder / "runs/scores/report.html").read_text()

    command(folder, "mode=predict ckpt=runs/mine input=mine/images run_dir=runs/pictures")
    assert len(list((folder / "runs/pictures").rglob("*_panel*"))) == 12
