"""Settings for GPUs."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from helpers.in_process import configured
from semseg.build import choose_device
from semseg.errors import ConfigError
from semseg.nets.gpu import ALLOCATOR_VARIABLES, configure_gpu
from semseg.training.trainer import create_trainer


@pytest.fixture(autouse=True)
def precision_restored() -> object:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_matrix_products_use_tf32_and_memory_grows_in_segments() -> None:
    without = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
    with patch.dict(os.environ, without, clear=True):
        configure_gpu()
        assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_a_setting_of_the_user_is_kept(name: str) -> None:
    with patch.dict(os.environ, {name: "max_split_size_mb:64"}):
        configure_gpu()
        assert [other for other in ALLOCATOR_VARIABLES if other in os.environ] == [name]


def test_every_run_and_prediction_on_a_gpu_sets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning would look for the GPU next, which is not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for use in ("training", "prediction"):
        torch.set_float32_matmul_precision("highest")
        config = configured("data=scenes", "trainer=gpu", "trainer.devices=1", f"run_dir={tmp_path}")
        if use == "training":
            trainer = patch("pytorch_lightning.Trainer", side_effect=ValueError("no GPU"))
            with trainer, pytest.raises(ConfigError, match="no GPU"):
                create_trainer(
                    config.trainer, config.syncbn, tmp_path, callbacks=[], loggers=[], has_val=True, is_training=True
                )
        else:
            choose_device(config.trainer)
        assert torch.get_float32_matmul_precision() == "high", use
