"""The mean of the probabilities of several networks: in one picture, in a split, and from Python."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import semseg
from helpers.command_line import TINY_ENCODERS, run_here
from helpers.random_checkpoints import write_random_checkpoints
from semseg.checkpoints.ensemble import join_networks
from semseg.checkpoints.format import read_checkpoint
from semseg.config.preprocessing import PREPROCESSING
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.errors import ArgumentError, CheckpointError, ConfigError
from semseg.evaluation.inference import predict_class_map
from semseg.evaluation.tiled import ArraySink, WindowLayout, predict_by_windows
from semseg.nets.ensemble import Ensemble, list_members
from semseg.nets.interfaces import Logits, SegmentationNetwork
from semseg.nets.registry import ENCODERS

CONVENTION = PREPROCESSING["rgb_mean_std"]


class Striding(SegmentationNetwork):
    """One convolution of a stride."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.num_classes, self.size_divisor, self.label_stride = 4, 2 * stride, stride
        self.layer = nn.Conv2d(3, 4, stride, stride)

    @property
    def backbone(self) -> nn.Module:
        return self.layer

    def forward(self, image: Tensor) -> Logits:
        return Logits(self.layer(image), None)


def probabilities_of(net: SegmentationNetwork, **options: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(1)
    scales = [
        torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in ((24, 48), (48, 72))
    ]
    found = np.empty((4, 20, 33), np.float32)
    predict_class_map(net, scales, (20, 33), CONVENTION, probabilities=found, **options)
    return found


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"window": 24, "stride": 12, "flip": True}])
def test_networks_of_different_strides_are_averaged_over_all_scales(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    members = [Striding(4), Striding(6), Striding(4)]
    ensemble = Ensemble(members, [member.size_divisor for member in members])
    assert ensemble.size_divisor == 24 and list_members(ensemble) == members
    expected = np.mean([probabilities_of(member, **options) for member in members], axis=0)
    assert np.allclose(probabilities_of(ensemble, **options), expected, atol=1e-6)


def test_windows_at_native_resolution_are_averaged_if_the_strides_are_equal() -> None:
    torch.manual_seed(0)
    members, layout = [Striding(4), Striding(4)], WindowLayout(24, 16, 8)
    pixels = torch.randint(0, 256, (3, 30, 41), dtype=torch.uint8)

    def run(net: SegmentationNetwork) -> np.ndarray:
        sink = ArraySink(Size(30, 41), np.empty((4, 30, 41), np.float32))
        predict_by_windows(net, pixels, CONVENTION, layout, sink, flip=True)
        assert sink.probabilities is not None
        return np.asarray(sink.probabilities)

    assert np.allclose(run(Ensemble(members, [8, 8])), np.mean([run(member) for member in members], axis=0), atol=1e-6)
    with pytest.raises(ConfigError, match="logits at different strides"):
        run(Ensemble([Striding(4), Striding(8)], [8, 16]))


def test_every_network_normalises_by_its_own_convention() -> None:
    torch.manual_seed(0)
    members = [Striding(4), Striding(4)]
    members[1].convention = CONVENTION._replace(mean=(0.1, 0.2, 0.3), scale=1 / 100)

    def run(net: SegmentationNetwork) -> np.ndarray:
        found = np.empty((4, 20, 33), np.float32)
        scales = [torch.arange(3 * 24 * 48).view(3, 24, 48).to(torch.uint8)]
        predict_class_map(net, scales, (20, 33), net.convention, probabilities=found)
        return found

    assert np.allclose(run(Ensemble(members, [8, 8])), np.mean([run(member) for member in members], axis=0), atol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints of networks with random weights, a.ckpt and b.ckpt, and their data."""
    return write_random_checkpoints(tmp_path_factory.mktemp("ensemble"), "data.make.num_val=2")


def evaluate(folder: Path, ckpt: str, name: str) -> tuple[dict[str, Any], str]:
    words = [
        "eval.scales=[32,48]",
        "eval.also_scales=[[48]]",
        "eval.flip=true",
        "eval.bootstrap=0",
        "data.num_workers=0",
    ]
    printed = run_here(folder, "mode=eval", f"ckpt={ckpt}", *words, "trainer.accelerator=cpu", f"run_dir={name}")
    return json.loads((folder / name / "metrics.json").read_text()), printed


@pytest.mark.slow
def test_an_evaluation_averages_networks_and_subsets_of_scales(folder: Path) -> None:
    (alone, _), (twice, printed) = evaluate(folder, "a.ckpt", "alone"), evaluate(folder, "[a.ckpt,a.ckpt]", "twice")
    for key in ("confusion", "classes", "subsets"):
        assert twice.get(key) == alone.get(key)  # the mean of a network with itself
    assert twice["checkpoints"] == [str(folder / "a.ckpt")] * 2
    assert twice["steps"] == [alone["step"]] * 2 and twice["step"] is None
    assert "checkpoint a.ckpt, a.ckpt" in printed
    assert "mean of 2 x tiny + c1 on scenes" in (folder / "twice" / "report.html").read_text()
    both, _ = evaluate(folder, "[a.ckpt,b.ckpt]", "both")
    swapped, _ = evaluate(folder, "[b.ckpt,a.ckpt]", "swapped")
    counts = [np.array(one["confusion"]) for one in (both, swapped, alone)]
    # Sums in another order are rounded in another way, which decides where two classes are equally likely.
    assert np.abs(counts[0] - counts[1]).sum() < 0.01 * counts[0].sum() < np.abs(counts[0] - counts[2]).sum()


@pytest.mark.slow
def test_prediction_and_python_average_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "tiny", TINY_ENCODERS["tiny"])
    picture = next((folder / "scenes" / "images" / "validation").iterdir())
    files = [folder / "a.ckpt", folder / "b.ckpt"]
    one, two, both = (semseg.load(ckpt, device="cpu") for ckpt in (*files, files))
    options = {"scales": [32, 48], "flip": True, "probabilities": True}
    means = [predictor.predict(picture, **options).probabilities for predictor in (one, two)]
    found = both.predict(picture, **options)
    assert found.probabilities is not None
    assert np.allclose(found.probabilities, np.mean(means, axis=0), atol=1e-3)  # kept as float16
    assert "mean of 2 x tiny + c1" in repr(both)
    words = ["predict.scales=[32,48]", "predict.flip=true", "predict.save=[ids]", "data.num_workers=0"]
    run_here(folder, "mode=predict", "ckpt=[a.ckpt,b.ckpt]", f"input={picture}", *words, "trainer.accelerator=cpu",
             "run_dir=predicted")  # fmt: skip
    assert list((folder / "predicted").glob("*_ids.png"))


def test_networks_that_do_not_fit_each_other_are_refused_with_the_difference(folder: Path) -> None:
    first = read_checkpoint(folder / "a.ckpt")
    names = list(first.classes.names)
    fewer = ClassTable.from_names(names[:-1])
    renamed = ClassTable.from_names(["heaven", *names[1:]])
    data = replace(first.config.data, first_id=2)
    for other, message in (
        (first._replace(classes=fewer, source="b"), f"they have {len(names)} and {len(names) - 1} classes"),
        (first._replace(classes=renamed, source="b"), f"class 0 is {names[0]} in the one and heaven in the other"),
        (
            first._replace(convention=PREPROCESSING["bgr_mean"], source="b"),
            "resizes images with antialiasing for one of",
        ),
        (first._replace(config=replace(first.config, data=data), source="b"), "have the ids"),
    ):
        with pytest.raises(CheckpointError, match="and b cannot be averaged") as caught:
            join_networks([first, other])
        assert message in str(caught.value)


def test_a_list_of_one_and_modes_of_one_network_are_refused(folder: Path) -> None:
    printed = run_here(folder, "mode=eval", "ckpt=[a.ckpt]", code=2)
    assert "ckpt=['a.ckpt']: must be text, or a list of at least two networks" in printed
    printed = run_here(folder, "mode=export", "ckpt=[a.ckpt,b.ckpt]", "output=x.onnx", code=2)
    assert "several networks are for mode=eval, predict, serve" in printed
    printed = run_here(folder, "mode=eval", "ckpt=[a.ckpt,c.ckpt]", "data.num_workers=0", code=1)
    assert "ckpt=c.ckpt: there is no such file" in printed
    with pytest.raises(ArgumentError, match="a list of at least two"):
        semseg.load([folder / "a.ckpt"])
