"""The notebook runs from top to bottom, and shows a picture and scores."""

from __future__ import annotations

import nbformat
import pytest
from nbclient import NotebookClient

from helpers.command_line import RUN

NOTEBOOK = RUN.parent / "examples" / "first_steps.ipynb"


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(RUN.parent))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "mean IoU 0." in printed and "16 images" in printed and "sky" in printed
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "best.ckpt" not in printed  # quiet=true
