"""The supervisor, with ranks of a few lines of Python: which rank is named, how soon, with which exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.in_process import configured
from semseg.cli import supervise
from semseg.cli.supervise import (
    LAUNCHER_VARIABLES,
    RANKS_FOLDER,
    check_world_size,
    count_processes,
    record_error,
    supervise_ranks,
)
from semseg.errors import ConfigError

WAIT = "time.sleep(60)"
SPEAK = """
from semseg.cli.supervise import record_error
try:
    raise ValueError("a damaged image")
except ValueError as error:
    record_error(error, 1)
"""


def job(tmp_path: Path, rank: int, fault: str, others: str = WAIT) -> int:
    """Two ranks: `rank` does `fault`, the other one does `others`."""
    code = f"""
import os, signal, sys, time
if int(os.environ["LOCAL_RANK"]) == {rank}:
{indented(fault)}
else:
{indented(others)}
"""
    return supervise_ranks([sys.executable, "-c", code], 2, tmp_path)


def indented(code: str) -> str:
    return "\n".join("    " + line for line in code.strip().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "fault", "code", "reason"),
    [
        (0, "os._exit(3)", 3, "ended with exit code 3"),
        (1, "sys.exit(7)", 7, "ended with exit code 7"),
        (0, "os.kill(os.getpid(), signal.SIGKILL)", 137, "killed by signal 9 (SIGKILL)"),
        (1, "os.kill(os.getpid(), signal.SIGTERM)", 143, "killed by signal 15 (SIGTERM)"),
        (0, SPEAK + "sys.exit(1)", 1, "ValueError: a damaged image"),
        (1, SPEAK + WAIT, 1, "ValueError: a damaged image"),  # it hangs on its way out
    ],
)
def test_the_rank_that_failed_is_named_within_ten_seconds(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    rank: int,
    fault: str,
    code: int,
    reason: str,
) -> None:
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 1.0)
    began = time.monotonic()
    assert job(tmp_path, rank, fault) == code
    assert time.monotonic() - began < 10
    block = capfd.readouterr().err.strip().splitlines()[-2:]
    assert block[0] == f"error: rank {rank} of 2 failed: {reason}"
    assert block[1].startswith("its log: ")


def test_the_first_rank_to_fail_is_named_and_not_the_one_that_noticed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    late = SPEAK.replace("a damaged image", "Connection closed by peer")
    job(tmp_path, 1, SPEAK + "sys.exit(1)", "time.sleep(0.3)\n" + late + "sys.exit(1)")
    assert "rank 1 of 2 failed: ValueError: a damaged image" in capfd.readouterr().err


def test_a_message_of_several_lines_is_reported_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    error = "from semseg.errors import DataError\n" + SPEAK.replace("ValueError", "DataError").replace(
        "a damaged image", "two problems:\\n  a.png\\n  b.png"
    )
    job(tmp_path, 1, error + "sys.exit(1)", WAIT)
    assert "error: rank 1 of 2 failed: two problems:\n  a.png\n  b.png\n" in capfd.readouterr().err


def test_an_error_whose_record_cannot_be_written_is_not_hidden_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ValueError("a damaged image, \udcff.png")  # the name of a file may be no UTF-8
    monkeypatch.setenv(supervise.ERROR_FILE_VARIABLE, str(tmp_path / "missing" / "error.txt"))
    record_error(error, 1)
    monkeypatch.setenv(supervise.ERROR_FILE_VARIABLE, str(tmp_path / "error.txt"))
    record_error(error, 1)
    text = (tmp_path / "error.txt").read_text(encoding="utf-8")
    assert supervise.extract_error_message(text) == "ValueError: a damaged image, \\udcff.png"


@pytest.mark.slow
def test_a_killed_rank_is_named_even_if_the_other_recorded_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job(tmp_path, 1, "time.sleep(0.5)\nos.kill(os.getpid(), signal.SIGKILL)", SPEAK + WAIT)
    assert "rank 1 of 2 failed: killed by signal 9" in capfd.readouterr().err


def test_success_is_zero_and_other_ranks_write_to_their_log(tmp_path: Path) -> None:
    assert job(tmp_path, 1, "print('hello from one')", "pass") == 0
    assert (tmp_path / RANKS_FOLDER / "rank1.log").read_text().strip() == "hello from one"


def test_a_process_that_a_rank_started_ends_with_it(tmp_path: Path) -> None:
    fault = "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nprint(child.pid, flush=True)\nos._exit(3)"
    job(tmp_path, 1, fault)
    child = int((tmp_path / RANKS_FOLDER / "rank1.log").read_text())
    time.sleep(0.2)
    status = Path(f"/proc/{child}/stat")
    assert not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def without_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_supervisor_ends_all(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import sys; from pathlib import Path; from semseg.cli.supervise import supervise_ranks;"
        f"sys.exit(supervise_ranks([sys.executable, '-c', 'import time; time.sleep(60)'], 2, Path({str(tmp_path)!r})))"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, preexec_fn=without_nohup)  # noqa: PLW1509
    while not (tmp_path / RANKS_FOLDER / "rank1.log").exists():
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=15) == (130 if number == signal.SIGINT else 143)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ([], 1),
        (["trainer.devices=2"], 2),
        (["trainer.devices=[0,2,3]"], 3),
        (["trainer=ddp_cpu"], 2),
        (["trainer.devices=auto", "trainer.accelerator=cpu"], 1),
        (["trainer.devices=2", "trainer.strategy=ddp_find_unused_parameters_true"], 2),
        (["mode=predict", "ckpt=x", "input=y", "trainer.devices=2"], 1),
    ],
)
def test_a_process_per_device(monkeypatch: pytest.MonkeyPatch, overrides: list[str], count: int) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    config = configured(*overrides)
    assert count_processes(config) == count
    monkeypatch.setenv("LOCAL_RANK", "0")  # torchrun has started the ranks already
    assert count_processes(config) == 1
    assert os.environ["LOCAL_RANK"] == "0"


TORCHRUN = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}
REFUSED = "has started 4 processes, but trainer.devices={} on trainer.num_nodes={} needs {}. Set trainer.devices={}"


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize(
    ("variables", "overrides", "refusal"),
    [
        (TORCHRUN, [], f"torchrun {REFUSED.format(1, 1, 1, 2)} trainer.num_nodes=2,"),
        (SRUN, ["trainer.devices=3"], f"srun {REFUSED.format(3, 1, 3, 2)} trainer.num_nodes=2,"),
        (MPIRUN, ["mode=eval", "ckpt=x"], f"mpirun {REFUSED.format(1, 1, 1, 4)} trainer.num_nodes=1,"),
        (TORCHRUN, ["trainer.devices=auto", "trainer.accelerator=cpu"], f"torchrun {REFUSED.format('auto', 1, 1, 2)}"),
        (TORCHRUN, ["trainer.devices=[0,3]"], f"torchrun {REFUSED.format('[0,3]', 1, 2, 2)}"),
        (TORCHRUN, ["trainer.devices=[0,3]", "trainer.num_nodes=2"], None),
        (SRUN, ["trainer.devices=2", "trainer.num_nodes=2"], None),
        (SRUN | {"SLURM_JOB_NAME": "bash"}, [], None),  # a shell inside an allocation
        (
            TORCHRUN,
            ["mode=predict", "ckpt=x", "input=y"],
            "mode=predict needs one process, but torchrun has started 4.",
        ),
        (SRUN, ["mode=predict", "ckpt=x", "input=y"], None),
        ({}, ["trainer.devices=2"], None),
        ({}, ["trainer.num_nodes=2"], "trainer.num_nodes=2: start the processes of all machines with torchrun or srun"),
        (
            {},
            ["mode=crossval", "data.folds=3", "trainer.num_nodes=2"],
            "trainer.num_nodes=2: start the processes of all",
        ),
        (SRUN | {"SLURM_JOB_NAME": "bash"}, ["trainer.num_nodes=2"], "trainer.num_nodes=2: start the processes of all"),
    ],
)
def test_e11_the_number_of_processes_is_that_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], overrides: list[str], refusal: str | None
) -> None:
    for name in (*TORCHRUN, *SRUN, *MPIRUN, *LAUNCHER_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = configured(*overrides)
    if refusal is None:
        return check_world_size(config)
    with pytest.raises(ConfigError) as raised:
        check_world_size(config)
    assert refusal in str(raised.value)
