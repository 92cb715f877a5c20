"""model=smp on the command line: every mode, every key about training, exact resume, and two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import semseg
from helpers.command_line import TINY, run, run_here
from semseg.build import find_network
from semseg.checkpoints.initialise import initialise_from
from semseg.checkpoints.network import build_architecture, build_network
from semseg.config.load import load_config
from semseg.config.schema import ModelConfig
from semseg.modes.models import find_missing_extra, measure_model
from semseg.nets.cost import measure_cost
from semseg.nets.libraries.smp import ARCHITECTURES

WORDS = [*(word for word in TINY if not word.startswith(("model", "~model"))), "data.batch_size=2"]
SMALL_ENCODER = "tu-mobilenetv3_small_050"  # 0.6 M parameters
NARROW = {
    "unet": ["decoder_channels=[16,8,8,8,8]"],
    "unetplusplus": ["decoder_channels=[16,8,8,8,8]"],
    "manet": ["decoder_channels=[16,8,8,8,8]", "decoder_pab_channels=8"],
    "fpn": ["decoder_pyramid_channels=64", "decoder_segmentation_channels=64"],
    "pspnet": ["psp_out_channels=16"],
    "deeplabv3": ["decoder_channels=16"],
    "deeplabv3plus": ["decoder_channels=16"],
    "segformer": ["decoder_segmentation_channels=16"],
    "upernet": ["decoder_channels=16"],
    "dpt": ["decoder_intermediate_channels=[8,8,8,8]", "decoder_fusion_channels=8"],
}


def list_archs(short: str) -> list[Any]:
    """All architectures, of which one is tested in every run of the tests."""
    return [pytest.param(arch, marks=[] if arch == short else pytest.mark.long) for arch in ARCHITECTURES]


def network(arch: str = "unet") -> list[str]:
    encoder = "tu-vit_tiny_patch16_224" if arch == "dpt" else SMALL_ENCODER
    options = [f"model.options.{option}" for option in NARROW.get(arch, [])]
    return ["model=smp", f"model.arch={arch}", f"model.encoder.name={encoder}", "model.encoder.weights=none", *options]


RUN = [*WORDS, *network(), "checkpoint.every_n_steps=1", "checkpoint.keep=9", "trainer.log_every_n_steps=1"]
KEYS = [
    "optim.lr_encoder=0.001", "optim.layer_decay=0.9", "ema.decay=0.9", "model.freeze_bn=true",
    "model.channels_last=true",
]  # fmt: skip


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smp")
    printed = run_here(folder, *RUN, *KEYS, "run_dir=run")
    assert f"network     smp unet + {SMALL_ENCODER}: 0." in printed
    return folder


@pytest.mark.slow
def test_the_keys_about_training_act_on_its_encoder(trained: Path) -> None:
    content = load(trained / "run" / "checkpoints" / "last.ckpt")
    rates = {group["name"]: group["initial_lr"] for group in content["optimizer_states"][0]["param_groups"]}
    assert rates["encoder"] == 0.001 and rates["decoder"] == 0.02
    assert rates["encoder_-1_no_decay"] == pytest.approx(0.0009)
    statistics = [value for name, value in content["state_dict"].items() if name.endswith("running_mean")]
    assert len(statistics) > 20 and not any(value.any() for value in statistics)  # freeze_bn


@pytest.mark.slow
def test_a_frozen_encoder_stays_as_it_is(trained: Path) -> None:
    words = [*RUN, "model.encoder.frozen=true", "run_dir=frozen", "trainer.limit_val_batches=0"]
    run_here(trained, *words)
    first, last = (load(trained / "frozen" / "checkpoints" / f"{name}.ckpt") for name in ("step_00000001", "last"))
    changed = {
        name.removeprefix("net.model.").partition(".")[0]
        for name, value in last["state_dict"].items()
        if not torch.equal(value, first["state_dict"][name])
    }
    assert changed == {"decoder", "segmentation_head"}


@pytest.mark.slow
def test_it_is_evaluated_and_predicts(trained: Path) -> None:
    assert "mean IoU" in run_here(
        trained, "mode=eval", "ckpt=run", "run_dir=scores", "eval.window=32", "eval.flip=true"
    )
    run_here(trained, "mode=predict", "ckpt=run", "input=scenes/images/validation", "run_dir=seen")
    assert len(list((trained / "seen").rglob("*_panel*"))) == 7
    predictor = semseg.load(trained / "run", device="cpu")  # as mode=serve does
    assert predictor.predict(np.zeros((50, 70, 3), np.uint8)).ids.shape == (50, 70)
    assert f"smp unet + {SMALL_ENCODER}" in repr(predictor)


@pytest.mark.slow
def test_it_is_timed(trained: Path) -> None:
    words = ["mode=bench", *WORDS, *network(), "bench.steps=1", "bench.warmup=0", "bench.images=1", "run_dir=bench"]
    assert "training" in run_here(trained, *words)
    assert json.loads((trained / "bench" / "bench.json").read_text())["training"]["images_per_s"] > 0


@pytest.mark.long
def test_it_is_exported_and_used(trained: Path) -> None:
    run_here(trained, "mode=export", "ckpt=run", "output=net.onnx")
    exported = run_here(trained, "mode=eval", "ckpt=net.onnx", "run_dir=exported")
    assert "mean IoU" in exported and "mean IoU" in run_here(trained, "mode=eval", "ckpt=run", "run_dir=plain")
    scores = [json.loads((trained / name / "metrics.json").read_text())["mean_iou"] for name in ("exported", "plain")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@pytest.mark.slow
def test_only_the_classifier_may_have_other_classes(trained: Path) -> None:
    config, _ = load_config([])
    saved = find_network(str(trained / "run"), config, [])
    net = build_network(saved.config.model, saved.classes.num_classes + 2)
    report = initialise_from(net, saved)
    names = {"model.segmentation_head.0.weight", "model.segmentation_head.0.bias"}
    assert set(report.reinitialised) == names and not report.missing and not report.skipped
    assert len(report.loaded) == len(net.state_dict()) - 2


@pytest.mark.long
def test_a_run_starts_from_it_with_its_architecture_or_refuses_another(trained: Path) -> None:
    printed = run_here(trained, *WORDS, "init_from=run", "run_dir=next", "trainer.max_steps=1")
    assert f"network     smp unet + {SMALL_ENCODER}: " in printed
    refused = run_here(trained, *WORDS, *network("fpn"), "init_from=run", "run_dir=other", code=1)
    assert f"The file holds smp unet + {SMALL_ENCODER}" in refused and "\n" not in refused.strip()


@pytest.mark.slow
def test_a_layer_of_a_library_that_cannot_train_on_one_value_is_one_line(trained: Path) -> None:
    words = ["data.batch_size=1", "data.short_edges=[32]", "data.max_long_edge=32", "run_dir=single"]
    printed = run_here(trained, *RUN, *words, code=2).strip().splitlines()[-1]
    assert "batch normalisation has one value per channel for 1 image of 32 x 32 pixels on a device" in printed


@pytest.mark.slow
def test_its_cost_is_that_of_its_stages() -> None:
    model = ModelConfig(library="smp", arch="fpn", encoder={"name": "resnet18", "weights": "none"})
    with torch.device("meta"):
        cost = measure_cost(build_architecture(model, 150))
    names = [stage.name for stage in cost.stages]
    assert names[:3] == ["model.encoder.conv1", "model.encoder.bn1", "model.encoder.layer1"]
    assert names[-2:] == ["model.decoder", "model.segmentation_head"]
    assert sum(stage.flops for stage in cost.stages) == cost.flops > 1e9


def test_without_smp_the_table_of_models_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_missing_extra("smp") is None
    monkeypatch.setattr("semseg.modes.models.find_spec", lambda name: None)
    assert find_missing_extra("smp") == "smp" and measure_model("smp") is None
    assert find_missing_extra("upernet50") is None


@pytest.mark.long
@pytest.mark.parametrize("arch", list_archs("unet"))
def test_it_is_resumed_to_the_bit(arch: str, tmp_path: Path) -> None:
    longer = [*WORDS, *network(arch), "checkpoint.every_n_steps=1", "checkpoint.keep=9", "trainer.limit_val_batches=0"]
    run_here(tmp_path, *longer, "trainer.max_steps=3", "data.steps_per_epoch=3", "run_dir=whole")
    words = ["trainer.max_steps=3", "data.steps_per_epoch=3", "resume=whole/checkpoints/step_00000001.ckpt"]
    assert "resuming" in run_here(tmp_path, *longer, *words, "run_dir=resumed")
    resumed, whole = (load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("resumed", "whole"))
    assert all(torch.equal(value, whole["state_dict"][name]) for name, value in resumed["state_dict"].items())


@pytest.mark.long
@pytest.mark.parametrize("arch", list_archs("pspnet"))
def test_two_ranks_train_it(arch: str, tmp_path: Path) -> None:
    words = [word for word in WORDS if "accelerator" not in word]
    ranks = [
        "trainer=ddp_cpu",
        "trainer.devices=2",
        "trainer.max_steps=2",
        "trainer.limit_val_batches=0",
        "run_dir=run",
    ]
    printed = run(tmp_path, *words, *network(arch), *ranks)
    assert ("frozen, because the loss does not depend on them" in printed) == (arch in ("pspnet", "dpt"))
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
