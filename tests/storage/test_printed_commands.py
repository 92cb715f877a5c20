"""Commands and paths that are printed for users to copy."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from semseg.storage.commands import (
    describe_program,
    format_command,
    list_this_command,
    relative_to_cwd,
    shorten_path,
)


def test_the_program_is_named_as_it_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_program("../semseg/run.py", ["python3", "../semseg/run.py"]) == "python3 ../semseg/run.py"
    assert describe_program("run.py", [".venv/bin/python", "-u", "run.py"]) == ".venv/bin/python run.py"
    assert describe_program("run.py", ["pytest"]) == "python run.py"  # called from another program
    script = tmp_path / "bin" / "semseg"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    assert describe_program(str(script), [str(script)]) == "semseg"
    monkeypatch.setenv("PATH", "/nowhere")
    assert describe_program(".venv/bin/semseg", [".venv/bin/semseg"]) == ".venv/bin/semseg"


def test_paths_are_relative_where_that_is_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert relative_to_cwd(tmp_path / "work" / "runs" / "a") == Path("runs/a")
    assert relative_to_cwd(tmp_path / "b") == Path("../b")
    assert shorten_path("/a") == "/a"


def test_a_command_has_short_files_and_nothing_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f'data="{tmp_path}/my plants.yaml"', "optim.lr=1", "data.ignore=[0]"]
    assert shlex.split(format_command(words))[2:] == ["data=my plants.yaml", "optim.lr=1", "data.ignore=[0]"]
    monkeypatch.setattr(sys, "argv", ["run.py", "seed=1", "hydra.run.dir=x", "hydra.output_subdir=null"])
    assert list_this_command() == ["python", "run.py", "seed=1"]
