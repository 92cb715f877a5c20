"""Regions where the network contradicts the label: which are found, their score, and their way into files and page."""

from __future__ import annotations

import base64
import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import semseg
from helpers.command_line import TINY_ENCODERS, run_here
from helpers.random_checkpoints import write_random_checkpoints
from helpers.tiny_network import TinyNetwork
from semseg.config.preprocessing import PREPROCESSING
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.data.windows import Window
from semseg.evaluation.evaluator import Speed, SplitCounts
from semseg.evaluation.inference import merge_scales
from semseg.evaluation.label_errors import (
    LabelError,
    LabelErrorList,
    decode_region_mask,
    find_border_zone,
    find_label_errors,
    merge_label_errors,
)
from semseg.evaluation.metrics import Counts
from semseg.evaluation.result import build_result
from semseg.evaluation.tiled import ArraySink, WindowLayout, predict_by_windows
from semseg.modes.eval import describe_label_errors
from semseg.nets.ensemble import Ensemble
from semseg.nets.registry import ENCODERS
from semseg.reports.evaluation_page import EvaluationReport, render_evaluation_page
from semseg.reports.label_error_pictures import choose_crop_window, draw_label_error
from semseg.reports.run_card import NO_CHECKOUT, RunCard

SKY, ROAD, CAR = 0, 1, 2


class Scene:
    """A label of sky above road, a prediction that agrees with it, and confidence 0.9 everywhere."""

    def __init__(self) -> None:
        self.label = np.full((100, 100), SKY)
        self.label[50:] = ROAD
        self.prediction = self.label.copy()
        self.confidence = np.full((100, 100), 0.9, np.float32)
        self.label_confidence = np.full((100, 100), 0.9, np.float32)

    def predict(self, rows: slice, columns: slice, predicted: int, given: float = 0.1) -> None:
        """Let the network see another class, and give this probability to that of the label."""
        self.prediction[rows, columns] = predicted
        self.label_confidence[rows, columns] = given

    def find(self, **options: Any) -> list[LabelError]:
        maps = (self.label, self.prediction, self.confidence, self.label_confidence)
        return list(find_label_errors(*maps, position=0, file="a.png", **options))


def test_a_car_that_the_label_lacks_is_found_with_its_place_margin_and_score() -> None:
    scene = Scene()
    scene.predict(slice(70, 80), slice(20, 40), CAR)
    (error,) = scene.find()
    assert (error.label, error.predicted, error.pixels, error.box) == (ROAD, CAR, 200, Window(70, 20, 10, 20))
    assert error.margin == pytest.approx(0.8) and error.confidence == pytest.approx(0.9)
    assert error.score == pytest.approx(0.8 * math.sqrt(200) / 100)
    assert decode_region_mask(error.mask).shape == (10, 20) and decode_region_mask(error.mask).all()


def test_regions_are_apart_if_they_do_not_touch_or_have_another_pair_of_classes() -> None:
    scene = Scene()
    scene.predict(slice(60, 70), slice(10, 20), CAR)
    scene.predict(slice(70, 80), slice(20, 30), CAR)  # touches at a corner
    scene.predict(slice(60, 70), slice(50, 60), CAR)
    scene.predict(slice(60, 70), slice(60, 70), SKY)
    scene.predict(slice(10, 20), slice(10, 20), CAR)
    found = sorted((error.label, error.predicted, error.pixels) for error in scene.find())
    assert found == [(SKY, CAR, 100), (ROAD, SKY, 100), (ROAD, CAR, 100), (ROAD, CAR, 200)]


def test_a_border_that_is_drawn_a_few_pixels_off_is_no_label_error() -> None:
    scene = Scene()
    width = find_border_zone(scene.label)[:50].sum() // 100
    assert width == 1  # 0.5 % of a diagonal of 141 pixels
    scene.predict(slice(50 - width, 50), slice(0, 100), ROAD)
    assert scene.find() == []
    scene.predict(slice(46, 50), slice(0, 100), ROAD)
    (error,) = scene.find()
    assert error.pixels == 400 and error.score == pytest.approx(0.8 * math.sqrt(300) / 100)  # inner pixels only


def test_the_zone_is_as_wide_on_both_sides_and_open_at_the_edge_of_the_image() -> None:
    label = np.zeros((300, 400), int)
    label[:, 200:] = 1
    zone = find_border_zone(label)
    assert np.flatnonzero(zone.any(0)).tolist() == list(range(198, 202)) and zone[:, 198:202].all()
    assert not find_border_zone(np.zeros((5, 5), int)).any()


def test_pixels_that_are_not_scored_and_specks_are_left_out() -> None:
    scene = Scene()
    scene.label[60:90, 10:90] = -1
    scene.prediction[60:90, 10:90] = CAR
    scene.predict(slice(10, 12), slice(10, 14), CAR)  # 8 pixels
    assert scene.find() == []


def test_the_surer_and_the_larger_region_come_first() -> None:
    scene = Scene()
    scene.predict(slice(60, 70), slice(0, 10), CAR, given=0.1)
    scene.predict(slice(60, 70), slice(30, 40), CAR, given=0.5)
    scene.predict(slice(60, 80), slice(60, 80), CAR, given=0.1)
    ranked = merge_label_errors([scene.find()])
    assert [error.box.left for error in ranked] == [60, 0, 30]
    assert {error.box.left for error in scene.find(above=ranked[1].score)} == {60, 0}


def test_the_list_is_bounded_and_the_same_on_any_number_of_devices() -> None:
    rng = np.random.default_rng(0)
    errors = [
        LabelError(score, n, f"{n}.png", 0, 1, 0.5, 0.5, 9, Window(0, 0, 3, 3), b"")
        for n, score in enumerate(rng.integers(1, 20, 200) / 20)  # many are equal
    ]
    alone = LabelErrorList(limit=30)
    for error in errors:
        alone.add([error] if error.score >= alone.threshold else [])
    ranks = [LabelErrorList(limit=30) for _ in range(3)]
    for number, error in enumerate(errors):
        ranks[number % 3].add([error])
    assert len(alone.kept) == 30
    assert merge_label_errors([rank.kept for rank in ranks], 30) == alone.kept
    assert [error.score for error in alone.kept] == sorted((error.score for error in errors), reverse=True)[:30]


# ---- the probability of the label


def test_the_probability_of_the_label_is_that_of_its_class_whatever_the_memory_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(1, 5, 6, 4, generator=generator), torch.randn(2, 10, 12, 4, generator=generator)]
    label = torch.randint(-1, 4, (300, 250), generator=generator)
    found = np.empty((4, 300, 250), np.float32)
    class_map = merge_scales(logits, (300, 250), probabilities=found, label=label, memory_limit_mb=1)
    assert class_map.label_confidence is not None
    expected = torch.from_numpy(found).gather(0, label.clamp(min=0)[None])[0].masked_fill(label < 0, 0)
    assert torch.equal(class_map.label_confidence, expected)
    assert merge_scales(logits, (300, 250)).label_confidence is None


@pytest.mark.parametrize("num_members", [1, 2])
def test_windows_at_native_resolution_keep_it_too(num_members: int) -> None:
    torch.manual_seed(3)
    members = [TinyNetwork(5).eval() for _ in range(num_members)]
    net = members[0] if num_members == 1 else Ensemble(members, [8, 8])
    image = torch.randint(0, 256, (3, 70, 50), dtype=torch.uint8)
    label = torch.randint(-1, 5, (70, 50))
    whole, sink = ArraySink(Size(70, 50), np.empty((5, 70, 50), np.float32)), ArraySink(Size(70, 50))
    options: dict[str, Any] = {"convention": PREPROCESSING["rgb_mean_std"], "layout": WindowLayout(32, 24, 8)}
    predict_by_windows(net, image, sink=whole, flip=True, **options)
    predict_by_windows(net, image, sink=sink, label=label, flip=True, **options)
    class_map = sink.to_class_map(torch.device("cpu"))
    assert sink.probabilities is None and whole.label_confidence is None
    probabilities = torch.from_numpy(np.asarray(whole.probabilities))
    expected = probabilities.gather(0, label.clamp(min=0)[None])[0].masked_fill(label < 0, 0)
    assert torch.equal(class_map.label_confidence, expected) and np.array_equal(class_map.ids, whole.ids)  # pyright: ignore[reportArgumentType]


# ---- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints of networks with random weights, a.ckpt and b.ckpt, and their data."""
    return write_random_checkpoints(tmp_path_factory.mktemp("label_errors"), "data.make.num_val=2")


def evaluate(folder: Path, ckpt: str, name: str, *words: str) -> tuple[list[dict[str, str]], str]:
    printed = run_here(
        folder, "mode=eval", f"ckpt={ckpt}", "eval.label_errors=true", "data.num_workers=0", "trainer.accelerator=cpu",
        f"run_dir={name}", *words,
    )  # fmt: skip
    with (folder / name / "label_errors.csv").open(newline="") as file:
        return list(csv.DictReader(file)), " ".join(printed.split())


def test_a_region_along_a_border_comes_behind_a_compact_one_of_its_size() -> None:
    scene = Scene()
    scene.predict(slice(60, 75), slice(0, 20), CAR)
    for step in range(30):
        scene.predict(slice(5 + step, 5 + step + 10), slice(50 + step, 51 + step), ROAD)  # 300 pixels, 39 x 30
    first, second = merge_label_errors([scene.find()])
    assert (first.predicted, second.predicted, first.pixels, second.pixels) == (CAR, ROAD, 300, 300)
    assert second.score == pytest.approx(0.8 * math.sqrt(300) / 100 * 300 / (39 * 30))


@pytest.mark.slow
@pytest.mark.parametrize("ckpt", ["[a.ckpt,b.ckpt]", pytest.param("a.ckpt", marks=pytest.mark.long)])
def test_an_evaluation_ranks_regions_by_the_mean_probabilities_of_scales_and_networks(
    folder: Path, ckpt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENCODERS, "tiny", TINY_ENCODERS["tiny"])
    words = ["eval.scales=[32,48]", "eval.also_scales=[[48]]", "eval.flip=true"]
    rows, printed = evaluate(folder, ckpt, f"eval_{len(ckpt)}", *words)
    files = [folder / name for name in ckpt.strip("[]").split(",")]
    predictor = semseg.load(files if len(files) > 1 else files[0], device="cpu")
    found = LabelErrorList()
    names = predictor.classes.names
    for position, image in enumerate(sorted((folder / "scenes" / "images" / "validation").iterdir())):
        result = predictor.predict(image, scales=[32, 48], flip=True, probabilities=True)
        label = np.asarray(Image.open(folder / "scenes" / "annotations" / "validation" / f"{image.stem}.png")) - 1
        label = label.astype(np.int8).astype(np.int64)  # 0, which is not scored, has become 255
        assert result.probabilities is not None
        given = np.take_along_axis(result.probabilities, label.clip(min=0)[None], 0)[0].astype(np.float32)
        sure = result.probabilities.max(0).astype(np.float32)
        found.add(find_label_errors(label, result.ids, sure, given, position=position, file=f"{image.name}"))
    first, expected = rows[0], found.kept[0]
    assert [int(row["rank"]) for row in rows] == list(range(1, len(found.kept) + 1))
    assert (first["label"], first["predicted"]) == (names[expected.label], names[expected.predicted])
    assert [int(first[key]) for key in Window._fields] == list(expected.box)
    assert int(first["pixels"]) == expected.pixels and first["file"].endswith(expected.file)
    assert float(first["margin"]) == pytest.approx(expected.margin, abs=2e-3)  # probabilities were kept as float16
    assert float(first["score"]) == pytest.approx(expected.score, abs=2e-3)
    assert (first["label_id"], first["predicted_id"]) == (str(expected.label + 1), str(expected.predicted + 1))
    assert f"label errors: {len(rows)} region" in printed and f"labelled {first['label']}" in printed
    page = (folder / f"eval_{len(ckpt)}" / "report.html").read_text()
    assert page.count("<li>\n<h3>") == min(len(rows), 150) and 'href="#label-errors"' in page
    assert f'alt="{first["file"]}"' in page


@pytest.mark.slow
def test_an_evaluation_at_native_resolution_has_them_too(folder: Path) -> None:
    rows, _ = evaluate(folder, "a.ckpt", "native", "data.resize=native", "data.crop=[64,64]")
    assert rows and all(float(row["margin"]) > 0 for row in rows)


# ---- the pictures


def test_a_crop_shows_the_region_its_label_and_what_the_label_would_be() -> None:
    classes = ClassTable(("sky", "road", "car"), ((0, 0, 255), (128, 128, 128), (255, 0, 0)))
    scene = Scene()
    scene.predict(slice(70, 80), slice(20, 40), CAR)
    (error,) = scene.find()
    window = choose_crop_window(error.box, Size(100, 100))
    assert window == Window(38, 0, 62, 72)  # 32 pixels on each side, inside the image
    place = (slice(38, 100), slice(0, 72))
    image = np.full((62, 72, 3), 120, np.uint8)
    shown = draw_label_error(1, error, image, scene.label[place], window=window, classes=classes)
    pictures = [decode_uri(uri) for uri in (shown.image, shown.label, shown.suggestion)]
    assert {picture.shape for picture in pictures} == {(172, 200, 3)}
    row, column = round((75 - 38) * 200 / 72), round(30 * 200 / 72)  # the middle of the region
    differs = np.abs(pictures[1].astype(int) - pictures[2]).max(2) > 60
    assert differs[row, column] and not differs[10, 10] and 0.03 < differs.mean() < 0.08  # 200 of 4464 pixels
    outline = (np.abs(pictures[0].astype(int) - 120).max(2) > 40).mean()
    assert 0.005 < outline < 0.05


def decode_uri(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_the_page_says_so_if_there_is_no_region() -> None:
    result = build_result(
        SplitCounts([Counts(torch.diag(torch.tensor([2, 1])), 1)], None, [], Speed(1.0, {}), label_errors=[]),
        ClassTable.from_names(["sky", "road"]), (1, 2), rule="present", root=Path("/data"),
    )  # fmt: skip
    card = RunCard("python run.py", "", {}, NO_CHECKOUT, "cpu", "today", None)
    page = render_evaluation_page(EvaluationReport("t", "s", result, 1, (), (), card))
    assert "No region was found" in page
    assert describe_label_errors(result) == "label errors: no region where the network is sure that the label is wrong"
