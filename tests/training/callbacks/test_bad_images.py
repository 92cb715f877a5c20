"""Files that cannot be read: the run stops at the first, or leaves them out, counts them, and stops at too many."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from helpers.command_line import TINY, TINY_NETWORK, run_here
from helpers.in_process import TINY_RUN, configured, fit
from semseg import datamodule
from semseg.build import build_data
from semseg.collate import collate
from semseg.config.schema import AugmentConfig, Config
from semseg.data import loaders
from semseg.data.augment import Augmentation
from semseg.data.datasets import EvalDataset, ReadOptions, TrainDataset
from semseg.data.loaders import WatchedLoader
from semseg.data.overlap import find_overlap
from semseg.data.plan import SubBatch
from semseg.data.records import check_bad_fraction
from semseg.data.sources import DataSource
from semseg.errors import DataError
from semseg.modes import eval as evaluate
from semseg.modes import train
from semseg.nets.registry import ENCODERS, Constructor, build_segmenter
from semseg.training.callbacks import bad_images

pytestmark = pytest.mark.reliability


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of which training images 2 and 5 are cut in the middle."""
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    DataSource(configured(*data_words(root)).data)
    for record in (records(root)[2], records(root)[5]):
        cut(Path(record.image))
    return root


@pytest.fixture(autouse=True)
def nothing_reported_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_images, "_reported", set())


def data_words(root: Path) -> list[str]:
    return ["data=scenes", f"data.root={root}", "data.make.num_train=8", "data.make.num_val=5"]


def records(root: Path, split: str = "train") -> list:
    return DataSource(configured(*data_words(root)).data).records(split)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def run_words(root: Path, run_dir: Path, *words: str) -> Config:
    steps = ["data.steps_per_epoch=8", "trainer.max_epochs=1", f"run_dir={run_dir}"]
    return configured(*data_words(root), *TINY_RUN, *steps, *words)


def train_set(root: Path, *, skip_bad: bool) -> TrainDataset:
    source = DataSource(configured(*data_words(root)).data)
    return TrainDataset(
        source.records("train"),
        source.label_map,
        ReadOptions(max_long_edge=64, size_divisor=8, skip_bad=skip_bad),
        collate=collate,
        label_stride=8,
    )


# ---- C1: error or skip


@pytest.mark.slow
def test_c1_a_broken_image_is_an_error_with_its_line_unless_it_is_to_be_left_out(drawn: Path) -> None:
    pair = SubBatch(0, (2, 3), 32, (False, True))
    with pytest.raises(DataError, match=r"training\.odgt:3: .*JPEG is truncated"):
        train_set(drawn, skip_bad=False)[pair]
    batch = train_set(drawn, skip_bad=True)[pair]
    assert len(batch.bad) == 1 and "training.odgt:3" in batch.bad[0]
    alone = train_set(drawn, skip_bad=True)[SubBatch(0, (3,), 32, (True,))]
    assert torch.equal(batch.image, alone.image) and torch.equal(batch.label, alone.label)
    assert batch.paths == alone.paths


@pytest.mark.slow
def test_c1_a_sub_batch_of_broken_images_scores_nothing_and_has_their_size(drawn: Path) -> None:
    batch = train_set(drawn, skip_bad=True)[SubBatch(0, (2, 5), 32, (False, False))]
    assert len(batch.bad) == 2
    assert int(batch.image.max()) == 0 and (batch.label == -1).all()
    assert min(batch.size[0].tolist()) == 32


@pytest.mark.slow
def test_c1_a_sub_batch_of_broken_images_is_not_larger_than_a_crop(drawn: Path) -> None:
    data = train_set(drawn, skip_bad=True)
    data.augmentation = Augmentation(AugmentConfig(crop=[24, 16]), seed=0)
    batch = data[SubBatch(0, (2,), 32, (False,))]
    assert len(batch.bad) == 1 and batch.size.tolist() == [[24, 16]]


@pytest.mark.slow
def test_c1_training_leaves_them_out_and_counts_them(
    drawn: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = run_words(drawn, tmp_path, "data.on_bad=skip", "data.max_bad=0.5")
    content = fit(config)
    assert all(bool(value.isfinite().all()) for value in content["state_dict"].values() if value.is_floating_point())
    counted = content["callbacks"]["CountBadImages"]
    assert counted["seen"] == 16
    assert counted["left_out"] == 4  # two of eight images, seen twice
    assert capfd.readouterr().err.count("left out: ") == 2  # reported once each
    last = (tmp_path / "logs/metrics.csv").read_text().splitlines()
    assert last[0].split(",").index("data/left_out") > 0
    again = fit(run_words(drawn, tmp_path / "again", "data.on_bad=skip", "data.max_bad=0.5", "data.num_workers=2"))
    for name, value in content["state_dict"].items():
        assert torch.equal(value, again["state_dict"][name])  # workers change no bit


@pytest.mark.slow
def test_c1_steps_of_a_fused_optimiser_are_counted_in_their_own_row_of_the_log(drawn: Path, tmp_path: Path) -> None:
    columns = []
    for fused in ("false", "true"):  # the counts of a fused one come back one step later
        words = ["data.on_bad=skip", "data.max_bad=0.5", "data.steps_per_epoch=6", f"optim.fused={fused}"]
        content = fit(run_words(drawn, tmp_path / fused, *words))
        with (tmp_path / fused / "logs/metrics.csv").open(newline="") as file:
            counts = [row["data/left_out"] for row in csv.DictReader(file) if row["data/left_out"]]
        assert float(counts[-1]) == content["callbacks"]["CountBadImages"]["left_out"] > 0
        columns.append(counts)
    assert columns[0] == columns[1] and len(columns[0]) == 6


def test_c1_too_many_broken_images_stop_the_run(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 of \d+ images could not be read, more than data\.max_bad=0\.01"):
        fit(run_words(drawn, tmp_path, "data.on_bad=skip"))


def test_c1_one_in_a_hundred_is_no_reason_to_stop() -> None:
    check_bad_fraction(1, 3, 0.01)  # the first of few says nothing
    check_bad_fraction(10, 1000, 0.01)
    for left_out, seen in ((2, 100), (11, 1000)):
        with pytest.raises(DataError):
            check_bad_fraction(left_out, seen, 0.01)


@pytest.mark.slow
def test_c1_an_evaluation_leaves_them_out_names_them_and_scores_the_others_alike(drawn: Path, tmp_path: Path) -> None:
    broken = tmp_path / "scenes"
    shutil.copytree(drawn, broken)
    whole = run_words(drawn, tmp_path / "run", "data.on_bad=skip", "data.max_bad=1")
    fit(whole)
    cut(Path(records(broken, "val")[1].image))
    rows = []
    with patch.dict(ENCODERS, {"tiny": Constructor("helpers.in_process", "TinyEncoder")}):
        for name, root in (("whole", drawn), ("broken", broken)):
            out = tmp_path / name
            out.mkdir()
            words = ["mode=eval", f"ckpt={tmp_path / 'run'}", f"data.root={root}", f"run_dir={out}", "trainer=cpu",
                     "data.on_bad=skip", "trainer.enable_progress_bar=false", "eval.visualize=true"]  # fmt: skip
            evaluate.run(configured(*words), words)
            rows.append((out / "per_image.csv").read_text().splitlines())
    metrics = json.loads((tmp_path / "broken/metrics.json").read_text())
    assert metrics["images"] == 4 and len(metrics["left_out"]) == 1
    assert "JPEG is truncated" in metrics["left_out"][0]["reason"]
    scores = [[row.split(",")[:3] for row in table] for table in rows]
    assert len(scores[0]) == 1 + 5 and len(scores[1]) == 1 + 4
    assert [row for row in scores[0] if "scene_00002" not in str(row)] == scores[1]
    assert "4 images (1 unreadable)" in (tmp_path / "broken/report.html").read_text()


def test_c1_an_evaluation_without_a_readable_image_ends_with_an_error_and_writes_nothing(tmp_path: Path) -> None:
    run_here(tmp_path, *TINY, *TINY_NETWORK, "run_dir=run", "data.make.num_val=1", "trainer.limit_train_batches=1")
    (image,) = (tmp_path / "scenes/images/validation").iterdir()
    cut(image)
    words = ["mode=eval", "ckpt=run", "data.on_bad=skip", "data.num_workers=0", "trainer=cpu", "run_dir=scores"]
    printed = run_here(tmp_path, *words, code=1)
    assert f"{image.name}: " in printed
    assert "error: eval.split=val: none of its images could be read" in printed
    assert not list((tmp_path / "scores").glob("*.csv"))


# ---- C15: too few


def test_c15_fewer_images_than_a_step_takes_is_reported_before_the_network_is_built(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "build_network", lambda *_: pytest.fail("built"))
    config = run_words(drawn, tmp_path, "data.batch_size=9")
    with pytest.raises(DataError, match=r"data\.train has 8 images, one step takes 9: data\.batch_size=9 on 1 devices"):
        train.run(config, [])


# ---- C17: workers


class Trouble(Dataset[int]):
    """Item 2 kills its worker, or keeps it for a minute."""

    def __init__(self, *, kills: bool) -> None:
        self.kills = kills

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if index == 2 and self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 2:
            time.sleep(60)
        return index


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "timeout", "reason"), [(True, 60.0, "killed|exited"), (False, 0.3, "timed out")])
@pytest.mark.usefixtures("short_grace")
def test_c17_a_worker_that_dies_or_hangs_is_reported_with_the_image_in_its_hands(
    kills: bool, timeout: float, reason: str
) -> None:
    loader = WatchedLoader(
        Trouble(kills=kills), lambda number: [f"{number}.jpg"], timeout, batch_size=None, num_workers=1
    )
    found: list[int] = []
    started = time.monotonic()
    # Item 1 may be lost with the worker.
    with pytest.raises(DataError, match=rf"waiting for (1\.jpg, )?2\.jpg(, 3\.jpg)?: .*({reason})"):
        found.extend(iter(loader))
    assert time.monotonic() - started < 20


@pytest.mark.slow
@pytest.mark.usefixtures("short_grace")
def test_c17_a_long_wait_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "SLOW_ITEM_S", 0.1)
    loader = WatchedLoader(Trouble(kills=False), lambda number: [f"{number}.jpg"], 0.6, batch_size=None, num_workers=1)
    with pytest.warns(UserWarning, match=r"has been waiting for 2\.jpg for \d s") as warnings, pytest.raises(DataError):
        list(loader)
    # On a busy machine the start of the worker may take as long, and be reported as the wait for the first image.
    assert sum("has been waiting for 2.jpg" in str(one.message) for one in warnings) == 1


def test_c17_without_the_shared_memory_that_workers_need_there_are_none(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_words(drawn, tmp_path, "data.num_workers=2")
    data = build_data(config, DataSource(config.data), build_segmenter("resnet18", "c1", 8))
    batch = data.largest_batch()
    # What a loss needs may grow with the number of classes.
    assert {len(label.unique()) for label in batch.label} == {data.source.classes.num_classes}
    needed = 2 * 2 * (batch.image.nbytes + batch.label.nbytes)  # two workers, two sub-batches each
    monkeypatch.setattr(datamodule, "get_free_shared_memory", lambda: needed)
    assert data.train_dataloader().num_workers == 2
    monkeypatch.setattr(datamodule, "get_free_shared_memory", lambda: needed - 1)
    assert data.train_dataloader().num_workers == 2  # as forks they need none
    monkeypatch.setattr(datamodule.shared_slots, "slots_are_possible", lambda: False)
    with pytest.warns(UserWarning, match="images are read without workers.*--shm-size"):
        assert data.train_dataloader().num_workers == 0
    needed = 2 * 2 * data.largest_sample_bytes(data.source.records("val"))
    monkeypatch.setattr(datamodule, "get_free_shared_memory", lambda: needed)
    assert data.val_dataloader().num_workers == 2
    monkeypatch.setattr(datamodule, "get_free_shared_memory", lambda: needed - 1)
    with pytest.warns(UserWarning, match="images are read without workers.*--shm-size"):
        assert data.val_dataloader().num_workers == 0


def test_c17_training_and_evaluation_watch_their_workers(drawn: Path, tmp_path: Path) -> None:
    config = run_words(drawn, tmp_path, "data.num_workers=1", "data.worker_timeout_s=7")
    data = build_data(config, DataSource(config.data), build_segmenter("resnet18", "c1", 8))
    stream = data.train_dataloader().loader_from(3)
    assert isinstance(stream, WatchedLoader) and stream.timeout_s == 7
    assert isinstance(data.val_dataloader(), WatchedLoader) and data.val_dataloader().timeout_s == 7
    sub_batch = data.train_dataloader().plan.sub_batch(5)
    assert stream._images_of(2) == [records(drawn)[index].image for index in sub_batch.records]


# ---- C18: two splits


def test_c18_images_in_both_splits_are_counted_by_path_and_by_content(drawn: Path, tmp_path: Path) -> None:
    training, validation = records(drawn), records(drawn, "val")
    assert find_overlap(training, validation) is None
    twin = tmp_path / "twin.jpg"
    shutil.copy(training[0].image, twin)
    same_length = tmp_path / "other.jpg"
    same_length.write_bytes(bytes(twin.stat().st_size))
    extra = [training[1], training[0]._replace(image=str(twin)), training[0]._replace(image=str(same_length))]
    gone = training[0]._replace(image="/nowhere.jpg")
    common = find_overlap([*training, gone], [*validation, *extra])
    assert common is not None
    assert (common.same_path, common.same_content) == ([training[1].image], [str(twin)])
    assert str(common).startswith("2 validation images also used for training (1 by path, 1 by content), such as /")


def test_c18_training_says_so(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    list_file = drawn / "training.odgt"
    (drawn / "both.odgt").write_text("\n".join(list_file.read_text().splitlines()[:2]))
    config = run_words(drawn, tmp_path, "data.val.list=both.odgt", "data.batch_size=1")
    train.check_records(DataSource(config.data), 1)
    assert "2 validation images also used for training" in capsys.readouterr().err


@pytest.mark.slow
def test_c1_an_eval_sample_of_a_broken_image_carries_the_reason(drawn: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    cut(path)
    record = records(drawn)[0]._replace(image=str(path))
    label_map = DataSource(configured(*data_words(drawn)).data).label_map
    options = ReadOptions(max_long_edge=64, size_divisor=8, skip_bad=True)
    sample = EvalDataset([record], label_map, options, short_edges=[32], antialias=True)[0]
    assert sample.scales == [] and "truncated" in sample.bad
    with pytest.raises(DataError):
        EvalDataset([record], label_map, replace(options, skip_bad=False), short_edges=[32], antialias=True)[0]
