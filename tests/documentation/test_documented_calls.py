"""Every Python block and every documented call of README.md and docs/ runs unchanged, with every argument."""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import requests
from fastapi.testclient import TestClient
from PIL import Image

import semseg
from helpers.command_line import RUN
from helpers.in_process import TINY_RUN, configured, fit
from semseg.config.schema import ServeConfig
from semseg.errors import ConfigError
from semseg.nets.registry import ENCODERS, Constructor
from semseg.prediction.predictor import PredictionResult, Predictor
from semseg.serving.server import PredictResponse, PresentClass, ServedNetwork, build_app

pytestmark = pytest.mark.reliability
ROOT = RUN.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"extending.md", "export.md", "python.md"}  # run by test_extending.py, test_contract.py, test_api.py
BLOCKS = {
    f"{page.name}:{number}": code
    for page in PAGES
    if page.name not in ELSEWHERE
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
}
# `name(arguments)` in the tables of the pages.
CALLS = {
    name: arguments
    for page in PAGES
    for name, arguments in re.findall(r"^\| `([\w.]+)\(([^`]*)\)` \|", page.read_text(), re.MULTILINE)
}
# What each argument is tried with: an argument that is documented and not here makes the test fail.
VALUES: dict[str, tuple[Any, ...]] = {
    "probabilities": (False, True), "scales": ([32], (24, 32)), "flip": (False, True), "window": (None, 24),
    "stride": (None, 16), "max_long_edge": (64, 24), "size_divisor": (None, 16), "memory_limit_mb": (16, 1024),
    "max_pixels": (10**6, 10**7),
    "opacity": (0, 0.6, 1), "legend": (False, True), "device": ("cpu", None),
    "outputs": (["ids"], ["ids", "color", "overlay", "panel", "probabilities"]), "name": ("photo",),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A trained network of 2 000 parameters."""
    folder = tmp_path_factory.mktemp("documented")
    words = ["data.make.num_train=2", "data.steps_per_epoch=1", "trainer.max_epochs=1", "data.val.list=null"]
    fit(configured("data=scenes", *TINY_RUN, *words, f"data.root={folder / 'data'}", f"run_dir={folder / 'run'}"))
    with patch.dict(ENCODERS, {"tiny": Constructor("helpers.in_process", "TinyEncoder")}):
        yield folder / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def keywords(arguments: str) -> list[str]:
    """The names of the arguments with a default in `a, *b, c=1, d=...`."""
    return re.findall(r"(\w+)=", arguments)


def combinations(names: list[str]) -> list[dict[str, Any]]:
    """Every combination of the values of some arguments; a stride does not exceed the window."""
    every = (dict(zip(names, values, strict=True)) for values in itertools.product(*(VALUES[name] for name in names)))
    return [given for given in every if given.get("window") or not given.get("stride")]


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_i1_a_python_block_of_the_documentation_runs(
    checkpoint: Path, photo: Path, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photo.parent)
    net = semseg.load(checkpoint, device="cpu")
    monkeypatch.setattr(semseg, "load", lambda *_, **__: net)  # the network that the page names is not here
    served = ServedNetwork("a network", net.classes, net.label_map, lambda image: net.predict(image).ids)
    client = TestClient(build_app(served, ServeConfig(), ["testserver"]))
    monkeypatch.setattr(requests, "post", lambda url, **given: client.post(url.rpartition(":8000")[2], **given))
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[block], block, "exec"), names)
    ids = names["ids"] if "ids" in names else names["result"].ids
    assert ids.shape == (40, 60)


def test_i1_the_documented_calls_are_those_of_the_classes() -> None:
    assert {
        "semseg.load",
        "Predictor.predict",
        "PredictionResult.overlay",
        "PredictionResult.shares",
        "PredictionResult.save",
    } <= set(CALLS)
    for name, arguments in CALLS.items():
        owner, _, method = name.partition(".")
        call = getattr({"semseg": semseg, "Predictor": Predictor, "PredictionResult": PredictionResult}[owner], method)
        parameters = inspect.signature(call).parameters
        takes_more = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
        assert takes_more or set(keywords(arguments)) <= set(parameters), name
        assert set(keywords(arguments)) <= set(VALUES), f"{name}: say what to try its new argument with, in VALUES"


@pytest.mark.slow
def test_i1_predict_takes_every_combination_of_its_documented_arguments(checkpoint: Path, photo: Path) -> None:
    net = semseg.load(checkpoint, "predict.scales=[32]", "predict.flip=true", device="cpu")
    for given in combinations(keywords(CALLS["Predictor.predict"])):
        result = net.predict(photo, **given)
        assert result.ids.shape == (40, 60), given
        if given["probabilities"]:
            assert result.probabilities is not None and result.probabilities.shape == (len(net.classes.names), 40, 60)
            assert np.array_equal(result.probabilities[:, 20, 30].argmax(), result.ids[20, 30]), given


@pytest.mark.slow
def test_i1_load_overlay_and_save_take_every_documented_argument(checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    for given in combinations(keywords(CALLS["semseg.load"])):
        net = semseg.load(str(checkpoint), **given)
    result = net.predict(photo, probabilities=True)
    for given in combinations(keywords(CALLS["PredictionResult.overlay"])):
        assert result.overlay(**given).dtype == np.uint8
    for outputs, name in itertools.product(VALUES["outputs"], VALUES["name"]):
        assert len(result.save(tmp_path / "out", outputs, name=name)) == len(outputs)
    with pytest.raises(ConfigError, match=r"opacity=1\.5: must be from 0 to 1"):
        result.overlay(1.5)


def test_i1_the_answer_of_the_server_has_the_documented_keys() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    answer = json.loads(re.findall(r"^```json\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[0])
    assert set(answer) == set(PredictResponse.model_fields)
    assert all(set(row) == set(PresentClass.model_fields) for row in answer["classes"])
