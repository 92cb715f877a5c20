"""The real command line, and a run of it that takes seconds."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO
from unittest.mock import patch

from helpers.fork_server import FORK_CHILDREN, run_python
from semseg.cli import main
from semseg.config.groups import CONFIG_DIR
from semseg.nets.registry import ENCODERS, Constructor

RUN = CONFIG_DIR.parent / "run.py"
TINY = [
    "data=scenes", "data.make.num_train=6", "data.make.num_val=7", "data.root=scenes", "data.batch_size=1",
    "data.short_edges=[32]", "data.max_long_edge=64", "data.num_workers=0", "data.steps_per_epoch=2",
    "model/encoder=resnet18", "model.encoder.weights=none", "model/decoder=c1", "eval.scales=[32]",
    "trainer.accelerator=cpu", "trainer.max_epochs=1",
]  # fmt: skip
# To be put behind TINY: the smallest network that has every part. `run`, `run_here` and all other programs of the fork
# server know it; where nothing depends on the network, it saves a second and 180 MB a run.
TINY_NETWORK = ["~model.encoder.output_stride", "model.encoder.name=tiny"]
TINY_ENCODERS = {"tiny": Constructor("helpers.in_process", "TinyEncoder")}


def run(cwd: Path, *words: str, code: int = 0) -> str:
    """What `python run.py <words>` prints in the folder `cwd`; it must end with the exit code `code`."""
    result = run_python(str(RUN), *words, cwd=cwd, env={**os.environ, FORK_CHILDREN: "1"})
    assert result.returncode == code, result.stdout
    return result.stdout


def run_here(cwd: Path, *words: str, code: int = 0) -> str:
    """As `run`, without a new process: what the command line prints, in a fraction of the time."""
    output = io.StringIO()
    assert call_main(cwd, words, output) == code, output.getvalue()
    return output.getvalue()


def call_main(cwd: Path, words: Sequence[str], output: TextIO) -> int | str:
    """Run a command line in this process, both of its streams written to `output`; returns its exit code."""
    with (
        contextlib.chdir(cwd),
        patch.dict(os.environ),
        patch.object(sys, "argv", [str(RUN), *words]),
        patch.dict(ENCODERS, TINY_ENCODERS),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            main.main()
        except SystemExit as leaving:
            return leaving.code or 0
    return 0


def run_script(path: Path, cwd: Path) -> tuple[int, str]:
    """Exit code and output of a program that imports this package and the modules in the folder `cwd`."""
    paths = os.pathsep.join(map(str, [RUN.parent, RUN.parent / "tests", cwd]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    result = run_python(str(path), cwd=cwd, env=environment)
    return result.returncode, result.stdout
