"""All outputs name a class by its id in the label files, for any `data.map`."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from test_server import SERVED, client, encoded, half_bright, mask_of

from helpers.in_process import configured
from semseg.build import open_predictor, restore_network
from semseg.checkpoints.format import FORMAT_KEY, describe_network, read_checkpoint
from semseg.checkpoints.network import build_network
from semseg.config.schema import PredictConfig, config_to_plain
from semseg.data.classes import ClassTable
from semseg.data.label_map import LabelMap
from semseg.errors import ConfigError
from semseg.evaluation.evaluator import Speed, SplitCounts
from semseg.evaluation.metrics import Counts
from semseg.evaluation.result import build_result
from semseg.evaluation.result_files import write_result_files
from semseg.export.onnx_runtime import build_description
from semseg.modes import check
from semseg.modes.eval import open_source
from semseg.prediction import predictor
from semseg.prediction.outputs import write_classes
from semseg.prediction.predictor import Predictor
from semseg.reports.compared_runs import read_evaluations
from semseg.reports.comparison import compare_runs
from semseg.serving import server

pytestmark = pytest.mark.reliability

MAPS = {
    "far apart": ({7: 0, 11: 1, 26: 2}, [7, 11, 26]),
    "several to one": ({7: 0, 8: 0, 26: 2, 11: 1, 3: 1}, [7, 3, 26]),
    "permuted": ({1: 2, 2: 0, 3: 1}, [2, 3, 1]),
    "16 bits": ({300: 1, 40_000: 0, 5: 2, 255: None}, [40_000, 300, 5]),
}
NAMES = ["road", "car", "sky"]


@pytest.fixture(params=MAPS)
def mapped(request: pytest.FixtureRequest) -> tuple[LabelMap, list[int]]:
    ids, expected = MAPS[request.param]
    return LabelMap(3, ignore=[0], ids=ids), expected


def test_j1_the_smallest_of_several_ids_represents_a_class(mapped: tuple[LabelMap, list[int]]) -> None:
    label_map, expected = mapped
    assert label_map.class_ids == expected
    assert label_map.to_raw(np.arange(3)).tolist() == expected
    assert label_map(label_map.to_raw(np.arange(3)), "a.png").tolist() == [0, 1, 2]


def test_j1_ignored_ids_include_those_that_the_map_ignores() -> None:
    label_map = LabelMap(2, ignore=[0, 9], ids={7: 0, 8: 1, 255: None, 3: None})
    assert label_map.ignored_ids == [0, 3, 9, 255]
    assert LabelMap(2, ignore=[0, 255]).ignored_ids == [0, 255]


@pytest.mark.slow
def test_j2_the_server_names_classes_by_the_ids_of_its_mask(mapped: tuple[LabelMap, list[int]]) -> None:
    label_map, expected = mapped
    caller = client(SERVED._replace(label_map=label_map))
    assert [one["id"] for one in caller.get("/network").json()["classes"]] == expected
    answer = caller.post("/predict", files={"image": encoded(half_bright())}).json()
    assert {one["name"]: one["id"] for one in answer["classes"]} == {"dark": expected[0], "bright": expected[1]}
    mask = np.asarray(mask_of(answer))
    assert mask[0, 0] == expected[0] and mask[0, 7] == expected[1]


def test_j2_predictions_are_written_by_the_ids(tmp_path: Path, mapped: tuple[LabelMap, list[int]]) -> None:
    label_map, expected = mapped
    classes = ClassTable.from_names(NAMES)
    ids = np.array([[0, 1, 2, 2]], np.int16)
    probabilities = np.zeros((3, 1, 4), np.float16)
    found = predictor.PredictionResult(np.zeros((1, 4, 3), np.uint8), ids, classes, label_map, probabilities)
    assert found.label_ids.tolist() == [[expected[0], expected[1], expected[2], expected[2]]]
    found.save(tmp_path, ["ids", "probabilities"], name="a")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a_ids.png")), found.label_ids)
    assert np.load(tmp_path / "a_probabilities.npz")["ids"].tolist() == expected
    write_classes(tmp_path / "classes.json", classes, label_map)
    assert [row["id"] for row in json.loads((tmp_path / "classes.json").read_text())["classes"]] == expected


def test_j2_evaluations_are_written_by_the_ids(tmp_path: Path, mapped: tuple[LabelMap, list[int]]) -> None:
    label_map, expected = mapped
    counts = Counts(torch.diag(torch.tensor([3, 4, 5])), 1)
    result = build_result(
        SplitCounts([counts], None, [], Speed(1.0, {})),
        ClassTable.from_names(NAMES),
        label_map.class_ids,
        rule="present",
        root=tmp_path,
    )
    # per_image.csv needs an image, which the scores of classes do not
    with pytest.raises(IndexError):
        write_result_files(tmp_path, result, {})
    rows = list(csv.DictReader((tmp_path / "per_class.csv").open()))
    assert [(row["index"], row["id"]) for row in rows] == [(str(n), str(raw)) for n, raw in enumerate(expected)]
    classes = json.loads((tmp_path / "metrics.json").read_text())["classes"]
    assert [row["id"] for row in classes] == expected


# ---- every mode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`net.ckpt`, and a data set of four images whose masks hold 7, 8, 300 and 26: classes 1, 1, 0 and 2."""
    folder = tmp_path_factory.mktemp("ids")
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / "d" / name).mkdir(parents=True)
    for number in range(4):
        label = np.repeat([[7, 8, 300, 26]], 32, 0).repeat(8, 1).astype(np.uint16)
        Image.fromarray(label).save(folder / f"d/masks/{number}.png")
        pixels = np.stack([label % 251] * 3, -1).astype(np.uint8) + rng.integers(0, 5, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"d/images/{number}.png")
    (folder / "classes.txt").write_text("\n".join(NAMES))
    video = cv2.VideoWriter(str(folder / "v.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 5, (32, 32))
    video.write(np.zeros((32, 32, 3), np.uint8))
    video.release()
    config = configured(*words(folder))
    torch.manual_seed(0)
    net = build_network(config.model, 3)
    entry = {FORMAT_KEY: describe_network(config_to_plain(config), ClassTable.from_names(NAMES), net.convention)}
    weights = {f"net.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 1, "global_step": 1} | entry, folder / "net.ckpt")
    return folder


IDS = [300, 7, 26]


def words(folder: Path) -> list[str]:
    return [
        "data=folder", f"data.root={folder / 'd'}", f"data.classes={folder / 'classes.txt'}", "data.num_classes=3",
        "data.map={7: 1, 8: 1, 300: 0, 26: 2, 255: null}", "data.short_edges=[32]", "eval.scales=[32]",
        "model/encoder=resnet18", "model.encoder.weights=none", "model/decoder=c1", "trainer=cpu", "data.num_workers=0",
    ]  # fmt: skip


def run_mode(folder: Path, mode: str, name: str, *changes: str) -> Path:
    """Run a mode in this process; returns its run folder."""
    given = [f"ckpt={folder / 'net.ckpt'}", f"run_dir={folder / name}", "trainer=cpu", "data.num_workers=0", *changes]
    import_module(f"semseg.modes.{mode}").run(configured(f"mode={mode}", *given), given)
    return folder / name


def opened(path: Path, *changes: str) -> Predictor:
    given = [f"ckpt={path}", "trainer=cpu", *changes]
    return open_predictor(configured("mode=serve", *given), given)


@pytest.mark.slow
def test_j3_every_mode_writes_the_same_ids(folder: Path) -> None:
    image = folder / "d/images/0.png"
    found = run_mode(folder, "predict", "p", f"input={image}", "predict.save=[ids]")
    ids = np.asarray(Image.open(found / "0_ids.png"))
    assert set(np.unique(ids)) <= set(IDS)
    net = opened(folder / "net.ckpt")
    assert np.array_equal(net.predict(image).label_ids, ids)
    served = server.ServedNetwork("", net.classes, net.label_map, lambda pixels: net.predict(pixels).ids)
    answer = client(served).post("/predict", files={"image": image.read_bytes()}).json()
    assert np.array_equal(np.asarray(mask_of(answer)), ids)
    assert {one["id"] for one in answer["classes"]} == set(np.unique(ids).tolist())


@pytest.mark.slow
def test_j3_frames_of_a_video_hold_the_ids(folder: Path) -> None:
    found = run_mode(folder, "predict", "v", f"input={folder / 'v.avi'}", "predict.save=[ids]")
    assert set(np.unique(np.asarray(Image.open(found / "v/000000_ids.png")))) <= set(IDS)


@pytest.mark.slow
def test_j3_an_evaluation_names_its_classes_by_the_ids(folder: Path) -> None:
    found = run_mode(folder, "eval", "e", *words(folder)[:5])
    assert np.load(found / "confusion.npz")["ids"].tolist() == IDS
    page = (found / "report.html").read_text()
    assert all(f'data-value="{raw_id}">{raw_id}<' in page for raw_id in IDS)
    with (found / "per_class.csv").open() as file:
        assert [int(row["id"]) for row in csv.DictReader(file)] == IDS
    shutil.copytree(found, folder / "again")
    assert compare_runs(read_evaluations([str(found), str(folder / "again")])).class_ids == IDS


def test_classes_in_another_order_than_those_of_the_network_are_not_scored(folder: Path) -> None:
    saved = read_checkpoint(folder / "net.ckpt")
    names = list(saved.classes.names)
    table = folder / "reversed.txt"
    table.write_text("".join(f"{name}\n" for name in reversed(names)))
    data = replace(saved.config.data, classes=str(table), num_classes=None)
    message = f"are those of .* in another order: class 0 is {names[-1]} here and {names[0]} there"
    with pytest.raises(ConfigError, match=message):
        open_source(data, saved)


def test_j3_an_exported_file_stores_the_ids(folder: Path) -> None:
    saved = read_checkpoint(folder / "net.ckpt")
    about = build_description(saved, restore_network(saved))
    assert about["label_ids"] == IDS and about["ignored_ids"] == [0, 255]
    plain = saved._replace(config=replace(saved.config, predict=PredictConfig(format="ade20k")))
    assert build_description(plain, restore_network(saved))["label_ids"] == list(range(1, len(IDS) + 1))


@pytest.mark.slow
def test_j3_an_exported_network_predicts_the_ids(folder: Path) -> None:
    saved = read_checkpoint(folder / "net.ckpt")
    about = build_description(saved, restore_network(saved)) | {"size_divisor": 1, "label_stride": 1}
    image, logits = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3, "h", "w"])
        for name in ("image", "logits")
    )
    # The logits are the channels of the image: red is class 0.
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["image"], ["logits"])], "g", [image], [logits])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    onnx.helper.set_model_props(model, {"semseg": json.dumps(about)})
    onnx.save(model, folder / "net.onnx")
    pixels = np.repeat(255 * np.eye(3, dtype=np.uint8)[None], 32, 0).repeat(11, 1)[:, :32]
    predicted = opened(folder / "net.onnx").predict(pixels).label_ids
    assert predicted[16, [5, 16, 27]].tolist() == IDS


def test_j3_mode_check_lists_classes_by_their_ids(folder: Path) -> None:
    check.run(configured("mode=check", f"run_dir={folder / 'c'}", *words(folder)), words(folder))
    found = json.loads((folder / "c/check.json").read_text())
    assert [(row["name"], row["id"]) for row in found["classes"]] == list(zip(NAMES, IDS, strict=True))


@pytest.mark.slow
def test_j3_serve_and_python_follow_predict_format(folder: Path) -> None:
    net = opened(folder / "net.ckpt", "predict.format=ade20k")
    assert net.label_map.class_ids == [1, 2, 3]
