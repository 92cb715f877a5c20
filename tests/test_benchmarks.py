"""Programs of benchmarks/, small enough for every run of the tests."""

from __future__ import annotations

import os
import re
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from helpers.fork_server import FORK_CHILDREN, run_python
from semseg.config.load import load_config

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PEERS = ("segmentation-models-pytorch", "transformers")
PEER_MODULES = ("segmentation_models_pytorch", "transformers")


def test_the_model_of_a_step_counts_a_backward_pass_as_two_forward_passes(tmp_path: Path) -> None:
    program = run_python(str(BENCHMARKS / "step_model.py"), "--height", "256", "--width", "384", cwd=tmp_path)
    assert program.returncode == 0, program.stdout
    rows = [line.strip("|").split("|") for line in program.stdout.splitlines() if line.startswith("| ")]
    tables = [index for index, row in enumerate(rows) if row[0].strip() == "stage"]
    assert len(tables) == 2
    for first in tables:
        end = next(index for index in range(first, len(rows)) if rows[index][0].strip() == "all")
        counts = {row[0].strip(): float(row[1]) for row in rows[first + 1 : end + 1]}
        decoder = counts["decoder"]
        assert 1.9 < counts["decoder, backward"] / decoder < 2.1
        assert counts["all"] > 3 * decoder


@pytest.mark.slow
def test_the_measurement_of_a_gpu_runs_in_its_toy_form_and_names_the_best_settings(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", FORK_CHILDREN: "1"}
    program = run_python(str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--toy", cwd=tmp_path, env=environment)
    assert program.returncode == 0, program.stdout
    lines = program.stdout.splitlines()
    assert not [line for line in lines if "skipped" in line and not line.startswith(PEERS)]
    rows = [line for line in lines if re.search(r" \d[\d.e+-]* (TFLOP/s|images/s|s|graphs|times)\b", line)]
    for beginning in (
        "matrix product, bf16", "upernet50, 2 images, tf32, factored", "upernet50, 2 images, bf16, channels_last",
        "2 sizes of upernet50, compiled, later", "graphs that were compiled", "upernet101, 2 images", "inference of",
        "a step with synchronised normalisation", "mode=bench: training with its loader",
        *(f"{peer}, 2 images, float32, eager" for peer, module in zip(PEERS, PEER_MODULES, strict=True)
          if find_spec(module) is not None),
    ):  # fmt: skip
        assert [row for row in rows if row.startswith(beginning)], f"{beginning}: {program.stdout}"
    best = [line for line in lines if line.startswith("best settings of upernet50: 2 images, ")]
    assert len(best) == 1
    (command,) = (line.split()[2:] for line in lines if line.strip().startswith("python run.py"))
    config, _ = load_config([*command, "trainer.accelerator=cpu"])
    assert config.data.batch_size == 2


@pytest.mark.slow
def test_networks_of_every_kind_are_timed_beside_their_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process, which has imported the libraries for other tests.
    monkeypatch.setattr("sys.argv", ["networks.py", "--toy", "--threads", str(torch.get_num_threads())])
    runpy.run_path(str(BENCHMARKS / "networks.py"), run_name="__main__")
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row[0].split()[0] for row in rows] == ["linear_vit_tiny", "smp", "transformers"]
    assert all(0.05 < float(row[column]) < 20 for row in rows for column in (3, 6))
