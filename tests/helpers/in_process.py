"""Training runs in the process of the test, and the smallest network that has every part. Imports no pytest."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from helpers.composition import compose_quickly
from semseg.build import build_data, build_module, build_trainer
from semseg.checkpoints.network import build_network
from semseg.config.schema import Config
from semseg.config.validate import check_config
from semseg.data.sources import DataSource
from semseg.nets.blocks import conv_norm_relu
from semseg.nets.interfaces import Encoder
from semseg.nets.registry import ENCODERS, Constructor
from semseg.training.resume import RunState, read_run_state

# To be put behind data=...: a run of TinyEncoder and C1 on the CPU.
TINY_RUN = [
    "data.batch_size=2", "data.short_edges=[32,48]", "data.max_long_edge=64", "data.num_workers=0",
    "model/encoder=resnet18", "~model.encoder.output_stride", "model.encoder.name=tiny", "model.encoder.weights=none",
    "model/decoder=c1", "eval.scales=[32]", "trainer=cpu", "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false", "checkpoint.every_n_minutes=null",
]  # fmt: skip
SHORT_RUN = [
    "data=scenes", "data.make.num_train=4", "data.make.num_val=1", *TINY_RUN, "data.max_long_edge=200",
    "data.steps_per_epoch=3", "trainer.max_epochs=1",
]  # fmt: skip


class TinyEncoder(Encoder):
    """1 976 parameters. Two maps."""

    channels = (8, 16)
    strides = (4, 8)

    def __init__(self, dropout: bool = True) -> None:
        super().__init__()
        self.fine = nn.Sequential(conv_norm_relu(3, 8, 3, stride=2), conv_norm_relu(8, 8, 3, stride=2))
        self.coarse = conv_norm_relu(8, 16, 3, stride=2)
        self.dropout = nn.Dropout2d(0.1 if dropout else 0.0)

    def forward(self, image: Tensor) -> list[Tensor]:
        fine = self.fine(image)
        return [fine, self.dropout(self.coarse(fine))]


def configured(*words: str) -> Config:
    """The configuration of a command line."""
    return check_config(compose_quickly(words))


class PreparedRun:
    """A run in this process before its first step: the parts that `fit` puts together. The encoder may be `tiny`."""

    def __init__(self, config: Config) -> None:
        pl.seed_everything(config.seed, verbose=False)
        source = DataSource(config.data)
        with patch.dict(ENCODERS, {"tiny": Constructor("helpers.in_process", "TinyEncoder")}):
            self.net = build_network(config.model, source.classes.num_classes, bands=source.bands)
        self.module = build_module(config, self.net, source.classes)
        self.trainer = build_trainer(config, source)
        self.data = build_data(config, source, self.net)

    def fit(self, resume: Path | None = None) -> None:
        self.trainer.fit(self.module, datamodule=self.data, ckpt_path=resume, weights_only=True)


def prepare_run(root: Path, run_dir: Path, *words: str) -> PreparedRun:
    """A run of one epoch of three steps on drawn scenes below `root`."""
    return PreparedRun(configured(*SHORT_RUN, f"data.root={root}", f"run_dir={run_dir}", *words))


def fit(config: Config, *callbacks: Callback, resume: Path | None = None) -> dict[str, Any]:
    """Train as mode=train does; returns the content of last.ckpt. The encoder may be `tiny`."""
    run = PreparedRun(config)
    run.trainer.callbacks += callbacks  # pyright: ignore[reportAttributeAccessIssue]
    run.fit(resume)
    return torch.load(Path(config.run_dir) / "checkpoints" / "last.ckpt", weights_only=True)


def read_state(path: Path, config: Config, *, has_val: bool = True) -> RunState:
    """The state of a run in one of its checkpoints, as a run with this configuration resumes from it."""
    return read_run_state(path, config.trainer, config.callbacks, has_val=has_val)


def logged_losses(run_dir: Path) -> dict[str, float]:
    """The training loss of every step that a run's log has one of, by the number of the step."""
    with (run_dir / "logs" / "metrics.csv").open(newline="") as file:
        return {row["step"]: float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Nested dicts, lists, tensors and numbers are equal to the last bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key, value in expected.items():
            assert_equal(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_equal(found[index], value, f"{where}.{index}")
    else:
        assert found == expected, where
