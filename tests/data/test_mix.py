"""Several data sets in one training (data.mix): shares, classes by name, messages, and what a run reads."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from helpers.command_line import run_here
from helpers.in_process import TINY_RUN, PreparedRun, assert_equal, configured, fit
from semseg.collate import collate
from semseg.config.mix import read_mix
from semseg.config.schema import DataConfig, SplitConfig
from semseg.data.datasets import ReadOptions, TrainDataset
from semseg.data.foreground import build_foreground_index
from semseg.data.geometry import Size
from semseg.data.label_cache import LabelCache
from semseg.data.open_pairs import open_pair
from semseg.data.pairs import read_pair
from semseg.data.plan import RankSequence, TrainPlan, share_repeats
from semseg.data.scenes import make_scenes
from semseg.data.sources import DataSource
from semseg.data.windows import Window
from semseg.errors import ConfigError, DataError

# ---- the plan


def plan_of(counts: list[int], shares: list[float], batch_size: int = 4, portraits: float = 0.0) -> TrainPlan:
    sources = np.repeat(np.arange(len(counts)), counts)
    is_tall = np.random.default_rng(1).random(len(sources)) < portraits
    sizes = [Size(4, 3) if tall else Size(3, 4) for tall in is_tall]
    repeats = share_repeats(sources, shares)
    return TrainPlan(sizes, seed=7, batch_size=batch_size, short_edges=[32], repeats=repeats, sources=sources)


def taken(plan: TrainPlan, counts: list[int], numbers: range) -> Counter[int]:
    """The images of each data set in some sub-batches."""
    ends = np.cumsum(counts)
    return Counter(
        int(np.searchsorted(ends, record, side="right"))
        for number in numbers
        for record in plan.sub_batch(number).records
    )


def test_after_any_number_of_steps_each_data_set_has_had_its_share_up_to_an_image() -> None:
    counts, shares = [10, 83, 7], [0.2, 0.5, 0.3]
    plan = plan_of(counts, shares)
    total: Counter[int] = Counter()
    for number in range(200):
        total += taken(plan, counts, range(number, number + 1))
        images = 4 * (number + 1)
        for source, share in enumerate(shares):
            assert abs(total[source] - share * images) <= 2, (number, total)


def test_a_pass_has_every_image_as_often_as_its_share_says() -> None:
    counts, shares = [10, 83, 7], [0.2, 0.5, 0.3]
    plan = plan_of(counts, shares, batch_size=1)
    assert plan.num_records == 166  # 83 images once are one half
    seen = Counter(record for number in range(166) for record in plan.sub_batch(number).records)
    assert set(seen) == set(range(100))
    assert {seen[record] for record in range(10)} == {3, 4} and {seen[record] for record in range(93, 100)} == {7, 8}
    assert all(seen[record] == 1 for record in range(10, 93))


def test_portraits_keep_the_shares_over_a_pass_and_are_never_mixed_with_the_others() -> None:
    counts, shares = [40, 160], [0.5, 0.5]
    plan = plan_of(counts, shares, batch_size=2, portraits=0.3)
    steps = 4 * plan.steps_in_pass(1)
    total = taken(plan, counts, range(steps))
    assert abs(total[0] - total[1]) <= 12  # of 1280 images; 2 queues hold back up to one image each
    is_tall = np.random.default_rng(1).random(200) < 0.3
    assert all(
        len({bool(is_tall[record]) for record in plan.sub_batch(number).records}) == 1 for number in range(steps)
    )


def test_a_sub_batch_depends_on_its_number_alone() -> None:
    counts, shares = [9, 30], [0.6, 0.4]
    plan = plan_of(counts, shares)
    expected = [plan.sub_batch(number) for number in range(60)]
    fresh = pickle.loads(pickle.dumps(plan_of(counts, shares)))  # as workers get it
    assert [fresh.sub_batch(number) for number in reversed(range(60))] == expected[::-1]
    ranks = [RankSequence(plan, rank=rank, world_size=2, start=5, num_steps=10) for rank in range(2)]
    assert [item for step in zip(*ranks, strict=True) for item in step] == expected[10:30]


def test_repeats_of_rare_classes_change_nothing_about_the_shares() -> None:
    sources, repeats = np.array([0, 0, 0, 1, 1]), np.array([1.0, 1.0, 4.0, 1.0, 2.0])
    found = share_repeats(sources, [0.25, 0.75], repeats)
    assert found.min() == 1 and found[:3].sum() / found.sum() == pytest.approx(0.25)
    assert found[2] / found[0] == pytest.approx(4) and found[4] / found[3] == pytest.approx(2)


# ---- the configuration


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"root": "a", "share": 0.5}, r"data.mix=\{.*must be a list of data sets with their shares"),
        ([0.5], "must be a list of data sets"),
        ([{"root": "a"}], r"data.mix\[0\].share=None: must be the fraction"),
        ([{"root": "a", "share": 1}], r"data.mix\[0\].share=1: must be the fraction of the training images"),
        ([{"root": "a", "share": 0.5}, {"root": "b", "share": 0.5}], "shares sum to 1, which leaves nothing"),
        ([{"root": "a", "share": 0.5}, {"rot": "b", "share": 0.1}], r"data.mix\[1\].rot: there is no such key. Did"),
        ([{"share": 0.5}], r"data.mix\[0\]: must name its files"),
        ([{"share": 0.5, "images": "a"}], r"data.mix\[0\]: must name its files"),
        ([{"root": "a", "share": 0.5, "first_id": "x"}], r"data.mix\[0\].first_id: .*'x'"),
        ([{"root": "a", "share": 0.5, "train": {"image": "b"}}], r"data.mix\[0\].*image"),
        ([{"root": "a", "share": 0.5, "map": {"x": 1}}], r"data.mix\[0\].map="),
        ([{"root": "a", "share": 0.5, "class_map": {"bus": "car"}}], "class_map: needs .*classes=<table>"),
        ([{"root": "a", "share": 0.5, "classes": "c.csv", "class_map": {"bus": 1}}], "must be names of its classes"),
    ],
)  # fmt: skip
def test_entries_that_say_nothing_valid_are_refused_with_their_number(mix: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_mix(DataConfig(root="main", train=SplitConfig(images="images", masks="masks"), mix=mix))


def test_a_key_that_an_entry_does_not_have_is_that_of_the_main_data_set() -> None:
    main = DataConfig(
        root="main", first_id=0, ignore=[255], num_classes=3, val_fraction=0.2, limit=5, mask_suffix="_m",
        mix=[{"root": "more", "share": 0.25, "ignore": [9], "train": {"images": "i", "masks": "m"}},
             {"images": "x", "masks": "y", "share": 0.25, "classes": "c.csv"}],
    )  # fmt: skip
    first, second = read_mix(main)
    assert (first.share, first.data.root, first.data.ignore, first.data.first_id) == (0.25, "more", [9], 0)
    assert (first.data.mask_suffix, first.data.val_fraction, first.data.limit, first.data.mix) == (
        "_m",
        0.0,
        5,
        None,
    )
    assert (first.data.train.images, first.data.num_classes, first.has_own_classes) == ("i", 3, False)
    assert (second.data.images, second.data.num_classes, second.has_own_classes) == ("x", None, True)
    assert read_mix(DataConfig()) == []


def test_the_command_line_takes_a_list(tmp_path: Path) -> None:
    mix = "data.mix=[{root: more, share: 0.5, ignore: [0, 255]}]"
    config = configured("data=folder", "data.num_classes=2", mix)
    assert config.data.mix == [{"root": "more", "share": 0.5, "ignore": [0, 255]}]
    output = run_here(tmp_path, "data=folder", "data.num_classes=2", "data.mix=[{root: more, shares: 0.5}]", code=2)
    assert "data.mix[0].shares: there is no such key. Did you mean share?" in output


# ---- what is read


def draw(root: Path, names: list[str], ids: dict[str, int], suffix: str = ".png") -> None:
    """Images 32 x 48 with a left and a right half: `names` are pairs of classes, such as sky-road."""
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for number, pair in enumerate(names):
        mask = np.zeros((32, 48), np.uint8)
        mask[:, :24], mask[:, 24:] = (ids[name] for name in pair.split("-"))
        cv2.imwrite(str(root / "masks" / f"{number}.png"), mask)
        cv2.imwrite(str(root / "images" / f"{number}{suffix}"), np.full((32, 48, 3), 40 * number, np.uint8))


def write_classes(root: Path, *names: str) -> None:
    rows = [f"{index},{name},{index},{index},{index}" for index, name in enumerate(names, start=1)]
    (root / "classes.csv").write_text("\n".join(["index,name,R,G,B", *rows]) + "\n")


@pytest.fixture
def main_config(tmp_path: Path) -> DataConfig:
    """sky, road, car from 1; beside it `other` with road 5, bus 6, Sky 7."""
    draw(tmp_path / "main", ["sky-road", "road-car"], {"sky": 1, "road": 2, "car": 3})
    write_classes(tmp_path / "main", "sky", "road", "car")
    draw(tmp_path / "other", ["road-bus", "Sky-road", "tree-road"], {"road": 5, "bus": 6, "Sky": 7, "tree": 8})
    write_classes(tmp_path / "other", "road", "bus", "Sky", "tree")
    entry = {"root": str(tmp_path / "other"), "share": 0.5, "classes": "classes.csv", "first_id": 5, "ignore": []}
    config = DataConfig(root=str(tmp_path / "main"), classes="classes.csv", ignore=[0], mix=[entry])
    config.train.images, config.train.masks = "images", "masks"
    return config


def test_classes_are_those_of_the_same_name_and_others_must_be_mapped(main_config: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"data.mix\[0\]: its class bus \(classes.csv\) is no class .*sky, road, car"):
        DataSource(main_config).training_records()
    entry = main_config.mix[0]
    for class_map, message in (
        ({"bus": "truck", "tree": None}, "bus: truck is no class of the main data set"),
        ({"Bus": "car", "tree": None, "train": "car"}, "class_map: train is no class of classes.csv"),
    ):
        entry["class_map"] = class_map
        with pytest.raises(ConfigError, match=message):
            DataSource(main_config).training_records()
    entry["class_map"] = {"Bus": "car", "tree": None}
    source = DataSource(main_config)
    records = source.training_records()
    assert records[0].origin.endswith("images") and records[2].origin == "data.mix[0]"
    assert [record.source for record in records] == [0, 0, 1, 1, 1] and len(source.records("train")) == 2
    assert source.shares == [0.5, 0.5]
    halves = [read_pair(record, source.label_map).label[0, [0, -1]].tolist() for record in records]  # pyright: ignore
    assert halves == [[0, 1], [1, 2], [1, 2], [0, 1], [-1, 1]]


def test_a_folder_that_describes_other_classes_must_name_them(main_config: DataConfig) -> None:
    """As mode=import writes folders: their ids would mean the classes of the main data set."""
    entry = main_config.mix[0]
    classes = entry.pop("classes")
    Path(entry["root"], "semseg.yaml").write_text(f"classes: {classes}\n")
    with pytest.raises(ConfigError, match=r"data\.mix\[0\]: .*semseg\.yaml names classes of its own.* as `classes`"):
        DataSource(main_config).training_records()
    write_classes(Path(entry["root"]), "Sky", "road", "car")
    assert len(DataSource(main_config).parts) == 1


def test_a_further_data_set_may_have_one_class(main_config: DataConfig) -> None:
    (Path(main_config.mix[0]["root"]) / "classes.csv").write_text("index,name,R,G,B\n0,car,1,2,3\n")
    assert DataSource(main_config).parts[0].source.classes.names == ("car",)


def test_every_way_to_read_a_label_uses_the_map_of_its_data_set(main_config: DataConfig, tmp_path: Path) -> None:
    main_config.mix[0]["class_map"] = {"bus": "car", "tree": None}
    source = DataSource(main_config)
    records, cache = source.training_records(), LabelCache(tmp_path / "cache", source.label_map)
    plan = TrainPlan(
        [record.size for record in records], seed=0, batch_size=5, short_edges=[32], flip=False, shuffle=False
    )
    for _ in range(2):  # the second time from the cache
        for exact in (False, True):
            options = ReadOptions(64, 8, cache=cache)
            dataset = TrainDataset(records, source.label_map, options, collate=collate, label_stride=8, exact=exact)
            label = dataset[plan.sub_batch(0)].label
            assert label[:, 0, [0, -1]].tolist() == [[0, 1], [1, 2], [1, 2], [0, 1], [-1, 1]]
        with open_pair(records[2], source.label_map, cache=cache) as pair:
            assert pair.read(Window(0, 20, 4, 8)).label[0].tolist() == [1] * 4 + [2] * 4
    index = build_foreground_index(records, tmp_path, source.label_map, cache_dir=tmp_path)
    assert [index.classes[a:b].tolist() for a, b in zip(index.label_starts, index.label_starts[1:], strict=False)] == [
        [0, 1], [1, 2], [1, 2], [0, 1], [1]
    ]  # fmt: skip


def test_messages_about_another_data_set_begin_with_its_key(main_config: DataConfig, tmp_path: Path) -> None:
    main_config.mix[0] |= {"class_map": {"bus": "car", "tree": None}, "train": {"images": "pictures", "masks": "masks"}}
    source = DataSource(main_config)
    for call in (source.training_records, lambda: source.require_paths("train")):
        with pytest.raises(DataError, match=r"^data.mix\[0\]: .*pictures"):
            call()
    assert len(source.records("train")) == 2  # what evaluates needs no other data set


# ---- runs


def mixed_words(tmp_path: Path) -> list[str]:
    """Overrides for drawn scenes with half of the images from other scenes."""
    for name, seed in (("scenes", 1), ("others", 2)):
        make_scenes(tmp_path / name, num_train=4, num_val=1, seed=seed)
    lists = "train: {list: training.odgt}"
    mix = f"data.mix=[{{root: {tmp_path / 'others'}, share: 0.5, {lists}}}]"
    main = ["data=scenes", f"data.root={tmp_path / 'scenes'}", "data.make.num_train=4", "data.make.num_val=1"]
    return [*main, *TINY_RUN, "data.steps_per_epoch=3", "trainer.max_epochs=2", mix]


@pytest.mark.slow
def test_a_run_of_two_data_sets_is_resumed_exactly_and_workers_change_nothing(tmp_path: Path) -> None:
    words = mixed_words(tmp_path)
    kept = ["checkpoint.every_n_steps=2", "checkpoint.keep=9", "data.num_workers=2"]
    whole = fit(configured(*words, *kept, f"run_dir={tmp_path / 'whole'}"))
    (first,) = (tmp_path / "whole" / "checkpoints").glob("step_*2.ckpt")
    resumed = fit(configured(*words, f"run_dir={tmp_path / 'resumed'}"), resume=first)
    assert_equal(resumed["state_dict"], whole["state_dict"])
    prepared = PreparedRun(configured(*words, f"run_dir={tmp_path / 'x'}"))
    paths = [
        prepared.data.source.training_records()[record].image
        for number in range(6)
        for record in prepared.data.plan().sub_batch(number).records
    ]
    assert sum("others" in path for path in paths) == 6 == len(paths) // 2
    alone = fit(configured(*words[:-1], f"run_dir={tmp_path / 'alone'}"))
    assert not all(torch.equal(value, whole["state_dict"][name]) for name, value in alone["state_dict"].items())


@pytest.mark.slow
def test_the_start_of_a_run_and_the_check_name_the_data_sets(tmp_path: Path) -> None:
    words = mixed_words(tmp_path)
    output = run_here(tmp_path, *words, "trainer.max_steps=1", "run_dir=run")
    assert "50% of the images from scenes, 50% from 4 images in others" in " ".join(output.split())
    run_here(tmp_path, "mode=check", *words, "run_dir=check")
    notices = [notice["text"] for notice in json.loads((tmp_path / "check" / "check.json").read_text())["notices"]]
    assert any(text.startswith("data.mix[0]: 4 pairs for 50% of the training images, with ") for text in notices)
    label = next((tmp_path / "others" / "annotations" / "training").glob("*.png"))
    cv2.imwrite(str(label), np.full_like(cv2.imread(str(label), cv2.IMREAD_UNCHANGED), 99))
    output = run_here(tmp_path, "mode=check", *words, "run_dir=again", code=1)
    assert "NOT READY" in output and "data.mix[0]" in output and "99" in output
    output = run_here(tmp_path, *words, "trainer.max_steps=1", "run_dir=run2", code=1)
    assert "data.mix[0]: " in output and "99" in output and "others" in output
