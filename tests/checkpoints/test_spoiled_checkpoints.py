"""Every entry of a checkpoint, replaced by what it must not be, ends in a sentence that names the file."""

from __future__ import annotations

import importlib
import math
import re
import shutil
import zipfile
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import semseg
from helpers.in_process import TINY_RUN, configured, fit
from helpers.memory import MEGABYTE, in_child, resident
from semseg.checkpoints.atomic_io import find_damage
from semseg.checkpoints.format import load_plain, parse_checkpoint, refuse_nonfinite_weights
from semseg.checkpoints.network import check_network
from semseg.errors import CheckpointError, SemsegError
from semseg.modes import train
from semseg.nets.registry import ENCODERS, Constructor
from semseg.training.training_state import check_training_state

MISSING = object()
SPOILED: list[Any] = [
    MISSING, None, "abc", "\x1b[31m", -1, 10**30, math.nan, math.inf, True, [], {}, [1], {"a": 1}, {1: {2: None}},
    torch.zeros(2), torch.zeros(2, dtype=torch.complex64), torch.zeros(2).to_sparse(), torch.zeros(2, device="meta"),
]  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("spoiled")
    data = ["data=scenes", f"data.root={folder}/scenes", "data.make.num_train=4", "data.make.num_val=1"]
    return [*data, *TINY_RUN, "data.steps_per_epoch=1", f"run_dir={folder}/run"]


@pytest.fixture(scope="module")
def whole(words: list[str]) -> dict[str, Any]:
    """The checkpoint after the first of two epochs."""
    return fit(configured(*words, "trainer.max_epochs=1"))


def entries(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all entries of nested dicts and lists; of many alike (weights, groups, classes) the first two."""
    items: list[Any] = list(
        node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    )
    alike = len({type(value) for _, value in items}) == 1 and len(items) > 4 and place[-1:] != ("config",)
    for key, value in items[:2] if alike else items:
        yield (*place, key)
        yield from entries(value, (*place, key))


def spoiled(whole: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy of `whole` with another value at `place`; it shares all that does not change."""
    changed: Any = whole.copy()
    node = changed
    for key in place[:-1]:
        node[key] = node[key].copy()
        node = node[key]
    if value is MISSING:
        del node[place[-1]]
    else:
        node[place[-1]] = value
    return changed


@pytest.fixture(autouse=True)
def tiny() -> Iterator[None]:
    with patch.dict(ENCODERS, {"tiny": Constructor("helpers.in_process", "TinyEncoder")}):
        yield


# The short form takes one entry out of twelve; which value an entry gets depends on its position among all.
ONE_IN = pytest.mark.parametrize("one_in", [12, pytest.param(1, marks=pytest.mark.long)])


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.filterwarnings("ignore")
@ONE_IN
def test_h4_every_spoiled_entry_of_the_network_is_read_or_refused_by_name(whole: dict[str, Any], one_in: int) -> None:
    path, read, refused = Path("runs/spoiled.ckpt"), 0, 0
    places = [place for place in entries(whole) if place[0] in ("semseg", "state_dict", "epoch", "global_step")]
    in_config = [place for place in places if len(place) > 2 and place[1] == "config"]
    # A configuration has many entries of few kinds: some of them get one of the values each.
    pairs = [(place, SPOILED[number % len(SPOILED)]) for number, place in enumerate(in_config[::4])]
    pairs += [(place, value) for place in places if place not in in_config for value in SPOILED]
    for place, value in pairs[::one_in]:
        try:
            saved = parse_checkpoint(path, spoiled(whole, place, value))
            check_network(saved)
            refuse_nonfinite_weights(saved.weights, saved.source)
            read += 1
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: "), (place, value, error)
            refused += 1
    assert refused > 200 / one_in and read > 10 / one_in, (refused, read)


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.filterwarnings("ignore")
@ONE_IN
def test_h4_every_spoiled_entry_of_the_training_state_is_resumed_or_refused_by_name(
    words: list[str], whole: dict[str, Any], tmp_path: Path, one_in: int
) -> None:
    path = tmp_path / "spoiled.ckpt"
    config = configured(*words, "trainer.max_epochs=2", f"resume={path}")
    places = [place for place in entries(whole) if place[0] not in ("semseg", "state_dict", "epoch")]
    refused = 0
    for number, place in list(enumerate(places))[::one_in]:
        torch.save(spoiled(whole, place, SPOILED[number % (len(SPOILED) - 3)]), path)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        try:
            train.run(replace(config, run_dir=str(tmp_path / "run")), [])
        except SemsegError as error:
            assert str(path) in str(error), (place, error)
            refused += 1
    assert refused > len(places) / one_in / 2


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_h5_weights_that_are_not_finite_are_refused_with_their_name(
    value: float, whole: dict[str, Any], tmp_path: Path
) -> None:
    name = "net.decoder.conv_last.bias"
    spoilt = whole["state_dict"][name].clone()
    spoilt[1] = value
    path = tmp_path / "nan.ckpt"
    torch.save(spoiled(whole, ("state_dict", name), spoilt), path)
    with pytest.raises(CheckpointError, match=r"nan\.ckpt: its weight decoder\.conv_last\.bias holds NaN or infinite"):
        semseg.load(path, device="cpu")
    for mode in ("eval", "predict", "serve"):
        config = configured(f"mode={mode}", f"ckpt={path}", f"input={path}", f"run_dir={tmp_path}/run")
        with pytest.raises(CheckpointError, match=re.escape("decoder.conv_last.bias holds NaN")):
            importlib.import_module(f"semseg.modes.{mode}").run(config, [])


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("packing", ["compressed", "overlapping"])
def test_h6_packed_entries_are_refused_before_they_take_memory(packing: str, tmp_path: Path) -> None:
    path, plain = tmp_path / "bomb.ckpt", tmp_path / "plain.ckpt"
    torch.save({"weight": torch.zeros(50_000_000)}, plain)  # 200 MB
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            kind = zipfile.ZIP_DEFLATED if packing == "compressed" else zipfile.ZIP_STORED
            target.writestr(entry.filename, source.read(entry), kind, 9)
        if packing == "overlapping":
            largest = max(target.filelist, key=lambda entry: entry.file_size)
            twin = copy(largest)
            twin.filename = "plain/data/1"
            target.filelist.append(twin)
    plain.unlink()

    def growth() -> tuple[int, str, str]:
        before = resident(field="VmHWM")
        with pytest.raises(CheckpointError) as caught:
            load_plain(path)
        return resident(field="VmHWM") - before, str(caught.value), str(find_damage(path))

    grown, message, damaged = in_child(growth)
    assert grown < 50 * MEGABYTE
    assert message.startswith(f"{path}: its entry ") and "is compressed or overlaps another one" in message
    assert "is compressed or overlaps another one" in damaged


@pytest.mark.reliability
@pytest.mark.parametrize("metrics", [True, {"train/loss": "low"}, {1: 0.5}])
def test_h4_metrics_that_are_not_numbers_are_refused(metrics: Any, whole: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"damaged at semseg_metrics="):
        check_training_state(Path("last.ckpt"), {**whole, "semseg_metrics": metrics})
    check_training_state(Path("last.ckpt"), whole)


@pytest.mark.reliability
@pytest.mark.parametrize("change", [{"loss": "low"}, {"loss": float("nan")}, {"num_steps": 1.5}, {"more": 1}])
def test_h4_sums_of_the_log_that_are_none_are_refused(change: dict[str, Any], whole: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"damaged at semseg_sums="):
        check_training_state(Path("last.ckpt"), {**whole, "semseg_sums": {**whole["semseg_sums"], **change}})
    check_training_state(Path("last.ckpt"), {key: value for key, value in whole.items() if key != "semseg_sums"})
