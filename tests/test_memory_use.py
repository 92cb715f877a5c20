"""Memory that evaluation takes for large images, and that training and sweeps must not take more and more of."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from helpers.command_line import RUN
from helpers.in_process import TINY_RUN, configured, fit
from helpers.memory import MEGABYTE, needs_proc, peak_growth, resident, run_in_fork
from semseg.config.preprocessing import PREPROCESSING
from semseg.data.batch import Batch
from semseg.evaluation.inference import predict_class_map
from semseg.nets.interfaces import Logits

NUM_CLASSES = 150

pytestmark = [pytest.mark.reliability, needs_proc]


class ManyClasses(nn.Module):
    """A network without weights, whose 150 logits are the means of 8 x 8 pixels, again and again."""

    size_divisor = 8

    def forward(self, image: Tensor) -> Logits:
        return Logits(F.avg_pool2d(image, 8).repeat(1, NUM_CLASSES // 3, 1, 1), None)


def growth_of_a_prediction(height: int, width: int) -> int:
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    convention = PREPROCESSING["rgb_mean_std"]
    # The pages of the libraries are mapped when they are first used.
    predict_class_map(ManyClasses(), [image[:, :64, :64]], (64, 64), convention, memory_limit_mb=64)
    return peak_growth(
        lambda: predict_class_map(ManyClasses(), [image], (height, width), convention, memory_limit_mb=64)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(1600, 1200), pytest.param(4000, 3000, marks=pytest.mark.long)])
def test_d4_a_large_image_takes_45_bytes_a_pixel_and_the_memory_limit(height: int, width: int) -> None:
    """At the image's own size: uint8 and normalised pixels, logits at 1/8, classes, confidence. All probabilities
    at once would be 600 bytes a pixel."""

    code = f"from test_memory_use import growth_of_a_prediction as grow; print(grow({height}, {width}))"
    growth = int(run_in_fork(code, Path(__file__).parent))
    logits = 4 * NUM_CLASSES * (height // 8) * (width // 8)
    assert logits < growth < 45 * height * width + 64 * MEGABYTE


class Gauge(Callback):
    """Notes the memory of this process after every step."""

    def __init__(self) -> None:
        self.resident: list[int] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.resident.append(resident())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [200, pytest.param(2000, marks=pytest.mark.long)])
def test_d5_training_takes_no_more_memory_from_step_to_step(steps: int, tmp_path: Path) -> None:
    config = configured(
        "data=scenes", "data.make.num_train=6", "data.make.num_val=1", *TINY_RUN, f"data.root={tmp_path / 'scenes'}",
        f"data.steps_per_epoch={steps}", "trainer.max_epochs=1", f"run_dir={tmp_path}",
    )  # fmt: skip
    gauge = Gauge()
    fit(config, gauge)
    assert len(gauge.resident) == steps
    assert gauge.resident[-1] - gauge.resident[50] < 20 * MEGABYTE


@pytest.mark.long
def test_d5_the_process_of_a_sweep_takes_no_more_memory_from_job_to_job(tmp_path: Path) -> None:
    """20 jobs, each in a process of its own, which ends at once since there is nothing to compare."""
    seeds = ",".join(map(str, range(20)))
    words = ["-m", "mode=compare", "runs=[nothing,here]", f"seed={seeds}", f"runs_dir={tmp_path / 'runs'}"]
    sweep = subprocess.Popen(
        [sys.executable, str(RUN), *words], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    early = latest = num_jobs = 0
    while sweep.poll() is None:
        num_jobs = len(list(tmp_path.glob("runs/*_sweep/*/.hydra")))
        with contextlib.suppress(IndexError):  # it ends while its memory is read
            latest = resident(sweep.pid)
        early = latest if num_jobs <= 2 else early
        time.sleep(0.05)
    assert num_jobs == 20 and early > 10 * MEGABYTE
    assert latest - early < 50 * MEGABYTE
