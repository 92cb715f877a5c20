"""Steps that must not reach the weights: NaN, infinite, too large for the memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from helpers.command_line import TINY_ENCODERS
from helpers.in_process import TINY_RUN, configured
from semseg.build import build_net, build_trainer
from semseg.config.schema import Config
from semseg.data.batch import Batch
from semseg.data.sources import DataSource
from semseg.datamodule import SegmentationData
from semseg.errors import SemsegError
from semseg.lit_module import SegmentationModule
from semseg.nets.registry import ENCODERS
from semseg.training.callbacks.guards import NonFiniteError, OutOfMemory, first_nonfinite
from semseg.training.losses import Loss

RUN = [
    "data=scenes", "data.make.num_train=4", "data.make.num_val=1", *TINY_RUN, "data.max_long_edge=200",
    "data.steps_per_epoch=3", "trainer.max_epochs=1",
]  # fmt: skip
WITHOUT_ENCODER = [word for word in RUN if not word.lstrip("~").startswith(("model/encoder", "model.encoder"))]

pytestmark = pytest.mark.reliability


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "scenes"


class Run:
    """A run in this process: its module, and what was seen before every step."""

    def __init__(self, config: Config) -> None:
        pl.seed_everything(config.seed, verbose=False)
        source = DataSource(config.data)
        self.config = config
        with patch.dict(ENCODERS, TINY_ENCODERS):
            self.net = build_net(config.model, source.classes.num_classes)
        self.module = SegmentationModule(self.net, config, source.classes)
        self.trainer = build_trainer(config, source)
        self.data = SegmentationData(source, config, self.net)

    def fit(self) -> None:
        self.trainer.fit(self.module, datamodule=self.data)


def make(root: Path, run_dir: Path, *words: str, base: Sequence[str] = RUN) -> Run:
    return Run(configured(*base, f"data.root={root}", f"run_dir={run_dir}", *words))


def spoil_steps(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> list[dict[str, Tensor]]:
    """Make the loss of some steps NaN; returns a list that gets the network's state at the start of every step."""
    states: list[dict[str, Tensor]] = []
    whole = SegmentationModule.loss_of

    def spoilt(module: SegmentationModule, batch: Batch) -> Tensor:
        states.append({name: value.clone() for name, value in module.net.state_dict().items()})
        loss = whole(module, batch)
        return loss * float("nan") if len(states) in steps else loss

    monkeypatch.setattr(SegmentationModule, "loss_of", spoilt)
    return states


def test_d1_a_nan_loss_stops_the_run_and_tells_what_there_is_to_know(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = spoil_steps(monkeypatch, {2})
    run = make(root, tmp_path)
    with pytest.raises(NonFiniteError) as caught:
        run.fit()
    told = str(caught.value)
    assert told.startswith("step 2: the loss is nan and the gradient's norm nan, at learning rates 0.0")
    assert told.count(".jpg") == 2
    assert len(states) == 2 and not list(tmp_path.glob("checkpoints/*"))
    weights = dict(run.net.named_parameters())
    assert all(torch.equal(value, states[1][name]) for name, value in weights.items())
    saved = re.search(r"input=(\S+)", told)
    assert saved is not None
    content = torch.load(saved[1], weights_only=True)
    assert content["step"] == 2
    assert content["batches"][0]["image"].dtype == torch.uint8 and len(content["batches"][0]["paths"]) == 2


def test_d1_a_skipped_step_changes_nothing_and_the_next_one_too_many_stops(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = spoil_steps(monkeypatch, {1, 3})
    run = make(root, tmp_path, "trainer.max_nonfinite_steps=1")
    with pytest.raises(NonFiniteError, match="step 3"):
        run.fit()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())  # statistics too
    assert any(not torch.equal(value, states[2][name]) for name, value in states[1].items())
    assert len(list(tmp_path.glob("nonfinite/*.pt"))) == 2


def test_d2_a_nan_score_is_never_the_best(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = pl.LightningModule.log
    scores = iter([float("nan"), 0.25])

    def with_scores(module: SegmentationModule, name: str, value: float, **options: object) -> None:
        log(module, name, next(scores) if name == "val/miou" else value, **options)

    monkeypatch.setattr(SegmentationModule, "log", with_scores)
    run = make(root, tmp_path, "trainer.max_epochs=2", "data.steps_per_epoch=1")
    run.fit()
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == 1


LARGE = 48 * 48  # pixels of a canvas, at least, at a short edge of 48; at 32 it is smaller


def no_memory_for_large(monkeypatch: pytest.MonkeyPatch, large: int = LARGE) -> list[int]:
    """A device on which a canvas of `large` pixels does not fit; returns the numbers of pixels that were tried."""
    tried: list[int] = []
    whole = SegmentationModule.losses

    def limited(module: SegmentationModule, batch: Batch, average: str) -> Loss:
        tried.append(batch.image[0, 0].numel())
        if tried[-1] >= large:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return whole(module, batch, average)

    monkeypatch.setattr(SegmentationModule, "losses", limited)
    return tried


def test_d3_out_of_memory_is_told_with_sizes_and_keys(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_memory_for_large(monkeypatch)
    with pytest.raises(OutOfMemory) as caught:
        make(root, tmp_path, "data.short_edges=[48]").fit()
    told = str(caught.value)
    assert re.match(r"out of memory on a sub-batch of 2 images of \d+ x \d+ pixels \(\S+\.jpg, ", told)
    assert all(key in told for key in ("data.batch_size", "data.max_long_edge", "data.short_edges", "20.00 GiB"))
    assert "\n" not in told


def test_d3_out_of_memory_in_evaluation_is_told_with_images_and_keys(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(root, tmp_path, "eval.scales=[32,64]")

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(type(run.net), "forward", full)
    with pytest.raises(SemsegError, match=r"evaluating .*\.jpg at up to \d+ x \d+ pixels") as caught:
        run.trainer.validate(run.module, datamodule=run.data, verbose=False)
    assert "eval.batch_size" in str(caught.value) and "Tried to allocate 20.00 GiB" in str(caught.value)


def test_d3_out_of_memory_in_the_backward_pass_names_the_sub_batch_too(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(root, tmp_path)

    def full(loss: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Tensor, "backward", full)
    with pytest.raises(OutOfMemory, match=r"data\.batch_size") as caught:
        run.fit()
    assert all(path in str(caught.value) for path in run.module.batch.paths)
    assert run.trainer.global_step == 0


def test_the_largest_sub_batch_is_tried_before_the_first_step(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = no_memory_for_large(monkeypatch)
    with pytest.raises(OutOfMemory, match="the largest possible sub-batch"):
        make(root, tmp_path, "trainer.probe_memory=always").fit()
    assert len(tried) == 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_trying_the_largest_sub_batch_trains_nothing(root: Path, tmp_path: Path, precision: str) -> None:
    ends = []
    for probe in ("always", "never"):
        run = make(root, tmp_path / probe, f"trainer.probe_memory={probe}", f"trainer.precision={precision}")
        run.fit()
        ends.append(run.net.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_the_first_layer_that_goes_wrong_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    image = torch.rand(1, 3, 4, 4)
    assert first_nonfinite(net, image) is None
    with torch.no_grad():
        net[2].weight[0, 0] = float("inf")
    culprit = first_nonfinite(net, image)
    assert culprit is not None and (culprit.name, culprit.kind) == ("2", "Conv2d")


@pytest.mark.parametrize(
    "words",
    [
        ["syncbn=off", "model/encoder=resnet18"],
        ["syncbn.convention=published", "model/encoder=timm", "model.encoder.name=test_resnet"],
    ],
    ids=lambda words: words[-1],
)
def test_d6_one_image_whose_deepest_map_is_one_pixel_trains_with_pyramid_pooling(
    root: Path, tmp_path: Path, words: list[str]
) -> None:
    small = ["data.batch_size=1", "data.short_edges=[16]", "data.max_long_edge=32", "data.steps_per_epoch=1"]
    words = ["model/decoder=ppm_deepsup", *small, *words, "model.encoder.weights=none"]
    run = make(root, tmp_path, *words, base=WITHOUT_ENCODER)
    weight = run.net.get_parameter("decoder.ppm.0.1.weight")  # behind the coarsest grid, which has one value a channel
    before = weight.detach().clone()
    run.fit()
    assert run.module.batch.image.shape == (1, 3, 32, 32) and run.net.size_divisor == 32
    assert torch.isfinite(weight).all() and not torch.equal(weight, before)
