"""Loaders: which sub-batch each rank gets at which step, whatever the workers and the resumes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from torch.utils.data import Dataset

from helpers.in_process import TINY_RUN, PreparedRun, configured
from semseg.build import build_data
from semseg.config.preprocessing import PREPROCESSING
from semseg.config.schema import Config
from semseg.data.batch import LABEL_TYPE, Batch, EvalSample
from semseg.data.loaders import SubBatchLoader, WatchedLoader
from semseg.data.sources import DataSource
from semseg.datamodule import SegmentationData
from semseg.errors import ConfigError, DataError
from semseg.nets.bands import band_convention
from semseg.nets.segmenter import Segmenter


class Strides:
    """What SegmentationData asks of a network."""

    size_divisor = 32
    label_stride = 4
    convention = PREPROCESSING["rgb_mean_std"]


class Place:
    """What SegmentationData asks of a Trainer."""

    def __init__(self, global_rank: int, world_size: int) -> None:
        self.global_rank, self.world_size, self.num_devices = global_rank, world_size, world_size


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "scenes"


@functools.cache
def config_of(root: Path, *overrides: str) -> Config:
    words = ["data=scenes", f"data.root={root}", "data.make.num_train=7", "data.make.num_val=5", "data.num_workers=0",
             "data.batch_size=2", "data.short_edges=[32,48]", "eval.scales=[32]"]  # fmt: skip
    return configured(*words, *overrides)


def loaders(config: Config, rank: int = 0, world_size: int = 1) -> SegmentationData:
    data = build_data(config, DataSource(config.data), cast(Segmenter, Strides()))
    data.trainer = cast(Trainer, Place(rank, world_size))
    return data


def take(loader: SubBatchLoader, steps: int) -> list[Batch]:
    batches: list[Batch] = []
    while len(batches) < steps:
        for batch in loader:
            batches.append(batch)
            if len(batches) == steps:
                break
    loader.close()
    return batches


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.paths == b.paths and torch.equal(a.image, b.image) and torch.equal(a.label, b.label)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_bit(root: Path, workers: int) -> None:
    alone = take(loaders(config_of(root)).train_dataloader(), 6)
    shared = take(loaders(config_of(root, f"data.num_workers={workers}")).train_dataloader(), 6)
    assert same(alone, shared)


def test_an_epoch_has_the_steps_it_was_given_and_null_is_one_pass(root: Path) -> None:
    assert len(loaders(config_of(root)).train_dataloader()) == 4  # 7 images, 2 a step
    assert len(loaders(config_of(root), 0, 2).train_dataloader()) == 2
    assert len(loaders(config_of(root, "data.steps_per_epoch=9")).train_dataloader()) == 9


def test_two_ranks_together_see_what_one_process_sees(root: Path) -> None:
    alone = take(loaders(config_of(root)).train_dataloader(), 6)
    ranks = [take(loaders(config_of(root), rank, 2).train_dataloader(), 3) for rank in (0, 1)]
    assert same(alone[0::2], ranks[0]) and same(alone[1::2], ranks[1])


@pytest.mark.parametrize("done", [1, 4, 5])
def test_a_loader_resumes_from_any_step(root: Path, done: int) -> None:
    loader = loaders(config_of(root)).train_dataloader()
    whole = take(loaders(config_of(root)).train_dataloader(), 8)
    assert same(whole[:done], take(loader, done))
    fresh = loaders(config_of(root)).train_dataloader()
    fresh.load_state_dict(loader.state_dict())
    assert same(whole[done:], take(fresh, 8 - done))


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_c16_evaluation_gives_each_image_to_one_rank(root: Path, world_size: int, batch_size: int) -> None:
    config = config_of(root, f"eval.batch_size={batch_size}")
    counted = []
    for rank in range(world_size):
        groups = [cast(list[EvalSample], group) for group in loaders(config, rank, world_size).eval_loader("val")]
        assert groups  # Lightning refuses a rank with nothing to do
        is_company = rank and groups[0][0].position == 0
        counted += [] if is_company else [sample.position for group in groups for sample in group]
    assert sorted(counted) == [0, 1, 2, 3, 4]


def test_images_of_one_shape_at_every_scale_are_evaluated_together(root: Path) -> None:
    data = loaders(config_of(root, "eval.batch_size=3", "eval.scales=[64,96]"))
    groups = [cast(list[EvalSample], group) for group in data.eval_loader("val")]
    shapes = [{tuple(scale.shape for scale in sample.scales) for sample in group} for group in groups]
    assert all(len(of_group) == 1 for of_group in shapes)
    assert len(groups) == 5 - sum(len(group) - 1 for group in groups) < 5
    assert [group[0].position for group in groups] == sorted(group[0].position for group in groups)


def test_strides_come_from_the_network_unless_set(root: Path) -> None:
    data = loaders(config_of(root))
    assert (data.size_divisor, data.label_stride) == (32, 4)
    batch = take(data.train_dataloader(), 1)[0]
    assert batch.image.shape[-1] % 32 == 0 and batch.image.shape[-1] == 4 * batch.label.shape[-1]
    data = loaders(config_of(root, "model.size_divisor=64", "model.label_stride=8"))
    batch = take(data.train_dataloader(), 1)[0]
    assert batch.image.shape[-1] % 64 == 0 and batch.image.shape[-1] == 8 * batch.label.shape[-1]


@pytest.mark.parametrize("resize", ["short_edge", "native"])
def test_a_size_divisor_that_cuts_through_logits_is_refused(root: Path, resize: str) -> None:
    words = [f"data.resize={resize}", "data.crop=[64,64]" if resize == "native" else "data.crop=null"]
    assert loaders(config_of(root, *words, "model.size_divisor=8")).size_divisor == 8
    with pytest.raises(ConfigError, match=r"model\.size_divisor=10: must be a multiple of 4, the stride of the logits"):
        loaders(config_of(root, *words, "model.size_divisor=10", "model.label_stride=2"))


def test_a_fraction_of_the_training_images_is_held_out_for_validation(root: Path) -> None:
    folders = ["data=folder", f"data.root={root}", "data.train.images=images/training",
               "data.train.masks=annotations/training", "data.num_classes=10"]  # fmt: skip
    DataSource(config_of(root).data)  # draws the scenes
    source = DataSource(configured(*folders, "data.val_fraction=0.4").data)
    train, val = source.records("train"), source.records("val")
    assert len(train) + len(val) == 7 and train and val
    assert not {record.image for record in train} & {record.image for record in val}


def test_missing_configuration_is_reported_with_its_key(root: Path) -> None:
    source = DataSource(config_of(root).data)
    with pytest.raises(DataError, match=r"data\.test"):
        source.records("test")
    with pytest.raises(ConfigError, match=r"data\.num_classes"):
        DataSource(configured("data=folder").data)
    with pytest.raises(ConfigError, match="has 150"):
        DataSource(configured("data.num_classes=5").data)


def test_images_with_a_rare_class_are_seen_more_often(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for index in range(20):
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / f"{index:02d}.png")
        Image.new("L", (40, 30), 2 if index == 7 else 1).save(tmp_path / "masks" / f"{index:02d}.png")
    words = ["data=folder", f"data.root={tmp_path}", "data.num_classes=2", "data.val_fraction=0", "data.num_workers=0",
             "data.batch_size=1", "data.short_edges=[32]"]  # fmt: skip
    for oversample, times in ((0.0, 1), (0.2, 2)):  # one of 20 images has class 1: sqrt(0.2 / 0.05) = 2
        loader = loaders(configured(*words, f"data.oversample={oversample}")).train_dataloader()
        seen = [Path(path).stem for batch in take(loader, 19 + times) for path in batch.paths]
        assert seen.count("07") == times
        assert len(set(seen)) == 20


def test_rare_classes_are_found_whatever_bands_the_images_have(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for index in range(8):
        np.save(tmp_path / "images" / f"{index}.npy", np.full((30, 40, 4), 1000 + index, np.uint16))
        Image.new("L", (40, 30), 2 if index == 5 else 1).save(tmp_path / "masks" / f"{index}.png")
    words = ["data=folder", f"data.root={tmp_path}", "data.num_classes=2", "data.val_fraction=0", "data.num_workers=0",
             "data.batch_size=1", "data.short_edges=[32]", "data.bands=[red,green,blue,nir]",
             "data.value_range=[0,3000]", "data.oversample=0.5"]  # fmt: skip
    repeats = loaders_of_bands(words)._compute_repeats()
    assert repeats is not None and repeats.argmax() == 5 and repeats[5] == 2  # sqrt(0.5 / (1 / 8))
    (tmp_path / "masks" / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"3\.png"):
        loaders_of_bands(words)._compute_repeats()
    assert loaders_of_bands([*words, "data.on_bad=skip"])._compute_repeats() is not None


def loaders_of_bands(words: Sequence[str]) -> SegmentationData:
    """The loaders of a network that takes the bands of the images."""
    config = configured(*words)
    source, net = DataSource(config.data), Strides()
    assert source.bands is not None
    net.convention = band_convention(net.convention, source.bands)
    return build_data(config, source, cast(Segmenter, net))


# ---- on the way to the device


def test_labels_reach_the_device_in_the_type_they_were_read_in_and_are_widened_there(root: Path) -> None:
    for workers in (0, 1):
        data = loaders(config_of(root, f"data.num_workers={workers}"))
        batch = take(data.train_dataloader(), 1)[0]
        (sample,) = cast(list[EvalSample], next(iter(data.eval_loader("val"))))
        for item in (batch, sample):
            assert item.label.dtype == LABEL_TYPE and LABEL_TYPE.itemsize == 2
            assert int(item.label.min()) == -1 < int(item.label.max())
        # Lightning calls this after it has moved them.
        (moved,) = data.on_after_batch_transfer([sample], 0)
        for item, small in ((data.on_after_batch_transfer(batch, 0), batch), (moved, sample)):
            assert item.label.dtype == torch.int64 and torch.equal(item.label, small.label)
            assert type(item) is type(small) and item[0] is small[0]


def test_the_network_and_callbacks_get_wide_labels(root: Path, tmp_path: Path) -> None:
    class Types(Callback):
        found: ClassVar[set[tuple[str, torch.dtype]]] = set()

        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, *_: int) -> None:
            self.found.add(("training", batch.label.dtype))

        def on_validation_batch_start(
            self, trainer: Trainer, module: LightningModule, batch: list[EvalSample], *_: int
        ) -> None:
            self.found.add(("validation", batch[0].label.dtype))

    words = ["data=scenes", f"data.root={root}", "data.make.num_train=7", "data.make.num_val=5", *TINY_RUN]
    words += ["data.steps_per_epoch=1", "trainer.max_epochs=1", "trainer.limit_val_batches=1", f"run_dir={tmp_path}"]
    run = PreparedRun(configured(*words))
    run.trainer.callbacks.append(Types())  # pyright: ignore[reportAttributeAccessIssue]
    run.fit()
    assert Types.found == {("training", torch.int64), ("validation", torch.int64)}


@pytest.mark.parametrize(("accelerator", "pins"), [("cpu", False), ("auto", True), ("gpu", True)])
def test_memory_is_pinned_for_the_accelerator_that_is_used(
    root: Path, monkeypatch: pytest.MonkeyPatch, accelerator: str, pins: bool
) -> None:
    data = loaders(config_of(root, f"trainer.accelerator={accelerator}"))
    streams = [data.train_dataloader().loader_from(0), data.eval_loader("val")]
    assert [stream.pin_memory for stream in streams] == [False, False]  # this machine has no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    streams = [data.train_dataloader().loader_from(0), data.eval_loader("val")]
    assert [stream.pin_memory for stream in streams] == [pins, pins]


# ---- evaluation reads ahead


class Announced(Dataset[int]):
    """Says which items have been read; the third one fails."""

    def __init__(self) -> None:
        self.read = [threading.Event() for _ in range(3)]

    def __len__(self) -> int:
        return len(self.read)

    def __getitem__(self, index: int) -> int:
        self.read[index].set()
        if index == 2:
            raise DataError("the third one")
        return index


def test_without_workers_the_next_item_is_read_while_the_last_one_is_used() -> None:
    data, seen = Announced(), []
    with pytest.raises(DataError, match="the third one"):
        for item in WatchedLoader(data, lambda _: [], 0, is_ahead=True, batch_size=None, num_workers=0):
            assert data.read[item + 1].wait(timeout=30), "it waits until it is asked for"
            seen.append(item)
    assert seen == [0, 1]


def test_evaluation_reads_ahead_of_the_network(root: Path) -> None:
    loader = loaders(config_of(root)).eval_loader("val")
    assert isinstance(loader, WatchedLoader) and loader.is_ahead
    ahead = [sample for group in loader for sample in group]
    alone = [loader.dataset[position] for position in range(5)]
    for sample, expected in zip(sorted(ahead, key=lambda sample: sample.position), alone, strict=True):
        assert torch.equal(sample.scales[0], expected.scales[0]) and torch.equal(sample.label, expected.label)
