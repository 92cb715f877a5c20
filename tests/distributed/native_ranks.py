"""What the tests have two processes do with images at their own resolution, and with bands. Imports no pytest."""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytorch_lightning as pl
import tifffile
from distributed.two_ranks import StopAt
from PIL import Image
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from helpers.command_line import TINY_ENCODERS
from helpers.in_process import TINY_RUN, configured, fit
from semseg.config.schema import Config
from semseg.modes import eval as evaluation
from semseg.nets.registry import ENCODERS
from semseg.training.callbacks.stop import StoppedError

NATIVE = ["data.resize=native", "data.crop=[48,40]", "data.crop_foreground=0.5", "augment.scale=[0.5,2.0]"]
BANDS = ["data.bands=[red,green,blue,nir]", "data.value_range=[0,3000]", "augment.brightness=0.3"]
# Of the runs: those on TIFF files of four bands of 16 bits have the folder `bands`, the others PNG files of 8 bits.
VARIANTS = {
    "bands at native resolution": ("bands", [*NATIVE, *BANDS]),
    "bands": ("bands", BANDS),
    "native resolution": ("photographs", NATIVE),
}
# Three steps of one sub-batch a rank; three images of validation, two of them on rank 0.
RUN = [
    "data=folder", "data.num_classes=2", "data.first_id=0", "data.ignore=[]",
    *(word for word in TINY_RUN if not word.startswith(("data.short_edges", "data.max_long_edge", "eval.scales"))),
    "data.val.images=val", "data.val.masks=val_masks", "data.train.images=train", "data.train.masks=train_masks",
    "data.steps_per_epoch=3", "trainer.max_epochs=1", "trainer.log_images=0", "optim.lr=0.1",
]  # fmt: skip
SHORT = ["data.short_edges=[32,48]", "data.max_long_edge=64", "eval.scales=[32]"]
TWO = ["trainer.devices=2", "trainer.strategy=ddp"]
STOPPED = 2  # step, in the middle of the epoch


def draw_data(folder: Path) -> None:
    """Images of 90 x 70 and 60 x 100 pixels, larger than the crops, in the folders of both data sets."""
    rng = np.random.default_rng(0)
    for data in ("bands", "photographs"):
        for name in ("train", "val", "train_masks", "val_masks"):
            (folder / data / name).mkdir(parents=True)
    for number in range(9):
        shape = (90, 70) if number % 2 else (60, 100)
        label = np.zeros(shape, np.uint8)
        label[:, : 30 + 4 * number] = 1
        pixels = np.array([[300, 500, 900, 2500], [1200, 900, 700, 400]])[label] + rng.integers(0, 300, (*shape, 4))
        pixels[:3] = 0  # without a value
        split = "train" if number < 6 else "val"
        tifffile.imwrite(
            folder / f"bands/{split}/{number}.tif", pixels.astype(np.uint16), photometric="minisblack",
            planarconfig="contig", compression="deflate", tile=(32, 32), extratags=[(42113, 2, 0, "0", True)],
        )  # fmt: skip
        Image.fromarray((pixels[..., :3] // 12).astype(np.uint8)).save(folder / f"photographs/{split}/{number}.png")
        for data in ("bands", "photographs"):
            Image.fromarray(label).save(folder / data / f"{split}_masks" / f"{number}.png")


class LastValidation(Callback):
    """Keeps what this rank holds of the last validation: the confusion matrix and the best threshold of all ranks."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        counts: Any = pl_module.counts
        self.matrix: Tensor = counts.matrix.clone()
        self.threshold = pl_module.threshold
        self.scores = pl_module.scores


def words_of(variant: str, root: Path, run_dir: Path, *words: str) -> list[str]:
    data, own = VARIANTS[variant]
    kept = [*RUN, *(own if "data.resize=native" in own else [*SHORT, *own]), *words]
    return [*kept, f"data.root={root / data}", f"run_dir={run_dir}"]


def configure(variant: str, root: Path, run_dir: Path, *words: str) -> Config:
    return configured(*words_of(variant, root, run_dir, *words))


def evaluate(variant: str, root: Path, run_dir: Path, checkpoint: Path, *words: str) -> None:
    """mode=eval of a checkpoint, in this process."""
    data, _ = VARIANTS[variant]
    given = [
        "mode=eval", f"ckpt={checkpoint}", f"data.root={root / data}", f"run_dir={run_dir}", "trainer=cpu",
        "trainer.enable_progress_bar=false", *words,
    ]  # fmt: skip
    with patch.dict(ENCODERS, TINY_ENCODERS):
        evaluation.run(configured(*given), given)


def train_and_resume(rank: int, world: int, *, variant: str, root: Path, folder: Path) -> dict[str, Any]:
    """Runs in `folder`: `whole` reads without workers, `stopped` with two, is stopped and resumed; `eval` scores.

    Returns "stopped", whether this rank was stopped, and what it holds of the last validation of `whole`.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    last = LastValidation()
    fit(configure(variant, root, folder / "whole", *TWO), last)
    config = configure(variant, root, folder / "stopped", *TWO, "data.num_workers=2")
    is_stopped = True
    with contextlib.suppress(StoppedError):
        fit(config, StopAt(STOPPED))
        is_stopped = False
    fit(config, resume=folder / "stopped" / "checkpoints" / "last.ckpt")
    evaluate(variant, root, folder / "eval", folder / "whole" / "checkpoints" / "last.ckpt", *TWO)
    return {"stopped": is_stopped, "matrix": last.matrix, "threshold": last.threshold, "scores": last.scores}
