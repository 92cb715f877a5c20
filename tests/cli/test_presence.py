"""Data that is missing is reported once, before any rank is started or torch is imported for it."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from helpers.command_line import run_here
from semseg.cli import main

MISSING = ["data=folder", "data.root=nowhere", "data.num_classes=2", "trainer.accelerator=cpu", "trainer.devices=8"]


def fail(*_: object) -> int:
    raise AssertionError("ranks were started")


@pytest.mark.parametrize("mode", ["train", "bench"])
def test_eight_ranks_report_a_missing_folder_once_and_are_not_started(tmp_path: Path, mode: str) -> None:
    with patch.object(main, "run_ranks", fail):
        printed = run_here(tmp_path, f"mode={mode}", *MISSING, code=1)
    assert printed.count("nowhere/images (looked at") == 1
    assert not list(tmp_path.iterdir())  # no run folder either


def test_a_missing_validation_split_is_reported_before_the_ranks_too(tmp_path: Path) -> None:
    (tmp_path / "nowhere" / "images").mkdir(parents=True)
    (tmp_path / "nowhere" / "masks").mkdir()
    with patch.object(main, "run_ranks", fail):
        printed = run_here(tmp_path, *MISSING, "data.val.images=later", "data.val.masks=later", code=1)
    assert "nowhere/later" in printed


def test_an_evaluation_reports_the_missing_data_of_its_network_before_the_ranks(tmp_path: Path) -> None:
    golden = Path(__file__).resolve().parents[1] / "golden" / "checkpoint" / "format_1.ckpt"
    words = ["mode=eval", f"ckpt={golden}", "data.root=nowhere", "trainer.accelerator=cpu", "trainer.devices=2"]
    with patch.object(main, "run_ranks", fail):
        printed = run_here(tmp_path, *words, code=1)
    assert printed.count("nowhere") and printed.count("error: ") == 1


@pytest.mark.parametrize(("local_rank", "count"), [("0", 1), ("1", 0)])
def test_of_ranks_that_a_launcher_has_started_one_on_each_machine_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_rank: str, count: int
) -> None:
    started = {"LOCAL_RANK": local_rank, "RANK": local_rank, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    assert run_here(tmp_path, *MISSING, code=1).count("error: ") == count
