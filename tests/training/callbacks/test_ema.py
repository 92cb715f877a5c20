"""The moving average of the weights: its values, who sees it, and what a checkpoint holds of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers.in_process import TINY_RUN, configured, fit
from semseg.checkpoints.format import read_checkpoint
from semseg.config.schema import Config
from semseg.training.callbacks.ema import update_average

WEIGHT = "net.decoder.conv_last.weight"


def run_of(root: Path, run_dir: Path, *words: str) -> Config:
    scenes = ["data=scenes", f"data.root={root}", "data.make.num_train=4", "data.make.num_val=2"]
    return configured(
        *scenes, *TINY_RUN, "data.steps_per_epoch=4", "trainer.max_epochs=1", f"run_dir={run_dir}", *words
    )


class Watch(Callback):
    """Keeps a weight after every step, and as validation sees it; saves a checkpoint in the middle of a validation."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.validated: list[Tensor] = []
        self.saved: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.steps.append(pl_module.state_dict()[WEIGHT].clone())

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.validated.append(pl_module.state_dict()[WEIGHT].clone())
        path = Path(trainer.default_root_dir) / "middle.ckpt"
        trainer.save_checkpoint(path)
        self.saved = torch.load(path, weights_only=True)


@pytest.mark.slow
def test_the_average_follows_the_formula_and_is_what_is_validated_and_kept(root: Path, tmp_path: Path) -> None:
    watch = Watch()
    end = fit(run_of(root, tmp_path, "ema.decay=0.8", "ema.start_step=2"), watch)
    average = watch.steps[1]  # step 2: the weights themselves
    for weight in watch.steps[2:]:
        average = 0.8 * average + 0.2 * weight
    torch.testing.assert_close(end["state_dict"][WEIGHT], average)
    assert torch.equal(end["current_model_state"][WEIGHT], watch.steps[-1])
    assert all(torch.equal(seen, end["state_dict"][WEIGHT]) for seen in watch.validated)
    best = read_checkpoint(tmp_path / "checkpoints" / "best.ckpt")
    assert torch.equal(best.weights[WEIGHT.removeprefix("net.")], end["state_dict"][WEIGHT])


def test_a_checkpoint_of_the_middle_of_a_validation_tells_weights_and_average_apart(root: Path, tmp_path: Path) -> None:
    watch = Watch()
    end = fit(run_of(root, tmp_path, "ema.decay=0.8"), watch)
    for key in ("state_dict", "current_model_state"):
        assert torch.equal(watch.saved[key][WEIGHT], end[key][WEIGHT]), key


@pytest.mark.slow
def test_a_validation_does_not_round_the_average_to_the_type_of_the_network(root: Path, tmp_path: Path) -> None:
    words = ["trainer.precision=bf16-true", "model.freeze_bn=true", "ema.decay=0.9", "trainer.max_epochs=2"]
    often = fit(run_of(root, tmp_path / "often", *words))
    never = fit(run_of(root, tmp_path / "never", *words, "trainer.limit_val_batches=0"))
    for key in ("state_dict", "current_model_state"):
        assert torch.equal(often[key][WEIGHT], never[key][WEIGHT]), key
    assert often["state_dict"][WEIGHT].dtype == torch.float32


def test_statistics_of_normalisation_are_averaged_too(root: Path, tmp_path: Path) -> None:
    end = fit(run_of(root, tmp_path, "ema.decay=0.8"))
    name = "net.encoder.coarse.1.running_mean"
    assert not torch.equal(end["state_dict"][name], end["current_model_state"][name])


@pytest.mark.slow
def test_without_a_decay_there_is_no_average(root: Path, tmp_path: Path) -> None:
    assert "current_model_state" not in fit(run_of(root, tmp_path))


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_the_average_equals_that_of_torch(decay: float) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    expected = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    average = copy.deepcopy(net)
    for step in range(4):
        for value in net.state_dict().values():
            value.add_(3 if value.dtype == torch.int64 else torch.randn_like(value))
        expected.update_parameters(net)
        update_average(average, net, decay if step else None)
    counts = {"1.num_batches_tracked": net[1].num_batches_tracked}  # torch averages the number, too
    averages = average.state_dict()
    assert all(torch.equal(averages[name], value) for name, value in (expected.module.state_dict() | counts).items())


@pytest.mark.parametrize("decay", [0.99, 0.9999, 0.99999])
def test_weights_that_do_not_change_are_their_own_average(decay: float) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    average = copy.deepcopy(net)
    for _ in range(100):
        update_average(average, net, decay)
    assert all(torch.equal(average.state_dict()[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("decay", [0.9, 0.95, 0.9995, 0.9999])
def test_indices_and_settings_of_the_step_are_not_averaged(decay: float) -> None:
    net = nn.Linear(2, 2)
    net.register_buffer("relative_position_index", torch.arange(169))  # as in Swin
    net.register_buffer("attn_mask_probs", torch.ones(4))  # as in EoMT, whose shares fall with the steps
    average = copy.deepcopy(net)
    for step in range(3):
        net.attn_mask_probs.fill_(1 - step / 2)
        update_average(average, net, decay)
    assert torch.equal(average.relative_position_index, torch.arange(169))
    assert average.attn_mask_probs.tolist() == [0.0] * 4
