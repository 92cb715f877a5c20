"""From list to batch: equal to the 2018 pipeline's tensors, and to itself for any number of workers."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from helpers.records import odgt_records
from semseg.collate import collate
from semseg.config.preprocessing import PREPROCESSING
from semseg.data.batch import Batch
from semseg.data.datasets import EvalDataset, ReadOptions, TrainDataset
from semseg.data.geometry import Size
from semseg.data.label_map import LabelMap
from semseg.data.plan import RankSequence, SubBatch, TrainPlan
from semseg.data.records import Record
from semseg.data.workers import stop_workers
from semseg.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden/dataset"
PIXELS = json.loads((GOLDEN / "pixels.json").read_text())["pixels"]
LABELS = np.load(GOLDEN / "labels.npz")
RECORDS = odgt_records(GOLDEN / "list.odgt", GOLDEN)
BY_NAME = {Path(record.image).stem: index for index, record in enumerate(RECORDS)}
LABEL_MAP = LabelMap(num_classes=150)
OPTIONS = ReadOptions(max_long_edge=1000, size_divisor=8)


def train_set(size_divisor: int = 8, label_stride: int = 8, *, exact: bool = True) -> TrainDataset:
    options = ReadOptions(max_long_edge=1000, size_divisor=size_divisor)
    return TrainDataset(RECORDS, LABEL_MAP, options, collate=collate, label_stride=label_stride, exact=exact)


def eval_set(label_map: LabelMap | None, short_edges: list[int], antialias: bool) -> EvalDataset:
    return EvalDataset(RECORDS, label_map, OPTIONS, short_edges=short_edges, antialias=antialias)


def one(name: str, short_edge: int, is_flipped: bool) -> SubBatch:
    return SubBatch(0, (BY_NAME[name],), short_edge, (is_flipped,))


def normalised_2018(image: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """uint8 (3, H, W) RGB to float32 (1, 3, H, W) BGR minus mean, 0 outside `size`."""
    mean = np.array(PREPROCESSING["bgr_mean"].mean, np.float32)
    values = image.numpy()[::-1].astype(np.float32) - mean[:, None, None]
    inside = np.zeros(values.shape, np.float32)
    inside[:, : size[0], : size[1]] = 1
    return (values * inside)[None]


def golden_places(size: int) -> np.ndarray:
    """The 64 flat indices at which reference values were taken."""
    seed = int.from_bytes(hashlib.sha256(b"samples").digest()[:8], "little")
    uniform = (np.random.PCG64(seed).random_raw(64) >> np.uint64(11)) * 2.0**-53
    return np.floor(uniform * size).astype(int)


def assert_pixels(values: np.ndarray, golden: dict, largest: float, mean: float) -> None:
    """Samples within `largest`, statistics of channels within `mean` (grey levels)."""
    assert list(values.shape) == golden["shape"]
    samples = values.reshape(-1)[golden_places(values.size)]
    assert np.abs(samples - golden["samples"]).max() <= largest + 1e-4
    wide = values.astype(np.float64)
    assert np.abs(wide.mean((0, 2, 3)) - golden["channel_mean"]).max() <= mean + 1e-4
    assert np.abs(wide.std((0, 2, 3)) - golden["channel_std"]).max() <= mean + 1e-2
    assert np.abs(wide.min((0, 2, 3)) - golden["channel_min"]).max() <= largest + 1e-4
    assert np.abs(wide.max((0, 2, 3)) - golden["channel_max"]).max() <= largest + 1e-4


@pytest.mark.parametrize("key", [key for key in PIXELS if "train" in key])
def test_training_pixels_are_within_one_grey_level_of_2018(key: str) -> None:
    name, short_edge, is_flipped = key[:8], int(key.split("/")[1][5:]), key.endswith("flipped")
    batch = train_set()[one(name, short_edge, is_flipped)]
    height, width = batch.size[0].tolist()
    assert_pixels(normalised_2018(batch.image[0], (height, width)), PIXELS[key]["old"], largest=1, mean=0.01)


@pytest.mark.parametrize("key", [key for key in PIXELS if "val" in key])
def test_evaluation_pixels_are_those_of_2018(key: str) -> None:
    name, short_edge = key[:8], int(key.split("/")[1][3:])
    sample = eval_set(LABEL_MAP, [short_edge], antialias=False)[BY_NAME[name]]
    (image,) = sample.scales
    assert_pixels(normalised_2018(image, (image.shape[1], image.shape[2])), PIXELS[key]["old"], largest=0, mean=0)


@pytest.mark.parametrize("key", [key for key in PIXELS if "val" in key])
def test_evaluation_pixels_of_2020_are_within_one_grey_level(key: str) -> None:
    name, short_edge = key[:8], int(key.split("/")[1][3:])
    convention = PREPROCESSING["rgb_mean_std"]
    sample = eval_set(LABEL_MAP, [short_edge], convention.antialias)[BY_NAME[name]]
    values = sample.scales[0].numpy().astype(np.float64) * convention.scale
    values = (values - np.array(convention.mean)[:, None, None]) / np.array(convention.std)[:, None, None]
    assert_pixels(values[None], PIXELS[key]["head"], largest=1 / 255 / min(convention.std), mean=0.001)


@pytest.mark.parametrize("key", list(LABELS))
def test_training_labels_are_exactly_those_of_2018(key: str) -> None:
    name, short, padding, rate = key.split("/")[:4]
    dataset = train_set(int(padding[3:]), int(rate[4:]))
    batch = dataset[one(name, int(short[5:]), key.endswith("flipped"))]
    assert np.array_equal(batch.label[0].numpy(), LABELS[key])


@pytest.mark.reliability
def test_c12_padding_is_never_scored_in_a_mixed_sub_batch() -> None:
    members = tuple(BY_NAME[name] for name in ("scene_01", "scene_05", "scene_12"))
    alone = [train_set(32, 4)[SubBatch(0, (member,), 300, (False,))] for member in members]
    together = train_set(32, 4)[SubBatch(0, members, 300, (False,) * 3)]
    assert (together.label >= 0).sum() == sum((batch.label >= 0).sum() for batch in alone)
    for place, batch in enumerate(alone):
        rows, columns = batch.label.shape[1:]
        assert torch.equal(together.label[place, :rows, :columns], batch.label[0])
        height, width = batch.size[0].tolist()
        assert torch.equal(together.image[place, :, :height, :width], batch.image[0, :, :height, :width])


def loaded(num_workers: int, start: int = 0, num_steps: int = 6, context: str | None = None) -> list[Batch]:
    sizes = [record.size for record in RECORDS]
    plan = TrainPlan(sizes, seed=304, batch_size=2, short_edges=[75, 100, 150])
    sequence = RankSequence(plan, rank=0, world_size=1, start=start, num_steps=num_steps)
    loader = DataLoader(
        train_set(),
        batch_size=None,
        sampler=sequence,  # pyright: ignore[reportArgumentType]
        num_workers=num_workers,
        multiprocessing_context=context,
    )
    return list(loader)


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for batch, twin in zip(one, other, strict=True):
        assert batch.paths == twin.paths
        assert all(torch.equal(a, b) for a, b in zip(batch[:3], twin[:3], strict=True))


@pytest.mark.slow
def test_batches_are_bit_identical_for_any_number_of_workers() -> None:
    alone = loaded(0)
    assert isinstance(alone[0], Batch)
    assert_equal(alone, loaded(1))
    assert_equal(alone, loaded(2))
    assert_equal(alone[4:], loaded(2, start=4, num_steps=2))  # a resumed run, with other workers


def test_a_pickled_data_set_gives_the_same_batches() -> None:
    dataset = train_set()
    copied = pickle.loads(pickle.dumps(dataset))
    assert_equal([copied[one("scene_01", 300, True)]], [dataset[one("scene_01", 300, True)]])


@pytest.mark.long
def test_batches_are_bit_identical_for_spawned_workers() -> None:
    assert_equal(loaded(0, num_steps=2), loaded(1, num_steps=2, context="spawn"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_evaluation_sample_has_every_scale_and_the_label_at_full_size(num_workers: int) -> None:
    dataset = eval_set(LABEL_MAP, [300, 450], antialias=True)
    assert len(dataset) == 6
    sample = next(iter(DataLoader(dataset, batch_size=None, num_workers=num_workers)))
    assert all(torch.equal(*scales) for scales in zip(sample.scales, dataset[0].scales, strict=True))
    assert torch.equal(sample.label, dataset[0].label)
    assert [tuple(scale.shape) for scale in sample.scales] == [(3, 304, 400), (3, 456, 600)]
    assert all(scale.dtype == torch.uint8 for scale in sample.scales)
    assert sample.label.shape == (512, 683)
    assert sample.label.dtype == torch.int64
    assert sample.size.tolist() == [512, 683]
    assert (sample.path, sample.position) == (RECORDS[0].image, 0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_prediction_needs_no_label(num_workers: int) -> None:
    loader = DataLoader(eval_set(None, [300], antialias=True), batch_size=None, num_workers=num_workers, sampler=[1])
    sample = next(iter(loader))
    assert sample.label.shape == (0, 0)
    assert sample.size.tolist() == [1000, 300]


def test_training_without_labels_or_with_a_wrong_stride_is_refused() -> None:
    record = Record("a.jpg", None, Size(1, 1), "train.odgt:5")
    with pytest.raises(DataError, match=r"train\.odgt:5: a\.jpg has no label"):
        TrainDataset([record], LABEL_MAP, OPTIONS, collate=collate, label_stride=8)
    with pytest.raises(ValueError, match="must divide"):
        train_set(size_divisor=8, label_stride=3)


@pytest.mark.slow
@pytest.mark.usefixtures("short_grace")
def test_a_broken_file_in_a_worker_names_itself() -> None:
    missing = [*RECORDS[:1], RECORDS[1]._replace(image="/no/such.jpg")]
    dataset = EvalDataset(missing, LABEL_MAP, OPTIONS, short_edges=[75], antialias=True)
    items = iter(DataLoader(dataset, batch_size=None, num_workers=1))
    with pytest.raises(DataError, match=r"list\.odgt:2: /no/such\.jpg: there is no such file"):
        list(items)
    stop_workers(items)


@pytest.mark.shared
def test_the_real_ade20k_samples_are_read() -> None:
    root = Path(__file__).parents[2].parent / "shared/ade20k_samples"
    if not root.exists():
        pytest.skip("no shared data")
    for name in ("training", "validation"):
        records = odgt_records(root / f"{name}.odgt", root)
        dataset = EvalDataset(records, LABEL_MAP, OPTIONS, short_edges=[75], antialias=True)
        for index, record in enumerate(records):
            sample = dataset[index]
            assert sample.size.tolist() == list(record.size)
            assert sample.label.max() < 150
