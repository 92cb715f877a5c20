"""Two training steps of many networks on two ranks, without data. Imports no pytest: every rank loads it."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from helpers.in_process import configured
from semseg.build import build_module
from semseg.checkpoints.network import build_network
from semseg.data.batch import Batch
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.nets.interfaces import SegmentationNetwork
from semseg.training.trainer import create_trainer

CLASSES = ClassTable.from_names(["wall", "sky", "tree"])
TWO_STEPS = [
    "data=scenes", "trainer=cpu", "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=2",
    "trainer.enable_progress_bar=false", "model.encoder.weights=none", "optim.lr=0.01",
]  # fmt: skip
SIDE = 64  # pixels of the images, at least


class Outcome(NamedTuple):
    """What a rank has of a network after two steps."""

    steps: int
    digest: str  # of all weights and statistics
    unused: list[str]  # parameters that were frozen, because the loss does not reach them
    without_gradient: list[str]  # other trainable parameters that got none, for which DDP would have waited
    is_wrapped_first: bool  # the buckets of DDP are there before training starts, where memory is probed
    fills_buckets: bool  # gradients are views of them


class Look(Callback):
    """Notes what DDP has when training starts, and the gradients at its end."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.is_wrapped = isinstance(trainer.strategy.model, DistributedDataParallel)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = {name: value.grad for name, value in pl_module.named_parameters() if value.requires_grad}
        self.idle = [name for name, gradient in trained.items() if gradient is None]
        gradients = [gradient for gradient in trained.values() if gradient is not None]
        self.fills_buckets = any(gradient.untyped_storage().nbytes() > gradient.nbytes for gradient in gradients)


def train_two_steps(rank: int, world: int, *, cases: Mapping[str, Sequence[str]], folder: str) -> dict[str, Outcome]:
    """By name of the case: the outcome of two steps of the network of these overrides.

    The images and the initial weights of the ranks differ; DDP sends those of rank 0.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    return {name: train_case(rank, words, Path(folder)) for name, words in cases.items()}


def train_case(rank: int, words: Sequence[str], folder: Path) -> Outcome:
    torch.manual_seed(rank)
    config = configured(*TWO_STEPS, *words, f"run_dir={folder}")
    net = build_network(config.model, CLASSES.num_classes)
    module = build_module(config, net, CLASSES)
    look = Look()
    trainer = create_trainer(
        config.trainer, config.syncbn, folder, callbacks=[look], loggers=[], has_val=False, is_training=False
    )
    batches: Any = [make_batch(net) for _ in range(2)]
    trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
    digest = hashlib.sha256()
    for value in net.state_dict().values():  # with random weights and frozen statistics, deep networks overflow
        digest.update(value.numpy().tobytes())
    return Outcome(
        trainer.global_step, digest.hexdigest(), list(module.unused), look.idle, look.is_wrapped, look.fills_buckets
    )


def make_batch(net: SegmentationNetwork) -> Batch:
    """One random image of the size that the network takes, with stripes of classes."""
    side = -(-max(SIDE, 2 * net.size_divisor, net.min_size) // net.size_divisor) * net.size_divisor
    size = net.image_size or Size(side, side)
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    height, width = (length // net.label_stride for length in size)
    label = torch.arange(width).expand(1, height, -1) % CLASSES.num_classes
    return Batch(image, label.contiguous(), torch.tensor([size]), ["drawn"])
