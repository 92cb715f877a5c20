"""Lightning's Trainer from the configuration."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from semseg.config.load import load_config
from semseg.config.schema import SyncBNConfig, TrainerConfig
from semseg.errors import ConfigError
from semseg.nets.registry import build_segmenter
from semseg.nets.segmenter import is_convolutional
from semseg.training.trainer import create_strategy, create_trainer

PARAMETERS = inspect.signature(DistributedDataParallel).parameters
BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in PARAMETERS else "broadcast_buffers"


@pytest.mark.parametrize(
    ("syncbn", "sends_buffers"),
    [({"name": "reduce"}, False), ({"name": "reduce", "group": "node"}, True), ({"name": "off"}, True)],
)
def test_ddp_sends_buffers_only_where_ranks_have_statistics_of_their_own(
    syncbn: dict[str, Any], sends_buffers: bool
) -> None:
    strategy = create_strategy(TrainerConfig(strategy="ddp", devices=2), SyncBNConfig(**syncbn), "cpu")
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs == {"gradient_as_bucket_view": True, BUFFERS: sends_buffers}


@pytest.mark.parametrize(
    ("devices", "num_nodes", "is_parallel"),
    [(1, 1, False), (2, 1, True), ([0, 1], 1, True), ([3], 1, False), (1, 2, True)],
)
def test_the_automatic_strategy_is_ddp_for_several_devices(devices: Any, num_nodes: int, is_parallel: bool) -> None:
    settings = TrainerConfig(devices=devices, num_nodes=num_nodes)
    assert isinstance(create_strategy(settings, SyncBNConfig(), "cpu"), DDPStrategy) == is_parallel


def test_ddp_looks_for_unused_parameters_only_if_it_is_asked_to() -> None:
    settings = TrainerConfig(strategy="ddp_find_unused_parameters_true", devices=2)
    strategy = create_strategy(settings, SyncBNConfig(), "cpu")
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs == {"gradient_as_bucket_view": True, BUFFERS: False, "find_unused_parameters": True}


def test_lightning_does_not_exchange_sigterm_over_the_device(tmp_path: Path) -> None:
    """The name is Lightning's own: create_trainer fails if it goes."""
    settings = TrainerConfig(accelerator="cpu")
    trainer = create_trainer(
        settings, SyncBNConfig(), tmp_path, callbacks=[], loggers=[], has_val=False, is_training=False
    )
    assert isinstance(trainer, pl.Trainer)
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None


def test_the_preset_for_a_gpu_has_mixed_precision_and_channels_last_and_can_be_overridden() -> None:
    config, _ = load_config(["trainer=gpu", "trainer.max_epochs=3", "trainer.accelerator=cpu"])
    assert (config.trainer.precision, config.trainer.benchmark) == ("bf16-mixed", False)
    assert (config.trainer.max_epochs, config.trainer.log_every_n_steps) == (3, 20)
    assert config.model.channels_last
    assert not load_config(["trainer=gpu", "model.channels_last=false"])[0].model.channels_last


def test_half_precision_with_a_gradient_scaler_is_for_gpus(tmp_path: Path) -> None:
    settings = TrainerConfig(accelerator="cpu", precision="16-mixed")
    with pytest.raises(ConfigError, match="=16-mixed: is for GPUs"):
        create_trainer(settings, SyncBNConfig(), tmp_path, callbacks=[], loggers=[], has_val=True, is_training=True)


def test_networks_with_linear_layers_keep_their_memory_layout() -> None:
    assert is_convolutional(build_segmenter("resnet18", "upernet", 3))
    with torch.device("meta"):
        assert not is_convolutional(build_segmenter("torchvision", "c1", 3, {"name": "swin_t"}))


def test_all_devices_of_a_cpu_are_one(tmp_path: Path) -> None:
    settings = TrainerConfig(accelerator="cpu", devices=-1)
    trainer = create_trainer(
        settings, SyncBNConfig(), tmp_path, callbacks=[], loggers=[], has_val=False, is_training=False
    )
    assert trainer.num_devices == 1
