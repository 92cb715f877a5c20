"""Every run has its own folder, whatever else is started: rows F1 and F3 of docs/reliability.md.

tests/distributed/test_devices.py has real processes of several devices: one folder and one saved configuration for
ranks that we, torchrun or SLURM have started.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from omegaconf import OmegaConf

from helpers.command_line import TINY, TINY_ENCODERS, TINY_NETWORK, call_main, run_here
from semseg.cli import main
from semseg.cli.main import resolve_run_dir, resolve_sweep_dir
from semseg.config.compose import compose_with_hydra
from semseg.config.groups import CONFIG_DIR
from semseg.config.overrides import RECORD_FOLDER, parse_overrides, quote_value
from semseg.errors import ConfigError
from semseg.nets.registry import ENCODERS
from semseg.storage.run_folders import RESULT_NAMES, choose_follow_up_folder, claim_folder, find_newest_evaluation

pytestmark = pytest.mark.reliability

# The real entry point with a clock that stands still, and a mode that prints its folder.
FROZEN = """
import sys
from datetime import datetime
from pathlib import Path
import hydra.core.utils

class Stopped(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 2, 3, 4, 5)

hydra.core.utils.datetime = Stopped
from semseg.cli import main
import semseg.modes.compare

def run(config, overrides):
    (Path(config.run_dir) / "result").write_text("a command that writes nothing leaves no folder")
    print("ran in", config.run_dir)

semseg.modes.compare.run = run
main.main()
"""
COMPARE = ["mode=compare", "runs=[a,b]"]


def start(cwd: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FROZEN, *words]
    environment = {"PYTHONPATH": str(CONFIG_DIR.parent), "PATH": "/usr/bin:/bin"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_all(processes: list[subprocess.Popen[str]]) -> list[str]:
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


@pytest.mark.slow
def test_f1_runs_of_the_same_second_get_different_folders(tmp_path: Path) -> None:
    outputs = wait_for_all([start(tmp_path, *COMPARE) for _ in range(3)])
    name = "2026-01-02_03-04-05_compare"
    expected = [name, f"{name}_2", f"{name}_3"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == expected
    assert sorted(output.split()[-1] for output in outputs) == [str(tmp_path / "runs" / name) for name in expected]
    assert len(list(tmp_path.glob("runs/*/.hydra/config.yaml"))) == 3  # no configuration is lost


@pytest.mark.slow
def test_f1_sweeps_of_the_same_second_get_different_folders_with_all_their_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "run_sweep_job", lambda overrides, run_dir, scores: 0.0)
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["run.py", "-m", *COMPARE, "seed=1,2", "runs_dir=x", *frozen_sweep()])
        with pytest.raises(SystemExit):
            main.main()
    assert [path.name for path in sorted((tmp_path / "x").iterdir())] == ["then_sweep", "then_sweep_2"]
    assert len(list(tmp_path.glob("x/*/*/"))) == 4  # jobs write their own files


def frozen_sweep() -> list[str]:
    """The override for a sweep folder whose name contains the time."""
    return ["hydra.sweep.dir=${runs_dir}/${now:then}_sweep"]


def test_f1_a_folder_that_the_user_names_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("run_dir=mine", f"hydra.run.dir={tmp_path}/mine", "run_dir='runs/2026-01-02_03-04-05_train'"):
        composed = compose_with_hydra(parse_overrides([word]))
        first = resolve_run_dir(composed)
        first.mkdir(parents=True, exist_ok=True)
        assert resolve_run_dir(composed) == first
    assert not list(tmp_path.rglob("*_2"))


def test_f1_a_hundred_claims_at_once_give_a_hundred_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: claim_folder(tmp_path / "runs" / "now"), range(100)))
    assert len(set(folders)) == 100 and all(folder.is_dir() for folder in folders)


def test_f1_a_folder_that_cannot_be_created_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match="cannot create this run folder"):
        claim_folder(tmp_path / "runs" / "now")


@pytest.mark.slow
def test_f1_and_f3_ranks_of_another_launcher_share_the_folder_that_rank_0_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store: dict[str, str] = {}

    def agree(own_dir: str, rank: int) -> str:
        return store.setdefault("run_dir", own_dir) if rank == 0 else store["run_dir"]

    monkeypatch.setattr(main, "agree_on_run_dir", agree)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    taken = resolve_run_dir(compose_with_hydra(["run_dir=${runs_dir}/${now:then}"]))
    for rank in (0, 1, 2):
        monkeypatch.setenv("RANK", str(rank))
        folder = resolve_run_dir(compose_with_hydra(["run_dir=${runs_dir}/${now:then}"]))
        assert folder == tmp_path / "runs" / "then_2"
    assert taken == tmp_path / "runs" / "then"
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_f3_our_ranks_receive_the_folder_and_claim_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = []
    for name in ("images", "annotations"):
        for split in ("training", "validation"):
            (tmp_path / "data" / "ADEChallengeData2016" / name / split).mkdir(parents=True)
    monkeypatch.setattr(
        main, "supervise_ranks", lambda command, processes, run_dir: commands.append((command, run_dir)) or 0
    )
    monkeypatch.setattr(sys, "argv", ["run.py", "trainer.devices=2"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 0
    [(command, run_dir)] = commands
    assert run_dir.parent == tmp_path / "runs" and not run_dir.exists()  # created, and removed because it is unused
    assert resolve_run_dir(compose_with_hydra(command[2:])) == run_dir
    assert not run_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["plain", "my runs", 'a"b', "a\\", 'a\\"b', "a\\\\", "it's", "a=b,c(d)", "[x]{y}", "ü"]
)
def test_any_name_of_a_folder_survives_hydras_grammar(name: str, tmp_path: Path) -> None:
    composed = compose_with_hydra([f"hydra.run.dir={quote_value(tmp_path / name)}"])
    assert resolve_run_dir(composed) == tmp_path / name
    assert OmegaConf.to_container(composed.hydra.run, resolve=False) == {"dir": str(tmp_path / name)}


@pytest.mark.slow
def test_the_home_directory_is_known_in_recipes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("# @package _global_\nruns_dir: ~/my_runs\n")
    composed = compose_with_hydra([f"experiment={tmp_path / 'mine.yaml'}"])
    assert resolve_run_dir(composed).parent == tmp_path / "my_runs"
    assert resolve_sweep_dir(composed).parent == tmp_path / "my_runs"


# ---- folders below a run


def train_here(folder: Path) -> Path:
    """The folder of a tiny finished run."""
    run_here(folder, *TINY, *TINY_NETWORK, "run_dir=runs/first")
    return folder / "runs" / "first"


@pytest.mark.slow
def test_results_of_a_network_are_below_its_run_and_never_replace_each_other(tmp_path: Path) -> None:
    run_dir = train_here(tmp_path)
    photo = next((tmp_path / "scenes" / "images").rglob("*.jpg"))
    words = ["trainer.accelerator=cpu", "eval.bootstrap=0"]
    with patch.dict(ENCODERS, TINY_ENCODERS):
        for spec in ("ckpt=best", "ckpt=runs/first", f"ckpt={run_dir}/checkpoints/last.ckpt"):
            run_here(tmp_path, "mode=eval", spec, *words)
        run_here(tmp_path, "mode=predict", "ckpt=last", f"input={photo}", *words)
        run_here(tmp_path, "mode=eval", "ckpt=runs/first", "run_dir=mine", *words)
        (tmp_path / "copy.ckpt").write_bytes((run_dir / "checkpoints" / "last.ckpt").read_bytes())
        run_here(tmp_path, "mode=eval", "ckpt=copy.ckpt", *words)
        output = run_here(tmp_path, "mode=compare", "runs=[runs/first,mine]")
        before = {path: path.read_bytes() for path in run_dir.glob("[!.]*.*")}
        for mode, others in (
            ("eval", ["ckpt=runs/first", "eval.bootstrap=0"]),
            ("predict", ["ckpt=runs/first", f"input={photo}"]),
            ("crossval", ["data.folds=2"]),
        ):
            words_of_training = [f"mode={mode}", *others, "run_dir=runs/first", "trainer.accelerator=cpu"]
            refused = run_here(tmp_path, *words_of_training, code=2)
            assert (
                f"run_dir=runs/first: is the folder of a training run, whose report and record mode={mode}" in refused
            )
        assert before == {path: path.read_bytes() for path in run_dir.glob("[!.]*.*")}
    assert {path.name for path in run_dir.iterdir() if path.is_dir()} >= {"eval", "eval-2", "eval-3", "predict"}
    files = {
        path.name for record in tmp_path.rglob(RECORD_FOLDER) for path in record.parent.iterdir() if path.is_file()
    }
    of_prediction = {"classes.json", f"{photo.stem}_ids.png", f"{photo.stem}_panel.png"}
    assert files - of_prediction - {"run.lock", "run.holder.json"} <= set(RESULT_NAMES)
    metrics = [json.loads((run_dir / name / "metrics.json").read_text()) for name in ("eval", "eval-2", "eval-3")]
    assert [Path(entry["checkpoint"]).stem for entry in metrics] == ["best", "best", "last"]
    assert len(list(tmp_path.glob("runs/*_eval"))) == 1  # of the network outside of a run
    assert find_newest_evaluation(run_dir) == run_dir / "eval-3"
    assert (tmp_path / "mine" / "metrics.json").is_file() and "compare.html" in output


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.yaml", []),
        ("metrics.json", ["mode=eval", "ckpt=a.ckpt"]),
        ("compare.csv", ["mode=compare", "runs=[a,b]"]),
        ("check.html", ["mode=check"]),
        ("panels", ["mode=eval", "ckpt=a.ckpt"]),
        ("crossval.csv", ["mode=crossval", "data.folds=2"]),
    ],
)
def test_files_that_no_run_has_written_are_not_replaced(name: str, words: list[str], tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "panels").mkdir(parents=True) if name == "panels" else mine.mkdir()
    if name != "panels":
        (mine / name).write_text("mine")
    output = run_here(tmp_path, *words, "run_dir=mine", code=2)
    assert f"run_dir=mine: holds {name}, which this run could replace, and no record (.hydra)" in output
    assert [path.name for path in mine.iterdir()] == [name]
    (mine / RECORD_FOLDER).mkdir()  # as after a run of ours
    output = io.StringIO()
    call_main(tmp_path, [*words, "run_dir=mine", "data.root=nothere"], output)
    assert "error" in output.getvalue() and "could replace" not in output.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["mode=eval", "ckpt=best"], 1),
        (["mode=eval", "ckpt=nothere"], 1),
        (["mode=predict", "ckpt=nothere", "input=no.jpg", "run_dir=mine/deep"], 1),
        (["data.root=nothere"], 1),
        (["data.root=nothere", "trainer=ddp_cpu", "trainer.devices=2"], 1),
        (["mode=compare", "runs=[a,b]"], 2),
        (["mode=check", "data.root=nothere"], 1),
    ],
)
def test_a_command_that_fails_before_it_wrote_anything_leaves_nothing(
    words: list[str], code: int, tmp_path: Path
) -> None:
    output = run_here(tmp_path, *words, code=code)
    assert list(tmp_path.iterdir()) == []
    assert "_eval" not in output  # the folder of this command is not among the runs that an error lists


def test_a_failing_command_leaves_an_existing_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    run_here(tmp_path, "mode=eval", "ckpt=nothere", "run_dir=mine", code=1)
    assert (tmp_path / "mine").is_dir()


def test_follow_ups_of_training_replace_their_own_results_only(tmp_path: Path) -> None:
    assert choose_follow_up_folder(tmp_path, "eval") == tmp_path / "eval"
    (tmp_path / "eval").mkdir()
    assert choose_follow_up_folder(tmp_path, "eval") == tmp_path / "eval"
    (tmp_path / "eval" / RECORD_FOLDER).mkdir()  # of a command of its own
    assert choose_follow_up_folder(tmp_path, "eval") == tmp_path / "eval-2"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_several_gpus_that_do_not_exist_are_one_error_and_leave_no_folder(tmp_path: Path) -> None:
    printed = run_here(tmp_path, *TINY, "trainer.devices=2", "trainer.accelerator=gpu", code=2)
    assert printed.count("PyTorch sees no GPU here") == 1
    assert not (tmp_path / "runs").exists()
