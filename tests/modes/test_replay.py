"""mode=replay computes a saved sub-batch as the run did: its loss, its frozen layers, its precision."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from helpers.command_line import TINY, run_here
from helpers.in_process import prepare_run
from helpers.tiny_network import TINY_NETWORK, TinyNetwork
from semseg.build import build_module, find_network, restore_network
from semseg.config.load import load_config
from semseg.data.batch import Batch
from semseg.lit_module import SegmentationModule
from semseg.nets.interfaces import Logits, SegmentationNetwork
from semseg.nets.registry import NETWORKS
from semseg.training.callbacks.nonfinite import NonFiniteError, batch_to_dict

pytestmark = pytest.mark.reliability
RUN = [
    *(word for word in TINY if not word.startswith("model")), "model=custom", "model.library=tiny",
    "model.options.width=4", "trainer.limit_train_batches=1", "trainer.limit_val_batches=0", "run_dir=run",
]  # fmt: skip
CHECKPOINT = "run/checkpoints/last.ckpt"


@pytest.fixture(autouse=True)
def program() -> Iterator[None]:
    with patch.dict(NETWORKS, TINY_NETWORK):
        yield


def save_batch(folder: Path) -> Batch:
    """Write the sub-batch of a stopped run, batch.pt, and return it."""
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        torch.randint(0, 256, (2, 3, 32, 40), dtype=torch.uint8, generator=generator),
        torch.randint(-1, 11, (2, 8, 10), generator=generator),
        torch.tensor([[32, 40], [24, 40]]),
        ["a.jpg", "b.jpg"],
    )
    torch.save({"step": 7, "batches": [batch_to_dict(batch)], "seeds": [5]}, folder / "batch.pt")
    return batch


def read_loss(printed: str) -> float:
    found = re.search(r"^loss (\S+), \d+ scored pixels$", printed, re.MULTILINE)
    assert found is not None, printed
    return float(found[1])


@pytest.mark.parametrize(
    "words",
    [
        ["model.freeze_bn=true", "loss=cross_entropy_dice", "loss.class_weights=[9,1,1,1,1,1,1,1,1,1,1]"],
        ["model.options.own_loss=true"],
        ["model.encoder.frozen=true", "trainer.precision=bf16-mixed"],
    ],
    ids=["frozen statistics and another loss", "a loss of the network", "a frozen backbone in half precision"],
)
def test_the_loss_is_that_of_a_step_of_the_run(tmp_path: Path, words: list[str]) -> None:
    run_here(tmp_path, *RUN, *words)
    batch = save_batch(tmp_path)
    config, _ = load_config([])
    saved = find_network(str(tmp_path / CHECKPOINT), config, [])
    module = build_module(saved.config, restore_network(saved), saved.classes).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=saved.config.trainer.precision == "bf16-mixed"):
        expected = float(module.compute_loss(batch, "ranks").total.detach())
    printed = run_here(tmp_path, "mode=replay", "ckpt=run", "input=batch.pt", "trainer=cpu")
    assert read_loss(printed) == pytest.approx(expected, rel=1e-5)
    assert "step 7 repeated" in printed and "images a.jpg, b.jpg" in printed
    assert "the first layer" not in printed and "gradients that are not finite: none" in printed


def test_a_layer_that_overflows_in_half_precision_only_is_named(tmp_path: Path) -> None:
    run_here(tmp_path, *RUN)
    save_batch(tmp_path)
    content: dict[str, Any] = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    content["semseg"]["config"]["trainer"]["precision"] = "16-mixed"
    content["state_dict"]["net.model.blocks.0.0.weight"].mul_(1e6)  # beyond 65504, the largest number of float16
    torch.save(content, tmp_path / CHECKPOINT)
    words = ["mode=replay", "ckpt=run", "input=batch.pt", "trainer=cpu"]
    printed = run_here(tmp_path, *words)
    assert "the first layer to give NaN or infinity: model.blocks.0.0 (Conv2d)" in printed
    assert "gradients that are not finite: model.blocks.0.0.weight" in printed
    assert "the first layer" not in run_here(tmp_path, *words, "trainer.precision=32-true")


def test_gradients_are_those_of_each_sub_batch_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(tmp_path, *RUN)
    batch = batch_to_dict(save_batch(tmp_path))
    torch.save({"step": 7, "batches": [batch, batch], "seeds": [5, 6]}, tmp_path / "batch.pt")
    factors, forward = iter((float("nan"), 1.0)), TinyNetwork.forward

    def fail_first(net: TinyNetwork, image: Tensor) -> Logits:
        return Logits(forward(net, image).main * next(factors), None)

    monkeypatch.setattr(TinyNetwork, "forward", fail_first)
    printed = run_here(tmp_path, "mode=replay", "ckpt=run", "input=batch.pt", "trainer=cpu")
    first, second = re.findall(r"gradients that are not finite: (.*)", printed)
    assert first.startswith("model.blocks.0.0.weight") and second == "none"


def test_trained_weights_count_and_not_their_average(tmp_path: Path) -> None:
    run_here(tmp_path, *RUN, "ema.decay=0.9")
    save_batch(tmp_path)
    words = ["mode=replay", "ckpt=run", "input=batch.pt", "trainer=cpu"]
    assert "the first layer" not in run_here(tmp_path, *words)
    content: dict[str, Any] = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    content["current_model_state"]["net.model.classify.weight"].fill_(float("inf"))
    torch.save(content, tmp_path / CHECKPOINT)
    printed = run_here(tmp_path, *words)
    assert "the first layer to give NaN or infinity: model.classify (Conv2d)" in printed


@pytest.mark.slow
def test_dropout_is_that_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that stops: its loss is computed again from the saved sub-batch."""
    losses: list[float] = []
    progress: list[tuple[int, int]] = []
    monkeypatch.setattr(SegmentationNetwork, "set_progress", lambda net, *numbers: progress.append(numbers))
    take_step = SegmentationModule.training_step

    def take_spoiled_step(module: SegmentationModule, batch: Batch, batch_idx: int) -> Tensor:
        loss = take_step(module, batch, batch_idx)
        losses.append(float(loss.detach()))
        return loss * float("nan") if len(losses) == 2 else loss

    monkeypatch.setattr(SegmentationModule, "training_step", take_spoiled_step)
    with pytest.raises(NonFiniteError):
        prepare_run(tmp_path / "scenes", tmp_path / "run", "checkpoint.every_n_steps=1", "optim.fused=null").fit()
    (batch,) = (tmp_path / "run/nonfinite").iterdir()
    printed = run_here(tmp_path, "mode=replay", "ckpt=run", f"input={batch}", "trainer=cpu")
    assert read_loss(printed) == pytest.approx(losses[1], rel=1e-5)
    assert progress[-1] == progress[1] and progress[1][0] == 1  # of networks that change over a run
