"""export.preprocessing=true: the graph resizes a picture and gives its class ids, as mode=predict does."""
# ruff: noqa: E402 - imports that need the extra come after the check for it

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="needs semseg[export]")

import onnx
import onnxruntime
from onnx import helper

import semseg
from helpers.exported import CLASS_IDS, PICTURE_SIZES, draw_picture, export
from helpers.in_process import configured
from semseg.data.geometry import Size, stretched_size
from semseg.data.resize import resize_image
from semseg.errors import CheckpointError, ConfigError, ExportError
from semseg.export import picture_graph
from semseg.export.onnx_runtime import PictureRule, read_exported
from semseg.export.picture_graph import (
    GraphBuilder,
    add_scaled_sides,
    build_picture_model,
    resize_antialiased,
    resize_like_opencv,
)

RULE = PictureRule((64,), 160, 8, antialias=True, flip=False)

pytestmark = pytest.mark.usefixtures("tiny_encoder")


def run_graph(graph: GraphBuilder, result: str, **inputs: NDArray) -> NDArray:
    """The value `result` of a graph."""
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
        for name, value in inputs.items()
    ]
    output = helper.make_empty_tensor_value_info(result)
    model = helper.make_model(
        helper.make_graph(graph.nodes, "part", values, [output], graph.constants),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    return np.asarray(onnxruntime.InferenceSession(model.SerializeToString()).run([result], inputs)[0])


@pytest.mark.slow
@pytest.mark.parametrize("antialias", [True, False])
def test_a_graph_resizes_to_the_same_pixels_as_evaluation(antialias: bool) -> None:
    graph = GraphBuilder("part_")
    result = (resize_antialiased if antialias else resize_like_opencv)(graph, "planes", "rows", "columns")
    generator = np.random.default_rng(0)
    sizes = [(64, 96, 32, 48), (64, 96, 64, 96), (64, 96, 64, 8), (1, 7, 8, 8), (900, 31, 32, 64)]
    sizes += [tuple(generator.integers((2, 2, 1, 1), (400, 400, 30, 30)) * (1, 1, 8, 8)) for _ in range(40)]
    for height, width, rows, columns in sizes:
        image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image[: height // 2] = np.where(image[: height // 2] < 128, 0, 255)  # sums beyond 0 and 255
        expected = resize_image(image, Size(int(rows), int(columns)), antialias=antialias)
        found = run_graph(
            graph, result, planes=image.transpose(2, 0, 1), rows=np.array(rows), columns=np.array(columns)
        )
        assert np.array_equal(found.transpose(1, 2, 0), expected), (height, width, rows, columns)


@pytest.mark.slow
def test_a_graph_computes_the_same_sizes_as_evaluation() -> None:
    generator = np.random.default_rng(0)
    for short_edge, max_long_edge, divisor in ((450, 1000, 8), (300, 450, 32), (7, 5000, 1)):
        graph = GraphBuilder("part_")
        rule = RULE._replace(max_long_edge=max_long_edge, size_divisor=divisor)
        rows, columns = add_scaled_sides(graph, "height", "width", short_edge, rule)
        result = graph.add("Add", graph.add("Mul", rows, np.int64(10**6)), columns)
        for height, width in [(426, 640), (1, 9000), *generator.integers(1, 3000, (30, 2))]:
            found = int(run_graph(graph, result, height=np.array(height), width=np.array(width)))
            size = Size(int(height), int(width))
            assert divmod(found, 10**6) == stretched_size(size, short_edge, max_long_edge, divisor), size


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["predict.scales=[40,64]"], marks=pytest.mark.long),
        ["predict.scales=[48]", "predict.flip=true"],
    ],
)
def test_the_graph_gives_the_class_map_of_prediction(settings: list[str], tiny_checkpoint: Path) -> None:
    export(tiny_checkpoint, *settings)
    predictor = semseg.load("model.onnx", *settings, device="cpu")
    export(tiny_checkpoint, *settings, "export.preprocessing=true")
    session = onnxruntime.InferenceSession("model.onnx")
    seen = set[int]()
    for size in PICTURE_SIZES:
        picture = draw_picture(*size)
        (found,) = session.run(["ids"], {"image": picture})
        assert np.asarray(found).dtype == np.uint8
        assert np.array_equal(np.asarray(found), predictor.predict(picture).label_ids), size
        seen |= set(np.unique(np.asarray(found)).tolist())
    assert len(seen) > 4 and seen <= set(CLASS_IDS)


@pytest.mark.slow
def test_the_weights_of_2018_are_resized_without_antialiasing_and_large_ids_are_int64(tiny_checkpoint: Path) -> None:
    network = onnx.load(tiny_checkpoint / "graph.onnx")
    picture = draw_picture(97, 131)
    ids = []
    for antialias in (True, False):
        rule = RULE._replace(antialias=antialias)
        model = build_picture_model(network, rule, [1000 + number for number in CLASS_IDS])
        onnx.checker.check_model(model, full_check=True)
        (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": picture})
        ids.append(np.asarray(found))
    assert ids[0].dtype == np.int64 and ids[0].min() > 1000
    assert 0 < (ids[0] != ids[1]).mean() < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("method", "operator"), [("dynamic", "ConvInteger"), ("static", "DequantizeLinear")])
def test_the_network_in_the_graph_may_be_quantised(method: str, operator: str, tiny_checkpoint: Path) -> None:
    words = [f"export.quantize={method}", "export.score_images=0", "export.calibration_images=2"]
    export(tiny_checkpoint, "export.preprocessing=true", *words)
    model = onnx.load("model.onnx")
    assert any(node.op_type == operator for node in model.graph.node)
    entry = json.loads({item.key: item.value for item in model.metadata_props}["semseg"])
    assert entry["quantized"] == method


@pytest.mark.slow
def test_the_file_describes_itself(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(tiny_checkpoint, "export.preprocessing=true")
    entry = json.loads({item.key: item.value for item in onnx.load("model.onnx").metadata_props}["semseg"])
    assert entry["preprocessing"]["resizing"] == "inside the graph"
    assert "uint8 (H, W, 3)" in entry["input"] and entry["output"].startswith("ids: uint8")
    assert re.search(r"InferenceSession\(.*model\.onnx.*\)\.run", capsys.readouterr().out)


@pytest.mark.slow
def test_the_network_inside_predicts_with_all_settings_as_the_file_without_preprocessing(tiny_checkpoint: Path) -> None:
    picture = draw_picture(97, 131)
    settings = {"scales": [56], "flip": True, "window": 48, "probabilities": True}
    results = []
    for words in ([], ["export.preprocessing=true", "predict.scales=[40,64]", "predict.flip=true"]):
        export(tiny_checkpoint, *words)
        results.append(semseg.load("model.onnx", device="cpu").predict(picture, **settings))
    assert np.array_equal(results[0].probabilities, results[1].probabilities)
    assert semseg.load("model.onnx", device="cpu").settings.scales == [40, 64]  # those of the file


@pytest.mark.slow
def test_a_graph_of_pictures_without_its_network_is_rejected(tiny_checkpoint: Path) -> None:
    export(tiny_checkpoint, "export.preprocessing=true")
    model = onnx.load("model.onnx")
    kept = [node for node in model.graph.node if "network_logits" not in node.output]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    onnx.save(model, "model.onnx")
    with pytest.raises(CheckpointError, match=r"model\.onnx: not written by mode=export"):
        read_exported(Path("model.onnx"))


@pytest.mark.slow
def test_a_graph_that_gives_other_classes_is_not_written(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        picture_graph,
        "build_picture_model",
        lambda network, rule, ids: build_picture_model(network, rule._replace(scales=(40,)), ids),
    )
    with pytest.raises(ExportError, match="other classes"):
        export(tiny_checkpoint, "predict.scales=[64]", "export.preprocessing=true")
    assert not Path("model.onnx").exists()


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["output=a.pt2", "export.preprocessing=true"], "export.preprocessing=true"),
        (["output=a.onnx", "export.preprocessing=true", "predict.window=64"], "predict.window=64"),
    ],
)
def test_what_cannot_be_in_a_graph_is_refused(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        configured("mode=export", "ckpt=a", *overrides)
