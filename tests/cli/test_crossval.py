"""Folds: groups stay together, finished folds are not repeated, and one report has mean and deviation."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers.command_line import TINY, TINY_NETWORK, run, run_here
from semseg.cli import crossval
from semseg.data.folds import assign_folds, name_group
from semseg.data.geometry import Size
from semseg.data.records import Record, split_by_hash
from semseg.data.scenes import make_scenes
from semseg.errors import DataError
from semseg.reports.crossval_page import FoldSpread
from semseg.storage.run_results import FAILED, FINISHED, Job, RunResult, read_job, read_result, write_job, write_result

SMALL = [*TINY, *TINY_NETWORK, "data.make.num_train=6"]
CROSSVAL = [*SMALL, "mode=crossval", "data.folds=3"]


def records_of(names: Sequence[str]) -> list[Record]:
    return [Record(f"/set/{name}.png", "x", Size(1, 1), "list") for name in names]


def test_folds_keep_groups_together_and_have_about_the_same_size() -> None:
    names = [f"patient{number // 3:02d}_{number % 3}" for number in range(30)]
    folds = assign_folds(records_of(names), "/set", 4, r"patient\d+")
    groups = {
        name[:9]: {fold for other, fold in zip(names, folds, strict=True) if other[:9] == name[:9]} for name in names
    }
    assert all(len(found) == 1 for found in groups.values())
    assert sorted(folds.count(fold) for fold in range(4)) == [6, 6, 9, 9]
    shuffled = list(reversed(names))
    assert assign_folds(records_of(shuffled), "/set", 4, r"patient\d+") == list(reversed(folds))  # whatever the order
    alone = assign_folds(records_of(names), "/set", 4, None)
    assert sorted(alone.count(fold) for fold in range(4)) == [7, 7, 8, 8]


def test_a_group_is_what_the_pattern_finds_and_every_image_has_one() -> None:
    assert name_group("/set/a/p7_1.png", "/set", r"^a/p(\d+)") == "7"
    either = r"patient(\d+)|case(\d+)"
    assert [name_group(f"/set/{name}_1.png", "/set", either) for name in ("patient3", "case3")] == ["3", "case3"]
    for pattern in (r"\d*", r"p(\d*)"):
        with pytest.raises(DataError, match="matches no character of p_1"):
            name_group("/set/p_1.png", "/set", pattern)
    assert name_group("/set/a.rf.0a.jpg", "/set", None) == name_group("/set/a.rf.1b.jpg", "/set", None)
    with pytest.raises(DataError, match=r"b\.png: data\.group=p\(\\d\) is not found in b\.png"):
        assign_folds(records_of(["p1", "b"]), "/set", 2, r"p(\d)")
    with pytest.raises(DataError, match=r"1 groups by data\.group=p cannot be split into data\.folds=2"):
        assign_folds(records_of(["p1", "p2"]), "/set", 2, "p")


def test_groups_stay_together_in_a_fraction_too() -> None:
    names = [f"p{number // 4}_{number}" for number in range(40)]
    records = records_of(names)
    kept, held_out = split_by_hash(records, 0.3, "/set", [name.split("_")[0] for name in names])
    sides = [{Path(record.image).name.split("_")[0] for record in side} for side in (kept, held_out)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_the_deviation_is_that_of_a_single_fold() -> None:
    spread = FoldSpread("x", (0.2, None, 0.4, 0.6))
    assert spread.mean == pytest.approx(0.4) and spread.deviation == pytest.approx(0.2)
    assert spread.error == pytest.approx(0.2 / 3**0.5)
    assert FoldSpread("x", (0.5, None)).deviation is None and FoldSpread("x", (None,)).mean is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mode=crossval"], "mode=crossval needs data.folds"),
        (["data.folds=3"], "data.folds=3: is for mode=crossval"),
        (["data.fold=1"], "data.fold=1: needs data.folds"),
        (["data.folds=3", "data.fold=3"], "data.fold=3: must be below data.folds=3"),
        (["mode=crossval", "data.folds=3", "output=x"], "output=x: has no effect with mode=crossval"),
        (["mode=crossval", "data.folds=3", "trainer.limit_train_batches=0"], "there is nothing to train"),
        (["mode=crossval", "data.folds=3", "data.fold=0"], "mode=crossval trains on every fold"),
        (["mode=crossval", "data.folds=3", "resume=last.ckpt"], "resume=last.ckpt: is one run"),
        (["mode=crossval", "data.folds=3", "data.group=(("], "data.group=((: is no regular expression"),
    ],
)
def test_folds_that_contradict_each_other_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    assert message in run_here(tmp_path, *SMALL, *words, code=2)


def test_finished_folds_are_kept_and_the_others_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_scenes(tmp_path / "scenes", num_train=6, num_val=7, seed=304)
    broken, ran = {1}, []

    def run_job(command: Sequence[str], overrides: Sequence[str], folder: Path, *, scores: bool) -> Job:
        fold = int(folder.name.removeprefix("fold_"))
        ran.append(fold)
        assert f"data.fold={fold}" in overrides and "mode=train" in overrides and f'run_dir="{folder}"' in command
        folder.mkdir(parents=True, exist_ok=True)
        job = Job(folder, tuple(overrides), FAILED if fold in broken else FINISHED, "no luck" if fold in broken else "")
        write_job(job)
        if fold not in broken:
            write_result(folder, RunResult(0.1 * fold, follow_ups=(("eval", "eval-2"),)))
            for name in ("eval", "eval-2"):
                (folder / name).mkdir(exist_ok=True)
            (folder / "eval" / "metrics.json").write_text("of a command of the user")
            content = {
                "mean_iou": 0.1 * fold, "pixel_accuracy": 0.5, "overall_score": None,
                "classes": [
                    {"name": "sky", "iou": 0.2 * fold, "pixels": 9},
                    {"name": "=sea", "iou": (0.3, 0.0, None)[fold], "pixels": 0 if fold else 4},
                ],
            }  # fmt: skip
            (folder / "eval-2" / "metrics.json").write_text(json.dumps(content))
        return read_job(folder) or job

    monkeypatch.setattr(crossval, "run_job", run_job)
    printed = run_here(tmp_path, *CROSSVAL, "run_dir=cv", code=1)
    assert "6 images in 6 groups, 3 folds of 2, 2, 2 images" in printed
    assert "fold 1: failed: no luck" in printed and "to continue: python run.py" in printed and "run_dir=cv" in printed
    broken.clear()
    printed = run_here(tmp_path, *CROSSVAL, "data.limit=1", "run_dir=limited")
    assert "6 images in 6 groups, 3 folds of 2, 2, 2" in printed
    del ran[-3:]
    printed = run_here(tmp_path, *CROSSVAL, "run_dir=cv")
    assert ran == [0, 1, 2, 1] and "fold 0 (1 of 3): finished earlier" in printed
    content = json.loads((tmp_path / "cv" / "crossval.json").read_text())
    assert content["iou"]["sky"]["mean"] == pytest.approx(0.2)
    assert content["iou"]["sky"]["deviation"] == pytest.approx(statistics.stdev([0, 0.2, 0.4]))
    assert content["iou"]["=sea"]["values"] == [0.3, None, None]
    rows = list(csv.reader((tmp_path / "cv" / "crossval.csv").open()))
    assert rows[0][:3] == ["score", "mean", "deviation"] and rows[4][0] == "IoU of sky"
    assert read_result(tmp_path / "cv") == RunResult(pytest.approx(0.1), "mean IoU")
    assert "fold_2/eval-2/report.html" in (tmp_path / "cv" / "crossval.html").read_text()
    assert (tmp_path / "cv" / ".hydra" / "overrides.yaml").is_file()
    shutil.rmtree(tmp_path / "cv" / "fold_2" / "eval-2")
    assert "3 of 3 folds" in run_here(tmp_path, *CROSSVAL, "run_dir=cv") and ran[4:] == [2]
    images = json.loads((tmp_path / "cv" / "folds.json").read_text())
    assert [len(names) for names in images] == [2, 2, 2]
    path = tmp_path / "scenes" / "training.odgt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    refused = run_here(tmp_path, *CROSSVAL, "run_dir=cv", code=2)
    assert "its folds were trained with other images: 6 then, 5 now, such as images/training/" in refused
    assert "was among them and is missing (folds.json" in refused


@pytest.mark.parametrize(
    ("before", "change"),
    [
        ([["a", "b", "c"]], "data.folds=1, and it is 2 now"),
        ([["a"], ["b", "c"]], "the same images in other folds, because data.group has changed"),
        ([["b"], ["c"]], "other images: 2 then, 3 now, such as a, which was not among them"),
        ([["a", "b"], ["c", "d"]], "other images: 4 then, 3 now, such as d, which was among them and is missing"),
    ],
)
def test_what_has_changed_since_the_folds_were_trained_is_named(before: list[list[str]], change: str) -> None:
    assert crossval.describe_change(before, [["a", "b"], ["c"]]) == change


@pytest.mark.slow
def test_every_image_is_validated_on_once_by_networks_that_did_not_see_it(tmp_path: Path) -> None:
    words = [*SMALL, "mode=crossval", "data.folds=2", "data.steps_per_epoch=1", "data.val.list=null", "run_dir=cv"]
    printed = run(tmp_path, *words)
    assert "2 of 2 folds" in printed
    files = []
    for fold in range(2):
        with (tmp_path / "cv" / f"fold_{fold}" / "eval" / "per_image.csv").open() as file:
            files += [row["file"] for row in csv.DictReader(file)]
    assert len(files) == len(set(files)) == 6 and all("training" in file for file in files)
