"""The notebook runs from top to bottom, and shows a picture and scores."""

from __future__ import annotations

import os
import re

import nbformat
import pytest

from helpers.command_line import RUN
from helpers.fork_server import FORK_CHILDREN, run_python

NOTEBOOK = RUN.parent / "examples" / "first_steps.ipynb"
# Runs the code cells as a kernel does, with a shorter training run.
PROGRAM = """
import sys
import nbformat
import semseg
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
train = semseg.train
semseg.train = lambda *, data, **keywords: train(*sys.argv[2:], data__root=data["root"], **keywords)
for cell in nbformat.read(sys.argv[1], as_version=4).cells:
    if cell.cell_type == "code":
        result = shell.run_cell(cell.source)
        result.raise_error()
        shown, _ = shell.display_formatter.format(result.result)
        kinds = sorted(shown, key="text/plain".__eq__)  # the pictures and pages first
        print("result:", type(result.result).__name__, "shown:", *kinds)
"""
SHORT = [
    "data.steps_per_epoch=2", "data.make.num_train=4", "data.make.num_val=3", "data.num_workers=0", "eval.bootstrap=0",
    "after_training=[eval]", "data.short_edges=[48]", "eval.scales=[48]", "model.decoder.width=16",
]  # fmt: skip


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom() -> None:
    environment = os.environ | {FORK_CHILDREN: "1", "OMP_NUM_THREADS": "1"}
    run = run_python("-c", PROGRAM, str(NOTEBOOK), *SHORT, cwd=NOTEBOOK.parent, env=environment)
    assert run.returncode == 0, run.stdout
    assert "mean IoU 0." in run.stdout and "3 images" in run.stdout and re.search(r"^\w+ +\d+\.\d%$", run.stdout, re.M)
    for shown in (
        "TrainingRun shown: text/html",
        "DataFrame shown: text/html",
        "Predictions shown: text/html",
        "PredictionResult shown: image/png",
    ):
        assert f"result: {shown}" in run.stdout, shown
    assert "to predict" not in run.stdout  # quiet=True
