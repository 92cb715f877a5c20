"""The messages that matter to users, produced in this process: mistakes in a command line, in data, and in a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from helpers.command_line import TINY, TINY_NETWORK, run_here
from semseg.data.batch import Batch
from semseg.errors import OutOfMemoryError
from semseg.training.callbacks.out_of_memory import report_out_of_memory

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "messages.json"
RUN = [*TINY, *TINY_NETWORK, "run_dir=run"]
RUN_ON_FILES = [word for word in RUN if not word.startswith("data.make.")]
FOLDER = ["data=folder", "data.root=mine", "data.val_fraction=0", "data.val.images=images", "data.val.masks=masks"]
# Mistakes that are found before anything is read, by name.
COMMAND_LINES = {
    "unknown key": ["optim.lrr=3"],
    "unknown key of another program": ["learning_rate=0.1"],
    "removed key": ["trainer.on_oom=retry"],
    "unknown group": ["modle=upernet50"],
    "unknown model": ["model=upernet51"],
    "unknown mode": ["mode=evl"],
    "wrong type": ["optim.lr=fast"],
    "several problems": ["optim.lr=-1", "optim.momentum=3", "seed=-1"],
    "section set to a value": ["ema=0.99"],
    "value that needs quotes": ["data.name=a=b"],
    "missing checkpoint key": ["mode=eval"],
    "setting of a sweep": ["hparams_search=grid"],
}


def collect_messages(folder: Path) -> dict[str, str]:
    """All messages by name, with `folder`, an empty one, as <folder>."""
    found = {name: run_and_read(folder, words, code=2) for name, words in COMMAND_LINES.items()}
    found |= dict(iterate_launcher_messages(folder))
    found |= dict(iterate_data_messages(folder))
    found |= dict(iterate_run_messages(folder))
    return {name: text.replace(str(folder), "<folder>") for name, text in found.items()}


def run_and_read(folder: Path, words: list[str], *, code: int = 1) -> str:
    """The error message of a command line."""
    output = run_here(folder, *words, code=code)
    return output[output.rindex("error: ") :].strip()


def iterate_launcher_messages(folder: Path) -> Iterator[tuple[str, str]]:
    """The message about a number of processes that does not match the configuration."""
    with patch.dict(os.environ, {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}):
        yield "another number of processes", run_and_read(folder, ["trainer.devices=2"], code=2)


def iterate_data_messages(folder: Path) -> Iterator[tuple[str, str]]:
    """Messages about data sets and checkpoints that are missing or damaged."""
    yield "missing data set", run_and_read(folder, [*RUN_ON_FILES, "data=ade20k", "data.root=nowhere"])
    yield "missing checkpoint", run_and_read(folder, [*RUN, "mode=eval", "ckpt=nowhere.ckpt"])
    for name in ("images", "masks"):
        (folder / "mine" / name).mkdir(parents=True)
        Image.fromarray(np.ones((40, 48), np.uint8)).save(folder / "mine" / name / "a.png")
    words = [*RUN_ON_FILES, *FOLDER]
    yield "unknown number of classes", run_and_read(folder, words, code=2)
    words += ["data.num_classes=2"]
    Image.fromarray(np.full((40, 48), 9, np.uint8)).save(folder / "mine" / "masks" / "a.png")
    yield "unknown label id", run_and_read(folder, words)
    Image.fromarray(np.ones((40, 48), np.uint8)).save(folder / "mine" / "masks" / "a.png")
    image = folder / "mine" / "images" / "a.png"
    image.write_bytes(image.read_bytes()[:-30])
    yield "unreadable image", run_and_read(folder, words)


def iterate_run_messages(folder: Path) -> Iterator[tuple[str, str]]:
    """Messages about a run that is finished, that was another one, and that does not fit into memory."""
    run_here(folder, *RUN)
    finished = run_here(folder, *RUN)
    yield "finished run", "\n".join(line for line in finished.splitlines() if "already finished" in line)
    yield "resume refused", run_and_read(folder, [*RUN, "trainer.max_epochs=2", "optim.momentum=0.5"], code=2)
    batch = Batch(
        torch.zeros(2, 3, 64, 96, dtype=torch.uint8), torch.zeros(2, 8, 12, dtype=torch.int64),
        torch.tensor([[64, 96]] * 2), ("a.jpg", "b.jpg"),
    )  # fmt: skip
    try:
        with report_out_of_memory(batch):
            raise torch.OutOfMemoryError("CUDA out of memory.")
    except OutOfMemoryError as error:
        yield "out of memory", str(error)


def write_golden(messages: dict[str, str]) -> None:
    """Write tests/golden/messages.json."""
    GOLDEN.write_text(json.dumps(messages, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_golden() -> dict[str, str]:
    """The messages in tests/golden/messages.json."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))
