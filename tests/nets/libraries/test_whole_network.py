"""A whole network of a program goes through every mode, as an encoder and a decoder of ours do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

from helpers.command_line import TINY, run_here
from helpers.in_process import logged_losses
from helpers.tiny_network import TINY_NETWORK, TinyNetwork
from semseg.build import find_network, restore_network
from semseg.config.load import load_config
from semseg.config.schema import OptimConfig
from semseg.nets.cost import measure_cost
from semseg.nets.registry import NETWORKS
from semseg.training.optim import parameter_groups

WORDS = [word for word in TINY if not word.startswith("model")]
RUN = [*WORDS, "model=custom", "model.library=tiny", "model.options.width=4", "trainer.log_every_n_steps=1"]


@pytest.fixture(autouse=True)
def program() -> Iterator[None]:
    with patch.dict(NETWORKS, TINY_NETWORK):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole_network")
    with patch.dict(NETWORKS, TINY_NETWORK):
        printed = run_here(folder, *RUN, "run_dir=run")
    assert "network     tiny: 0.0 M parameters" in printed
    assert "frozen, because the loss does not depend on them: model.idle (2 tensors)" in printed
    return folder


@pytest.mark.slow
def test_its_state_dict_is_that_of_the_library(trained: Path) -> None:
    content = torch.load(trained / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    net = TinyNetwork(11, width=4)
    names = {name.removeprefix("net.model.") for name in content["state_dict"] if name.startswith("net.")}
    assert names == set(net.model.state_dict())


@pytest.mark.slow
def test_it_is_resumed_to_the_bit(trained: Path) -> None:
    longer = [*RUN, "trainer.max_epochs=2", "checkpoint.every_n_steps=1", "checkpoint.keep=9"]
    run_here(trained, *longer, "run_dir=whole")
    step = "resume=whole/checkpoints/step_00000003.ckpt"
    assert "resuming" in run_here(trained, *longer, "run_dir=resumed", step)
    states = [
        torch.load(trained / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("resumed", "whole")
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    refused = run_here(trained, *longer, "run_dir=other", step, "model.options.width=8", code=2)
    assert "model.options.width: 4 in the checkpoint, 8 now" in refused


@pytest.mark.slow
def test_it_is_evaluated_used_exported_and_converted(trained: Path) -> None:
    assert "mean IoU" in run_here(trained, "mode=eval", "ckpt=run", "run_dir=scores")
    run_here(trained, "mode=predict", "ckpt=run", "input=scenes/images/validation", "run_dir=seen")
    assert len(list((trained / "seen").rglob("*_panel*"))) == 7
    run_here(trained, "mode=convert", "ckpt=run", "output=net.safetensors")
    config, _ = load_config([])
    saved = find_network(str(trained / "net.safetensors"), config, [])
    assert saved.config.model.title == "tiny" and restore_network(saved).architecture == "TinyNetwork"
    refused = run_here(trained, "mode=convert", "ckpt=run", "output=files", code=2)
    assert "is a whole network (tiny). Use output=<file.ckpt or file.safetensors>" in refused


@pytest.mark.slow
def test_a_run_starts_from_it_with_its_architecture(trained: Path) -> None:
    printed = run_here(trained, *WORDS, "init_from=run", "run_dir=next", "trainer.limit_train_batches=1")
    assert "tensors loaded" in printed and "network     tiny: " in printed


def test_it_trains_with_a_loss_of_its_own_and_is_told_every_step(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(TinyNetwork, "set_progress", lambda net, *progress: seen.append(progress))
    run_here(trained, *RUN, "model.options.own_loss=true", "run_dir=own", "trainer.limit_val_batches=0")
    assert seen == [(0, 2), (1, 2)]
    assert all(loss < 0.5 for loss in logged_losses(trained / "own").values())  # cross entropy begins above 1


def test_a_frozen_backbone_stays_and_its_rate_is_its_own(trained: Path) -> None:
    run_here(trained, *RUN, "model.encoder.frozen=true", "run_dir=frozen", "trainer.limit_val_batches=0")
    content = torch.load(trained / "frozen" / "checkpoints" / "last.ckpt", weights_only=True)
    decay = content["optimizer_states"][0]["param_groups"][0]
    assert (decay["name"], len(decay["params"])) == ("decoder", 2)  # idle and classify
    net = TinyNetwork(3)
    groups = {group["name"]: group for group in parameter_groups(net, OptimConfig(lr=1.0, lr_encoder=0.1))}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "encoder": 0.1, "encoder_no_decay": 0.1, "decoder": 1.0, "decoder_no_decay": 1.0,
    }  # fmt: skip
    counted = sum(len(group["params"]) for group in groups.values())
    assert counted == len(list(net.parameters()))


def test_its_cost_has_the_stages_of_its_backbone() -> None:
    with torch.device("meta"):
        cost = measure_cost(TinyNetwork(3))
    names = [stage.name for stage in cost.stages]
    assert names == [*(f"model.blocks.{index}" for index in range(4)), "model.idle", "model.classify"]
    assert sum(stage.flops for stage in cost.stages) == cost.flops > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=custom", "model.library=tiyn"], "model.library: 'tiyn' is not known. Did you mean tiny?"),
        (
            ["model=custom", "model.library=tiny", "model.options.widht=4"],
            "model.options.widht: tiny has no such option. Did you mean model.options.width?",
        ),
        (["model=custom", "model.library=tiny", "model.arch=unet"], "model.arch=unet: tiny has no such key."),
        (
            ["model=custom", "model.library=tiny", "+model.encoder.name=resnet18"],
            "model.encoder.name=resnet18: tiny has no such key.",
        ),
        (["model=smp", "model/encoder=resnet50"], "model/encoder: cannot be chosen for a whole network, whose encoder"),
        (
            ["model=smp", "model.encoder=resnet50"],
            "model.encoder=resnet50: is a section, not a value. Set model.encoder.",
        ),
        (["model=smp", "model.options=3"], "model.options=3: is a section, not a value. Its keys are options: model.o"),
        (["model.arch=unet"], "model.arch=unet: is for whole networks of other libraries, such as model=smp."),
        (["model.library=tiny"], "model.library=tiny: is a whole network, without model.decoder"),
    ],
)
def test_what_it_does_not_have_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    assert message in run_here(tmp_path, *WORDS, *words, code=2)


def test_a_network_without_a_registered_backbone_is_described() -> None:
    class Split(TinyNetwork):
        @property
        def backbone(self) -> nn.Module:
            return nn.ModuleList([self.model.blocks[0], self.model.blocks[1]])

    net = Split(3)
    groups = {group["name"]: len(group["params"]) for group in parameter_groups(net, OptimConfig())}
    assert groups == {"encoder": 2, "encoder_no_decay": 4, "decoder": 4, "decoder_no_decay": 6}
    with torch.device("meta"):
        assert [stage.name for stage in measure_cost(Split(3)).stages] == [
            "model.blocks",
            "model.idle",
            "model.classify",
        ]
