"""Which GPUs are used, as the configuration numbers them, on a machine that seems to have four."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from helpers.command_line import run_here
from helpers.in_process import configured
from semseg import build
from semseg.checkpoints.format import SavedNetwork
from semseg.config.schema import Config, SyncBNConfig, TrainerConfig
from semseg.errors import ConfigError
from semseg.modes import bench, train_end
from semseg.training.trainer import check_gpu_numbers, create_trainer

NUM_GPUS = 4


@pytest.fixture(autouse=True)
def set_device() -> Iterator[Mock]:
    """Four GPUs; what is called to choose one of them."""
    precision, environment = torch.get_float32_matmul_precision(), dict(os.environ)
    with (
        patch.object(rank_zero_only, "rank", 0),  # a Trainer of rank 1 would leave its number to later tests
        patch("torch.cuda.is_available", lambda: True),
        patch("torch.cuda.device_count", lambda: NUM_GPUS),
        patch("torch.cuda.set_device") as set_device,
    ):
        yield set_device
    torch.set_float32_matmul_precision(precision)
    os.environ.clear()
    os.environ.update(environment)


def trainer_of(folder: Path, devices: Any) -> pl.Trainer:
    settings = TrainerConfig(accelerator="gpu", devices=devices)
    return create_trainer(settings, SyncBNConfig(), folder, callbacks=[], loggers=[], has_val=False, is_training=False)


@pytest.mark.parametrize(
    ("devices", "local_rank", "number", "world_size"),
    [([3], 0, 3, 1), (1, 0, 0, 1), ([2, 3], 0, 2, 2), ([2, 3], 1, 3, 2), ("auto", 3, 3, 4), (2, 1, 1, 2)],
)
def test_every_rank_trains_on_its_own_gpu(
    tmp_path: Path, *, devices: Any, local_rank: int, number: int, world_size: int
) -> None:
    with patch.dict(os.environ, {"LOCAL_RANK": str(local_rank)}):
        trainer = trainer_of(tmp_path, devices)
        assert trainer.strategy.root_device == torch.device("cuda", number)
        assert trainer.world_size == world_size


@pytest.mark.parametrize(("devices", "number"), [([3], 3), ([2, 3], 2), (2, 0), ("auto", 0), (-1, 0), (8, 0)])
def test_prediction_uses_the_first_gpu_and_no_other(set_device: Mock, devices: Any, number: int) -> None:
    device = build.choose_device(TrainerConfig(accelerator="gpu", devices=devices))
    assert device == torch.device("cuda", number)
    set_device.assert_called_once_with(device)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([4], r"trainer\.devices=\[4\]: PyTorch sees 4 GPUs here, numbered from 0"),
        ([0, 7], r"trainer\.devices=\[0,7\]: PyTorch sees 4 GPUs"),
        (5, r"trainer\.devices=5: PyTorch sees 4 GPUs"),
    ],
)
def test_gpus_that_do_not_exist_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: Any, message: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError, match=message):
        trainer_of(tmp_path, devices)
    if isinstance(devices, list) and devices[0] >= NUM_GPUS:
        with pytest.raises(ConfigError, match=message):
            build.choose_device(TrainerConfig(accelerator="gpu", devices=devices))


def test_numbers_count_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6,7")
    check_gpu_numbers(TrainerConfig(accelerator="gpu", devices=[3]))
    with pytest.raises(ConfigError, match=r"4 GPUs here \(CUDA_VISIBLE_DEVICES=2,3,6,7\), numbered from 0"):
        check_gpu_numbers(TrainerConfig(accelerator="gpu", devices=[6]))


def test_a_process_of_torchrun_may_see_its_own_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainerConfig(accelerator="gpu", devices=2)
    with patch("torch.cuda.device_count", lambda: 1):
        with pytest.raises(ConfigError, match="1 GPU here"):
            check_gpu_numbers(settings)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        check_gpu_numbers(settings)


@pytest.fixture(scope="module")
def gpu_config() -> Config:
    return configured("data=scenes", "trainer.accelerator=gpu")


@pytest.mark.parametrize(("devices", "first"), [([3], [3]), ([2, 3], [2]), (2, 1)])
@pytest.mark.parametrize("mode", ["eval", "predict"])
def test_follow_ups_of_training_use_its_first_gpu(
    tmp_path: Path, gpu_config: Config, *, mode: str, devices: Any, first: Any
) -> None:
    config = replace(gpu_config, run_dir=str(tmp_path), trainer=replace(gpu_config.trainer, devices=devices))
    given: list[Config] = []
    with (
        patch.object(train_end, "read_checkpoint", return_value=None),
        patch.object(train_end, "evaluate_network", lambda saved, config: given.append(config)),
        patch.object(train_end, "create_predictor", lambda saved, config: given.append(config)),
        patch.object(train_end, "predict_inputs"),
    ):
        train_end.run_follow_up(mode, config, tmp_path / "last.ckpt", tmp_path / mode)
    (after,) = given
    assert (after.trainer.devices, after.trainer.num_nodes, after.trainer.strategy) == (first, 1, "auto")


def test_mode_bench_looks_at_the_memory_of_the_gpu_that_it_has_used(gpu_config: Config) -> None:
    sizes = {0: 1, 3: 10**12}  # bytes
    speed = bench.TrainingSpeed(1.0, 1.0, 0.0, memory=10**9)
    with (
        patch("torch.cuda.current_device", lambda: 3),
        patch("torch.cuda.get_device_properties", lambda index: SimpleNamespace(total_memory=sizes[index])),
    ):
        assert any(key.startswith("data.batch_size=") for key in bench.settings_for_network(gpu_config, speed))


class Chosen(Exception):  # noqa: N818 - it only ends the mode
    """A predictor would be built on this device."""


@pytest.mark.parametrize(
    "words", [["mode=predict", "input=."], ["mode=serve", "serve.port=0"]], ids=["predict", "serve"]
)
def test_modes_that_predict_choose_the_gpu_of_the_command_line(tmp_path: Path, words: list[str]) -> None:
    pytest.importorskip("fastapi")
    (tmp_path / "a.png").write_bytes(b"")

    def stop(saved: SavedNetwork, config: Config, device: torch.device) -> None:
        raise Chosen(device)

    with (
        patch.object(build, "open_network", lambda config, overrides: (None, config)),
        patch.object(build, "create_predictor", stop),
        pytest.raises(Chosen, match="cuda:3"),
    ):
        run_here(tmp_path, *words, "ckpt=x.ckpt", "trainer.accelerator=gpu", "trainer.devices=[3]")
