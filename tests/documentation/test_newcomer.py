"""A newcomer's first minutes: eight commands, no edits, no network access. The first one, `make install`, is done."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch

from helpers.command_line import TINY_NETWORK
from helpers.fork_server import FORK_CHILDREN, ForkedProgram
from helpers.tiny_program import PROGRAM, Gate
from semseg.storage.commands import PROGRAM_VARIABLE

SMALL = f"model/encoder=resnet18 {' '.join(TINY_NETWORK)} model.encoder.weights=none data.num_workers=0"
QUICKSTART = (
    "experiment=quickstart trainer.max_epochs=1 trainer.check_val_every_n_epoch=1 data.steps_per_epoch=3"
    f" run_dir=runs/first data.make.num_train=8 data.make.num_val=3 {SMALL}"
)
TRAIN = (
    "data=folder data.root=mine data.num_classes=11 run_dir=runs/mine trainer=cpu data.steps_per_epoch=6"
    " data.batch_size=2 data.short_edges=[64] trainer.max_epochs=1 trainer.log_every_n_steps=1 eval.scales=[64]"
    f" checkpoint.every_n_steps=2 {SMALL}"
)


def start(folder: Path, words: str, variables: dict[str, str] | None = None) -> ForkedProgram:
    environment = os.environ | {FORK_CHILDREN: "1", "OMP_NUM_THREADS": "1"} | (variables or {})
    del environment[PROGRAM_VARIABLE]  # printed commands start the program as this process does
    return ForkedProgram([str(PROGRAM), *shlex.split(words)], folder, environment)


def command(folder: Path, words: str) -> str:
    process = start(folder, words)
    assert process.wait(300) == 0, process.read()
    return process.read()


def steps_of(run_dir: Path) -> list[int]:
    lines = (run_dir / "logs" / "metrics.csv").read_text().splitlines()[1:]
    return [int(line.partition(",")[0]) for line in lines]


@pytest.mark.slow
def test_from_the_machine_check_to_a_prediction_in_eight_commands(tmp_path: Path) -> None:
    assert "READY" in command(tmp_path, "mode=doctor")

    printed = command(tmp_path, QUICKSTART)
    assert "best mean IoU" in printed and "mode=predict" in printed
    assert (tmp_path / "runs/first/eval/report.html").is_file() and list(tmp_path.glob("runs/first/predict/*"))

    scenes = next(tmp_path.glob("data/*"))  # the newcomer has a folder of pictures and one of masks
    for kind, name in (("images", "images"), ("annotations", "masks")):
        shutil.copytree(next((scenes / kind).glob("train*")), tmp_path / "mine" / name)

    printed = command(tmp_path, "mode=check data=folder data.root=mine data.num_classes=11")
    assert "READY" in printed and re.search(r"python .*data\.root=mine", printed)

    gate = Gate(tmp_path / "gate", step=3)
    process = start(tmp_path, TRAIN, gate.variables)
    gate.wait()
    process.send_signal(signal.SIGINT)
    gate.open()
    assert process.wait(300) == 130, process.read()
    resume = re.findall(rf"python \S*{PROGRAM.name} (.*runs/mine.*)", process.read())
    assert resume, process.read()
    saved = torch.load(tmp_path / "runs/mine/checkpoints/last.ckpt", weights_only=True)
    assert 0 < saved["global_step"] < 6

    printed = command(tmp_path, resume[-1])
    assert steps_of(tmp_path / "runs/mine") == list(range(6))
    assert "best mean IoU" in printed

    command(tmp_path, "mode=eval ckpt=runs/mine run_dir=runs/scores")
    assert json.loads((tmp_path / "runs/scores/metrics.json").read_text())["images"] >= 1
    assert "<html" in (tmp_path / "runs/scores/report.html").read_text()

    command(tmp_path, "mode=predict ckpt=runs/mine input=mine/images run_dir=runs/pictures")
    assert len(list((tmp_path / "runs/pictures").rglob("*_panel*"))) == 8
