"""Fixtures of the tests of exported networks. Only the tests that use them import the packages of semseg[export]."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.command_line import TINY_ENCODERS
from semseg.nets.registry import ENCODERS


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of `helpers.exported.write_checkpoint`."""
    from helpers.exported import write_checkpoint

    folder = tmp_path_factory.mktemp("exported")
    write_checkpoint(folder)
    return folder


@pytest.fixture
def tiny_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current folder, and the encoder `tiny`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ENCODERS, "tiny", TINY_ENCODERS["tiny"])
