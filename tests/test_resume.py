"""Runs that were stopped and went on, held against the run that never stopped: equal to the last bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from in_process import TINY_RUN, assert_equal, configured, fit
from semseg.checkpoint import read_checkpoint, write_ckpt
from semseg.checkpoint_io import AtomicCheckpointIO
from semseg.config import Config
from semseg.errors import CheckpointError, ConfigError
from semseg.modes.train import state_to_resume, with_meaning_of_ckpt
from semseg.resume import check_same_run, read_run_state
from semseg.saving import Saver

# Five images in sub-batches of two, two epochs of three steps: every epoch ends in the middle of a pass.
RUN = [
    "data=scenes", "data.make.num_train=5", "data.make.num_val=2", *TINY_RUN, "data.steps_per_epoch=3",
    "data.flip=true", "model/decoder=c1_deepsup", "trainer.max_epochs=2", "checkpoint.every_n_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "scenes"


def run_of(root: Path, run_dir: Path, *words: str) -> Config:
    return configured(*RUN, f"data.root={root}", f"run_dir={run_dir}", *words)


def copies_of_every_save(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Path]:
    """A list that gets a copy of the whole run folder each time last.ckpt is written."""
    copies: list[Path] = []
    save = Saver.save

    def save_and_copy(saver: Saver, trainer: pl.Trainer) -> bool:
        is_saved = save(saver, trainer)
        copy = folder / f"{len(copies)}_step{trainer.global_step}"
        shutil.copytree(trainer.default_root_dir, copy)
        copies.append(copy)
        return is_saved

    monkeypatch.setattr(Saver, "save", save_and_copy)
    return copies


@pytest.mark.reliability
def test_a1_resuming_from_every_checkpoint_gives_the_run_that_never_stopped(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    config = run_of(root, run_dir)
    with monkeypatch.context() as patched:
        copies = copies_of_every_save(patched, tmp_path / "copies")
        whole = fit(config)
    log = (run_dir / "logs" / "metrics.csv").read_bytes()
    assert [copy.name for copy in copies] == [
        "0_step1", "1_step2", "2_step3", "3_step3", "4_step4", "5_step5", "6_step6", "7_step6",
    ]  # fmt: skip  # at the end of an epoch: before and after validation
    for copy in copies:
        shutil.rmtree(run_dir)
        shutil.copytree(copy, run_dir)
        assert_equal(fit(config, resume=run_dir / "checkpoints" / "last.ckpt"), whole, copy.name)
        assert (run_dir / "logs" / "metrics.csv").read_bytes() == log, copy.name


@pytest.mark.reliability
def test_a1_the_moving_average_goes_on_exactly_too(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    config = run_of(root, run_dir, "ema.decay=0.8", "ema.start_step=1")
    with monkeypatch.context() as patched:
        copies = copies_of_every_save(patched, tmp_path / "copies")
        whole = fit(config)
    average, weights = (whole[key]["net.encoder.coarse.0.weight"] for key in ("state_dict", "current_model_state"))
    assert not torch.equal(average, weights)
    for copy in (copies[0], copies[2], copies[3], copies[6]):
        shutil.rmtree(run_dir)
        shutil.copytree(copy, run_dir)
        assert_equal(fit(config, resume=run_dir / "checkpoints" / "last.ckpt"), whole, copy.name)


@pytest.mark.reliability
def test_a2_a5_the_number_of_workers_may_change_between_stop_and_resume(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patched:
        copies = copies_of_every_save(patched, tmp_path / "copies")
        whole = fit(run_of(root, run_dir, "trainer.accumulate_grad_batches=2", "data.num_workers=2"))
    # Two batches a step, and the third of an epoch by itself: a checkpoint after each, and after validation.
    assert [copy.name for copy in copies] == ["0_step1", "1_step2", "2_step2", "3_step3", "4_step4", "5_step4"]
    for copy, workers in ((copies[0], 0), (copies[1], 2), (copies[3], 1)):
        shutil.rmtree(run_dir)
        shutil.copytree(copy, run_dir)
        config = run_of(root, run_dir, "trainer.accumulate_grad_batches=2", f"data.num_workers={workers}")
        resumed = fit(config, resume=run_dir / "checkpoints" / "last.ckpt")
        resumed["semseg"]["config"]["data"]["num_workers"] = 2
        assert_equal(resumed, whole, copy.name)


@pytest.mark.reliability
def test_a4_weights_do_not_depend_on_the_number_of_workers(root: Path, tmp_path: Path) -> None:
    ends = [
        fit(run_of(root, tmp_path / str(workers), f"data.num_workers={workers}", "trainer.max_epochs=1"))
        for workers in (0, 1, 2, 4)
    ]
    for end in ends[1:]:
        assert_equal(end["state_dict"], ends[0]["state_dict"])
        assert_equal(end["optimizer_states"], ends[0]["optimizer_states"])


@pytest.mark.reliability
def test_a8_two_runs_with_one_seed_write_the_same_log(root: Path, tmp_path: Path) -> None:
    logs = []
    for name in ("a", "b"):
        fit(run_of(root, tmp_path / name, "trainer.max_epochs=1"))
        logs.append((tmp_path / name / "logs" / "metrics.csv").read_bytes())
    assert logs[0] == logs[1] and logs[0].count(b"\n") == 4


def saved_run(root: Path, tmp_path: Path, *words: str) -> Path:
    """The checkpoint of a run of one epoch."""
    fit(run_of(root, tmp_path / "saved", "trainer.max_epochs=1", *words))
    return tmp_path / "saved" / "checkpoints" / "last.ckpt"


@pytest.mark.reliability
def test_a9_resume_auto_in_an_empty_folder_starts_afresh_and_says_so(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert state_to_resume(run_of(root, tmp_path)) is None
    assert capsys.readouterr().out == f"no checkpoint in {tmp_path} yet: this run starts afresh\n"
    assert state_to_resume(run_of(root, tmp_path, "resume=null")) is None
    assert capsys.readouterr().out == ""


@pytest.mark.reliability
def test_a9_the_last_checkpoint_where_there_is_none_is_an_error_that_lists_what_is_there(
    root: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    config = run_of(root, tmp_path / "run", "ckpt=last", f"runs_dir={runs}")
    with pytest.raises(CheckpointError, match=rf"^ckpt=last: no last.ckpt in any run below {runs} \(.* does not exist"):
        with_meaning_of_ckpt(config)
    (runs / "started" / "checkpoints").mkdir(parents=True)
    (runs / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"\(there: notes\.txt, started\)\. Give a file or a run folder"):
        with_meaning_of_ckpt(config)


@pytest.mark.reliability
def test_a11_settings_that_decide_the_steps_must_be_those_of_the_checkpoint(root: Path, tmp_path: Path) -> None:
    path = saved_run(root, tmp_path)
    state = read_run_state(path)
    assert (state.epoch, state.is_epoch_done) == (1, True)
    same = run_of(root, tmp_path / "elsewhere", "data.num_workers=2", "trainer.max_epochs=7", "eval.scales=[48]")
    assert check_same_run(state.config, same, path, force=False) is None
    other = run_of(root, tmp_path, "seed=7", "data.short_edges=[32]", "data.batch_size=1")
    with pytest.raises(ConfigError) as caught:
        check_same_run(state.config, other, path, force=False)
    told = str(caught.value)
    assert "seed: 304 in the checkpoint, 7 now" in told and "data.batch_size: 2 in the checkpoint, 1 now" in told
    assert "data.short_edges" in told and "resume_force=true" in told and "data.root" not in told
    assert "seed: 304" in str(check_same_run(state.config, other, path, force=True))


@pytest.mark.reliability
def test_a10_a_finished_run_is_told_and_takes_no_step(root: Path, tmp_path: Path) -> None:
    state = read_run_state(saved_run(root, tmp_path))
    assert state.is_finished(1) and not state.is_finished(2)


@pytest.mark.reliability
def test_b5_weights_alone_cannot_be_resumed(root: Path, tmp_path: Path) -> None:
    path = saved_run(root, tmp_path)
    write_ckpt(tmp_path / "net.ckpt", read_checkpoint(path))
    with pytest.raises(CheckpointError, match=r"net\.ckpt: a network without its optimiser.*init_from="):
        read_run_state(tmp_path / "net.ckpt")


@pytest.mark.reliability
@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_b3_a_checkpoint_that_cannot_be_written_stops_the_run_or_is_told(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    def full(self: AtomicCheckpointIO, checkpoint: dict, path: Path, storage_options: object = None) -> None:
        if Path(path).name == "last.ckpt" and checkpoint["global_step"] == 2:
            raise CheckpointError(f"{path}: the checkpoint cannot be written (No space left on device).")
        write(self, checkpoint, path, storage_options)

    write = AtomicCheckpointIO.save_checkpoint
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", full)
    config = run_of(root, tmp_path, "trainer.max_epochs=1", f"checkpoint.on_error={policy}", "checkpoint.keep=5")
    if policy == "stop":
        with pytest.raises(CheckpointError, match="No space left"):
            fit(config)
        last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
        assert last["global_step"] == 1
        return
    assert fit(config)["global_step"] == 3
    assert "warning:" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000001.ckpt"]
