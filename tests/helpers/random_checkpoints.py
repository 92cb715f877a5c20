"""Checkpoints of the smallest network with random weights."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import torch

from helpers.command_line import TINY_ENCODERS
from helpers.in_process import SHORT_RUN, configured
from semseg.checkpoints.format import SavedNetwork, write_ckpt
from semseg.checkpoints.network import build_network
from semseg.data.sources import DataSource
from semseg.nets.registry import ENCODERS


def write_random_checkpoints(folder: Path, *words: str) -> Path:
    """Write a.ckpt and b.ckpt, of two random networks for the drawn scenes in `scenes`, and return the folder."""
    with patch.dict(ENCODERS, TINY_ENCODERS):
        config = configured(*SHORT_RUN, f"data.root={folder / 'scenes'}", *words)
        classes = DataSource(config.data).classes
        for seed, name in enumerate("ab"):
            torch.manual_seed(seed)
            net = build_network(config.model, classes.num_classes)
            saved = SavedNetwork("", net.state_dict(), config, classes, net.convention)
            write_ckpt(folder / f"{name}.ckpt", saved)
    return folder
