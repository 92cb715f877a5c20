"""Training, evaluation and prediction through the real command line, on a handful of drawn scenes."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from PIL import Image

import semseg
from helpers.command_line import TINY_ENCODERS, TINY_NETWORK, run, run_here
from helpers.in_process import configured
from semseg.config.schema import SplitConfig
from semseg.errors import SemsegError
from semseg.modes.eval import describe_cut_split
from semseg.nets.registry import ENCODERS
from semseg.prediction.video import VideoWriters, read_frames

TINY = [
    "data=scenes",
    "data.make.num_train=6",
    "data.make.num_val=3",
    "data.root=scenes",
    "data.batch_size=2",
    "data.short_edges=[48,64]",
    "data.max_long_edge=128",
    "data.num_workers=0",
    "model/encoder=resnet18",
    *TINY_NETWORK,
    "model.encoder.weights=none",
    "model/decoder=upernet",
    "model.decoder.width=16",
    "eval.scales=[64]",
    "trainer=cpu",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the data set and one trained run, `run`."""
    folder = tmp_path_factory.mktemp("project")
    output = run(folder, *TINY, "run_dir=run")
    (folder / "output.txt").write_text(output)
    with patch.dict(ENCODERS, TINY_ENCODERS):
        yield folder


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> str:
    """What the evaluation of `run` prints; its files are in `scores`."""
    return run(folder, "mode=eval", "ckpt=run", "run_dir=scores", "optim.lr=0.1", "data.batch_size=4")


@pytest.fixture(scope="module")
def predicted(folder: Path) -> str:
    """What the prediction of the validation images prints; its files are in `pictures`."""
    return run(folder, "mode=predict", "ckpt=run", "input=scenes/images/validation", "run_dir=pictures")


@pytest.mark.slow
def test_training_leaves_a_whole_run_folder(folder: Path) -> None:
    run = folder / "run"
    for name in (
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "config.yaml",
        "logs/metrics.csv",
        "result.json",
    ):
        assert (run / name).is_file(), name
    rows = list(csv.DictReader((run / "logs/metrics.csv").open()))
    columns = {name for row in rows for name, value in row.items() if value}
    assert {"train/loss", "train/accuracy", "val/miou", "val/pixel_accuracy"} <= columns
    assert {"lr/encoder", "lr/decoder"} <= columns


def test_training_prints_the_commands_to_continue_with(folder: Path) -> None:
    output = (folder / "output.txt").read_text()
    assert "mode=eval ckpt=" in output
    assert "resume=auto" in output


def test_checkpoints_load_with_weights_only(folder: Path) -> None:
    for path in (folder / "run" / "checkpoints").iterdir():
        content = torch.load(path, weights_only=True)
        assert content["semseg"]["config"]["data"]["name"] == "scenes"
        assert content["semseg"]["classes"]["names"]


@pytest.mark.slow
def test_evaluation_writes_the_scores_it_prints(folder: Path, evaluated: str) -> None:
    metrics = json.loads((folder / "scores" / "metrics.json").read_text())
    assert metrics["images"] == 3
    assert f"{100 * metrics['mean_iou']:.2f}" in evaluated
    low, high = metrics["confidence"]["mean_iou"]  # by default, because there are few images
    assert metrics["confidence"]["resamples"] == 1000 and low < metrics["mean_iou"] < high
    assert f"{100 * low:.2f}" in evaluated and f"{100 * high:.2f}" in evaluated
    assert metrics["mean_iou"] == pytest.approx(
        json.loads((folder / "run" / "result.json").read_text())["score"], abs=1e-6
    )
    rows = list(csv.DictReader((folder / "scores" / "per_class.csv").open()))
    assert [row["name"] for row in rows] == [entry["name"] for entry in metrics["classes"]]


@pytest.mark.slow
def test_an_evaluation_names_the_words_that_only_training_reads(evaluated: str) -> None:
    assert "optim.lr=0.1, data.batch_size=4: have no effect with mode=eval, which trains nothing\n" in evaluated


@pytest.mark.slow
def test_several_scales_change_the_answer(folder: Path, evaluated: str) -> None:
    run_here(folder, "mode=eval", "ckpt=run", "run_dir=multi", "eval.scales=[48,64,96]", "eval.flip=true")
    multi = json.loads((folder / "multi" / "metrics.json").read_text())
    assert multi["scales"] == [48, 64, 96] and multi["flip"] is True
    assert multi["pixel_accuracy"] != json.loads((folder / "scores" / "metrics.json").read_text())["pixel_accuracy"]


@pytest.mark.slow
def test_evaluations_keep_what_a_comparison_of_them_shows(folder: Path, evaluated: str) -> None:
    run_here(folder, "mode=eval", "ckpt=run/checkpoints/last.ckpt", "run_dir=last", "optim.lr=0.1")
    metrics = json.loads((folder / "last" / "metrics.json").read_text())
    assert metrics["trained_with"]["optim"]["lr"] == 0.02 and metrics["step"] == 6  # of the training
    counts = np.load(folder / "last" / "per_image.npz")["counts"].sum(0)
    matrix = np.array(metrics["confusion"])
    assert np.array_equal(counts, [matrix.diagonal(), matrix.sum(1), matrix.sum(0)])
    output = run_here(folder, "mode=compare", "runs=[scores,last]", "run_dir=comparison")
    assert "trained with the same configuration" in output and "at least 6 images, not 3" in output
    page = (folder / "comparison" / "compare.html").read_text()
    curves, images = (page.split(f'id="{name}"')[1].split("</section>")[0] for name in ("curves", "images"))
    assert curves.count("<polyline") >= 4 and "n/a" not in curves
    assert images.count('alt="photograph of') == images.count('alt="who is right of') > 0


@pytest.mark.slow
def test_prediction_writes_ids_and_a_panel_for_every_image(folder: Path, predicted: str) -> None:
    images = sorted((folder / "scenes/images/validation").iterdir())
    for image in images:
        ids = np.asarray(Image.open(folder / "pictures" / f"{image.stem}_ids.png"))
        width, height = Image.open(image).size
        assert ids.shape == (height, width) and ids.dtype == np.uint8
        assert ids.min() >= 1  # 0 is "unlabelled" in this data set, and no class
        panel = Image.open(folder / "pictures" / f"{image.stem}_panel.png")
        assert panel.width % (2 * width) == 0 and panel.height > height


def test_prediction_and_evaluation_agree(folder: Path, evaluated: str, predicted: str) -> None:
    matrix_right = total = 0
    for image in sorted((folder / "scenes/images/validation").iterdir()):
        ids = np.asarray(Image.open(folder / "pictures" / f"{image.stem}_ids.png"))
        label = np.asarray(Image.open(folder / "scenes/annotations/validation" / f"{image.stem}.png"))
        matrix_right += int((ids == label)[label > 0].sum())
        total += int((label > 0).sum())
    metrics = json.loads((folder / "scores" / "metrics.json").read_text())
    assert matrix_right / total == pytest.approx(metrics["pixel_accuracy"], abs=1e-9)


@pytest.mark.slow
def test_prediction_of_a_folder_with_a_film_and_a_broken_file(folder: Path) -> None:
    place = folder / "mixed"
    (place / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/a.png"):
        Image.fromarray(np.full((32, 40, 3), 90, np.uint8)).save(place / name)
    (place / "broken.jpg").write_bytes(b"no image")
    with VideoWriters(place / "film") as film:
        for level in (0, 255):
            film.add("of_two", np.full((32, 40, 3), level, np.uint8), 10)
    shutil.copy(place / "a.png", place / f"{'n' * 248}.png")
    shutil.copy(place / "film_of_two.mp4", place / f"{'n' * 246}.mp4")
    output = run_here(
        folder, "mode=predict", "ckpt=run", "input=mixed", "run_dir=mixed/out", "predict.format=ade20k",
        "predict.save=[ids,color,overlay,panel,probabilities]", code=1,
    )  # fmt: skip
    assert "broken.jpg: is not an image" in output and "3 of 6 files predicted" in output
    assert output.count("its name is too long for the names of the outputs. Shorten it.") == 2
    of_image = {"ids.png", "color.png", "overlay.png", "panel.png", "probabilities.npz"}
    written = {path.relative_to(place / "out").as_posix() for path in (place / "out").rglob("*") if path.is_file()}
    expected = {f"{stem}_{kind}" for stem in ("a", "sub/a") for kind in of_image} | {"classes.json"}
    expected |= {f"film_of_two_{kind}.mp4" for kind in ("color", "overlay", "panel")}
    expected |= {f"film_of_two/00000{number}_{kind}" for number in (0, 1) for kind in ("ids.png", "probabilities.npz")}
    assert {name for name in written if not name.startswith(".hydra")} == expected
    assert [frame.rate for frame in read_frames(place / "out/film_of_two_overlay.mp4")] == [10, 10]
    classes = json.loads((place / "out/classes.json").read_text())["classes"]
    assert [row["id"] for row in classes] == list(range(1, len(classes) + 1))


@pytest.mark.slow
def test_the_python_interface_gives_what_the_command_line_writes(folder: Path, predicted: str) -> None:
    image = min((folder / "scenes/images/validation").iterdir())
    net = semseg.load(folder / "run", device="cpu")
    ids = np.asarray(Image.open(folder / "pictures" / f"{image.stem}_ids.png"))
    assert np.array_equal(net.label_map.to_raw(net.predict(image).ids), ids)
    with pytest.raises(SemsegError, match="nowhere"):
        semseg.load("nowhere.ckpt")
    with pytest.raises(SemsegError, match=r"predict\.scale'"):
        semseg.load(folder / "run", "predict.scale=[32]")


@pytest.mark.slow
def test_a_text_file_that_holds_no_paths_is_said_to_be_read_as_a_list(folder: Path) -> None:
    (folder / "prose.txt").write_text("Photographs of 2024\n")
    shown = run_here(folder, "mode=predict", "ckpt=run", "input=prose.txt", "run_dir=of_prose", code=1)
    assert "1 file could not be read" in shown
    assert "prose.txt: This file was read as a list of paths" in shown


@pytest.mark.slow
def test_a_prediction_replaces_the_files_of_an_earlier_one_alone(folder: Path) -> None:
    photos, words = folder / "photos", ("mode=predict", "ckpt=run", "input=photos", "predict.save=[ids,coco]")
    photos.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.zeros((32, 40, 3), np.uint8)).save(photos / f"{name}.png")
    first = run_here(folder, *words, "run_dir=twice")
    assert "replaced" not in first
    assert "3 files in twice are replaced, such as coco.json" in run_here(folder, *words, "run_dir=twice")
    (folder / "twice/b_ids.png").unlink()
    (folder / "twice/coco.json").unlink()
    assert "twice/a_ids.png is replaced" in run_here(folder, *words, "run_dir=twice")

    table = folder / "twice/classes.json"
    table.write_text(json.dumps({"classes": [{"id": 0, "name": "sky"}, {"id": 1, "name": "road"}]}))
    for place in ("twice", "of_a_data_set"):  # another network has predicted here, or no network at all
        (folder / place).mkdir(exist_ok=True)
        (folder / place / "classes.json").write_bytes(table.read_bytes())
        shown = run_here(folder, *words, f"run_dir={place}", code=2)
        assert f"run_dir={place}: holds classes.json with other classes than this prediction has" in shown
        assert "replaced" not in shown
        assert (folder / place / "classes.json").read_bytes() == table.read_bytes()

    for name in ("a_ids.png", "coco.json", "label_studio.xml"):
        strange = folder / "strange" / name
        strange.parent.mkdir(exist_ok=True)
        strange.write_bytes(b"mine")
        shown = run_here(folder, *words, "predict.save=[ids,coco,label_studio]", "run_dir=strange", code=2)
        assert f"run_dir=strange: holds 1 file with the names of outputs, such as {name}" in shown
        assert [path.read_bytes() for path in strange.parent.iterdir()] == [b"mine"]
        strange.unlink()


@pytest.mark.slow
def test_outputs_of_videos_are_found_before_they_are_replaced(folder: Path) -> None:
    with VideoWriters(folder / "short") as film:
        film.add("film", np.zeros((32, 40, 3), np.uint8), 10)
    words = ("mode=predict", "ckpt=run", "input=short_film.mp4", "predict.save=[ids,panel]", "run_dir=of_film")
    run_here(folder, *words)
    assert "2 files in of_film are replaced, such as short_film_panel.mp4" in run_here(folder, *words)


@pytest.mark.slow
def test_images_that_differ_in_the_suffix_alone_do_not_collide(folder: Path) -> None:
    (folder / "two").mkdir()
    for name in ("a.png", "a.jpg"):
        Image.fromarray(np.zeros((32, 40, 3), np.uint8)).save(folder / "two" / name)
    run_here(folder, "mode=predict", "ckpt=run", "input=two", "run_dir=two_out", "predict.save=[ids]")
    assert {path.name for path in (folder / "two_out").glob("*.png")} == {"a_jpg_ids.png", "a_png_ids.png"}


@pytest.mark.slow
def test_a_phone_photo_comes_out_upright(folder: Path) -> None:
    pixels = np.zeros((40, 90, 3), np.uint8)
    photo = Image.fromarray(pixels)
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(folder / "phone.jpg", exif=exif)
    run_here(folder, "mode=predict", "ckpt=run", "input=phone.jpg", "run_dir=phone")
    assert Image.open(folder / "phone" / "phone_ids.png").size == (40, 90)


@pytest.mark.slow
def test_training_resumes_where_it_stopped(folder: Path) -> None:
    run_here(folder, *TINY, "run_dir=run", "trainer.max_epochs=3", "resume=auto")
    content = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["epoch"] == 2
    assert content["global_step"] == 9  # 3 epochs of 3 steps
    log = list(csv.DictReader((folder / "run/logs/metrics.csv").open()))
    assert [int(row["step"]) for row in log if row["train/loss"]] == list(range(9))


@pytest.mark.slow
def test_an_evaluation_leaves_no_file_of_an_earlier_one(folder: Path) -> None:
    words, place = ("mode=eval", "ckpt=run", "run_dir=again", "eval.bootstrap=0"), folder / "again"
    run_here(folder, *words, "eval.visualize=true", "eval.label_errors=true")
    panels = sorted((place / "panels").rglob("*.png"))
    assert len(panels) == 3 and (place / "label_errors.csv").exists()
    (place / "panels/mine.txt").touch()
    run_here(folder, *words, "eval.visualize=true", "data.limit=1")
    assert sorted((place / "panels").rglob("*.png")) == panels[:1] and not (place / "label_errors.csv").exists()
    (place / "precision_recall.csv").touch()
    run_here(folder, *words)
    assert [path.name for path in (place / "panels").iterdir()] == ["mine.txt"]
    assert not (place / "precision_recall.csv").exists() and (place / "per_image.npz").exists()


@pytest.mark.slow
def test_an_evaluation_explains_itself(folder: Path) -> None:
    output = run_here(
        folder, "mode=eval", "ckpt=run", "run_dir=explained", "eval.scales=[48,64]", "eval.also_scales=[[64]]",
        "eval.bootstrap=50", "eval.boundary_iou=true", "eval.visualize=true",
    )  # fmt: skip
    assert "images per second" in output and "95 % interval" in output
    assert json.loads((folder / "explained/metrics.json").read_text())["confidence"]["resamples"] == 50
    place = folder / "explained"
    content = json.loads((place / "metrics.json").read_text())
    assert set(content["mean_iou_by_rule"]) == {"ade20k", "present", "ground_truth"}
    assert content["boundary_iou"] is not None and content["also_scales"][0]["scales"] == [64]
    rows = list(csv.DictReader((place / "per_image.csv").open()))
    names = sorted(path.name for path in (folder / "scenes/images/validation").iterdir())
    assert [Path(row["file"]).name for row in rows] == names
    assert int(np.load(place / "confusion.npz")["matrix"].sum()) == sum(row["pixels"] for row in content["classes"])
    assert len(list((place / "panels").rglob("*.png"))) == 3
    page = (place / "report.html").read_text()
    assert page.startswith("<!doctype html>") and all(name in page for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["mode=eval", "ckpt=nowhere.ckpt"], 1, "nowhere.ckpt"),
        (["mode=predict", "ckpt=run", "input=nowhere"], 1, "input=nowhere"),
        (["mode=eval", "ckpt=run", "data=ade20k", "data.root=scenes"], 2, "has 150 classes, but"),
        (
            ["mode=eval", "ckpt=run", "eval.also_scales=[[33]]"],
            2,
            "[33] must be a subset of eval.scales=[64]",
        ),
    ],
)
def test_mistakes_are_one_line(folder: Path, words: list[str], code: int, expected: str) -> None:
    output = run_here(folder, *words, code=code)
    assert expected in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ""),
        ({"val_fraction": 0.05}, ""),  # fewer images of the same
        (
            {"val_fraction": 0.5},
            "warning: data.val_fraction=0.5: val is not that of the run, which has trained on some",
        ),
        ({"group": "p[0-9]"}, "warning: data.group=p[0-9]: val is not that of the run"),
        ({"folds": 5, "fold": 1}, "warning: data.folds=5, data.fold=1: val is not that of the run"),
        (
            {"root": "other"},
            "data.val_fraction=0.1: 2 images of data.train are val. To score all: data.val.images=images "
            "data.val.masks=masks",
        ),
        ({"root": "other", "val": SplitConfig(images="photos", masks="labels")}, ""),
    ],
)
def test_an_evaluation_says_which_images_of_train_it_scores(given: dict[str, Any], expected: str) -> None:
    trained = configured("data=folder", "data.root=here", "data.num_classes=2", "data.val_fraction=0.1").data
    source = Mock(records=lambda split: ["a", "b"])
    found = describe_cut_split(replace(trained, **given), trained, source)
    assert found.startswith(expected) and bool(found) == bool(expected)


@pytest.mark.slow
def test_a_validation_whose_labels_have_no_class_is_reported(folder: Path) -> None:
    shutil.copytree(folder / "scenes", folder / "unlabelled")
    for mask in (folder / "unlabelled" / "annotations" / "validation").iterdir():
        Image.fromarray(np.zeros_like(np.asarray(Image.open(mask)))).save(mask)
    with pytest.warns(UserWarning, match="test: nothing is scored, because no pixel of the labels has a class"):
        run_here(folder, "mode=eval", "ckpt=run", "data.root=unlabelled", "run_dir=nothing_scored")
