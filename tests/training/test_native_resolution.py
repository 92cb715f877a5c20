"""Runs at the resolution of the images: crops, windows, resuming, workers and ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.command_line import TINY_NETWORK, run_here
from helpers.in_process import PreparedRun, assert_equal, configured, fit
from semseg.config.schema import Config
from semseg.data.loaders import SubBatchLoader
from semseg.errors import ConfigError

NETWORK = [
    "model/encoder=resnet18", *TINY_NETWORK, "model.encoder.weights=none", "model/decoder=c1", "trainer=cpu",
    "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false", "checkpoint.every_n_minutes=null",
]  # fmt: skip
NATIVE = [
    "data=scenes", "data.make.num_train=5", "data.make.num_val=2", "data.resize=native", "data.crop=[48,64]",
    "data.batch_size=2", "data.num_workers=0", "data.steps_per_epoch=3", "trainer.max_epochs=2", *NETWORK,
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "scenes"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run_of(root: Path, run_dir: Path, *words: str) -> Config:
    return configured(*NATIVE, f"data.root={root}", f"run_dir={run_dir}", *words)


@pytest.mark.slow
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(root: Path, tmp_path: Path) -> None:
    words = ["augment.scale=[0.5,2.0]", "augment.brightness=0.2", "checkpoint.every_n_steps=1", "checkpoint.keep=9"]
    whole = fit(run_of(root, tmp_path / "whole", *words))
    (tmp_path / "cache").rename(tmp_path / "other")  # the index is made again
    (stopped,) = (tmp_path / "whole" / "checkpoints").glob("step_*2.ckpt")  # in the first epoch
    resumed = fit(run_of(root, tmp_path / "resumed", *words), resume=stopped)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(resumed[key], whole[key], key)


def loader_of(root: Path, tmp_path: Path, *words: str) -> SubBatchLoader:
    run = PreparedRun(run_of(root, tmp_path / "run", "augment.scale=[0.5,2.0]", *words))
    run.data.trainer = run.trainer
    return run.data.train_dataloader()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(root: Path, tmp_path: Path, workers: int) -> None:
    alone, with_workers = (loader_of(root, tmp_path, f"data.num_workers={number}") for number in (0, workers))
    for expected, found in zip(alone, with_workers, strict=True):
        assert_equal(tuple(found), tuple(expected))
    with_workers.close()


def test_ranks_take_the_sub_batches_of_one_process(root: Path, tmp_path: Path) -> None:
    loader = loader_of(root, tmp_path)
    loader.steps = 4
    alone = list(loader)
    for rank in (0, 1):
        loader.rank, loader.world_size, loader.steps = rank, 2, 2
        loader.load_state_dict({"taken": 0})
        for expected, found in zip(alone[rank::2], loader, strict=True):
            assert_equal(tuple(found), tuple(expected))


def test_the_largest_sub_batch_is_that_of_the_crops(root: Path, tmp_path: Path) -> None:
    run = PreparedRun(run_of(root, tmp_path / "run", "augment.scale=[0.5,2.0]"))
    assert run.data.largest_batch().image.shape == (2, 3, 48, 64)
    grown = PreparedRun(run_of(root, tmp_path / "run", "augment.scale=[0.5,3.0]", "data.crop=[5000,5000]"))
    largest = max(record.size.height for record in grown.data.source.records("train"))
    assert grown.data.largest_batch().image.shape[2] >= 3 * largest - 3


@pytest.mark.slow
def test_evaluation_and_prediction_use_windows_at_the_resolution_of_the_images(root: Path, tmp_path: Path) -> None:
    words = [word for word in NATIVE if not word.startswith("trainer.max_epochs")]
    output = run_here(tmp_path, *words, f"data.root={root}", "run_dir=run", "trainer.max_epochs=1")
    assert "native resolution, crops of 48 x 64, 33% around a pixel of a class" in " ".join(output.split())
    output = run_here(tmp_path, "mode=eval", "ckpt=run", "run_dir=eval", "trainer=cpu")
    assert "native resolution, windows of 64 pixels every 48" in " ".join(output.split())
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert (metrics["scales"], metrics["window"], metrics["stride"]) == (None, 64, 48)
    images = root / "images" / "validation"
    run_here(tmp_path, "mode=predict", "ckpt=run", "run_dir=predicted", f"input={images}", "predict.save=[ids]")
    confusion = np.load(tmp_path / "eval" / "confusion.npz")
    counted = np.zeros(11, int)
    for path in sorted(images.iterdir()):
        with Image.open(tmp_path / "predicted" / f"{path.stem}_ids.png") as ids, Image.open(path) as photo:
            assert ids.size == photo.size
            label = np.asarray(Image.open(root / "annotations" / "validation" / f"{path.stem}.png"))
            counted += np.bincount(np.asarray(ids)[label > 0], minlength=12)[1:]
    assert np.array_equal(confusion[confusion.files[0]].sum(0), counted)
    # Another data set is evaluated at its own resolution as well: that is how the network was trained.
    output = run_here(
        tmp_path, "mode=eval", "ckpt=run", "run_dir=other", "data=scenes", f"data.root={root}", "data.make.num_train=5",
        "data.make.num_val=2", "trainer=cpu", "eval.window=32", "eval.flip=true", "eval.batch_size=4",
    )  # fmt: skip
    assert "native resolution, windows of 32 pixels every 24, mirrored too" in " ".join(output.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval.scales=[300]"], "eval.scales=[300]: has no effect with data.resize=native"),
        (["data.short_edges=[300]"], "data.short_edges=[300]: has no effect with data.resize=native"),
        (["augment.crop=[32,32]"], "data.crop=[48, 64] and augment.crop=[32, 32] are the same setting"),
        (["data.crop=[48]"], "data.crop=[48]: must be [height, width] in pixels"),
        (["data.resize=short_edge", "data.crop_foreground=0.5"], "data.crop_foreground=0.5: needs data.resize=native"),
        (["data.resize=nativ"], "data.resize=nativ: not known. Did you mean data.resize=native?"),
    ],
)
def test_settings_without_effect_are_refused_with_a_way_out(tmp_path: Path, words: list[str], message: str) -> None:
    output = run_here(tmp_path, *NATIVE, *words, code=2)
    assert message in " ".join(output.split())


def test_a_window_must_be_one_that_a_network_of_one_size_takes(root: Path, tmp_path: Path) -> None:
    run = PreparedRun(run_of(root, tmp_path / "run"))
    assert run.module.window_layout is not None
    assert run.module.window_layout.side == 64
    run.net.image_size = None
    with pytest.raises(ConfigError, match="also_scales"):
        run_of(root, tmp_path / "run", "eval.also_scales=[[450]]")


@torch.no_grad()
def test_an_image_larger_than_a_crop_is_validated_whole(root: Path, tmp_path: Path) -> None:
    run = PreparedRun(run_of(root, tmp_path / "run", "data.val.list=training.odgt"))
    dataset = run.data.eval_loader("val").dataset
    sample = dataset[0]
    assert [tuple(scale.shape[1:]) for scale in sample.scales] == [tuple(sample.size.tolist())]
    run.module.eval()
    ((class_map,),) = run.module.predict([sample])
    assert class_map.ids.shape == sample.label.shape
