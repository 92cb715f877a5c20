"""mode=export, and its files in other modes. Needs the packages of semseg[export]."""
# ruff: noqa: E402 - imports that need the extra come after the check for it

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="needs semseg[export]")

import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

import semseg
from helpers.command_line import TINY, TINY_ENCODERS, TINY_NETWORK
from helpers.in_process import TinyEncoder, configured
from semseg import build
from semseg.build import restore_network
from semseg.checkpoints.format import SavedNetwork, write_ckpt
from semseg.checkpoints.network import build_network
from semseg.config.groups import CONFIG_DIR
from semseg.config.preprocessing import PREPROCESSING
from semseg.data.sources import DataSource
from semseg.errors import CheckpointError, ConfigError, ExportError, SemsegError
from semseg.export import onnx as onnx_export
from semseg.export.onnx import Deviation, PixelNetwork, compare_with_network, write_onnx, write_torch_export
from semseg.export.onnx_runtime import METADATA_KEY, read_exported
from semseg.export.quantize import quantize_onnx
from semseg.modes import eval as eval_mode
from semseg.modes import export as export_mode
from semseg.nets.interfaces import SegmentationNetwork
from semseg.nets.normalise import normalise
from semseg.nets.registry import ENCODERS, build_decoder, build_segmenter
from semseg.nets.segmenter import Segmenter

SMALL = [*(word for word in TINY if not word.startswith("data.root=")), *TINY_NETWORK]
NUM_CLASSES = 11  # classes of the generated scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, `net.ckpt`, of a tiny network with C1 and `net.onnx` from it."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    overrides = [*SMALL, "model/decoder=c1_deepsup", f"data.root={folder / 'scenes'}"]
    config = configured(*overrides)
    net = build_network(config.model, NUM_CLASSES)
    classes = DataSource(config.data).classes
    write_ckpt(folder / "net.ckpt", SavedNetwork("", net.state_dict(), config, classes, net.convention, epoch=3))
    run("export", f"ckpt={folder / 'net.ckpt'}", f"output={folder / 'net.onnx'}")
    return folder


def run(mode: str, *overrides: str) -> float | None:
    """A mode in this process; the score of mode=eval."""
    words = [f"mode={mode}", *overrides]
    config = configured(*words)
    Path(config.run_dir).mkdir(parents=True, exist_ok=mode == "eval")
    return {"export": export_mode, "eval": eval_mode}[mode].run(config, words)


@pytest.fixture(autouse=True, scope="module")
def tiny_encoders() -> Iterator[None]:
    with patch.dict(ENCODERS, TINY_ENCODERS):
        yield


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def differences(net: SegmentationNetwork, path: Path) -> list[float]:
    """Largest differences, as fractions of the largest logit, at sizes that the export has not compared."""
    exported = onnx_export.load_onnx(path, net)
    found = []
    for size in ((1, 5, 7), (4, 2, 1), (1, 1, 12)):
        shape = (size[0], 3, net.size_divisor * size[1], net.size_divisor * size[2])
        image = torch.rand(shape) * 255
        with torch.no_grad():
            expected = PixelNetwork(net)(image)
        found.append(float((exported(image) - expected).abs().max() / expected.abs().max()))
    return found


def tiny_segmenter(decoder: str, **options: int) -> Segmenter:
    """An encoder of three convolutions, and a decoder."""
    encoder = TinyEncoder()
    return Segmenter(encoder, build_decoder(decoder, encoder.channels, 5, **options), 5).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "options"),
    # C1 is exported below, and the pyramid's pooling in tests/nets/test_blocks.py.
    [
        pytest.param("upernet", {"width": 16}, marks=pytest.mark.long),
        pytest.param("ppm_deepsup", {}, marks=pytest.mark.long),
    ],
)
def test_every_decoder_gives_the_same_logits_at_every_size(
    decoder: str, options: dict[str, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = tiny_segmenter(decoder, **options)
    write_onnx(tmp_path / "net.onnx", net, {})
    assert max(differences(net, tmp_path / "net.onnx")) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        ("mobilenetv2_dilated8", "c1"),
        ("resnet18_dilated8", "ppm"),
        ("resnet18_dilated8", "upernet"),
        ("hrnetv2", "c1"),
    ],
)
def test_networks_give_the_same_logits_at_every_size(encoder: str, decoder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = build_segmenter(encoder, decoder, 5).eval()
    write_onnx(tmp_path / "net.onnx", net, {})
    assert max(differences(net, tmp_path / "net.onnx")) < 1e-5


@pytest.mark.slow
def test_c1_gives_the_same_logits_at_every_size(folder: Path) -> None:
    net = restore_network(build.read_checkpoint(folder / "net.ckpt"))
    assert max(differences(net, folder / "net.onnx")) < 1e-5


@pytest.mark.slow
def test_a_file_for_torch_export_gives_the_same_logits_and_holds_the_description(tmp_path: Path) -> None:
    net = tiny_segmenter("c1")
    write_torch_export(tmp_path / "net.pt2", net, {"size_divisor": 4})
    files = {"semseg.json": ""}
    module = torch.export.load(tmp_path / "net.pt2", extra_files=files).module()
    image = torch.rand(1, 3, 40, 24) * 255
    with torch.no_grad():
        assert torch.allclose(module(image), PixelNetwork(net)(image), rtol=1e-4)
    assert json.loads(files["semseg.json"]) == {"size_divisor": 4}
    with zipfile.ZipFile(tmp_path / "net.pt2") as archive:
        text = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".json"))
    assert b"blocks.py" not in text


def test_the_file_describes_the_network(folder: Path) -> None:
    model = onnx.load(folder / "net.onnx")
    about = json.loads({item.key: item.value for item in model.metadata_props}["semseg"])
    assert about["classes"]["names"][:2] == ["sky", "mountain"]
    assert about["classes"]["palette"][0] == [120, 190, 240]
    assert (about["size_divisor"], about["label_stride"], about["epoch"]) == (8, 8, 3)
    assert about["label_ids"] == list(range(1, 12)) and about["ignored_ids"] == [0]
    assert about["convention"]["channel_order"] == "rgb" and about["convention"]["std"][0] == 0.229
    assert [axis.dim_param or axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim] == [
        "N", 3, "H", "W"
    ]  # fmt: skip


def test_the_file_does_not_contain_source_paths(folder: Path) -> None:
    assert b"segmenter.py" not in (folder / "net.onnx").read_bytes()
    assert str(CONFIG_DIR.parent / "semseg").encode() not in (folder / "net.onnx").read_bytes()


@pytest.mark.slow
def test_prediction_needs_nothing_but_the_file(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "net.onnx", tmp_path / "alone.onnx")
    picture = np.random.default_rng(0).integers(0, 256, (150, 97, 3), dtype=np.uint8)
    overrides = ["predict.scales=[64,96]", "predict.flip=true", "predict.window=64"]
    found, expected = (
        semseg.load(path, *overrides, device="cpu").predict(picture, probabilities=True)
        for path in (tmp_path / "alone.onnx", folder / "net.ckpt")
    )
    assert found.probabilities is not None and expected.probabilities is not None
    assert np.abs(found.probabilities - expected.probabilities).max() < 0.002  # they are float16
    assert found.classes == expected.classes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["net.ckpt", "net.onnx"])
def test_images_of_other_sizes_than_the_network_takes_are_refused(name: str, folder: Path) -> None:
    divisor = restore_network(read_exported(folder / "net.onnx")).size_divisor
    message = f"^size_divisor=1: this network takes images whose sides are multiples of {divisor} pixels"
    with pytest.raises(ConfigError, match=message):
        semseg.load(folder / name, device="cpu").predict(np.zeros((30, 40, 3), np.uint8), size_divisor=1)


@pytest.mark.slow
def test_evaluation_scores_as_with_the_checkpoint(folder: Path) -> None:
    scores = [
        run("eval", f"ckpt={folder / name}", "trainer=cpu", f"run_dir={name}", "trainer.enable_progress_bar=false")
        for name in ("net.ckpt", "net.onnx")
    ]
    assert scores[0] is not None and scores[0] == pytest.approx(scores[1], abs=1e-3)


# ---- a file that differs


def test_a_file_that_gives_other_numbers_is_rejected() -> None:
    net = tiny_segmenter("c1")
    with pytest.raises(ExportError, match=r"by .* at \(2, 3, 16, 8\)"):
        compare_with_network(net, lambda image: PixelNetwork(net)(image) * 1.001, ((2, 2, 1),))
    with pytest.raises(ExportError, match="by nan at"):
        compare_with_network(net, lambda image: PixelNetwork(net)(image) * float("nan"), ((2, 2, 1),))
    with pytest.raises(ExportError, match="by inf at"):
        compare_with_network(net, lambda image: PixelNetwork(net)(image)[:1], ((2, 2, 1),))


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, b"an earlier file"])
def test_a_rejected_file_is_not_written(
    before: bytes | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_wrongly(path: Path, net: Segmenter, entry: dict[str, Any]) -> Deviation:
        path.write_bytes(b"wrong")
        return compare_with_network(net, lambda image: PixelNetwork(net)(image) + 1e6, ((1, 1, 1),))

    monkeypatch.setitem(onnx_export.EXPORT_WRITERS, "onnx", write_wrongly)
    output = tmp_path / "out" / "net.onnx"
    if before is not None:
        output.parent.mkdir()
        output.write_bytes(before)
    with pytest.raises(ExportError):
        run("export", f"ckpt={folder / 'net.ckpt'}", f"output={output}")
    assert list(output.parent.iterdir()) == ([output] if before else [])
    assert before is None or output.read_bytes() == before


def test_an_error_of_the_exporter_becomes_one_line() -> None:
    with pytest.raises(ExportError) as caught, onnx_export.raise_export_errors("ONNX"):
        raise RuntimeError("Failed.\n\nHow to report it:\n...") from ValueError("sizes are fixed\nat 7")
    assert "ONNX: sizes are fixed" in str(caught.value) and "\n" not in str(caught.value)


# ---- integers


def drawn_scene(folder: Path) -> torch.Tensor:
    """An image for training, normalised (1, 3, H, W)."""
    path = next((folder / "scenes" / "images" / "training").glob("*.jpg"))
    pixels = np.asarray(Image.open(path).convert("RGB").resize((64, 32)), np.float32)
    return normalise(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None], PREPROCESSING["rgb_mean_std"])


def count_weights(path: Path, *types: int) -> int:
    """The number of weights of convolutions in a file of some types."""
    kept = onnx.load(path).graph.initializer
    return sum(math.prod(each.dims) for each in kept if each.data_type in types and len(each.dims) == 4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dynamic", "static"])
def test_weights_become_integers_of_one_byte_and_scores_are_printed(
    method: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def copy(path: Path, net: Segmenter, entry: dict[str, Any]) -> Deviation:
        shutil.copy(folder / "net.onnx", path)
        return Deviation(0.0, 1.0)

    monkeypatch.setitem(onnx_export.EXPORT_WRITERS, "onnx", copy)
    output = tmp_path / "small.onnx"
    overrides = [f"export.quantize={method}", "export.calibration_images=6", "export.score_images=3"]
    run("export", f"ckpt={folder / 'net.ckpt'}", f"output={output}", *overrides)
    assert count_weights(output, TensorProto.INT8, TensorProto.UINT8) > 0.9 * count_weights(
        folder / "net.onnx", TensorProto.FLOAT
    )
    assert list(tmp_path.glob("*.onnx")) == [output]
    printed = capsys.readouterr().out
    assert "scores on 3 images of scenes val" in printed and re.search(r"int8 +mean IoU \d+\.\d\d %", printed)
    integers, floats = (restore_network(read_exported(path)) for path in (output, folder / "net.onnx"))
    image = drawn_scene(folder)
    found, expected = integers(image).main, floats(image).main
    assert 0 < (found - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.slow
def test_without_the_data_set_dynamic_quantisation_works_and_nothing_is_scored(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = read_exported(folder / "net.onnx")
    config = configured("data=camvid", f"data.root={tmp_path / 'nowhere'}")
    net = restore_network(saved)
    export_mode.print_quantisation_loss(config, saved, net, net)
    assert "was not measured" in caplog.text and "nowhere" in caplog.text


# ---- unsafe files and options


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["mode=train", "init_from=net.onnx"], "init_from=net.onnx: an exported network is for mode=eval, predict"),
        (["mode=train", "ckpt=net.ONNX"], "an exported network is for"),
        (["mode=train", "model.encoder.weights=net.onnx"], "an exported network is for"),
        (["mode=convert", "ckpt=net.onnx", "output=a.ckpt"], "an exported network is for"),
        (["mode=replay", "ckpt=net.onnx", "input=a.pt"], "an exported network is for"),
        (["mode=export", "ckpt=net.onnx", "output=a.onnx"], "an exported network is for"),
        (["mode=eval", "ckpt=net.onnx", "trainer.precision=bf16-mixed"], "Leave this at 32-true"),
        (["mode=eval", "ckpt=net.onnx", "model.compile=true"], "Leave this at False"),
        (["mode=export", "ckpt=a", "output=net.pth"], "needs output=<file.onnx or file.pt2>"),
        (["mode=export", "ckpt=a"], "needs output=<file.onnx or file.pt2>"),
        (["mode=export", "ckpt=a", "output=a.pt2", "format=onnx"], "would be format=torch_export"),
        (["mode=export", "ckpt=a", "output=a.pt2", "export.quantize=static"], ".onnx files"),
        (["mode=export", "ckpt=a", "output=a.onnx", "export.quantize=int4"], "Valid: none, dynamic, static"),
    ],
)
def test_contradictory_options_are_rejected_before_anything_is_read(overrides: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)) as caught:
        configured(*overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [["mode=export", "output=a.onnx"], ["mode=predict", "input=."]])
def test_without_the_extra_one_line_says_what_to_install(
    overrides: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    overrides = [*overrides, f"ckpt={folder / ('net.ckpt' if overrides[0] == 'mode=export' else 'net.onnx')}"]
    config = configured(*overrides)
    with pytest.raises(ConfigError, match=re.escape('pip install --editable ".[export]"')):
        export_mode.run(config, overrides) if config.mode == "export" else build.open_network(config, overrides)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def hostile(tmp_path: Path, marker: Path) -> Path:
    """A file for torch.export.load in which a size is an expression that leaves a mark."""

    class Double(torch.nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values * 2

    program = torch.export.export(Double(), (torch.zeros(4),), dynamic_shapes=({0: torch.export.Dim("N")},))
    torch.export.save(program, tmp_path / "honest.pt2")
    code = f"__import__('pathlib').Path({str(marker)!r}).touch() or 4"
    with zipfile.ZipFile(tmp_path / "honest.pt2") as honest, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as bad:
        for name in honest.namelist():
            content = honest.read(name)
            if name.endswith("models/model.json"):
                content = re.sub(rb'"expr_str": "[^"]+"', b'"expr_str": ' + json.dumps(code).encode(), content)
            bad.writestr(name, content)
    return tmp_path / "bad.pt2"


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("key", ["ckpt", "init_from", "resume", "model.encoder.weights"])
def test_g1_a_file_of_torch_export_is_not_opened(key: str, hostile: Path, marker: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded, because loading it could run code"):
        configured(*SMALL, f"{key}={hostile}")
    with pytest.raises(CheckpointError):
        build.read_checkpoint(hostile)
    assert not marker.exists()


@pytest.mark.reliability
def test_g1_the_payload_would_run_if_it_were_loaded(hostile: Path, marker: Path) -> None:
    with suppress(Exception):  # loading fails after the payload has run
        torch.export.load(hostile)
    assert marker.exists()


@pytest.fixture
def model(folder: Path) -> onnx.ModelProto:
    """A network of one convolution, with the description of `net.onnx`."""
    pixels, logits = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", channels, None, None])
        for name, channels in (("image", 3), ("logits", NUM_CLASSES))
    )
    weights = numpy_helper.from_array(np.ones((NUM_CLASSES, 3, 1, 1), np.float32), "weights")
    convolution = helper.make_node("Conv", ["image", "weights"], ["logits"], strides=[32, 32])
    graph = helper.make_graph([convolution], "network", [pixels], [logits], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.metadata_props.extend(onnx.load(folder / "net.onnx", load_external_data=False).metadata_props)
    return model


def outside(model: onnx.ModelProto) -> None:
    """Weights from a file in another folder."""
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def outside_of_an_operator(model: onnx.ModelProto) -> None:
    tensor = TensorProto(name="x", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(helper.make_node("Constant", [], ["x"], value=tensor))


def library(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.stranger\x1b"


def function(model: onnx.ModelProto) -> None:
    model.functions.add(name="f", domain="")


def inner_graph(model: onnx.ModelProto) -> None:
    node = model.graph.node.add(op_type="If")
    node.attribute.append(AttributeProto(name="then_branch", type=AttributeProto.GRAPH, g=onnx.GraphProto(name="g")))


def sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add()


def other_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "picture"


def with_entry(key: str, value: Any) -> Any:
    """A change of the description beside the graph."""

    def change(model: onnx.ModelProto) -> None:
        (item,) = (item for item in model.metadata_props if item.key == METADATA_KEY)
        entry = json.loads(item.value)
        node = entry
        *parents, last = key.split(".")
        for name in parents:
            node = node[name]
        node[last] = value
        item.value = json.dumps(entry)

    return change


def without_entry(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


HOSTILE = {
    "weights outside": (outside, "weights in other files"),
    "weights outside, of an operator": (outside_of_an_operator, "weights in other files"),
    "library": (library, r"operators of 'com.stranger\x1b'"),
    "function": (function, "functions"),
    "inner graph": (inner_graph, "its operator 'If' contains another graph"),
    "sparse": (sparse, "sparse weights"),
    "other input": (other_input, "not written by mode=export"),
    "no entry": (without_entry, "not written by mode=export ('semseg')"),
    "target": (with_entry("config.logger.x", {"_target_": "os.system"}), "_target_=os.system: not allowed"),
    "interpolation": (with_entry("config.data.root", "${oc.env:HOME}"), "saved configuration is not plain data"),
    "another format": (with_entry("format", 99), "format 99"),
    "no classes": (with_entry("classes", 5), "its description is damaged"),
    "list": (with_entry("size_divisor", []), "not written by mode=export"),
    "stride": (with_entry("label_stride", 0), "label_stride 0"),
}


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("name", HOSTILE)
def test_g1_an_onnx_file_that_holds_more_than_a_graph_and_its_weights_is_not_run(
    name: str, model: onnx.ModelProto, tmp_path: Path
) -> None:
    change, complaint = HOSTILE[name]
    change(model)
    path = tmp_path / "bad.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError) as caught:
        read_exported(path)
    assert complaint in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.reliability
def test_g1_other_files_under_the_name_of_onnx_are_refused(folder: Path, tmp_path: Path, marker: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"{sys.executable} -c 'open({str(marker)!r}, \"w\")'",)

    torch.save({"state_dict": Payload()}, tmp_path / "pickle.onnx")
    (tmp_path / "cut.onnx").write_bytes((folder / "net.onnx").read_bytes()[:-1000])
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "text.onnx").write_bytes(b"no graph at all")
    for path in tmp_path.glob("*.onnx"):
        with pytest.raises(SemsegError, match=re.escape(str(path))) as caught:
            read_exported(path)
        assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_a_graph_that_onnxruntime_cannot_run_gives_a_message_of_one_line(
    model: onnx.ModelProto, tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    assert restore_network(read_exported(path))(torch.zeros(1, 3, 64, 96)).main.shape == (1, NUM_CLASSES, 2, 3)
    model.graph.node[0].op_type = "NoSuchOperator"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"net\.onnx: onnxruntime cannot run it") as caught:
        restore_network(read_exported(path))(torch.zeros(1, 3, 64, 96))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_quantising_keeps_the_description(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "net.onnx", tmp_path / "net.onnx")
    quantize_onnx(tmp_path / "net.onnx", None)
    assert read_exported(tmp_path / "net.onnx").classes == read_exported(folder / "net.onnx").classes
