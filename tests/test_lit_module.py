"""The LightningModule under a real Trainer, in this process, on a handful of drawn scenes."""

from __future__ import annotations

import csv
import itertools
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import nn

from helpers.command_line import TINY_ENCODERS
from helpers.in_process import TINY_RUN, PreparedRun, configured, fit
from semseg.build import build_data, build_module, build_trainer
from semseg.checkpoints.network import build_network
from semseg.config.schema import Config
from semseg.data.sources import DataSource
from semseg.errors import ConfigError
from semseg.evaluation.evaluator import Stopwatch
from semseg.lit_module import SegmentationModule
from semseg.nets.registry import ENCODERS

TINY = [
    "data=scenes", "data.make.num_train=4", "data.make.num_val=2", *TINY_RUN, "data.short_edges=[32]",
    "data.steps_per_epoch=2", "model/decoder=c1_deepsup", "trainer.max_epochs=1",
]  # fmt: skip

FROZEN_BN = "model.freeze_bn=true"
ENCODER = ("model/encoder", "model.encoder")  # how words about it start


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "scenes"


def config_of(root: Path, run_dir: Path, *overrides: str) -> Config:
    return configured(*TINY, f"data.root={root}", f"run_dir={run_dir}", *overrides)


def fitted(config: Config) -> tuple[SegmentationModule, dict[str, torch.Tensor]]:
    """A module after training, and its state before."""
    torch.manual_seed(0)
    source = DataSource(config.data)
    with patch.dict(ENCODERS, TINY_ENCODERS):
        net = build_network(config.model, source.classes.num_classes)
    module = build_module(config, net, source.classes)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    build_trainer(config, source).fit(module, datamodule=build_data(config, source, net))
    return module, before


def test_training_moves_every_parameter_and_the_statistics(root: Path, tmp_path: Path) -> None:
    module, before = fitted(config_of(root, tmp_path))
    assert all(not torch.equal(value, before[name]) for name, value in module.net.state_dict().items())
    assert module.scores is not None and module.scores.pixel_accuracy is not None


def test_freeze_bn_keeps_the_statistics_and_trains_scale_and_shift(root: Path, tmp_path: Path) -> None:
    module, before = fitted(config_of(root, tmp_path, "model.freeze_bn=true", "optim.lr=1e-3"))
    after = module.net.state_dict()
    buffers = {name for name, _ in module.net.named_buffers()}
    assert all(torch.equal(after[name], before[name]) for name in buffers)
    assert any(not torch.equal(after[name], before[name]) for name in before if name.endswith("fine.0.1.weight"))
    dropouts = [layer for layer in module.net.modules() if isinstance(layer, nn.Dropout2d)]
    assert all(layer.training for layer in dropouts)


@pytest.mark.slow
def test_a_frozen_encoder_stays_as_it_is_and_the_decoder_learns(root: Path, tmp_path: Path) -> None:
    module, before = fitted(config_of(root, tmp_path, "model.encoder.frozen=true"))
    after = module.net.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("encoder."))
    assert all(not torch.equal(after[name], before[name]) for name in before if name.startswith("decoder."))
    groups = module.trainer.optimizers[0].param_groups
    assert {group["name"] for group in groups} == {"decoder", "decoder_no_decay"}


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["trainer.precision=bf16-mixed", "optim.fused=true"]], ids=["plain", "fused"])
def test_gradient_clipping_bounds_the_step(root: Path, tmp_path: Path, more: list[str]) -> None:
    """Also as on a GPU, where Lightning's own clipping raises an error."""
    words = ["optim.lr=1", "optim.momentum=0", "optim.weight_decay=0", "data.steps_per_epoch=1", *more]
    moved = []
    for limit in ("null", "0.01"):
        module, before = fitted(config_of(root, tmp_path / limit, *words, f"trainer.gradient_clip_val={limit}"))
        steps = [(value - before[name]).flatten() for name, value in module.net.named_parameters()]
        moved.append(float(torch.cat(steps).norm()))
    assert moved[0] > 0.1  # lr times the norm of the gradient
    assert moved[1] == pytest.approx(0.01, rel=1e-2)  # rounding of float32 weights


def test_early_stopping_ends_a_run_that_gets_no_better(root: Path, tmp_path: Path) -> None:
    words = ["callbacks=early_stopping", "callbacks.early_stopping.patience=1", "trainer.max_epochs=9"]
    fitted(config_of(root, tmp_path, *words, "optim.lr=1e-12", "model.freeze_bn=true"))
    with (tmp_path / "logs" / "metrics.csv").open(newline="") as file:
        epochs = {row["epoch"] for row in csv.DictReader(file) if row["epoch"]}
    assert len(epochs) == 2  # the first, and one that was not better


@pytest.mark.slow
def test_the_published_convention_holds_on_one_device_too(root: Path, tmp_path: Path) -> None:
    one_step = ["data.steps_per_epoch=1", "trainer.precision=64-true"]
    plain, before = fitted(config_of(root, tmp_path / "a", *one_step))
    published, _ = fitted(config_of(root, tmp_path / "b", *one_step, "syncbn.convention=published"))
    name = "encoder.fine.0.1.running_var"
    moved = [module.net.state_dict()[name] - before[name] for module in (plain, published)]
    # One convention takes 0.1 of the first variance, its momentum; the other takes 1 / 1.999.
    torch.testing.assert_close(moved[1], moved[0] * 10 / 1.999, rtol=1e-9, atol=0)
    assert {type(layer) for layer in published.net.modules()} == {type(layer) for layer in plain.net.modules()}


@pytest.mark.slow
def test_channels_last_gives_the_same_numbers(root: Path, tmp_path: Path) -> None:
    plain, _ = fitted(config_of(root, tmp_path / "a", "trainer.precision=64-true"))
    other, _ = fitted(config_of(root, tmp_path / "b", "trainer.precision=64-true", "model.channels_last=true"))
    weight = other.net.encoder.coarse[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weight, plain.net.encoder.coarse[0].weight, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["trainer.precision=bf16-mixed"], ["trainer.precision=bf16-true", FROZEN_BN]])
def test_half_precision_trains_on_cpu(root: Path, tmp_path: Path, words: list[str]) -> None:
    module, before = fitted(config_of(root, tmp_path, *words))
    weight = module.net.state_dict()["encoder.coarse.0.weight"]
    assert torch.isfinite(weight).all() and not torch.equal(weight.float(), before["encoder.coarse.0.weight"])


@pytest.mark.reliability
def test_d10_weights_in_half_precision_are_refused_where_normalisation_statistics_move(
    root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.precision=bf16-true: .*bf16-mixed, or model\.freeze_bn=true"):
        fitted(config_of(root, tmp_path, "trainer.precision=bf16-true"))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.long
def test_a_compiled_network_trains_to_the_same_numbers(root: Path, tmp_path: Path) -> None:
    plain, _ = fitted(config_of(root, tmp_path / "a", "trainer.precision=64-true"))
    compiled, _ = fitted(config_of(root, tmp_path / "b", "trainer.precision=64-true", "model.compile=true"))
    assert list(compiled.net.state_dict()) == list(plain.net.state_dict())
    for name, value in plain.net.state_dict().items():
        torch.testing.assert_close(compiled.net.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_training_needs_no_validation_images(root: Path, tmp_path: Path) -> None:
    module, _ = fitted(config_of(root, tmp_path, "data.val.list=null"))
    assert module.scores is None
    assert (tmp_path / "checkpoints/last.ckpt").is_file()


def test_a_gpu_that_is_not_there_is_reported(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = config_of(root, tmp_path, "trainer.accelerator=gpu")
    with pytest.raises(ConfigError, match="no GPU here"):
        build_trainer(config, DataSource(config.data))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_validation_score_is_that_of_a_hand_count(root: Path, tmp_path: Path, batch_size: int) -> None:
    from semseg.evaluation.metrics import ConfusionMatrix, confusion_counts, scores_from

    config = config_of(root, tmp_path, f"eval.batch_size={batch_size}")
    module, _ = fitted(config)
    source = DataSource(config.data)
    data = build_data(config, source, module.net)
    matrix = ConfusionMatrix(source.classes.num_classes)
    module.net.eval()
    groups = list(data.eval_loader("val"))
    assert max(map(len, groups)) == batch_size
    for sample in itertools.chain.from_iterable(groups):
        image = module.prepare_input(sample.scales[0][None])
        with torch.no_grad():
            logits = module.net(image).main
        size = tuple(sample.label.shape)
        upsampled = nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        matrix.update(confusion_counts(upsampled.argmax(1)[0], sample.label, source.classes.num_classes))
    assert module.scores == scores_from(matrix.compute().matrix, config.data.miou_rule)


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize(("limit", "scored"), [("1", 1), ("9", 3), ("0.5", 1), ("1.0", 3), ("0", None)])
def test_i2_a_limit_of_validation_is_a_number_of_batches_or_a_fraction(
    tmp_path: Path, limit: str, scored: int | None
) -> None:
    words = [*TINY_RUN, "data.make.num_train=2", "data.make.num_val=3", "data.steps_per_epoch=1"]
    places = [f"data.root={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}", "trainer.max_epochs=1"]
    config = configured("data=scenes", *words, *places, f"trainer.limit_val_batches={limit}")
    counted: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        check = SegmentationModule.check_image_count
        patched.setattr(
            SegmentationModule,
            "check_image_count",
            lambda module, images, stage: (counted.append(images), check(module, images, stage)),
        )
        fit(config)
    assert counted == ([] if scored is None else [scored])


@pytest.mark.slow
@pytest.mark.parametrize(
    "word",
    [
        "limit_train_batches=0", "limit_train_batches=0.0", "limit_train_batches=1.5", "limit_train_batches=true",
        "limit_val_batches=-1", "limit_val_batches=1.5", "limit_val_batches=nan", "limit_val_batches=all",
        "fast_dev_run=0", "fast_dev_run=some",
    ],
)  # fmt: skip
def test_i2_other_limits_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.{word.partition('=')[0]}=.*: must be"):
        configured(f"trainer.{word}")


@pytest.mark.slow
@pytest.mark.parametrize("key", ["limit_train_batches", "limit_val_batches"])
def test_i2_a_fraction_of_less_than_one_batch_is_refused(root: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.{key}=0\.1"):
        fitted(config_of(root, tmp_path, f"trainer.{key}=0.1"))


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize(
    "words",
    [
        ["syncbn=off", "model/encoder=timm", "model.encoder.name=test_resnet"],
        ["syncbn.convention=published", "model/encoder=timm", "model.encoder.name=test_resnet"],
    ],
    ids=lambda words: words[0],
)
def test_d6_one_image_whose_deepest_map_is_one_pixel_trains_with_pyramid_pooling(
    root: Path, tmp_path: Path, words: list[str]
) -> None:
    small = ["data.batch_size=1", "data.short_edges=[16]", "data.max_long_edge=32", "data.steps_per_epoch=1"]
    words = ["model/decoder=ppm_deepsup", *small, *words, "model.encoder.weights=none"]
    base = [word for word in TINY if "decoder" not in word and not word.lstrip("~").startswith(ENCODER)]
    run = PreparedRun(configured(*base, *words, f"data.root={root}", f"run_dir={tmp_path}"))
    weight = run.net.get_parameter("decoder.ppm.0.1.weight")  # behind the coarsest grid, which has one value a channel
    before = weight.detach().clone()
    run.fit()
    assert run.module.batch.image.shape == (1, 3, 32, 32) and run.net.size_divisor == 32
    assert torch.isfinite(weight).all() and not torch.equal(weight, before)


def test_the_start_of_the_workers_is_not_counted_as_reading() -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    module = SimpleNamespace(evaluator=SimpleNamespace(stopwatch=stopwatch))
    time.sleep(0.05)
    SegmentationModule.on_test_batch_start(module, [], 0)  # pyright: ignore[reportArgumentType]
    assert stopwatch.seconds["reading"] == 0
    time.sleep(0.01)
    SegmentationModule.on_test_batch_start(module, [], 1)  # pyright: ignore[reportArgumentType]
    assert stopwatch.seconds["reading"] >= 0.01
