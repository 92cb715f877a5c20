"""mode=bench: its measurements, and the advice that follows from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.command_line import TINY, TINY_NETWORK, run_here
from helpers.in_process import configured
from semseg.modes.bench import LoadingSpeed, TrainingSpeed, give_advice


@pytest.mark.slow
def test_it_times_reading_training_and_evaluation_and_leaves_figures_alone(tmp_path: Path) -> None:
    words = ["data.short_edges=[48]", "data.batch_size=2", "bench.steps=4", "bench.warmup=1", "bench.images=3"]
    printed = run_here(tmp_path, "mode=bench", *TINY, *TINY_NETWORK, *words, "run_dir=bench")
    for row in ("loading alone", "padding", "training", "a step", "evaluation, [32]", "is the bottleneck"):
        assert row in printed
    figures = json.loads((tmp_path / "bench" / "bench.json").read_text())
    training = figures["training"]
    assert training["images_per_s"] == pytest.approx(2 / (training["step_s"] + training["waiting_s"]))
    assert 0 < training["waiting"] < 1 and training["memory"] > 2**27
    assert figures["loading"]["images_per_s"] > 0 and 0 <= figures["loading"]["padding"] < 1
    assert figures["evaluation"]["images_per_second"] > 0
    assert set(figures["evaluation"]["seconds_per_image"]) == {"reading", "network", "scoring"}
    assert not (tmp_path / "bench" / "checkpoints").exists() and not (tmp_path / "bench" / "logs").exists()


@pytest.mark.slow
def test_the_bottleneck_is_named_with_keys_that_are_not_set_yet() -> None:
    config = configured("mode=bench", "data=scenes", "data.decode=exact", "augment=color", "data.batch_size=2")
    slow_loader, fast_loader = LoadingSpeed(2.0, 0.05, 0), LoadingSpeed(500.0, 0.4, 1)
    [line] = give_advice(config, slow_loader, TrainingSpeed(1.0, 0.1, 0.9, 0), ranks_here=1)
    assert "Loading is the bottleneck: 90% of the time" in line
    assert "20.0 images/s, its loader alone delivers 2.0" in line
    assert "data.decode=fast" in line and "augment=none" in line and "channels_last" not in line
    line, padding = give_advice(config, fast_loader, TrainingSpeed(2.0, 1.0, 0.01, 0), ranks_here=1)
    assert "The network is the bottleneck" in line and "model.channels_last=true" in line and "decode" not in line
    assert padding.startswith("40% of the pixels are padding")
    faster = configured("mode=bench", "data=scenes", "model.channels_last=true", "model.compile=true")
    line, _ = give_advice(faster, fast_loader, TrainingSpeed(2.0, 1.0, 0.01, 0), ranks_here=1)
    assert "channels_last" not in line and "compile" not in line
    assert ("bf16-mixed" in line) == torch.cuda.is_available()
