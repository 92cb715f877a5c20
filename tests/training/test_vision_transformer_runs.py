"""Training runs of vision transformers: the recipes, resuming, the rates of their blocks."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from helpers import tiny_vit
from helpers.in_process import SHORT_RUN, assert_equal, configured, fit
from semseg.config.schema import Config

assert tiny_vit.default_cfgs  # registers the networks
VIT = [
    *[word for word in SHORT_RUN if not word.lstrip("~").startswith("model")], "model/encoder=timm",
    "model.encoder.name=tiny_dinov3", "model.encoder.weights=none", "model/decoder=upernet", "model.decoder.width=8",
    "optim=adamw", "optim.lr=0.001", "optim.layer_decay=0.5", "trainer.max_epochs=2", "checkpoint.every_n_steps=1",
    "checkpoint.keep=9",
]  # fmt: skip


def run_of(folder: Path, name: str, *words: str) -> Config:
    return configured(*VIT, f"data.root={folder / 'scenes'}", f"run_dir={folder / name}", *words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    fit(run_of(folder, "whole"))
    return folder


@pytest.mark.slow
def test_a_resumed_run_of_a_vision_transformer_equals_one_that_never_stopped(folder: Path) -> None:
    whole = torch.load(folder / "whole" / "checkpoints" / "last.ckpt", weights_only=True)
    resumed = fit(run_of(folder, "resumed"), resume=folder / "whole" / "checkpoints" / "step_00000004.ckpt")
    for entry in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(resumed[entry], whole[entry], entry)


@pytest.mark.slow
def test_every_block_has_a_rate_of_its_own_in_the_log(folder: Path) -> None:
    with (folder / "whole" / "logs" / "metrics.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    rates = {name.removeprefix("lr/"): float(value) for name, value in row.items() if name.startswith("lr/")}
    expected = {f"encoder_-{position}": 0.001 * 0.5**position for position in range(1, 5)}
    assert rates == pytest.approx({"decoder": 0.001, "encoder": 0.001, **expected})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "encoder", "rates"),
    [
        pytest.param(
            "finetune_vit",
            "tiny_dinov3",
            {"encoder": 1e-4, "encoder_-4": 1e-4 * 0.8**4, "decoder": 1e-4},
            marks=pytest.mark.long,
        ),
        ("finetune_vit_frozen", "tiny_dinov2", {"decoder": 1e-3}),
    ],
)
def test_the_recipes_train(folder: Path, recipe: str, encoder: str, rates: dict[str, float]) -> None:
    config = configured(
        f"experiment={recipe}", "data=scenes", f"data.root={folder / 'scenes'}", f"run_dir={folder / recipe}",
        "trainer=cpu", f"model.encoder.name={encoder}", "model.encoder.weights=none", "data.batch_size=2",
        "data.short_edges=[48]", "augment.crop=[48,48]", "data.num_workers=0", "data.steps_per_epoch=2",
        "trainer.max_epochs=1", "trainer.accumulate_grad_batches=1", "eval.scales=[48]",
        "schedule.warmup_steps=0", "trainer.enable_progress_bar=false", "checkpoint.every_n_minutes=null",
        "trainer.log_every_n_steps=1",
        # UPerNet's convolutions of 512 channels take seconds in bfloat16 on a CPU.
        *(["model.decoder.width=8", "trainer.precision=32-true"] if recipe == "finetune_vit" else []),
    )  # fmt: skip
    end = fit(config)
    assert end["global_step"] == 2
    found = {group["name"]: group["initial_lr"] for group in end["optimizer_states"][0]["param_groups"]}
    assert {name: found[name] for name in rates} == pytest.approx(rates)
    assert ("encoder" in found) == (recipe == "finetune_vit")


def test_the_recipes_have_the_numbers_of_their_sources() -> None:
    config = configured("experiment=finetune_vit")
    assert (config.optim.lr, config.optim.weight_decay, config.optim.layer_decay) == (1e-4, 0.05, 0.8)
    assert (config.schedule.warmup_steps, config.schedule.power) == (1500, 0.9)
    assert config.data.batch_size * config.trainer.accumulate_grad_batches == 16
    frozen = configured("experiment=finetune_vit_frozen")
    assert (frozen.optim.lr, frozen.optim.weight_decay, frozen.schedule.name) == (1e-3, 1e-3, "cosine")
    assert frozen.model.encoder["frozen"] is True and frozen.data.batch_size == 16
    for each in (config, frozen):
        assert each.augment.crop == [512, 512] and each.augment.scale == [0.5, 2.0]
        assert each.trainer.precision == "bf16-mixed"
