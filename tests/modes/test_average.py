"""Averages of weights: the arithmetic, the statistics that are measured again, and what is kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

from helpers.command_line import TINY_ENCODERS, run_here
from helpers.in_process import SHORT_RUN, configured, prepare_run
from helpers.random_checkpoints import write_random_checkpoints
from semseg.checkpoints.format import read_checkpoint, write_ckpt
from semseg.config.preprocessing import PREPROCESSING
from semseg.errors import CheckpointError
from semseg.modes import average
from semseg.modes.average import SplitScore, average_weights, measure_statistics, refuse_other_network
from semseg.nets.blocks import BatchNorm2d
from semseg.nets.registry import ENCODERS

QUICK = ["eval.scales=[32]", "data.num_workers=0", "trainer.accelerator=cpu"]


@pytest.fixture(autouse=True)
def tiny_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "tiny", TINY_ENCODERS["tiny"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints a.ckpt and b.ckpt of networks with random weights, and their data."""
    return write_random_checkpoints(tmp_path_factory.mktemp("average"))


def scored(*ious: float) -> list[SplitScore]:
    """Scores of networks, with a threshold of its own for each."""
    return [SplitScore(iou, iou / 2) for iou in ious]


def test_weights_are_the_mean_and_counts_those_of_the_first() -> None:
    first = {"w": torch.tensor([1.0, 2.0]), "count": torch.tensor(5)}
    second = {"w": torch.tensor([2.0, 4.0]), "count": torch.tensor(9)}
    found = average_weights([first, second, second])
    assert torch.equal(found["w"], torch.tensor([5 / 3, 10 / 3])) and found["w"].dtype == torch.float32
    assert int(found["count"]) == 5


def test_statistics_are_means_over_training_sub_batches(tmp_path: Path) -> None:
    run = prepare_run(tmp_path / "scenes", tmp_path / "run", "data.batch_size=2")
    layer = next(module for module in run.net.modules() if isinstance(module, nn.BatchNorm2d))
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].mean((0, 2, 3))))
    config = configured(*SHORT_RUN, f"data.root={tmp_path / 'scenes'}", f"run_dir={tmp_path / 'run'}")
    layer.running_mean.fill_(7.0)  # pyright: ignore[reportOptionalMemberAccess]
    assert measure_statistics(run.net, config, run.data.source) == 4
    assert len(seen) == 2 and torch.allclose(layer.running_mean, torch.stack(seen).mean(0), atol=1e-6)  # pyright: ignore[reportArgumentType]
    assert layer.momentum == 0.1 and not run.net.training


def test_statistics_that_training_leaves_alone_are_kept(tmp_path: Path) -> None:
    words = ["model.freeze_bn=true"]
    run = prepare_run(tmp_path / "scenes", tmp_path / "run", *words)
    before = {name: value.clone() for name, value in run.net.state_dict().items()}
    config = configured(*SHORT_RUN, f"data.root={tmp_path / 'scenes'}", f"run_dir={tmp_path / 'run'}", *words)
    assert measure_statistics(run.net, config, run.data.source) == 0
    assert all(torch.equal(value, before[name]) for name, value in run.net.state_dict().items())


def test_layers_that_see_single_values_only_keep_their_statistics(tmp_path: Path) -> None:
    words = ["model/decoder=ppm", "data.batch_size=1"]
    run = prepare_run(tmp_path / "scenes", tmp_path / "run", *words)
    coarsest = run.net.get_submodule("decoder.ppm.0.2")
    assert isinstance(coarsest, BatchNorm2d) and coarsest.running_mean is not None
    coarsest.running_mean.fill_(0.25)
    assert coarsest.num_batches_tracked is not None
    coarsest.num_batches_tracked.fill_(7)
    config = configured(*SHORT_RUN, f"data.root={tmp_path / 'scenes'}", f"run_dir={tmp_path / 'run'}", *words)
    assert measure_statistics(run.net, config, run.data.source) > 0
    assert (coarsest.running_mean == 0.25).all() and coarsest.num_batches_tracked == 7
    measured = run.net.get_submodule("decoder.ppm.1.2")
    assert isinstance(measured, BatchNorm2d) and (measured.running_mean != 0).all()


@pytest.mark.slow
def test_the_average_is_kept_only_if_it_is_better_than_the_best(folder: Path) -> None:
    with patch.object(average, "score_on_split", side_effect=scored(0.2, 0.5, 0.5)):
        printed = run_here(folder, "mode=average", "ckpt=[a.ckpt,b.ckpt]", *QUICK, "run_dir=worse")
    assert "not better than the best of them: not kept" in printed
    assert not (folder / "worse" / "average.ckpt").exists()
    content = json.loads((folder / "worse" / "average.json").read_text())
    assert [row["mean_iou"] for row in content["networks"]] == [0.2, 0.5] and content["is_kept"] is False
    scores = iter(scored(0.2, 0.5, 0.6))

    def score_in_double(net: nn.Module, *_: object) -> SplitScore:  # as with trainer.precision=64-true
        net.double()
        return next(scores)

    with patch.object(average, "score_on_split", side_effect=score_in_double):
        run_here(folder, "mode=average", "ckpt=[a.ckpt,b.ckpt]", *QUICK, "run_dir=better")
    again = run_here(folder, "mode=average", "ckpt=[a.ckpt,b.ckpt]", *QUICK, "run_dir=better", code=2)
    assert "run_dir=better: holds average.ckpt of an earlier call" in again
    found = read_checkpoint(folder / "better" / "average.ckpt")
    ends = [read_checkpoint(folder / f"{name}.ckpt").weights for name in "ab"]
    assert found.threshold == 0.3  # its own, not that of the first network
    name = "encoder.fine.0.0.weight"
    assert found.weights[name].dtype == torch.float32
    assert torch.allclose(found.weights[name], (ends[0][name] + ends[1][name]) / 2)
    statistics = "encoder.fine.0.1.running_mean"
    assert not torch.allclose(found.weights[statistics], (ends[0][statistics] + ends[1][statistics]) / 2)


@pytest.mark.slow
def test_statistics_are_measured_with_the_augmentation_of_the_run(folder: Path) -> None:
    for name in "ab":
        saved = read_checkpoint(folder / f"{name}.ckpt")
        augment = replace(saved.config.augment, crop=[24, 16])
        write_ckpt(folder / f"{name}_crops.ckpt", saved._replace(config=replace(saved.config, augment=augment)))
    sizes = []
    with (
        patch.object(average, "score_on_split", side_effect=scored(0.2, 0.5, 0.5)),
        patch.object(average, "run_forward", side_effect=lambda _, batch, *__: sizes.append(batch.image.shape[2:])),
    ):
        run_here(folder, "mode=average", "ckpt=[a_crops.ckpt,b_crops.ckpt]", *QUICK, "run_dir=crops")
    assert sizes and all(tuple(size) == (24, 16) for size in sizes)


@pytest.mark.slow
def test_the_networks_and_their_average_are_scored(folder: Path) -> None:
    refused = run_here(folder, "mode=average", "ckpt=[a.ckpt,b.ckpt,./a.ckpt]", *QUICK, "run_dir=scored", code=2)
    assert "ckpt: a.ckpt is given 2 times. Give each network once." in refused
    shutil.copy(folder / "a.ckpt", folder / "same_a.ckpt")
    words = ["mode=average", "ckpt=[a.ckpt,same_a.ckpt]", *QUICK]
    printed = run_here(folder, *words, "trainer.devices=2", "run_dir=scored")
    assert printed.count("a.ckpt: mean IoU") == 2 and "their mean, statistics of 4 images" in printed
    content = json.loads((folder / "scored" / "average.json").read_text())
    assert content["networks"][0]["mean_iou"] == content["networks"][1]["mean_iou"] is not None


def test_other_networks_are_refused_with_the_difference(folder: Path) -> None:
    first = read_checkpoint(folder / "a.ckpt")
    fewer = {name: value for name, value in first.weights.items() if "coarse" not in name}
    for other, message in (
        (first._replace(source="b", weights=fewer), "coarse"),
        (
            first._replace(source="b", convention=PREPROCESSING["bgr_mean"]),
            "evaluation resizes images with antialiasing for one of them",
        ),
    ):
        with pytest.raises(CheckpointError, match="and b cannot be averaged") as caught:
            refuse_other_network(first, other)
        assert message in str(caught.value)
    assert "mode=average needs at least two networks" in run_here(folder, "mode=average", "ckpt=a.ckpt", code=2)
