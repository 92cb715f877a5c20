"""Runs that were stopped and resumed equal the run that never stopped, to the last bit."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import pytorch_lightning as pl
import torch

from helpers.in_process import TINY_RUN, assert_equal, configured, fit, logged_losses, read_state
from semseg.build import build_data
from semseg.checkpoints.atomic_io import AtomicCheckpointIO
from semseg.checkpoints.format import read_checkpoint, write_ckpt
from semseg.checkpoints.network import build_network
from semseg.config.schema import Config, config_to_plain
from semseg.data.classes import ClassTable
from semseg.data.sources import DataSource
from semseg.errors import CheckpointError, ConfigError, DataError
from semseg.modes import train
from semseg.modes.train_end import resume_command
from semseg.modes.train_start import Start, prepare_checkpoint_folder, resolve_start
from semseg.nets.registry import ENCODERS, Constructor
from semseg.system.process import StopRequest
from semseg.training.callbacks.saver import Saver
from semseg.training.loggers.csv import read_rows
from semseg.training.resume import Position, RunConditions, RunState
from semseg.training.same_run import check_same_conditions, check_same_run

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


@pytest.mark.slow
@pytest.mark.reliability
def test_a1_resuming_from_every_checkpoint_gives_the_run_that_never_stopped(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    config = run_of(root, run_dir, "trainer.log_every_n_steps=2")  # some of the checkpoints are between two rows
    with monkeypatch.context() as patched:
        copies = copies_of_every_save(patched, tmp_path / "copies")
        whole = fit(config)
    assert steps_logged(run_dir) == ["0", "1", "2", "3", "5"]
    log = (run_dir / "logs" / "metrics.csv").read_bytes()
    assert [copy.name for copy in copies] == [
        "0_step1", "1_step2", "2_step3", "3_step3", "4_step4", "5_step5", "6_step6", "7_step6",
    ]  # fmt: skip  # at the end of an epoch: before and after validation
    for copy in copies:
        shutil.rmtree(run_dir)
        shutil.copytree(copy, run_dir)
        assert_equal(fit(config, resume=run_dir / "checkpoints" / "last.ckpt"), whole, copy.name)
        assert (run_dir / "logs" / "metrics.csv").read_bytes() == log, copy.name


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("word", ["optim.fused=true", "trainer.precision=64-true"])
def test_a1_the_moving_average_a_fused_optimiser_and_64_bits_are_resumed_exactly_too(
    word: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    config = run_of(root, run_dir, "ema.decay=0.8", "ema.start_step=1", word)
    with monkeypatch.context() as patched:
        copies = copies_of_every_save(patched, tmp_path / "copies")
        whole = fit(config)
    average, weights = (whole[key]["net.encoder.coarse.0.weight"] for key in ("state_dict", "current_model_state"))
    assert not torch.equal(average, weights)
    for copy in (copies[0], copies[2], copies[3], copies[6]):
        shutil.rmtree(run_dir)
        shutil.copytree(copy, run_dir)
        assert_equal(fit(config, resume=run_dir / "checkpoints" / "last.ckpt"), whole, copy.name)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.reliability
def test_a4_weights_do_not_depend_on_the_number_of_workers(root: Path, tmp_path: Path) -> None:
    ends = [
        fit(run_of(root, tmp_path / str(workers), f"data.num_workers={workers}", "trainer.max_epochs=1"))
        for workers in (0, 1, 2, 4)
    ]
    for end in ends[1:]:
        assert_equal(end["state_dict"], ends[0]["state_dict"])
        assert_equal(end["optimizer_states"], ends[0]["optimizer_states"])


@pytest.mark.slow
@pytest.mark.reliability
def test_a8_two_runs_with_one_seed_write_the_same_log(root: Path, tmp_path: Path) -> None:
    logs = []
    for name in ("a", "b"):
        fit(run_of(root, tmp_path / name, "trainer.max_epochs=1"))
        logs.append((tmp_path / name / "logs" / "metrics.csv").read_bytes())
    assert logs[0] == logs[1] and logs[0].count(b"\n") == 4


SAVED_RUNS: dict[tuple[str, ...], Path] = {}  # their folders by their further overrides


def saved_run(root: Path, tmp_path: Path, *words: str) -> Path:
    """The checkpoint of a run of one epoch, in a copy of its folder; the run itself is trained once."""
    if words not in SAVED_RUNS:
        folder = root.parent / f"saved_run_{len(SAVED_RUNS)}"
        fit(run_of(root, folder, "trainer.max_epochs=1", *words))
        SAVED_RUNS[words] = folder
    shutil.copytree(SAVED_RUNS[words], tmp_path / "saved")
    return tmp_path / "saved" / "checkpoints" / "last.ckpt"


@pytest.mark.reliability
def test_a9_resume_auto_in_an_empty_folder_starts_a_new_run_and_says_so(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_of(root, tmp_path, "trainer.max_epochs=1")
    source = DataSource(config.data)
    assert resolve_start(config, [], source).kind == "scratch"
    assert resolve_start(run_of(root, tmp_path, "resume=null"), [], source).kind == "scratch"
    assert capsys.readouterr().out == ""
    trained(config)
    assert re.search("^weights +a new run: ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
def test_a_run_starts_from_its_checkpoint_from_other_weights_or_from_scratch(root: Path, tmp_path: Path) -> None:
    path = saved_run(root, tmp_path)
    source = DataSource(run_of(root, tmp_path).data)

    def start_of(run_dir: Path, *words: str) -> Start:
        return resolve_start(run_of(root, run_dir, *words), [], source)

    assert start_of(tmp_path / "new").kind == "scratch"
    initialised = start_of(tmp_path / "new", f"init_from={path}")
    assert initialised.kind == "init" and initialised.network is not None and initialised.network.source == str(path)
    other = [f"init_from={path}", "model/decoder=ppm"]
    for given, decoder in (([], "c1"), (["model.encoder.weights=none"], "c1"), (other[1:], "ppm")):
        start = resolve_start(run_of(root, tmp_path / "new", *other), [other[0], *given], source)
        assert start.config.model.decoder["name"] == decoder, given
    for words in ([], [f"init_from={path}"]):  # a checkpoint of the run itself comes first
        resumed = start_of(tmp_path / "saved", *words)
        assert resumed.kind == "resume" and resumed.state is not None and resumed.state.path == path
    assert start_of(tmp_path / "new", f"ckpt={path}").kind == "resume"
    assert start_of(tmp_path / "saved", "resume=null").kind == "scratch"


@pytest.mark.reliability
def test_a9_the_last_checkpoint_where_there_is_none_is_an_error_that_lists_what_is_there(
    root: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    config = run_of(root, tmp_path / "run", "ckpt=last", f"runs_dir={runs}")
    with pytest.raises(CheckpointError, match=rf"^ckpt=last: no last.ckpt in any run below {runs} \(.* does not exist"):
        resolve_start(config, [], DataSource(config.data))
    (runs / "started" / "checkpoints").mkdir(parents=True)
    (runs / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"\(there: notes\.txt, started\)\. Give a file or a run folder"):
        resolve_start(config, [], DataSource(config.data))


@pytest.mark.slow
@pytest.mark.reliability
def test_a11_settings_that_decide_the_steps_must_be_those_of_the_checkpoint(root: Path, tmp_path: Path) -> None:
    path = saved_run(root, tmp_path)
    state = read_state(path, run_of(root, tmp_path))
    assert (state.position, state.step) == (Position(epochs=1), 3)
    changed = ("data.name=other", "data.num_workers=2", "trainer.max_epochs=7", "eval.scales=[48]")
    same = run_of(root, tmp_path / "elsewhere", *changed)
    assert check_same_run(state, config_to_plain(same), classes=state.classes) is None
    other = run_of(root, tmp_path, "seed=7", "data.short_edges=[32]", "data.batch_size=1")
    with pytest.raises(ConfigError) as caught:
        check_same_run(state, config_to_plain(other), classes=state.classes)
    message = str(caught.value)
    assert "seed: 304 in the checkpoint, 7 now" in message and "data.batch_size: 2 in the checkpoint, 1 now" in message
    assert message.count("data.short_edges") == 1  # a list is one line
    assert "give another run_dir" in message  # init_from alone would resume the same run
    assert "data.short_edges" in message and "resume_force=true" in message and "data.root" not in message
    report = check_same_run(state, config_to_plain(other), classes=state.classes, force=True)
    assert "seed: 304" in str(report)


@pytest.mark.slow
@pytest.mark.reliability
def test_a10_a_finished_run_is_reported_and_takes_no_step(root: Path, tmp_path: Path) -> None:
    one, two = (run_of(root, tmp_path, f"trainer.max_epochs={epochs}") for epochs in (1, 2))
    state = read_state(saved_run(root, tmp_path), one)
    assert state.describe_end(one.trainer) == "already finished at epoch 1; raise trainer.max_epochs to continue"
    assert state.describe_end(two.trainer) is None


@pytest.mark.slow
@pytest.mark.reliability
def test_b5_weights_alone_cannot_be_resumed(root: Path, tmp_path: Path) -> None:
    path = saved_run(root, tmp_path)
    write_ckpt(tmp_path / "net.ckpt", read_checkpoint(path))
    with pytest.raises(CheckpointError, match=r"net\.ckpt: .*without its optimiser.*init_from="):
        read_state(tmp_path / "net.ckpt", run_of(root, tmp_path))


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("damaged", ["loops", "semseg_run", "callbacks"])
def test_b5_a_checkpoint_whose_state_is_damaged_is_named(root: Path, tmp_path: Path, damaged: str) -> None:
    words = ["callbacks=early_stopping"]
    path = saved_run(root, tmp_path, *words)
    content = torch.load(path, weights_only=True)
    content[damaged] = [1, 2]
    torch.save(content, path)
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt: (its description of the run|its training state) is damaged"
    ):
        read_state(path, run_of(root, tmp_path, *words))


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_b3_a_checkpoint_that_cannot_be_written_stops_the_run_or_is_reported(
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


# ---- the whole of mode=train


def trained(config: Config, *words: str) -> float | None:
    """What mode=train returns."""
    with patch.dict(ENCODERS, {"tiny": Constructor("helpers.in_process", "TinyEncoder")}):
        return train.run(config, list(words))


def steps_logged(run_dir: Path) -> list[str]:
    return list(logged_losses(run_dir))


NO_VALIDATION = ["data.val.list=null", "data.val.images=null"]
PATIENCE = ["callbacks=early_stopping", "callbacks.early_stopping.patience=1", "optim.lr=1e-12", "model.freeze_bn=true"]


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.max_epochs=1"], "already finished at epoch 1; raise trainer.max_epochs to continue"),
        (
            ["trainer.max_epochs=1", *NO_VALIDATION],
            "already finished at epoch 1; raise trainer.max_epochs to continue",
        ),
        (["trainer.max_steps=2"], "already finished at step 2; raise trainer.max_steps to continue"),
        (["trainer.max_steps=3"], "already finished at step 3; raise trainer.max_steps to continue"),
        (
            ["trainer.max_epochs=1", "trainer.max_steps=3"],
            "already finished at epoch 1; raise trainer.max_epochs and trainer.max_steps to continue",
        ),
        (
            ["trainer.max_epochs=4", *PATIENCE],
            "already finished at epoch 2: callbacks.early_stopping ended it (Monitored metric val/miou did not improve",
        ),
        (
            [
                "trainer.max_epochs=4", *PATIENCE, *NO_VALIDATION, "callbacks.early_stopping.monitor=train/loss",
                "callbacks.early_stopping.mode=min", "+callbacks.early_stopping.stopping_threshold=99",
                "callbacks.early_stopping.check_on_train_epoch_end=true",
            ],
            "already finished at epoch 1: callbacks.early_stopping ended it (Stopping threshold reached",
        ),
    ],
)  # fmt: skip
def test_a15_a_finished_run_is_known_whatever_ended_it_and_takes_no_step(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    config = run_of(root, tmp_path, *words)
    score = trained(config)
    log, last = tmp_path / "logs" / "metrics.csv", tmp_path / "checkpoints" / "last.ckpt"
    before = log.read_bytes(), last.read_bytes()
    # Said at the end of the run, and not only when it is continued.
    assert ("callbacks.early_stopping ended the run after epoch" in capsys.readouterr().out) == ("ended it" in message)
    assert trained(config) == score
    assert message in capsys.readouterr().out
    assert (log.read_bytes(), last.read_bytes()) == before


@pytest.mark.slow
@pytest.mark.reliability
def test_a15_a_run_that_was_killed_between_its_last_step_and_its_end_takes_no_step(root: Path, tmp_path: Path) -> None:
    config = run_of(root, tmp_path, "trainer.max_epochs=4", *PATIENCE)
    score = trained(config)
    log = (tmp_path / "logs" / "metrics.csv").read_bytes()
    (tmp_path / "result.json").unlink()
    assert trained(config) == score
    assert (tmp_path / "logs" / "metrics.csv").read_bytes() == log


@pytest.mark.slow
@pytest.mark.reliability
def test_a15_after_early_stopping_more_epochs_change_nothing_but_more_patience_or_no_callback_continues(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(run_of(root, tmp_path, *PATIENCE, "trainer.max_epochs=4"), "run=it", *PATIENCE)
    assert steps_logged(tmp_path) == ["0", "1", "2", "3", "4", "5"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "to continue" in printed and "'~callbacks.early_stopping'" in printed and "max_epochs=8" not in printed
    trained(run_of(root, tmp_path, *PATIENCE, "trainer.max_epochs=5"))
    assert len(steps_logged(tmp_path)) == 6
    trained(run_of(root, tmp_path, *PATIENCE, "callbacks.early_stopping.patience=2", "trainer.max_epochs=5"))
    assert len(steps_logged(tmp_path)) == 9  # one more validation without a better score
    trained(run_of(root, tmp_path, *PATIENCE, "~callbacks.early_stopping", "trainer.max_epochs=5"))
    assert len(steps_logged(tmp_path)) == 15


@pytest.mark.reliability
def test_a15_the_command_to_continue_removes_what_a_word_has_added_behind_it(root: Path, tmp_path: Path) -> None:
    added = "+callbacks.stop={_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: val/miou}"
    words = [added, "trainer.max_epochs=2"]
    command = shlex.split(resume_command(run_of(root, tmp_path), words, "~callbacks.stop", "trainer.max_epochs=4"))
    assert command.index(added) < command.index("~callbacks.stop") and "trainer.max_epochs=2" not in command


def test_a15_the_command_to_continue_does_not_go_back_to_the_checkpoint_that_the_run_resumed_from(
    root: Path, tmp_path: Path
) -> None:
    config = run_of(root, tmp_path)
    assert "ckpt=" not in resume_command(config, ["ckpt=runs/a", "seed=2"])
    published = replace(config, init_from="a.pth,b.pth")  # as resolve_start gives it for ckpt=a.pth,b.pth
    assert "'ckpt=\"a.pth,b.pth\"'" in resume_command(published, ['ckpt="a.pth,b.pth"'])  # which names the network


@pytest.mark.reliability
def test_a15_the_command_to_continue_raises_the_limit_that_ended_the_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(run_of(root, tmp_path, "trainer.max_steps=2"), "trainer.max_steps=2")
    printed = " ".join(capsys.readouterr().out.split())
    assert "trainer.max_steps=4" in printed and "trainer.max_epochs" not in printed


@pytest.mark.slow
@pytest.mark.reliability
def test_a15_a_fast_dev_run_says_that_it_is_finished_and_continues_with_the_printed_overrides(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["debug=fast", "trainer.max_epochs=1"]
    trained(run_of(root, tmp_path, *words), *words)
    printed = " ".join(capsys.readouterr().out.split())
    assert "training 1 step, 1 an epoch" in printed
    further = "trainer.fast_dev_run=false trainer.limit_train_batches=1 trainer.max_epochs=2"
    assert printed.endswith(f"resume=auto {further}") and "debug=fast" in printed
    trained(run_of(root, tmp_path, *words), *words)
    assert "already finished at step 1" in (printed := capsys.readouterr().out) and further in printed
    trained(run_of(root, tmp_path, "debug=fast", *further.split()))
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt").step == 2


@pytest.mark.reliability
def test_e8_a_run_that_is_interrupted_without_a_new_checkpoint_names_the_last_one(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(run_of(root, tmp_path, "trainer.max_epochs=1"))

    def interrupt(*_: object, **__: object) -> None:
        raise StopRequest(signal.SIGINT)

    monkeypatch.setattr(pl.Trainer, "fit", interrupt)
    with pytest.raises(StopRequest):
        trained(run_of(root, tmp_path))
    assert "last.ckpt. To resume: " in capsys.readouterr().out


def stopped_run(root: Path, run_dir: Path) -> tuple[RunState, Config, RunConditions]:
    """A run that was stopped at the second of three steps of its first epoch, and what decides its steps."""
    config = run_of(root, run_dir, "trainer.max_steps=2")
    fit(config)
    state = read_state(run_dir / "checkpoints" / "last.ckpt", config)
    assert state.conditions is not None
    return state, config, state.conditions


@pytest.mark.reliability
def test_a16_devices_batches_of_an_epoch_and_training_images_must_be_those_of_the_checkpoint(
    root: Path, tmp_path: Path
) -> None:
    state, config, conditions = stopped_run(root, tmp_path)
    plain = config_to_plain(config)
    assert conditions[:3] == (1, 3, 2) and {split: found[0] for split, found in conditions.records.items()} == {
        "train": 5,
        "val": 2,
    }
    assert check_same_conditions(state, plain, conditions) == []
    for changes, message in (
        ({"world_size": 2}, "number of devices: 1 in the checkpoint, 2 now"),
        ({"batches_per_epoch": 2}, "sub-batches of an epoch, on each device: 3 in the checkpoint, 2 now"),
        ({"records": conditions.records | {"train": [4, ""]}}, "data.train: 5 images in the checkpoint, 4 images now"),
        (
            {"records": conditions.records | {"train": [5, ""]}},
            "data.train: other files, sizes or order than in the check",
        ),
    ):
        other = conditions._replace(**changes)
        with pytest.raises(ConfigError) as caught:
            check_same_conditions(state, plain, other)
        assert message in str(caught.value) and "resume_force=true" in str(caught.value)
        (report,) = check_same_conditions(state, plain, other, force=True)
        assert message in report
    fewer = conditions._replace(threads=99, records=conditions.records | {"val": [1, ""]})
    message = "\n".join(check_same_conditions(state, plain, fewer))
    assert "data.val: 2 images in the checkpoint, 1 images now" in message and "threads" in message


@pytest.mark.slow
@pytest.mark.reliability
def test_a16_a_longer_run_is_reported_with_its_rate(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(run_of(root, tmp_path, "schedule.power=1", "trainer.max_epochs=1"))
    capsys.readouterr()
    trained(run_of(root, tmp_path, "schedule.power=1", "trainer.max_epochs=2"))
    message = "the schedule ends at step 6 now, 3 in the checkpoint: at step 3 the rate is 0.5 of the base rate, not 0"
    assert message in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.reliability
def test_a16_a_file_less_in_the_training_data_is_refused_and_leaves_the_run_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run_dir = tmp_path / "scenes", tmp_path / "run"
    trained(run_of(root, run_dir, "trainer.max_epochs=1"))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    lists = sorted(root.rglob("*.odgt"))
    train_list = next(path for path in lists if "train" in path.name)
    train_list.write_text("".join(train_list.read_text().splitlines(keepends=True)[1:]))
    longer = run_of(root, run_dir, "trainer.max_epochs=2")
    with pytest.raises(ConfigError, match=r"data\.train: 5 images in the checkpoint, 4 images now"):
        trained(longer)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    capsys.readouterr()
    trained(replace(longer, resume_force=True))
    assert "data.train: 5 images in the checkpoint, 4 images now" in capsys.readouterr().out
    assert len(steps_logged(run_dir)) == 6


@pytest.mark.slow
@pytest.mark.reliability
def test_a16_settings_of_the_optimiser_that_are_forced_take_effect(root: Path, tmp_path: Path) -> None:
    trained(run_of(root, tmp_path, "trainer.max_steps=2", "schedule.power=1"))
    words = ["schedule.power=1", "optim.lr=0.5", "optim.weight_decay=0.25", "resume_force=true"]
    trained(run_of(root, tmp_path, *words))
    (group, *_) = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0][
        "param_groups"
    ]
    assert (group["initial_lr"], group["weight_decay"]) == (0.5, 0.25)
    rates = [float(row["lr/encoder"]) for row in read_rows(tmp_path / "logs" / "metrics.csv")]
    assert rates == pytest.approx([0.02, 0.01, 0.5 * 4 / 6, 0.5 * 3 / 6, 0.5 * 2 / 6, 0.5 / 6])


@pytest.mark.slow
@pytest.mark.reliability
def test_a16_a_run_that_gives_up_its_average_resumes_with_the_weights_that_were_trained(
    root: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    decays = {"with": ["ema.decay=0.9"], "without": ["ema.decay=null"]}
    halves = {kind: ["schedule.power=1", *words] for kind, words in decays.items()}
    for kind, words in halves.items():
        trained(run_of(root, tmp_path / kind, *words, "trainer.max_steps=2"))
        shutil.copytree(tmp_path / kind, tmp_path / f"{kind}_changed")
    for kind, before in (("without", "with"), ("with", "without")):
        trained(run_of(root, tmp_path / f"{before}_changed", *halves[kind], "resume_force=true"))
    trained(run_of(root, tmp_path / "with", *halves["with"], "resume_force=true"))
    losses = [logged_losses(tmp_path / name) for name in ("with", "with_changed", "without_changed")]
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 6
    assert not [warning for warning in recwarn if "WeightAveraging" in str(warning.message)]


@pytest.mark.slow
@pytest.mark.reliability
def test_a18_a_run_that_goes_back_does_not_call_a_checkpoint_of_discarded_steps_its_best(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["checkpoint.every_n_steps=1", "checkpoint.keep=3", "data.steps_per_epoch=2", "trainer.max_epochs=2"]
    folder = tmp_path / "checkpoints"
    trained(run_of(root, tmp_path, *words))
    best = folder / "best.ckpt"
    shutil.copy(folder / "last.ckpt", best)  # of step 4, whatever its score was
    capsys.readouterr()
    back = ["trainer.max_steps=3", f"resume={folder}/step_00000001.ckpt", "resume_force=true"]
    with patch.object(train, "fit_network", side_effect=DataError("an image is broken")), pytest.raises(DataError):
        trained(run_of(root, tmp_path, *words, *back))
    assert (
        "best.ckpt: is of a later step, which is discarded; renamed to best.ckpt.discarded" in capsys.readouterr().out
    )
    assert read_checkpoint(folder / "last.ckpt").step == 1 and not best.exists()
    assert trained(run_of(root, tmp_path, *words, "trainer.max_steps=3", "resume_force=true")) is not None  # from there
    assert read_checkpoint(folder / "last.ckpt").step == 3 and read_checkpoint(best).step <= 3
    names = {path.name for path in folder.iterdir()}
    assert {"best.ckpt.discarded", "last.ckpt.discarded", "step_00000003.ckpt.discarded"} <= names


@pytest.mark.slow
@pytest.mark.reliability
def test_a18_a_job_that_slurm_runs_again_resumes_from_its_own_checkpoint(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved_run(root, tmp_path)
    first = shutil.copy(path, tmp_path / "first.ckpt")
    source = DataSource(run_of(root, tmp_path).data)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    start = resolve_start(run_of(root, path.parent.parent, f"resume={first}"), [], source)
    assert start.state is not None and start.state.path == path
    start = resolve_start(run_of(root, tmp_path / "new", f"resume={first}"), [], source)
    assert start.state is not None and start.state.path == Path(first)


@pytest.mark.slow
@pytest.mark.reliability
def test_a_run_resumes_neither_with_permuted_classes_nor_with_another_best(root: Path, tmp_path: Path) -> None:
    state = read_state(saved_run(root, tmp_path), run_of(root, tmp_path))
    config, classes = config_to_plain(run_of(root, tmp_path)), state.classes
    swapped = ClassTable((classes.names[1], classes.names[0], *classes.names[2:]), classes.palette)
    with pytest.raises(ConfigError, match=rf"data\.classes: class 0 is {classes.names[0]} in the checkpoint, "):
        check_same_run(state, config, classes=swapped, force=True)
    recoloured = ClassTable(classes.names, tuple(reversed(classes.palette)))
    assert check_same_run(state, config, classes=recoloured) is None  # masks of ids
    with pytest.raises(ConfigError, match=r"data\.classes: other colours, by which masks are read"):
        check_same_run(state, config, classes=recoloured, decodes_colours=True)
    other = config_to_plain(run_of(root, tmp_path, "checkpoint.monitor=val/pixel_accuracy"))
    with pytest.raises(ConfigError, match=r"checkpoint\.monitor: val/miou in the checkpoint, .* replace best\.ckpt"):
        check_same_run(state, other, classes=classes)
    assert "val/pixel_accuracy now" in str(check_same_run(state, other, classes=classes, force=True))


@pytest.mark.slow
@pytest.mark.reliability
def test_a16_what_weights_belong_to_cannot_be_forced(root: Path, tmp_path: Path) -> None:
    state, _, _ = stopped_run(root, tmp_path)
    other = config_to_plain(run_of(root, tmp_path, "optim=adamw"))
    with pytest.raises(ConfigError, match=r"optim\.name: sgd in the checkpoint, adamw now"):
        check_same_run(state, other, classes=state.classes, force=True)


@pytest.mark.slow
@pytest.mark.reliability
def test_a17_an_epoch_with_fewer_steps_resumes_at_the_same_fraction_with_the_next_images(
    root: Path, tmp_path: Path
) -> None:
    words = ["data.steps_per_epoch=4", "schedule.power=1"]
    trained(run_of(root, tmp_path, *words, "trainer.max_steps=2"))
    trained(run_of(root, tmp_path, *words, "trainer.limit_train_batches=2", "resume_force=true"))
    rows = read_rows(tmp_path / "logs" / "metrics.csv")
    assert [(row["step"], row["epoch"]) for row in rows] == [("0", "0"), ("1", "0"), ("2", "1"), ("3", "1")]
    # Half of the first epoch was done: step 1 of 4, where the rate is 3/4.
    assert [float(row["lr/encoder"]) for row in rows] == pytest.approx([0.02, 0.015, 0.01, 0.005])
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["SegmentationData"] == {"taken": 2 + 3}  # no sub-batch is taken twice or left out


@pytest.mark.slow
@pytest.mark.reliability
def test_a_step_that_is_lower_after_resuming_is_no_earlier_one(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data.steps_per_epoch=4", "ema.decay=0.5", "checkpoint.every_n_steps=1", "checkpoint.keep=2"]
    folder = tmp_path / "checkpoints"
    trained(run_of(root, tmp_path, *words))
    finished = read_rows(tmp_path / "logs" / "metrics.csv")
    longer = [*words, "trainer.max_epochs=3", "trainer.accumulate_grad_batches=2", "resume_force=true"]
    capsys.readouterr()
    trained(run_of(root, tmp_path, *longer))
    assert "metrics.csv: rows of finished epochs have the numbers of steps to come; kept as" in capsys.readouterr().out
    assert read_rows(tmp_path / "logs" / "metrics_until_epoch_2.csv") == finished
    last = torch.load(folder / "last.ckpt", weights_only=True)
    before = torch.load(folder / "step_00000007.ckpt", weights_only=True)
    name = "net.encoder.coarse.0.weight"
    assert last["global_step"] == 6 and not torch.equal(last["state_dict"][name], before["state_dict"][name])
    assert {path.name for path in folder.glob("step_*")} == {"step_00000005.ckpt", "step_00000007.ckpt"}
    state = read_state(folder / "last.ckpt", run_of(root, tmp_path, *longer))
    shutil.copy(folder / "step_00000007.ckpt", folder / "best.ckpt")
    prepare_checkpoint_folder(state, folder, str(folder / "last.ckpt"))
    assert not list(folder.glob("*.discarded"))
    earlier = read_state(folder / "step_00000007.ckpt", run_of(root, tmp_path, *words))
    prepare_checkpoint_folder(earlier, folder, str(folder / "step_00000007.ckpt"))
    assert {path.name for path in folder.glob("*.discarded")} == {"last.ckpt.discarded", "step_00000005.ckpt.discarded"}


@pytest.mark.reliability
def test_a17_another_number_of_devices_takes_the_sub_batches_after_those_that_were_taken(root: Path) -> None:
    config = run_of(root, Path("unused"))
    source = DataSource(config.data)
    with patch.dict(ENCODERS, {"tiny": Constructor("helpers.in_process", "TinyEncoder")}):
        data = build_data(config, source, build_network(config.model, 3))
    data.load_state_dict({"taken": 5})
    for rank in (0, 1):
        data._rank_and_world_size = lambda rank=rank: (rank, 2)
        paths = [batch.paths for batch in data.train_dataloader()]
        numbers = [5 + rank, 7 + rank, 9 + rank]
        records = source.records("train")
        assert paths == [[records[index].image for index in data.plan().sub_batch(n).records] for n in numbers]
    data._rank_and_world_size = lambda: (0, 2)
    data.load_state_dict({"position": 5})  # an early version counted steps
    assert data.train_dataloader().taken == 10
    assert data.state_dict() == {"taken": 10}


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("where", ["moved", "copied", "elsewhere"])
def test_a18_a_run_folder_that_is_moved_or_copied_keeps_its_best(root: Path, tmp_path: Path, where: str) -> None:
    old, new = tmp_path / "old", tmp_path / "parent" / "new"
    trained(run_of(root, old, "trainer.max_epochs=1"))
    last = old / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    (state,) = (value for key, value in content["callbacks"].items() if key.startswith("BestCheckpoint"))
    best = torch.tensor(0.9)
    for key in ("best_model_score", "current_score", "kth_value"):
        state[key] = best
    state["best_k_models"] = dict.fromkeys(state["best_k_models"], best)
    torch.save(content, last)
    kept = (old / "checkpoints" / "best.ckpt").read_bytes()
    words = ["trainer.max_epochs=2"]
    if where == "moved":
        new.parent.mkdir()
        old.rename(new)
    elif where == "copied":
        shutil.copytree(old, new)
    else:
        words.append(f"resume={last}")
    assert trained(run_of(root, new, *words)) == pytest.approx(0.9)
    assert (new / "checkpoints" / "best.ckpt").read_bytes() == kept
    content = torch.load(new / "checkpoints" / "last.ckpt", weights_only=True)
    (state,) = (value for key, value in content["callbacks"].items() if key.startswith("BestCheckpoint"))
    assert state["best_model_path"] == str(new / "checkpoints" / "best.ckpt")


@pytest.mark.slow
@pytest.mark.reliability
def test_a18_without_its_file_the_best_is_looked_for_again(root: Path, tmp_path: Path) -> None:
    trained(run_of(root, tmp_path, "trainer.max_epochs=1"))
    (tmp_path / "checkpoints" / "best.ckpt").unlink()
    trained(run_of(root, tmp_path, "trainer.max_epochs=2"))
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 6


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("word", ["limit_train_batches=0", "limit_train_batches=0.0", "max_steps=0"])
def test_a19_a_run_without_a_step_is_refused(root: Path, tmp_path: Path, word: str) -> None:
    with pytest.raises(ConfigError, match=r"there is nothing to train"):
        run_of(root, tmp_path, f"trainer.{word}")


@pytest.mark.reliability
def test_a19_a_fraction_that_leaves_no_batch_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.limit_train_batches=0\.1"):
        trained(run_of(root, tmp_path, "trainer.limit_train_batches=0.1"))


@pytest.mark.slow
@pytest.mark.reliability
def test_a14_a_step_with_what_is_left_of_an_epoch_is_the_mean_over_that(root: Path, tmp_path: Path) -> None:
    words = ["trainer.max_epochs=1", "optim.momentum=0", "optim.weight_decay=0", "data.steps_per_epoch=1"]
    alone = fit(run_of(root, tmp_path / "1", *words))
    accumulated = fit(run_of(root, tmp_path / "2", *words, "trainer.accumulate_grad_batches=2"))
    assert_equal(accumulated["state_dict"], alone["state_dict"])
