"""On systems without POSIX, one device trains, evaluates and predicts; a GPU of Apple is chosen where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from helpers.fork_server import run_python
from semseg.build import choose_device
from semseg.config.schema import TrainerConfig
from semseg.errors import ConfigError
from semseg.training.trainer import choose_accelerator, refuse_double_precision

PROGRAM = Path(__file__).with_name("other_system_program.py")


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", ["0", pytest.param("2", marks=pytest.mark.long)])
def test_one_device_needs_nothing_that_only_posix_has(tmp_path: Path, num_workers: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[1])}
    program = run_python(str(PROGRAM), num_workers, cwd=tmp_path, env=environment)
    assert program.returncode == 0, program.stdout
    checked = ["check/check.json", "bench/bench.json"] if num_workers != "0" else []
    for name in ("run/checkpoints/best.ckpt", "run/eval/metrics.json", "eval/report.html", *checked):
        assert (tmp_path / name).is_file(), name
    assert len(list((tmp_path / "predict").glob("*_ids.png"))) == 1


@pytest.fixture
def apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("apple_gpu")
def test_a_gpu_of_apple_is_chosen_where_there_is_one() -> None:
    assert [choose_accelerator(name) for name in ("auto", "gpu", "mps", "cpu")] == ["mps", "mps", "mps", "cpu"]
    assert choose_device(TrainerConfig()) == torch.device("mps")
    assert choose_device(TrainerConfig(accelerator="cpu")) == torch.device("cpu")
    with pytest.raises(ConfigError, match="accelerator=cuda"):
        choose_accelerator("cuda")


@pytest.mark.usefixtures("apple_gpu")
def test_float64_is_refused_on_a_gpu_of_apple() -> None:
    for precision in ("64-true", "64"):
        with pytest.raises(ConfigError, match=f"precision={precision}: Apple"):
            choose_device(TrainerConfig(precision=precision))
        refuse_double_precision(precision, "cpu")


def test_a_gpu_of_apple_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="accelerator=mps"):
        choose_accelerator("mps")
