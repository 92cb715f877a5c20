"""Writes checkpoint/format_<n>.ckpt and the losses of the three steps after it, by which later releases are judged.

    python tests/golden/make_checkpoint.py

To be run once for every checkpoint format, when it is new. A file that is there already stays: it is what that
release wrote.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]

from helpers.in_process import TINY_RUN, configured, fit, logged_losses  # noqa: E402 - found by the line above
from semseg.checkpoints.format import FORMAT_VERSION  # noqa: E402
from semseg.config.schema import Config  # noqa: E402

# Six images of tests/golden/dataset, in float64: another processor rounds differently.
RUN = [
    "data=ade20k", "data.train={list: list.odgt, images: null, masks: null}",
    "data.val={list: list.odgt, images: null, masks: null}", *TINY_RUN, "data.steps_per_epoch=3",
    "data.decode=exact", "model/decoder=c1_deepsup", "trainer.precision=64-true", "trainer.max_epochs=2",
]  # fmt: skip


def run_of(run_dir: Path, *words: str) -> Config:
    """Two epochs of three steps on tests/golden/dataset."""
    return configured(*RUN, f"data.root={FOLDER / 'dataset'}", f"run_dir={run_dir}", *words)


def make(target: Path) -> None:
    """Train for one epoch, keep the checkpoint as `target`, train for another one, keep its losses beside it."""
    with tempfile.TemporaryDirectory(prefix="semseg_") as folder:
        run_dir = Path(folder)
        shutil.copytree(FOLDER / "dataset", run_dir / "dataset")
        root = f"data.root={run_dir / 'dataset'}"  # the file then names a folder of no machine
        last = run_dir / "checkpoints" / "last.ckpt"
        fit(run_of(run_dir, root, "trainer.max_epochs=1"))
        shutil.copyfile(last, target)
        fit(run_of(run_dir, root), resume=last)
        losses = logged_losses(run_dir)
        after = {step: losses[step] for step in ("3", "4", "5")}
        target.with_suffix(".json").write_text(json.dumps(after) + "\n")


if __name__ == "__main__":
    file = FOLDER / "checkpoint" / f"format_{FORMAT_VERSION}.ckpt"
    if file.exists():
        sys.exit(f"{file} is there already")
    file.parent.mkdir(exist_ok=True)
    make(file)
