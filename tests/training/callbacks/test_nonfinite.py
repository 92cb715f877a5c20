"""Steps whose loss or gradient is NaN or infinite do not reach the weights."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn

from helpers.in_process import prepare_run
from semseg.data.batch import Batch
from semseg.lit_module import SegmentationModule
from semseg.training.callbacks.nonfinite import NonFiniteError, NonFiniteGuard, watch_layers

pytestmark = pytest.mark.reliability


def spoil_steps(
    monkeypatch: pytest.MonkeyPatch, steps: set[int], files: list[list[str]] | None = None
) -> list[dict[str, Tensor]]:
    """Make the loss of some steps NaN; returns a list that gets the network's state at the start of every step.

    Args:
        files: gets the images of every step.
    """
    states: list[dict[str, Tensor]] = []
    take_step = SegmentationModule.training_step

    def take_spoiled_step(module: SegmentationModule, batch: Batch, batch_idx: int) -> Tensor:
        states.append({name: value.clone() for name, value in module.net.state_dict().items()})
        if files is not None:
            files.append(batch.paths)
        loss = take_step(module, batch, batch_idx)
        return loss * float("nan") if len(states) in steps else loss

    monkeypatch.setattr(SegmentationModule, "training_step", take_spoiled_step)
    return states


@pytest.mark.parametrize("fused", ["null", "true"])
def test_d1_a_nan_loss_stops_the_run_and_names_step_files_and_saved_sub_batch(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: str
) -> None:
    files: list[list[str]] = []
    states = spoil_steps(monkeypatch, {2}, files)
    run = prepare_run(root, tmp_path, f"optim.fused={fused}")
    with pytest.raises(NonFiniteError) as caught:
        run.fit()
    message = str(caught.value)
    assert message.startswith("step 2: ") and "loss is nan" in message and "learning rates 0.0" in message
    assert f"images: {', '.join(files[1])}. " in message and files[1] != files[-1 if fused == "true" else 0]
    assert len(states) == (3 if fused == "true" else 2) and not list(tmp_path.glob("checkpoints/*"))
    weights = dict(run.net.named_parameters())
    assert all(torch.equal(value, states[1][name]) for name, value in weights.items())
    saved = re.search(r"input=(\S+)", message)
    assert saved is not None
    content = torch.load(saved[1], weights_only=True)
    assert content["step"] == 2
    assert content["batches"][0]["image"].dtype == torch.uint8 and len(content["batches"][0]["paths"]) == 2


@pytest.mark.parametrize("optim", ["fused=null", "fused=true", "name=adamw optim.fused=true"])
def test_d1_a_skipped_step_changes_nothing_and_the_next_one_too_many_stops(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str
) -> None:
    states = spoil_steps(monkeypatch, {1, 3})
    run = prepare_run(root, tmp_path, "trainer.max_nonfinite_steps=1", *f"optim.{optim}".split())
    with pytest.raises(NonFiniteError, match="step 3"):
        run.fit()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())  # statistics too
    assert any(not torch.equal(value, states[2][name]) for name, value in states[1].items())
    assert all(bool(value.isfinite().all()) for value in run.net.state_dict().values())
    assert len(list(tmp_path.glob("nonfinite/*.pt"))) == 2


@pytest.mark.parametrize("step", [2, 4])
def test_d1_a_bad_step_of_a_fused_optimiser_is_reported_before_a_checkpoint_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    spoil_steps(monkeypatch, {step})
    run = prepare_run(root, tmp_path, "optim.fused=true", "checkpoint.every_n_steps=2", "data.steps_per_epoch=4")
    with pytest.raises(NonFiniteError, match=f"step {step}") as caught:
        run.fit()
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert last.is_file() == (step == 4)
    named = f"ckpt={last}" if step == 4 else "'ckpt=<checkpoint>'"  # not that of another run
    assert f" mode=replay {named} input={tmp_path}/nonfinite/step_{step}_rank_0.pt" in str(caught.value)
    if step == 4:
        assert torch.load(last, weights_only=True)["global_step"] == 2


@pytest.mark.slow
def test_d2_a_nan_score_is_never_the_best(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = pl.LightningModule.log
    scores = iter([float("nan"), 0.25])

    def with_scores(module: SegmentationModule, name: str, value: float, **options: object) -> None:
        log(module, name, next(scores) if name == "val/miou" else value, **options)

    monkeypatch.setattr(SegmentationModule, "log", with_scores)
    run = prepare_run(root, tmp_path, "trainer.max_epochs=2", "data.steps_per_epoch=1")
    run.fit()
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == 1


def test_the_loss_that_is_reported_is_neither_scaled_nor_divided(tmp_path: Path) -> None:
    guard = NonFiniteGuard(tmp_path, 0)
    module: Any = SimpleNamespace(step_metrics=[torch.tensor([3.0, 0.5])])
    trainer: Any = None
    for loss in (1.5 * 2**16, float("inf")):
        guard.on_before_backward(trainer, module, torch.tensor(loss))
    assert torch.stack(guard._losses).tolist() == [3.0, float("inf")]


def test_the_first_layer_that_goes_wrong_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    image = torch.rand(1, 3, 4, 4)
    with watch_layers(net) as layers:
        net(image)
        assert layers == []
        with torch.no_grad():
            net[2].weight[0, 0] = float("inf")
        net(image)
    assert layers == [("2", "Conv2d")]


@pytest.mark.slow
@pytest.mark.parametrize("clip", ["null", "0.1"])
def test_d12_steps_that_overflow_in_half_precision_are_skipped_and_counted_also_with_clipping(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    states = spoil_steps(monkeypatch, set())
    run = prepare_run(root, tmp_path, f"trainer.gradient_clip_val={clip}", "trainer.precision=bf16-mixed")
    # Lightning has no scaler on the CPU; this is the one that it has on a GPU, at scales that overflow once.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-32)
    run.trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
    with pytest.warns(UserWarning, match="step 1: gradients overflow in half precision"):
        run.fit()
    states.append({name: value.clone() for name, value in run.net.state_dict().items()})
    first, second, third, last = ([state[name] for name, _ in run.net.named_parameters()] for state in states)
    assert all(torch.equal(before, after) for before, after in zip(first, second, strict=True))
    for before, after in ((second, third), (third, last)):
        assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
        moved = torch.cat([(one - other).flatten() for one, other in zip(before, after, strict=True)])
        assert bool(moved.isfinite().all())
        if clip != "null":  # the first step has no momentum: the rate times the clipped gradient, and the decay
            assert float(moved.norm()) < 2 * 0.02 * float(clip) * (1 if before is second else 2)
    with (tmp_path / "logs" / "metrics.csv").open(newline="") as file:
        assert [row["amp/overflows"] for row in csv.DictReader(file) if row["amp/overflows"]] == ["1.0"] * 3
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["NonFiniteGuard"] == {"skipped": 0, "overflows": 1}
    assert saved["MixedPrecision"]["scale"] == 2.0**8
    assert not (tmp_path / "nonfinite").exists()


def test_overflows_of_a_gradient_scaler_are_counted_and_left_to_it(root: Path, tmp_path: Path) -> None:
    """Without a GPU Lightning has no scaler: the guard sees a gradient as the scaler leaves it."""
    run = prepare_run(root, tmp_path)
    guard = NonFiniteGuard(tmp_path, max_skipped=0)
    guard.has_scaler = True
    optimizer = torch.optim.SGD(run.net.parameters(), lr=0.1)
    for gradient in (1.0, float("inf"), float("inf")):
        for weight in run.net.parameters():
            weight.grad = torch.full_like(weight, gradient)
        guard._losses.append(torch.tensor(1.0))
        if gradient == 1.0 or guard.overflows:
            guard.on_before_optimizer_step(run.trainer, run.module, optimizer)
        else:
            with pytest.warns(UserWarning, match="step 1: gradients overflow"):
                guard.on_before_optimizer_step(run.trainer, run.module, optimizer)
    assert guard.read_counts() == {"amp/overflows": 2} and guard.state_dict() == {"skipped": 0, "overflows": 2}
    assert all(weight.grad is not None for weight in run.net.parameters())
    # A gradient that stays infinite, however small the scale is, is not the scale's fault.
    for weight in run.net.parameters():
        weight.grad = torch.full_like(weight, float("nan"))
    for _ in range(38):
        guard._losses.append(torch.tensor(1.0))
        guard.on_before_optimizer_step(run.trainer, run.module, optimizer)
    guard._losses.append(torch.tensor(1.0))
    with pytest.raises(NonFiniteError, match="the loss is 1 and the gradient norm nan"):
        guard.on_before_optimizer_step(run.trainer, run.module, optimizer)
    guard._losses.append(torch.tensor(float("nan")))
    with pytest.raises(NonFiniteError):
        guard.on_before_optimizer_step(run.trainer, run.module, optimizer)
