"""Training on two processes: stopped and resumed to the last bit, and the same steps as on one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from distributed.two_ranks import ALONE, SHARED_OUT, STOPS, UNUSED, Watch, run_of, stop_and_resume

from helpers.in_process import assert_equal, fit, logged_losses
from helpers.ranks import launch
from semseg.data.scenes import make_scenes

pytestmark = pytest.mark.reliability


class Runs(NamedTuple):
    """What two ranks have done, all in one pair of processes: starting one costs seconds."""

    root: str  # folder of the data
    folder: Path  # parent of the run folders
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("two_ranks")
    root = str(folder / "scenes")
    make_scenes(Path(root), num_train=5, num_val=2, seed=304)
    return Runs(root, folder, launch(partial(stop_and_resume, root=root, folder=str(folder)), 2))


def end_of(run_dir: Path) -> dict[str, Any]:
    """The last checkpoint without what names its folder."""
    content = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return {key: value for key, value in content.items() if key not in ("semseg", "callbacks")}


@pytest.mark.slow
@pytest.mark.parametrize("step", STOPS)
def test_a1_a2_a_run_on_two_ranks_that_was_stopped_and_resumed_equals_one_that_was_not(runs: Runs, step: int) -> None:
    assert all(step in rank["stopped"] for rank in runs.ranks)
    stopped, whole = runs.folder / f"stopped_{step}", runs.folder / "whole"
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops"} <= set(end_of(whole))
    assert_equal(end_of(stopped), end_of(whole))
    log = (whole / "logs" / "metrics.csv").read_bytes()
    assert (stopped / "logs" / "metrics.csv").read_bytes() == log
    assert list(logged_losses(whole)) == ["0", "2", "5"]  # steps


def test_a6_two_processes_take_the_sub_batches_of_one_that_accumulates_two(runs: Runs) -> None:
    watch = Watch()
    end = fit(run_of([*SHARED_OUT, *ALONE], runs.root, runs.folder / "one"), watch)
    on_two = [sub_batch for step in zip(*(rank["seen"] for rank in runs.ranks), strict=True) for sub_batch in step]
    assert len(on_two) == len(watch.seen) == 8
    assert len({tuple(size) for _, size, _ in on_two}) > 1
    for alone, together in zip(watch.seen, on_two, strict=True):
        assert alone[:2] == together[:2]
        assert alone[2] == pytest.approx(together[2], abs=1e-6)
    weights = torch.load(runs.folder / "two" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in end["state_dict"].items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", UNUSED)
def test_d8_a_network_with_parts_that_the_loss_does_not_reach_trains_on_two_ranks(runs: Runs, name: str) -> None:
    first, second = (rank["unused"][name] for rank in runs.ranks)
    assert_equal(second["state"], first["state"])
    assert first["unused"] == second["unused"]
    if name in ("unread maps", "a pyramid"):
        assert len(first["unused"]) == {"unread maps": 66, "a pyramid": 0}[name]
    else:
        assert len(first["unused"]) == 5 and all("_deepsup." in parameter for parameter in first["unused"])


def test_d9_the_logged_loss_is_the_mean_of_the_ranks_over_all_sub_batches_of_the_steps(runs: Runs) -> None:
    losses = torch.tensor([[loss for _, _, loss in rank["seen"]] for rank in runs.ranks], dtype=torch.float64)
    found = list(logged_losses(runs.folder / "two").values())
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), losses.mean(0), rtol=1e-6, atol=0)
    assert float((losses[0] - losses[1]).abs().max()) > 1e-2  # the loss of one rank is not the mean
    # Six steps of two sub-batches on each rank; every second step is logged, and the third, which ends an epoch.
    losses = torch.tensor([[loss for _, _, loss in rank["logged"]["seen"]] for rank in runs.ranks], dtype=torch.float64)
    *alone, before, last = losses.reshape(2, 6, 2).mean((0, 2)).tolist()
    rows = [*alone, (before + last) / 2]
    logged = logged_losses(runs.folder / "logged")
    assert list(logged) == ["0", "1", "2", "3", "5"]
    assert list(logged.values()) == pytest.approx(rows, rel=1e-6)
    # The third and the last row end the epochs; all ranks judge them by the same number.
    first, second = (rank["logged"]["best"] for rank in runs.ranks)
    assert first == second == pytest.approx(min(rows[2], rows[4]), rel=1e-6)


@pytest.mark.parametrize(("fused", "last"), [("true", 7), ("false", 6)])
def test_a_step_exchanges_its_gradients_and_one_reduction_and_a_logged_step_the_means(
    runs: Runs, fused: str, last: int
) -> None:
    """The reduction of a fused optimiser, and with it the signal in step 6, is read one step later."""
    for rank in runs.ranks:
        steps, end = rank["collectives"][fused]
        assert end.startswith(f"stopped by SIGTERM at step {last}; ") and len(steps) == last
        assert steps[2] == steps[4] == {"gloo:all_reduce": 2}  # one bucket of gradients, and the sums of the callbacks
        assert steps[3]["gloo:all_reduce"] == 3


def test_the_page_of_a_run_on_two_ranks_has_the_scores_of_all_images(runs: Runs) -> None:
    page = (runs.folder / "whole" / "report.html").read_text()
    assert "Scores of 2 images" in page and page.count("data:image/") == 4  # rank 0 has one of the images


def test_b10_ranks_agree_on_what_could_not_be_written(runs: Runs) -> None:
    first, second = (rank["full disk"] for rank in runs.ranks)
    assert first == second and first[0] >= 0
    assert (runs.folder / "full_disk" / "checkpoints" / "best.ckpt").is_file()
    assert end_of(runs.folder / "full_disk")["epoch"] == 2
