"""Checkpoints of every format so far load, and their runs continue with the steps that they would have taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden.make_checkpoint import run_of

from helpers.in_process import configured, fit, logged_losses, read_state
from helpers.reference import GOLDEN
from semseg.checkpoints.format import FORMAT_KEY, FORMAT_VERSION, MOVED_TARGETS, read_checkpoint
from semseg.config.schema import ALLOWED_TARGETS, config_to_plain
from semseg.errors import ConfigError
from semseg.modes import eval as evaluate
from semseg.nets.registry import ENCODERS, Constructor
from semseg.training.resume import Position
from semseg.training.same_run import check_same_run

CHECKPOINTS = sorted((GOLDEN / "checkpoint").glob("*.ckpt"))

pytestmark = pytest.mark.reliability


def test_a12_there_is_a_checkpoint_of_the_present_format() -> None:
    assert f"format_{FORMAT_VERSION}.ckpt" in [path.name for path in CHECKPOINTS]


@pytest.mark.slow
@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.stem)
def test_a12_a_checkpoint_of_an_earlier_release_resumes_with_the_same_losses(path: Path, tmp_path: Path) -> None:
    config = run_of(tmp_path, "model.label_stride=null")  # as resolve_start sets it for such checkpoints
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    shutil.copyfile(path, last)
    state = read_state(last, config)
    assert state.position == Position(epochs=1) and state.conditions is None
    assert check_same_run(state, config_to_plain(config), classes=state.classes) is None
    end = fit(config, resume=last)
    assert end["global_step"] == 6
    expected = json.loads(path.with_suffix(".json").read_text())
    found = logged_losses(tmp_path)
    assert list(found) == list(expected) == ["3", "4", "5"]
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], abs=1e-6)


def test_a12_a_run_without_data_decode_resumes_with_exact_decoding(tmp_path: Path) -> None:
    path = GOLDEN / "checkpoint" / "format_1.ckpt"
    assert read_checkpoint(path).config.data.decode == "exact"
    state = read_state(path, run_of(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.decode: exact in the checkpoint, fast now"):
        check_same_run(state, config_to_plain(run_of(tmp_path, "data.decode=fast")), classes=state.classes)


@pytest.mark.slow
def test_a12_a_checkpoint_with_a_key_that_is_gone_is_resumed_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENCODERS, "tiny", Constructor("helpers.in_process", "TinyEncoder"))
    content = torch.load(GOLDEN / "checkpoint" / "format_1.ckpt", weights_only=True)
    content[FORMAT_KEY]["config"]["trainer"]["on_oom"] = "retry"
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    torch.save(content, last)
    config = run_of(tmp_path, "model.label_stride=null")  # as resolve_start sets it for such checkpoints
    state = read_state(last, config)
    assert check_same_run(state, config_to_plain(config), classes=state.classes) is None
    assert fit(config, resume=last)["global_step"] == 6
    assert "on_oom" not in torch.load(last, weights_only=True)[FORMAT_KEY]["config"]["trainer"]
    torch.save(content, last)
    words = ["mode=eval", f"ckpt={last}", f"data.root={GOLDEN / 'dataset'}", "trainer=cpu"]
    evaluate.run(configured(*words, f"run_dir={tmp_path / 'out'}"), words)
    assert (tmp_path / "out" / "metrics.json").is_file()


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.stem)
def test_a12_the_network_of_an_earlier_release_is_read_whole(path: Path) -> None:
    saved = read_checkpoint(path)
    assert (saved.epoch, saved.step, len(saved.classes.names)) == (0, 3, 150)
    assert saved.config.model.encoder["name"] == "tiny" and saved.config.optim.momentum == 0.9
    assert all(torch.isfinite(value).all() for value in saved.weights.values())


def test_a12_every_logger_of_an_earlier_release_is_one_that_is_allowed_now() -> None:
    assert set(MOVED_TARGETS.values()) <= set(ALLOWED_TARGETS)
    saved = read_checkpoint(GOLDEN / "checkpoint" / "format_1.ckpt").config
    assert saved.logger["csv"]["_target_"] == MOVED_TARGETS["semseg.csv_log.CSVLog"]
