"""The drawn data set: the same pixels from the same seed, whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from helpers.records import odgt_records
from semseg.data import scenes
from semseg.data.classes import ClassTable
from semseg.data.label_map import LabelMap
from semseg.data.pairs import read_pair
from semseg.data.scenes import SCENE_CLASSES, Scene, draw_scene, make_scenes
from semseg.data.seeding import generator_for
from semseg.errors import DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes", num_train=12, num_val=4, seed=304)


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return [draw_scene(generator_for(304, 0, index)) for index in range(150)]


@pytest.mark.slow
def test_the_pixels_are_those_of_the_version(drawn: list[Scene]) -> None:
    """If this fails on purpose, raise scenes.VERSION, or old data sets on disk are taken for new ones."""
    digest = hashlib.sha256()
    for scene in drawn[:20]:
        digest.update(scene.image.tobytes())
        digest.update(scene.label.tobytes())
    assert scenes.VERSION == 1
    assert digest.hexdigest()[:16] == "05a801079798679f"


def test_the_files_are_ade20ks_layout(root: Path) -> None:
    for split, count in (("training", 12), ("validation", 4)):
        records = odgt_records(root / f"{split}.odgt", root)
        assert len(records) == count
        for record in records:
            assert record.image.startswith(f"{root}/images/{split}/")
            assert str(record.label).startswith(f"{root}/annotations/{split}/")
            assert read_pair(record, LabelMap(SCENE_CLASSES.num_classes)).label is not None
    assert ClassTable.from_csv(root / "classes.csv") == SCENE_CLASSES
    assert [path.name for path in root.parent.glob(".*")] == [".scenes.lock"]  # the draft is gone


def test_labels_on_disk_are_exact_and_images_nearly(root: Path) -> None:
    scene = draw_scene(generator_for(304, 1, 2))
    label = cv2.imread(str(root / "annotations/validation/scene_00003.png"), cv2.IMREAD_UNCHANGED)
    image = cv2.imread(str(root / "images/validation/scene_00003.jpg"))
    assert label is not None
    assert image is not None
    assert np.array_equal(label, scene.label)
    assert np.abs(image[..., ::-1].astype(int) - scene.image).mean() < 6


def test_the_same_numbers_give_the_same_files_and_more_scenes_change_no_old_one(root: Path, tmp_path: Path) -> None:
    more = make_scenes(tmp_path / "again", num_train=13, num_val=4, seed=304)
    for path in sorted(root.rglob("*.*g")):
        assert (more / path.relative_to(root)).read_bytes() == path.read_bytes()


def test_what_is_there_is_not_made_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "draw_scene", lambda rng: pytest.fail("drawn again"))
    assert make_scenes(root, num_train=12, num_val=4, seed=304) == root


def test_of_several_that_want_it_at_once_one_draws_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_seeds = []
    draw = scenes.draw_scene

    def slowly(rng: np.random.Generator) -> Scene:
        drawn_seeds.append(rng)
        time.sleep(0.02)
        return draw(rng)

    monkeypatch.setattr(scenes, "draw_scene", slowly)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: make_scenes(tmp_path / "scenes", num_train=3, num_val=1), range(4)))
    assert len(drawn_seeds) == 4


def test_other_numbers_replace_it(tmp_path: Path) -> None:
    for num_train in (3, 2):
        make_scenes(tmp_path / "scenes", num_train=num_train, num_val=1)
        assert len(list((tmp_path / "scenes").rglob("*.jpg"))) == num_train + 1


def test_an_interrupted_making_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(rng: np.random.Generator) -> Scene:
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path / "scenes", num_train=2, num_val=1)
    assert [path.name for path in tmp_path.iterdir()] == [".scenes.lock"]
    monkeypatch.undo()
    (tmp_path / "scenes").mkdir()  # an empty folder is in nobody's way
    assert (make_scenes(tmp_path / "scenes", num_train=2, num_val=1) / scenes.MANIFEST).exists()


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="contains other files"):
        make_scenes(tmp_path, num_train=1, num_val=1)
    (tmp_path / scenes.MANIFEST).write_text(json.dumps({"made_by": "me"}))
    with pytest.raises(DataError, match="contains other files"):
        make_scenes(tmp_path, num_train=1, num_val=1)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_sizes_and_shapes_vary_as_in_ade20k(drawn: list[Scene]) -> None:
    sizes = np.array([scene.label.shape for scene in drawn])
    assert sizes.min(1).min() >= 90
    assert sizes.max() <= 320
    assert 0.05 < (sizes[:, 0] > sizes[:, 1]).mean() < 0.25
    assert 0.05 < (sizes[:, 0] == sizes[:, 1]).mean() < 0.35
    assert len(np.unique(sizes, axis=0)) > 80
    assert all(scene.image.shape == (*scene.label.shape, 3) for scene in drawn)


def test_every_class_is_common_enough_to_learn(drawn: list[Scene]) -> None:
    counts = np.array([np.bincount(scene.label.ravel(), minlength=12) for scene in drawn])
    assert counts.shape[1] == SCENE_CLASSES.num_classes + 1
    assert ((counts > 0).mean(0) > 0.25).all()
    share = counts.sum(0) / counts.sum()
    assert share[1:].min() > 0.004
    assert 0.005 < share[0] < 0.08  # clutter, unlabelled


def test_colour_alone_does_not_determine_the_class(drawn: list[Scene]) -> None:
    """The best class for every colour (of 4096) is right for far fewer pixels than a network can reach."""
    table = np.zeros((4096, 12), np.int64)
    for scene in drawn:
        colour = (scene.image // 16).astype(np.int64) @ np.array([256, 16, 1])
        np.add.at(table, (colour[scene.label > 0], scene.label[scene.label > 0]), 1)
    assert 0.4 < table.max(1).sum() / table.sum() < 0.75
