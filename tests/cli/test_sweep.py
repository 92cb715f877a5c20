"""Sweeps: the status of each job, which jobs run again, and the table at the end.

Jobs are stubs that score 1 - 10 * optim.lr or fail, behind the real entry point and the real Hydra; one sweep at the
end trains.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from helpers.browser import evaluate_in_browser, needs_browser
from helpers.command_line import TINY, TINY_NETWORK, run
from helpers.fork_server import FORK_CHILDREN, run_python
from helpers.tiny_program import PROGRAM
from semseg.cli import main, sweep
from semseg.cli.supervise import CLEARED_VARIABLES, ProcessEnd, run_isolated
from semseg.cli.sweep import classify_end
from semseg.config.compose import compose_with_hydra, explain_option
from semseg.config.groups import CONFIG_DIR
from semseg.config.overrides import parse_overrides
from semseg.reports.sweep_page import (
    choose_log_marks,
    draw_parameter_charts,
    group_values,
    place_values,
    render_sweep_page,
    suggest_comparison,
)
from semseg.storage.commands import relative_to_cwd
from semseg.storage.run_results import (
    Job,
    RunResult,
    find_finished_job,
    job_name,
    rank_jobs,
    read_jobs,
    read_result,
    write_job,
    write_result,
)

Sweep = Callable[..., int]
GRACE = 20  # seconds for processes on a busy machine


class Stub:
    """Replaces the process of a job."""

    def __init__(self) -> None:
        self.rates: list[str] = []  # learning rates of the jobs that were run
        self.failing: set[str] = set()
        self.stopping: set[str] = set()  # jobs that receive Ctrl-C

    def __call__(self, command: Sequence[str], error_file: Path) -> ProcessEnd:
        given = dict(word.split("=", 1) for word in command[2:])
        rate, run_dir = given["optim.lr"], Path(given["run_dir"].strip('"'))
        self.rates.append(rate)
        if rate in self.stopping:
            return ProcessEnd(130, signal.SIGINT)
        if rate in self.failing:
            error_file.write_text("1\nTraceback\nsemseg.errors.DataError: no such image.\n")
            return ProcessEnd(1, None)
        write_result(run_dir, RunResult(1 - 10 * float(rate), "val/miou", "max"))
        return ProcessEnd(0, None)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub()
    monkeypatch.setattr(sweep, "run_isolated", stub)
    return stub


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sweep:
    """Runs the entry point in this process, in the folder `tmp_path`, and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")

    def run_main(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["run.py", *words])
        with pytest.raises(SystemExit) as ended:
            main.main()
        return int(ended.value.code or 0)

    return run_main


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---- F4: failed jobs, skipped jobs, and the table


@pytest.mark.slow
@pytest.mark.reliability
def test_f4_a_failing_job_does_not_stop_the_others_and_the_table_ranks_them_all(
    stub: Stub, start: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.failing = {"0.02"}
    assert start("-m", "optim.lr=0.04,0.02,0.01", "seed=1", "sweep_dir=x") == 1
    assert stub.rates == ["0.04", "0.02", "0.01"]
    rows = table(tmp_path / "x")
    columns = ("place", "optim.lr", "val/miou", "status", "reason")
    assert [[row[name] for name in columns] for row in rows] == [
        ["1", "0.01", "0.9", "finished", ""],
        ["2", "0.04", "0.6", "finished", ""],
        ["3", "0.02", "", "failed", "no such image."],
    ]
    assert "seed" not in rows[0]  # it is the same in all jobs
    output = capsys.readouterr().out
    assert "3 jobs: 1 failed, 2 finished" in output
    assert "to continue: python run.py -m optim.lr=0.04,0.02,0.01 seed=1 sweep_dir=x\n" in output


@pytest.mark.slow
@pytest.mark.reliability
def test_f4_a_repeated_sweep_runs_only_unfinished_and_new_jobs(stub: Stub, start: Sweep, tmp_path: Path) -> None:
    stub.failing = {"0.02"}
    assert start("-m", "optim.lr=0.01,0.02", "seed=1", "sweep_dir=x") == 1
    stub.failing = set()
    assert start("seed=1", "-m", "optim.lr=0.04,0.02,0.01", "sweep_dir=x") == 0  # an option between overrides
    assert stub.rates == ["0.01", "0.02", "0.04", "0.02"]
    assert [row["optim.lr"] for row in table(tmp_path / "x")] == ["0.01", "0.02", "0.04"]


@pytest.mark.reliability
def test_f4_only_the_same_overrides_with_a_result_are_a_finished_job(tmp_path: Path) -> None:
    words = ["seed=1", "optim.lr=0.1"]
    write_job(Job(tmp_path, tuple(words), "finished"))
    assert find_finished_job(tmp_path, words, scores=True) is None  # no result.json
    assert find_finished_job(tmp_path, words, scores=False) is not None
    write_result(tmp_path, RunResult(0.5))
    assert find_finished_job(tmp_path, words[::-1], scores=True) is not None
    assert find_finished_job(tmp_path, ["seed=1", "optim.lr=0.2"], scores=True) is None
    write_job(Job(tmp_path, tuple(words), "stopped"))
    assert find_finished_job(tmp_path, words, scores=True) is None
    (tmp_path / "job.json").write_text("{")
    assert find_finished_job(tmp_path, words, scores=True) is None


@pytest.mark.slow
def test_ctrl_c_ends_the_sweep_and_prints_how_to_continue(
    stub: Stub, start: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.stopping = {"0.02"}
    assert start("-m", "optim.lr=0.02,0.01", "sweep_dir=x") == 130
    assert stub.rates == ["0.02"]
    assert [row["status"] for row in table(tmp_path / "x")] == ["stopped"]
    assert "to continue: python run.py -m optim.lr=0.02,0.01 sweep_dir=x" in capsys.readouterr().out
    stub.stopping = set()
    assert start("-m", "optim.lr=0.02,0.01", "sweep_dir=x") == 0
    assert stub.rates == ["0.02", "0.02", "0.01"]


def test_time_of_all_attempts_adds_up(stub: Stub, tmp_path: Path) -> None:
    write_job(Job(tmp_path, ("optim.lr=0.1",), "stopped", seconds=100))
    command = ["python", "run.py", "optim.lr=0.1", f"run_dir={tmp_path}"]
    job = sweep.run_job(command, ["optim.lr=0.1"], tmp_path, scores=True)
    assert 100 < job.seconds < 110
    assert job.result.score == 0.0


@pytest.mark.parametrize(
    ("ended", "status", "reason"),
    [
        (ProcessEnd(0, None), "finished", ""),
        (ProcessEnd(130, None), "stopped", ""),
        (ProcessEnd(143, signal.SIGTERM), "stopped", ""),
        (ProcessEnd(-9, signal.SIGINT), "stopped", ""),  # it did not stop in time
        (ProcessEnd(-9, None), "failed", "killed by signal 9 (SIGKILL)"),
        (ProcessEnd(2, None), "failed", "exit code 2"),
    ],
)
def test_the_end_of_a_process_gives_the_status_of_its_job(
    ended: ProcessEnd, status: str, reason: str, tmp_path: Path
) -> None:
    assert classify_end(ended, tmp_path, scores=False) == (status, reason)


def test_a_training_without_a_result_has_not_ended(tmp_path: Path) -> None:
    assert classify_end(ProcessEnd(0, None), tmp_path, scores=True) == ("stopped", "")


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("jobs", [6, pytest.param(20, marks=pytest.mark.long)])
def test_d5_jobs_leave_the_memory_of_the_sweep_as_it_is(stub: Stub, start: Sweep, jobs: int) -> None:
    start("-m", "optim.lr=0.01", "sweep_dir=before")  # imports everything
    before = resident_bytes()
    start("-m", f"optim.lr=range(1,{jobs + 1})", "sweep_dir=x")
    assert len(stub.rates) == 1 + jobs
    assert resident_bytes() - before < 50 * 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- the ranking and the page


def jobs_of(folder: Path, mode: str = "max") -> list[Job]:
    rows = [("0.001", "resnet18", 0.3), ("0.1", "resnet50", 0.5), ("0.01", "<b>hrnet</b>", 0.4)]
    return [
        Job(folder / rate, (f"optim.lr={rate}", f"model/encoder={name}", "seed=1"), "finished", "", 61.0,
            RunResult(score, "val/miou", mode))
        for rate, name, score in rows
    ] + [Job(folder / "none", ("optim.lr=1", "model/encoder=resnet18", "seed=1"), "failed", "killed")]  # fmt: skip


def test_the_best_score_is_at_the_top_in_the_direction_of_the_runs() -> None:
    highest, lowest = rank_jobs(jobs_of(Path())), rank_jobs(jobs_of(Path(), "min"))
    assert [job.result.score for job in highest.jobs] == [0.5, 0.4, 0.3, None]
    assert [job.result.score for job in lowest.jobs] == [0.3, 0.4, 0.5, None]
    assert highest.varying == ("optim.lr", "model/encoder")


def test_jobs_with_another_score_are_not_ranked_with_the_others() -> None:
    first, second, *_ = jobs_of(Path())
    other = second._replace(result=RunResult(0.9, "val/pixel_accuracy"))
    ranking = rank_jobs([first, other, second])
    assert [job.result.score for job in ranking.jobs] == [0.5, 0.3, None] and ranking.monitor == "val/miou"
    assert ranking.jobs[2].reason == "val/pixel_accuracy 0.9000, max is best, is not compared"


def test_a_key_that_only_one_job_names_varies() -> None:
    ranking = rank_jobs([Job(Path("a"), ("seed=1",)), Job(Path("b"), ("seed=1", "optim.lr=1"))])
    assert ranking.varying == ("optim.lr",)
    assert [ranking.values_of(job) for job in ranking.jobs] == [[""], ["1"]]


def test_the_page_plots_the_score_against_each_parameter_and_escapes_what_it_is_given() -> None:
    page = render_sweep_page(rank_jobs(jobs_of(Path())), "python run.py -m 'x'")
    assert page.count("<circle") == 6  # three jobs with a score, two parameters
    assert page.count("optim.lr=0.1 model/encoder=resnet50: 0.5") == 2
    assert "<b>hrnet" not in page and "&lt;b&gt;hrnet" in page
    assert "http" not in page.replace("http-equiv", "")  # it needs no network
    assert "failed: killed" in page and "0:01:01" in page


def test_each_parameter_is_plotted_with_the_colours_of_the_other() -> None:
    jobs = [
        Job(Path(f"{rate}{name}{seed}"), (f"optim.lr={rate}", f"model/encoder={name}", f"seed={seed}"),
            "finished", "", 1, RunResult(score + 0.001 * seed, "val/miou"))
        for rate, name, score in (("0.01", "a", 0.3), ("0.02", "a", 0.31), ("0.01", "b", 0.5), ("0.02", "b", 0.52))
        for seed in (1, 2)
    ]  # fmt: skip
    charts = draw_parameter_charts(rank_jobs(jobs))
    # The encoder explains most of the score; for the encoder itself, that is the rate.
    assert [(chart.key, chart.groups and chart.groups.key) for chart in charts] == [
        ("optim.lr", "model/encoder"), ("model/encoder", "optim.lr"), ("seed", "model/encoder"),
    ]  # fmt: skip
    for colour in (0, 1):
        assert str(charts[0].drawing).count(f'class="dot line-{colour}"') == 4
        assert str(charts[0].drawing).count(f'class="line line-{colour}"') == 1  # connects the means
    assert ">0.01</text>" in charts[0].drawing and ">0.02</text>" in charts[0].drawing


def test_learning_rates_are_on_a_logarithmic_axis_and_other_numbers_from_a_factor_of_ten_on() -> None:
    assert place_values("optim.lr", ["0.01", "0.02", "0.04"]).positions == pytest.approx([-2, -1.69897, -1.39794])
    assert place_values("data.batch_size", ["2", "4", "8"]).positions == [2, 4, 8]
    assert place_values("ema.start_step", ["100", "1000"]).positions == pytest.approx([2, 3])
    assert place_values("optim.weight_decay", ["0", "0.1"]).positions == [0, 0.1]
    assert list((place_values("optim.lr", ["0.01", "0.02"]).marks or {}).values()) == ["0.01", "0.02"]


def test_numbers_with_many_values_are_coloured_by_range_and_names_with_many_by_the_frequent_ones() -> None:
    groups = group_values("optim.lr", [str(n) for n in range(1, 13)])
    assert groups.names == ("1 to 4", "5 to 8", "9 to 12") and groups.members == (0,) * 4 + (1,) * 4 + (2,) * 4
    names = group_values("model", [f"net{n}" for n in range(12)] + ["net9"])
    assert len(names.names) == 8 and "net9" in names.names and names.names[-1] == "others"


def test_jobs_are_named_by_their_overrides_and_link_to_their_reports(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path)
    for job in jobs[:2]:
        (job.folder / "eval").mkdir(parents=True)
        (job.folder / "eval" / "report.html").touch()
        (job.folder / "eval" / "metrics.json").touch()
    jobs[2].folder.mkdir()
    ranking = rank_jobs(jobs)
    page = render_sweep_page(ranking, "x")
    assert '<a href="0.1/eval/report.html">optim.lr=0.1 model/encoder=resnet50</a>' in page
    assert '<a href="0.01/">optim.lr=0.01' in page and page.count("<a href=") == 3 + 3  # the sections of the page
    command = suggest_comparison(ranking)
    assert command is not None and command.endswith(
        f"mode=compare 'runs=[{relative_to_cwd(jobs[0].folder)},{relative_to_cwd(jobs[1].folder)}]'"
    )
    odd = rank_jobs([job._replace(folder=tmp_path / "a, [b]" / job.folder.name) for job in jobs[:2]])
    shutil.copytree(tmp_path, tmp_path / "a, [b]", ignore=shutil.ignore_patterns("a, *"))
    command = suggest_comparison(odd)
    assert command is not None
    (runs,) = parse_overrides([shlex.split(command)[-1]])
    value = OverridesParser.create().parse_override(runs).value()
    assert value == [str(relative_to_cwd(odd.jobs[number].folder)) for number in (1, 0)]  # the best one last
    (jobs[0].folder / "eval" / "metrics.json").unlink()
    assert suggest_comparison(ranking) is None


def test_a_sweep_without_any_score_has_a_page_without_plots() -> None:
    page = render_sweep_page(
        rank_jobs([Job(Path("a"), ("seed=1",), "failed"), Job(Path("b"), ("seed=2",), "failed")]), "x"
    )
    assert "<svg" not in page and "2 jobs: 2 failed" in page


def test_marks_of_many_powers_are_thinned_out() -> None:
    assert list(choose_log_marks(1e-12, 1.0).values()) == ["1e-12", "1e-10", "1e-8", "1e-6", "1e-4", "0.01", "1"]


@pytest.mark.slow
@needs_browser
def test_the_page_sorts_and_fits_a_telephone(tmp_path: Path) -> None:
    page = tmp_path / "sweep.html"
    page.write_text(render_sweep_page(rank_jobs(jobs_of(tmp_path)), "python run.py " + "x" * 300))
    order, width = evaluate_in_browser(
        page,
        """(() => {
          const table = document.querySelector("#jobs table");
          table.tHead.rows[0].cells[1].querySelector("button").click();
          const order = [...table.tBodies[0].rows].map((row) => row.cells[1].innerText);
          return [order, document.documentElement.scrollWidth];
        })()""",
        width=390,
    )
    assert order == ["0.001", "0.01", "0.1", "1"]
    assert width == 390


# ---- the process of a job


def test_a_job_receives_our_signals_and_no_variable_that_makes_it_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CLEARED_VARIABLES:
        monkeypatch.setenv(name, "1")
    code = f"""
import os, signal, sys, time
def stop(*_):
    open("stopped", "w").close()
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
assert not set(os.environ) & set({CLEARED_VARIABLES!r})
open("ready", "w").close()
time.sleep({GRACE})
"""
    monkeypatch.chdir(tmp_path)
    threading.Thread(target=interrupt_once, args=(tmp_path / "ready",), daemon=True).start()
    assert run_isolated([sys.executable, "-c", code], tmp_path / "error.txt") == ProcessEnd(130, signal.SIGINT)
    assert (tmp_path / "stopped").exists()


def interrupt_once(path: Path) -> None:
    """Send Ctrl-C to this process as soon as `path` exists."""
    deadline = time.monotonic() + GRACE
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep_dir=x"], "needs a sweep. Add -m"),
        (["hparams_search=grid"], "needs a sweep. Add -m"),
        (["-m", "optim.lr=1,2", "--cfg", "job"], "a sweep takes no other option"),
        (["-m", "optim.lr=1,2", "run_dir=x"], "run_dir=x: is of one run, and every job of a sweep has a folder"),
        (["-m", "hydra/launcher=jblib", "seed=1,2"], "not known. Did you mean hydra/launcher=joblib?"),
    ],
)
def test_what_is_not_a_sweep_is_refused(
    words: list[str], message: str, start: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(*words) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_plugin_that_is_missing_is_named_with_the_way_to_install_it() -> None:
    assert '".[optuna]"' in explain_option("hydra/sweeper", "optuna", ["basic"])
    assert '".[slurm]"' in explain_option("hydra/launcher", "submitit_slurm", ["basic"])


# ---- searches and launchers


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_DIR / "hparams_search").glob("*.yaml")))
def test_a_search_has_no_settings_of_jobs(name: str) -> None:
    if name == "optuna":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    alone, searched = (
        OmegaConf.to_container(compose_with_hydra(words, sweep=True)) for words in ([], [f"hparams_search={name}"])
    )
    assert isinstance(alone, dict) and isinstance(searched, dict)
    assert {key for key in alone if alone[key] != searched[key]} == {"hydra"}
    assert job_name([f"hparams_search={name}", "seed=1"]) == job_name(["seed=1"])


@pytest.mark.slow
def test_the_grid_is_swept_and_an_override_replaces_its_values(stub: Stub, start: Sweep) -> None:
    assert start("-m", "hparams_search=grid", "optim.weight_decay=1e-4", "sweep_dir=x") == 0
    assert stub.rates == ["0.005", "0.01", "0.02", "0.04"]


@pytest.mark.slow
def test_optuna_receives_scores_and_failures_and_continues_a_search(stub: Stub, start: Sweep, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ["-m", "hparams_search=optuna", "sweep_dir=x"]
    assert start(*search, "hydra.sweeper.n_trials=2") == 0
    first = list(stub.rates)
    assert start(*search, "hydra.sweeper.n_trials=3") == 0
    assert len(first) == 2 and len(stub.rates) == 3  # the same two are proposed again, and skipped
    assert all(0.002 <= float(rate) <= 0.2 for rate in stub.rates)
    best = OmegaConf.to_container(OmegaConf.load(tmp_path / "x" / "optimization_results.yaml"))
    assert isinstance(best, dict)
    assert best["best_params"]["optim.lr"] == min(map(float, stub.rates))
    lowest = ["-m", "hparams_search=optuna", "sweep_dir=y", "checkpoint.mode=min", "hydra.sweeper.n_trials=2"]
    del stub.rates[:]
    assert start(*lowest) == 0
    best = OmegaConf.to_container(OmegaConf.load(tmp_path / "y" / "optimization_results.yaml"))
    assert isinstance(best, dict)
    assert best["best_params"]["optim.lr"] == max(map(float, stub.rates))  # of the lowest score


@pytest.mark.slow
def test_optuna_without_a_successful_job_ends_with_the_table(
    stub: Stub, start: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    monkeypatch.setattr(sweep, "run_isolated", lambda command, error_file: ProcessEnd(1, None))
    assert start("-m", "hparams_search=optuna", "hydra.sweeper.n_trials=2", "sweep_dir=x") == 1
    assert [row["reason"] for row in table(tmp_path / "x")] == ["exit code 1"] * 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        ("hydra_joblib_launcher", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
        ("hydra_submitit_launcher", ["hydra/launcher=submitit_local"]),
    ],
)
def test_jobs_may_run_at_the_same_time(plugin: str, words: list[str], tmp_path: Path) -> None:
    pytest.importorskip(f"hydra_plugins.{plugin}")
    content = {"mean_iou": 0.5, "classes": [{"name": "sky", "iou": 0.5}, {"name": "sea", "iou": 0.5}]}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(content))
    # A mode that takes a second: it reads two small files.
    run(tmp_path, "-m", "mode=compare", "runs=[a,b]", "seed=1,2", "sweep_dir=x", *words)
    assert [job.status for job in read_jobs(tmp_path / "x")] == ["finished", "finished"]
    assert len(list(tmp_path.glob("x/*/compare.html"))) == 2


@pytest.mark.slow
@pytest.mark.reliability
def test_f4_a_sweep_that_trains(start: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["-m", *TINY, *TINY_NETWORK, "optim.lr=-1,0.01", "sweep_dir=x"]
    ended = run_python(str(PROGRAM), *words, cwd=tmp_path, env={**os.environ, FORK_CHILDREN: "1"})
    assert ended.returncode == 1, ended.stdout
    failed, finished = read_jobs(tmp_path / "x")
    assert failed.status == "failed" and failed.reason == "optim.lr=-1.0: must be above 0."
    assert finished.status == "finished"
    result = read_result(finished.folder)
    assert result is not None and result.score is not None and (result.monitor, result.mode) == ("val/miou", "max")
    repeated: list[Path] = []
    monkeypatch.setattr(
        sweep, "run_isolated", lambda command, error_file: repeated.append(error_file) or ProcessEnd(2, None)
    )
    assert start(*words) == 1
    assert [path.parent for path in repeated] == [failed.folder]
