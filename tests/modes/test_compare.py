from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tifffile
from PIL import Image

from helpers.browser import evaluate_in_browser, needs_browser
from helpers.command_line import RUN, run_here
from semseg.config.schema import Config, DataConfig
from semseg.data.seeding import generator_for
from semseg.errors import ConfigError, DataError
from semseg.evaluation.image_files import COUNTS_FILE, MAPS_FILE, encode_maps, write_class_maps, write_image_counts
from semseg.evaluation.paired_bootstrap import compute_difference_intervals, score_counts
from semseg.modes import compare as mode
from semseg.reports import photographs
from semseg.reports.compare_page import render_compare_page
from semseg.reports.compared_runs import ComparedRun, choose_distinct_names, name_giving_folder, read_evaluations
from semseg.reports.comparison import Difference, compare_runs
from semseg.reports.differing_images import BASE_COLOUR, OTHER_COLOUR, DifferingImage, draw_winners, load_photograph
from semseg.reports.photographs import describe_reading
from semseg.storage.run_results import Job, write_job

SKY, ROAD = "sky", "<b>[red]road[/red]</b>"


def evaluation(
    folder: Path, ious: list[float | None], images: dict[str, float | str] | None = None, **facts: Any
) -> str:
    """The files of an evaluation of two classes."""
    folder.mkdir(parents=True)
    scored = [iou for iou in ious if iou is not None]
    classes = [
        {"index": n, "name": name, "iou": iou} for n, (name, iou) in enumerate(zip((SKY, ROAD), ious, strict=True))
    ]
    content = {
        "mean_iou": sum(scored) / len(scored),
        "pixel_accuracy": 0.5,
        "split": "val",
        "classes": classes,
        **facts,
    }
    (folder / "metrics.json").write_text(json.dumps(content))
    if images is not None:
        rows = [f"{file},0.5,{score},0.1" for file, score in images.items()]
        (folder / "per_image.csv").write_text("\n".join(["file,pixel_accuracy,mean_iou,seconds", *rows, ""]))
    return str(folder)


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return [
        evaluation(tmp_path / "base", [0.5, 0.2], {"a.jpg": 0.4, "b.jpg": 0.6, "c.jpg": ""}),
        evaluation(tmp_path / "new", [0.4, 0.8], {"a.jpg": 0.5, "b.jpg": 0.1, "c.jpg": 0.3}),
    ]


def run(tmp_path: Path, runs: list[str]) -> dict[str, Any]:
    mode.run(Config(mode="compare", runs=runs, run_dir=str(tmp_path / "out")), [])
    return json.loads((tmp_path / "out" / "compare.json").read_text())


def test_differences_are_to_the_first_run_and_the_largest_change_comes_first(tmp_path: Path, runs: list[str]) -> None:
    content = run(tmp_path, runs)
    assert content["base"] == "base"
    headline = {row["name"]: row for row in content["headline"]}
    assert headline["mean IoU"]["differences"] == pytest.approx([0.25])
    assert headline["pixel accuracy"]["differences"] == [0]
    assert [row["name"] for row in content["images"]] == ["b.jpg", "a.jpg", "c.jpg"]
    assert content["images"][2]["differences"] == [None]
    assert content["notes"] == ["no per_image.npz in base, new, so no intervals: evaluate again to get them."]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.index("&lt;b&gt;[red]road[/red]&lt;/b&gt;") < page.index("sky")


def test_the_table_of_classes_goes_into_a_csv_file(tmp_path: Path, runs: list[str]) -> None:
    run(tmp_path, runs)
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    assert list(rows[0]) == ["index", "name", "iou base", "iou new", "difference new", "low new", "high new"]
    assert rows[1]["name"] == ROAD and float(rows[1]["difference new"]) == pytest.approx(0.6)


def test_the_console_shows_the_runs_side_by_side(
    tmp_path: Path, runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, runs)
    output = capsys.readouterr().out
    assert "+60.00" in output and "-10.00" in output and "[red]road[/red]" in output
    assert "compare.html" in output


def test_images_are_compared_on_the_intersection_and_its_size_is_reported(tmp_path: Path, runs: list[str]) -> None:
    third = evaluation(tmp_path / "third", [0.5, 0.2], {"b.jpg": 0.7, "d.jpg": 0.1})
    content = run(tmp_path, [*runs, third])
    assert [row["name"] for row in content["images"]] == ["b.jpg"]
    assert content["images"][0]["differences"] == pytest.approx([-0.5, 0.1])
    assert "1 image in common (base: 3, new: 3, third: 2)" in content["notes"][0]


def test_without_a_table_of_images_everything_else_is_compared(tmp_path: Path, runs: list[str]) -> None:
    content = run(tmp_path, [runs[0], evaluation(tmp_path / "old", [0.5, None])])
    assert content["images"] == []
    assert content["notes"][0] == "no per_image.csv in old: images are not compared."
    assert content["classes"][1]["differences"] == [None]


def test_different_settings_of_evaluations_are_noted(tmp_path: Path, runs: list[str]) -> None:
    other = evaluation(tmp_path / "other", [0.5, 0.2], {"a.jpg": 1, "b.jpg": 1, "c.jpg": 1}, split="test", scales=[300])
    notes = run(tmp_path, [runs[0], other])["notes"]
    assert len(notes) == 3
    assert "split differs (base: val, other: test)" in notes[0]
    assert "scales differs (base: not stored, other: [300])" in notes[1]


def test_a_run_folder_means_the_evaluation_in_it(tmp_path: Path, runs: list[str]) -> None:
    evaluation(tmp_path / "train" / "eval", [0.5, 0.2])
    base, other = read_evaluations([runs[0], str(tmp_path / "train")])
    assert (base.name, other.name) == ("base", "train")
    assert other.folder == tmp_path / "train" / "eval"


def test_names_are_as_long_as_needed_to_distinguish_runs() -> None:
    assert choose_distinct_names([Path("/r/a"), Path("/s/a")]) == ["r/a", "s/a"]


def test_an_evaluation_in_the_folder_of_its_run_has_the_name_of_the_run(tmp_path: Path) -> None:
    folders = [evaluation(tmp_path / name / "eval", [0.5, 0.2]) for name in ("first", "second")]
    assert [run.name for run in read_evaluations(folders)] == ["first", "second"]
    assert name_giving_folder(Path("/runs/a/eval-2")) == Path("/runs/a")
    assert name_giving_folder(Path("/runs/a/eval_test")) == Path("/runs/a/eval_test")
    again = evaluation(tmp_path / "first" / "eval-2", [0.5, 0.2])
    assert [run.name for run in read_evaluations([folders[0], again])] == ["eval", "eval-2"]


def test_jobs_of_a_sweep_are_named_by_the_overrides_that_differ(tmp_path: Path) -> None:
    folders = [evaluation(tmp_path / name / "eval", [0.5, 0.2]) for name in ("f5ca38f7", "5feceb66")]
    for folder, rate in zip(folders, ("0.1", "0.2"), strict=True):
        write_job(Job(Path(folder).parent, ("seed=1", f"optim.lr={rate}")))
    assert [run.name for run in read_evaluations(folders)] == ["optim.lr=0.1", "optim.lr=0.2"]
    (Path(folders[1]).parent / "job.json").unlink()
    assert [run.name for run in read_evaluations(folders)] == ["f5ca38f7", "5feceb66"]


@pytest.mark.parametrize("change", ["names", "number"])
def test_runs_with_other_classes_are_rejected(tmp_path: Path, runs: list[str], change: str) -> None:
    file = Path(runs[1]) / "metrics.json"
    content = json.loads(file.read_text())
    if change == "names":
        content["classes"][1]["name"] = "river"
    else:
        content["classes"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"class 1 is .*road.* but 'river' in new|new has 1"):
        compare_runs(read_evaluations(runs))


def test_an_error_about_a_folder_without_evaluation_suggests_the_command(tmp_path: Path, runs: list[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "sweep" / "job").mkdir(parents=True)
    (tmp_path / "sweep" / "job" / "job.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"sweep is a sweep, .* of the 1 folders below it, such as .*sweep/job\."):
        read_evaluations([str(tmp_path / "sweep"), runs[0]])
    (tmp_path / "sweep" / "folds.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"sweep is a cross-validation, and its folds are runs\. Give several of"):
        read_evaluations([str(tmp_path / "sweep"), runs[0]])
    file = tmp_path / "metrics.json"
    file.write_text("{}")
    with pytest.raises(ConfigError, match=rf"metrics\.json is a file\. Give its folder: {tmp_path}\."):
        read_evaluations([str(file), runs[0]])
    with pytest.raises(ConfigError, match=r"run holds no evaluation .* python run.py mode=eval ckpt="):
        read_evaluations([runs[0], str(tmp_path / "run")])


def test_the_error_about_a_missing_folder_suggests_no_evaluation(tmp_path: Path, runs: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: there is no such folder\.$"):
        read_evaluations([runs[0], str(tmp_path / "nowhere")])


def test_the_same_run_twice_is_rejected(runs: list[str]) -> None:
    with pytest.raises(ConfigError, match="listed twice"):
        read_evaluations([runs[0], runs[0] + "/."])


@pytest.mark.parametrize(("file", "text"), [("metrics.json", "{"), ("metrics.json", "[]"), ("per_image.csv", "a\n1\n")])
def test_a_broken_file_is_named(runs: list[str], file: str, text: str) -> None:
    (Path(runs[1]) / file).write_text(text)
    with pytest.raises(DataError, match=file):
        read_evaluations(runs)


# ---- intervals


def counted_evaluation(folder: Path, counts: np.ndarray, **facts: Any) -> str:
    """An evaluation with the pixel counts (N, 2 classes) of images 0.jpg, 1.jpg, ..., and the scores of their sum."""
    scores = score_counts(counts.sum(0, keepdims=True), "present")
    files = facts.pop("files", [f"{n}.jpg" for n in range(len(counts))])
    headline = {name: float(values[0]) for name, values in scores.headline.items()}
    path = evaluation(folder, [float(iou) for iou in scores.iou[0]], dict.fromkeys(files, 0.5), **headline, **facts)
    write_image_counts(folder / COUNTS_FILE, files, list(counts))
    return path


def image_counts(num_images: int, num_right: int, spread: int, seed: int) -> np.ndarray:
    """(N, 3, 2) counts of images with 100 pixels of each class, of which `num_right` +- `spread` are correct."""
    right = np.random.default_rng(seed).integers(num_right - spread, num_right + spread + 1, size=(num_images, 2))
    return np.stack([right, np.full_like(right, 100), 100 + right - right[:, ::-1]], 1).astype(np.int32)


def test_a_real_difference_is_coloured_and_a_difference_by_chance_is_grey(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = counted_evaluation(tmp_path / "base", image_counts(20, 60, 15, seed=1))
    chance = counted_evaluation(tmp_path / "chance", image_counts(20, 60, 15, seed=4))
    better = counted_evaluation(tmp_path / "better", image_counts(20, 75, 15, seed=3))
    content = run(tmp_path, [base, chance, better])
    mean_iou = content["headline"][0]
    assert abs(mean_iou["differences"][0]) > 0.001 and mean_iou["verdicts"] == ["unclear", "better"]
    assert (content["num_images"], content["resamples"]) == (20, 2000)
    page = (tmp_path / "out" / "compare.html").read_text()
    cells = re.findall(r'<td class="number (\w+)"', page.split("mean IoU</th>")[1].split("</tr>")[0])
    assert cells == ["unclear", "better"]
    assert "20 images. Differences are" in page
    output = " ".join(capsys.readouterr().out.split())
    assert "20 images cannot tell which is better" in output and "better, as far as 20 images can tell" in output


def test_intervals_are_those_of_the_paired_bootstrap_with_the_seed(tmp_path: Path) -> None:
    counts = [image_counts(9, 60, 20, seed) for seed in (1, 2)]
    folders = [counted_evaluation(tmp_path / name, one) for name, one in zip("ab", counts, strict=True)]
    rows = compare_runs(read_evaluations(folders), seed=7).headline
    (expected,) = compute_difference_intervals(counts[0], counts[1:], ["present"] * 2, generator_for(7))
    assert rows[0].intervals == (expected.headline["mean_iou"],)
    other_seed = compare_runs(read_evaluations(folders), seed=8).headline
    assert other_seed[0].intervals != rows[0].intervals and compare_runs(read_evaluations(folders), 7).headline == rows


def test_an_interval_that_touches_zero_is_unclear() -> None:
    verdicts = [Difference(0.1, interval).verdict for interval in ((0.0, 0.2), (0.01, 0.2), (-0.2, -0.01), None)]
    assert verdicts == ["unclear", "better", "worse", "unclear"]


def test_all_scores_are_over_the_images_that_the_runs_have_in_common(tmp_path: Path) -> None:
    counts = image_counts(10, 60, 20, seed=1)
    files = [f"{n}.jpg" for n in range(10)]
    base = counted_evaluation(tmp_path / "base", counts, files=files)
    other = counted_evaluation(tmp_path / "other", counts[[9, 8, 7, 6, 5, 4, 3]], files=files[:2:-1])
    content = run(tmp_path, [base, other])
    common = score_counts(counts[3:].sum(0, keepdims=True), "present")
    for row, name in zip(content["headline"], common.headline, strict=True):
        assert row["values"] == pytest.approx([common.headline[name][0]] * 2) and row["differences"] == [0]
    assert [row["values"][0] for row in content["classes"]] == pytest.approx(list(common.iou[0]))
    assert content["num_images"] == 7
    assert "7 images in common (base: 10, other: 7)" in content["notes"][0]


def test_other_scales_leave_the_verdict_and_another_rule_is_that_of_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts, better = image_counts(8, 60, 5, seed=1), image_counts(8, 90, 5, seed=1)
    counts[:, :2, 1] = better[:, :2, 1] = 0  # a class that is predicted and in no label
    base = counted_evaluation(tmp_path / "base", counts, mean_iou_rule="ade20k")
    other = counted_evaluation(tmp_path / "other", better, mean_iou_rule="ground_truth", scales=[300], split="test")
    content = run(tmp_path, [base, other])
    by_rule = [
        float(score_counts(one.sum(0, keepdims=True), "ade20k").headline["mean_iou"][0]) for one in (counts, better)
    ]
    assert content["headline"][0]["values"] == pytest.approx(by_rule)
    assert content["headline"][0]["verdicts"] == ["better"]
    out = capsys.readouterr().out
    for note in (
        "split differs (base: val, other: test), but the labels of the images in common are the same.",
        "mean_iou_rule differs (base: ade20k, other: ground_truth): all scores are by the rule of base.",
        "scales differs (base: not stored, other: [300]): the differences are those of the networks with these",
    ):
        assert 0 <= out.find(note) < out.index("better, as far as 8 images can tell")


def test_without_intervals_no_difference_has_a_colour_and_the_reason_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = image_counts(8, 60, 5, seed=1)
    better = image_counts(8, 90, 5, seed=1)
    base = counted_evaluation(tmp_path / "base", counts)
    few = [counted_evaluation(tmp_path / f"few{n}", one[:5]) for n, one in enumerate((counts, better))]
    apart = counted_evaluation(tmp_path / "apart", better, files=[f"x{n}" for n in range(8)])
    relabelled = counts.copy()
    relabelled[3, 1] += 1
    other_labels = counted_evaluation(tmp_path / "relabelled", relabelled)
    for runs, reason in (
        (few, "telling two runs apart takes at least 6 images, not 5"),
        ([base, apart], "no image in common"),
        ([base, other_labels], "labels of 1 of 8 images"),
    ):
        content = run(tmp_path, runs)
        has_verdict = "so there is no verdict" not in capsys.readouterr().out
        assert has_verdict == (runs is few)
        assert any(reason in note for note in content["notes"]), content["notes"]
        assert content["resamples"] == 0
        page = (tmp_path / "out" / "compare.html").read_text()
        assert not re.search(r'<td class="[^"]*(better|worse)', page)


def test_the_difference_of_one_image_has_no_colour(tmp_path: Path, runs: list[str]) -> None:
    run(tmp_path, runs)
    assert not re.search(r'<td class="[^"]*(better|worse)', (tmp_path / "out" / "compare.html").read_text())


def test_fractions_that_programs_add_are_compared_without_an_interval(tmp_path: Path) -> None:
    counts = image_counts(8, 60, 5, seed=1)
    units = {"edges": "%", "distance": "px"}
    base, other = (
        counted_evaluation(tmp_path / name, counts, own_scores={"edges": edges, "distance": 3.5}, own_units=units)
        for name, edges in (("base", 0.5), ("other", 0.75))
    )
    row = run(tmp_path, [base, other])["headline"][-1]
    assert (row["name"], row["differences"], row["intervals"], row["verdicts"]) == (
        "edges",
        [0.25],
        [None],
        ["unclear"],
    )


# ---- configuration and curves


def test_the_keys_that_differ_are_on_the_page_and_on_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = [
        {"run_dir": f"/x/{lr}", "seed": 1, "optim": {"lr": lr, "name": "sgd"}, "data": {"num_workers": workers}}
        for lr, workers in ((0.1, 2), (0.02, 4))
    ]
    folders = [
        evaluation(tmp_path / name, [0.5, 0.2], trained_with=one) for name, one in zip("ab", configs, strict=True)
    ]
    rows = run(tmp_path, folders)["configuration"]
    assert [(row["key"], row["values"], row["is_minor"]) for row in rows] == [
        ("optim.lr", ["0.1", "0.02"], False),
        ("data.num_workers", ["2", "4"], True),
    ]
    assert "differs: optim.lr: 0.1 | 0.02" in capsys.readouterr().out
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.index('id="scores"') < page.index("<code>optim.lr</code>") < page.index('id="classes"')


def test_a_key_that_an_earlier_version_did_not_have_has_its_default(tmp_path: Path) -> None:
    before, after = {"optim": {"lr": 0.1}}, {"optim": {"lr": 0.1, "momentum": 0.9, "own": 1}}  # 0.9 is the default
    folders = [
        evaluation(tmp_path / name, [0.5, 0.2], trained_with=one)
        for name, one in (("before", before), ("after", after))
    ]
    rows = run(tmp_path, folders)["configuration"]
    assert [(row["key"], row["values"]) for row in rows] == [("optim.own", ["not set", "1"])]


def test_earlier_evaluations_read_the_configuration_of_the_run_beside_the_checkpoint(tmp_path: Path) -> None:
    folders = []
    for name, lr in (("a", 0.1), ("b", 0.2)):
        folders.append(
            evaluation(tmp_path / f"eval_{name}", [0.5, 0.2], checkpoint=f"{tmp_path}/{name}/checkpoints/best.ckpt")
        )
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"mode: train\noptim: {{lr: {lr}}}\n")
    assert [row["values"] for row in run(tmp_path, folders)["configuration"]] == [["0.1", "0.2"]]
    (tmp_path / "b" / "config.yaml").unlink()
    comparison = compare_runs(read_evaluations(folders))
    assert comparison.configuration == () and "eval_b" in comparison.configuration_summary


def test_curves_of_the_runs_that_still_exist_are_drawn_over_each_other(tmp_path: Path) -> None:
    folders = [
        evaluation(tmp_path / name / "eval", [0.5, 0.2], checkpoint=f"/gone/{name}.ckpt") for name in ("a", "b", "c")
    ]
    for name in ("a", "c"):
        log = tmp_path / name / "logs" / "csv" / "version_0"
        log.mkdir(parents=True)
        (log / "metrics.csv").write_text("step,train/loss,val/miou\n10,1.5,\n20,1.0,0.3\n30,0.8,0.4\n")
    page = render_compare_page(compare_runs(read_evaluations(folders)))
    curves = page.split('id="curves"')[1].split("</section>")[0]
    assert curves.count("<polyline") == 4 and curves.count('class="line line-2"') == 2  # c keeps its colour
    assert "n/a for b:" in curves


# ---- images


def with_maps(folder: str, label: np.ndarray, predictions: list[np.ndarray]) -> str:
    write_class_maps(Path(folder) / MAPS_FILE, [encode_maps(label, prediction) for prediction in predictions])
    return folder


def test_the_images_that_are_predicted_most_differently_are_shown_with_both_predictions(tmp_path: Path) -> None:
    label = np.array([[0, 1, -1, -1]] * 4)
    right, half, unscored = label.clip(0), np.zeros((4, 4), int), label.clip(0) + (label < 0)
    counts = image_counts(3, 50, 0, seed=1)
    root = tmp_path / "data"
    root.mkdir()
    Image.fromarray(np.full((80, 80, 3), 90, np.uint8)).save(root / "1.jpg")
    base, other = (
        with_maps(counted_evaluation(tmp_path / name, counts, root=str(root)), label, predictions)
        for name, predictions in (("base", [right, right, right]), ("other", [right, half, unscored]))
    )
    page = render_compare_page(compare_runs(read_evaluations([base, other])))
    images = page.split('id="images"')[1].split("</section>")[0]
    assert images.count('<div class="example">') == 1  # 0.jpg is equal, 2.jpg only where nothing is scored
    assert "<h3>1.jpg</h3>" in images and "50.00 % predicted differently" in images
    captions = re.findall("<figcaption>(.*?)</figcaption>", images)
    assert captions == ["photograph", "label", "base", "other", "who is right"]
    with_maps(other, label, [right, right, unscored])
    assert "predict the same class for every scored pixel" in render_compare_page(
        compare_runs(read_evaluations([base, other]))
    )
    with_maps(other, label, [right, half, unscored])
    (root / "1.jpg").write_bytes(b"no picture")
    assert "photograph of 1.jpg" not in render_compare_page(compare_runs(read_evaluations([base, other])))


def test_images_whose_names_begin_with_an_equals_sign_are_shown(tmp_path: Path) -> None:
    label, folders = np.array([[0, 1], [1, 1]]), []
    for name, prediction in (("a", label), ("b", 1 - label)):
        folders.append(evaluation(tmp_path / name, [0.5, 0.2], {"'=1.jpg": 0.5}))  # as tables write it
        write_image_counts(tmp_path / name / COUNTS_FILE, ["=1.jpg"], list(image_counts(1, 50, 0, seed=1)))
        with_maps(folders[-1], label, [prediction])
    page = render_compare_page(compare_runs(read_evaluations(folders)))
    assert "100.00 % predicted differently" in page


def test_the_map_of_winners_has_the_colour_of_the_run_that_is_right() -> None:
    image = DifferingImage(
        "a", 0.5, np.array([[0, 0, 0, 0, -1]]), (np.array([[0, 0, 1, 1, 0]]), np.array([[0, 1, 0, 2, 0]]))
    )
    both, base, other, none, _ = draw_winners(image, None)[0]
    assert (base == BASE_COLOUR).all() and (other == OTHER_COLOUR).all()
    assert both.min() > 150 and none.max() < 60


def test_a_photograph_is_turned_if_its_labels_are(tmp_path: Path) -> None:
    picture = Image.fromarray(np.zeros((40, 80, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.paste((255, 0, 0), (0, 0, 40, 40))  # left in the file, at the top when upright
    picture.save(tmp_path / "a.png", exif=exif)
    (run,) = [ComparedRun("a", tmp_path, {"root": str(tmp_path)}, None)]
    upright, stored = load_photograph(run, "a.png", (20, 10)), load_photograph(run, "a.png", (10, 20))
    assert upright is not None and upright[0, 5, 0] == 255 and upright[-1, 5, 0] == 0
    assert stored is not None and stored[5, 0, 0] == 255 and stored[5, -1, 0] == 0
    assert load_photograph(run, "missing.png", (10, 20)) is None
    for max_pixels, is_read in ((1000, False), (4000, True)):  # the limit of the evaluation
        limited = run._replace(metrics=run.metrics | describe_reading(DataConfig(max_pixels=max_pixels)))
        assert (load_photograph(limited, "a.png", (10, 20)) is not None) == is_read


def test_photographs_of_bands_are_read_and_drawn_as_the_evaluation_has_read_them(tmp_path: Path) -> None:
    """Pillow would give wrong pixels for all of them, or none."""
    pixels = np.full((40, 80, 4), 1000, np.uint16)
    pixels[:, 40:, 3] = 3000
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", planarconfig="contig", tile=(16, 16))
    np.save(tmp_path / "b.npy", pixels)
    for band, suffix in ((0, "_B4"), (3, "_B8")):
        tifffile.imwrite(tmp_path / f"c{suffix}.tif", pixels[..., band])
    bands = DataConfig(bands=["red", "green", "blue", "nir"], value_range=[0, 4000], show_bands=["nir"])
    files = DataConfig(bands=["red", "nir"], band_files={"red": "_B4", "nir": "_B8"}, value_range=[0, 4000])
    for name, data in (("a.tif", bands), ("b.npy", bands), ("c_B4.tif", replace(files, show_bands=["nir"]))):
        stored = json.loads(json.dumps({"root": str(tmp_path), **describe_reading(data)}))
        shown = load_photograph(ComparedRun("a", tmp_path, stored, None), name, (10, 20))
        assert shown is not None and shown.shape == (10, 20, 3)
        assert shown[:, :10].max() == 0 and shown[:, 10:].min() == 255
        with patch.object(photographs, "WHOLE_PIXELS", 100):
            by_window = load_photograph(ComparedRun("a", tmp_path, stored, None), name, (10, 20))
        assert np.array_equal(by_window, shown)
    assert load_photograph(ComparedRun("a", tmp_path, {"root": str(tmp_path)}, None), "a.tif", (10, 20)) is None
    for damaged in ({"bands": 5}, {"bands": []}, {"_target_": "x"}, 7, {"value_range": "x"}, {"band_files": ["x"]}):
        run = ComparedRun("a", tmp_path, {"root": str(tmp_path), "reading": damaged}, None)
        assert load_photograph(run, "a.tif", (10, 20)) is None


def test_damaged_class_maps_are_named(tmp_path: Path) -> None:
    counts = image_counts(1, 50, 0, seed=1)
    label = np.array([[0, 1], [1, 1]])
    folders = [with_maps(counted_evaluation(tmp_path / name, counts), label, [label]) for name in "ab"]
    with_maps(folders[1], label, [label + 5])
    with pytest.raises(DataError, match=r"b/class_maps\.zip: the maps of 0\.jpg"):
        render_compare_page(compare_runs(read_evaluations(folders)))


def test_panels_of_evaluations_are_shown(runs: list[str]) -> None:
    (Path(runs[0]) / "panels").mkdir()
    Image.fromarray(np.zeros((600, 900, 3), np.uint8)).save(Path(runs[0]) / "panels" / "b.png")
    page = render_compare_page(compare_runs(read_evaluations(runs)))
    assert page.count("data:image/jpeg") == 1
    assert "new: better than base on 1 images, worse on 1, equal on 0" in page


def test_a_broken_panel_is_named(runs: list[str]) -> None:
    (Path(runs[0]) / "panels").mkdir()
    (Path(runs[0]) / "panels" / "b_panel.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"b_panel\.png: cannot be read"):
        render_compare_page(compare_runs(read_evaluations(runs)))


@pytest.mark.slow
def test_the_command_line_compares_without_torch(tmp_path: Path, runs: list[str]) -> None:
    probe = "import sys; from semseg.cli.main import main; main(); assert 'torch' not in sys.modules"
    words = ["mode=compare", f"runs=[{','.join(runs)}]", f"run_dir={tmp_path}/out"]
    result = subprocess.run(
        [sys.executable, "-c", probe, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(RUN.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "compare.html").is_file()


@pytest.mark.slow
def test_one_run_is_too_few(tmp_path: Path) -> None:
    assert "mode=compare needs at least two" in run_here(tmp_path, "mode=compare", "runs=[a]", code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_browser
def test_the_page_sorts_and_fits_a_phone(tmp_path: Path, runs: list[str]) -> None:
    run(tmp_path, runs)
    answer = evaluate_in_browser(
        tmp_path / "out" / "compare.html",
        """(() => {
          const table = document.querySelector("#classes table");
          table.tHead.rows[0].cells[4].querySelector("button").click();
          const order = [...table.tBodies[0].rows].map((row) => row.cells[4].innerText);
          return [order, innerWidth, document.documentElement.scrollWidth];
        })()""",
        width=390,
    )
    assert answer == [["+60.00", "-10.00"], 390, 390]


@pytest.mark.slow
@needs_browser
def test_a_page_with_intervals_curves_and_pictures_sorts_and_fits_a_phone(tmp_path: Path) -> None:
    label, folders = np.array([[0, 1]] * 2), []
    for seed, name in enumerate(("a-rather-long-name-of-a-run-" * 2, "b")):
        counts = image_counts(8, 60 + 20 * seed, 5, seed)
        folders.append(counted_evaluation(tmp_path / name / "eval", counts, trained_with={"seed": seed}))
        with_maps(folders[-1], label, [(label + seed) % 2] * 8)
        (tmp_path / name / "logs").mkdir()
        (tmp_path / name / "logs" / "metrics.csv").write_text("step,train/loss,val/miou\n10,1.5,0.2\n20,1.0,0.3\n")
    run(tmp_path, folders)
    widths, heights = evaluate_in_browser(
        tmp_path / "out" / "compare.html",
        """(() => {
          document.querySelector("#classes thead th:last-child button").click();
          const drawings = [...document.querySelectorAll("#classes .interval, #curves svg, #images img")];
          const heights = drawings.map((one) => one.getBoundingClientRect().height);
          return [[innerWidth, document.documentElement.scrollWidth], heights];
        })()""",
        width=390,
    )
    assert widths == [390, 390]
    assert len(heights) == 2 + 2 + 8 * 4 and min(heights) > 0  # label, two predictions, and who is right
