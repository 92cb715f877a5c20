"""Images at their own resolution, and bands, on two processes: exact resuming, and the scores of one process."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from distributed.native_ranks import VARIANTS, configure, draw_data, evaluate, train_and_resume

from helpers.in_process import PreparedRun, assert_equal
from helpers.ranks import launch

pytestmark = [pytest.mark.reliability, pytest.mark.slow]
FIRST, *OTHERS = VARIANTS


class Trained(NamedTuple):
    """What two ranks have done."""

    variant: str
    root: Path  # parent of the data sets
    folder: Path  # parent of the run folders
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module", params=[FIRST, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("native_ranks")
    draw_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))  # the index of foreground pixels is made here
        work = partial(train_and_resume, variant=request.param, root=folder, folder=folder)
        return Trained(request.param, folder, folder, launch(work, 2))


def test_a_run_on_two_ranks_that_was_stopped_and_resumed_with_workers_equals_one_without(trained: Trained) -> None:
    assert all(rank["stopped"] for rank in trained.ranks)
    whole, stopped = (
        torch.load(trained.folder / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("whole", "stopped")
    )
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert_equal(stopped[key], whole[key], key)
    logs = [(trained.folder / name / "logs" / "metrics.csv").read_bytes() for name in ("whole", "stopped")]
    assert logs[0] == logs[1]


def test_validation_on_two_ranks_has_the_counts_of_one(trained: Trained) -> None:
    run = PreparedRun(configure(trained.variant, trained.root, trained.folder / "alone"))
    state = torch.load(trained.folder / "whole" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    run.module.load_state_dict(state)
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    trainer.validate(run.module, datamodule=run.data, verbose=False)
    assert run.module.counts is not None and run.module.counts.images == 3
    for rank in trained.ranks:
        assert torch.equal(rank["matrix"], run.module.counts.matrix)
        assert rank["threshold"] == run.module.threshold and rank["scores"] == run.module.scores
    assert int(run.module.counts.matrix.sum(0).min()) > 0  # the network predicts both classes
    # Rows without a value are not scored, at any resolution.
    lacking = 3 * (100 + 70 + 100) if trained.variant.startswith("bands") else 0
    assert int(run.module.counts.matrix.sum()) == 2 * 60 * 100 + 90 * 70 - lacking


def read_scores(folder: Path) -> tuple[dict[str, Any], list[list[str]]]:
    """metrics.json without the speed, and the rows of per_image.csv without the seconds."""
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics = {key: value for key, value in metrics.items() if "second" not in key and key != "speed"}
    with (folder / "per_image.csv").open(newline="") as file:
        names, *rows = csv.reader(file)
    kept = [index for index, name in enumerate(names) if "second" not in name]
    return metrics, [[row[index] for index in kept] for row in rows]


def test_the_evaluation_of_two_ranks_is_that_of_one(trained: Trained) -> None:
    evaluate(
        trained.variant, trained.root, trained.folder / "eval_alone", trained.folder / "whole/checkpoints/last.ckpt"
    )
    two, one = (read_scores(trained.folder / name) for name in ("eval", "eval_alone"))
    assert two == one and len(one[1]) == 3
    matrices = [np.load(trained.folder / name / "confusion.npz") for name in ("eval", "eval_alone")]
    assert all(np.array_equal(matrices[0][key], matrices[1][key]) for key in matrices[0].files)
