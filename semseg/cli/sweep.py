"""Run the jobs of a sweep, each in a process of its own, and summarise all of them at the end. No torch."""

from __future__ import annotations

import csv
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from semseg.cli.supervise import ProcessEnd, extract_error_message, run_isolated
from semseg.errors import STOPPED_CODES
from semseg.reports.sweep_page import format_duration, format_job_score, suggest_comparison, write_sweep_page
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import relative_to_cwd
from semseg.storage.run_results import (
    FAILED,
    FINISHED,
    STOPPED,
    Job,
    Ranking,
    RunResult,
    rank_jobs,
    read_job,
    read_jobs,
    read_result,
    write_job,
)
from semseg.system.process import get_stop_code
from semseg.system.text import escape_csv_cell, escape_lines

ERROR_FILE = "error.txt"  # in the folder of a job that raised an exception


def run_job(command: Sequence[str], overrides: Sequence[str], run_dir: Path, *, scores: bool) -> Job:
    """Run `command` as the job of `run_dir` and record its status.

    Args:
        command: what runs the job.
        overrides: the overrides of the job.
        scores: the job is finished once it has a result, not when the command succeeds.

    Raises:
        SystemExit: if this process was asked to stop, with the code for that signal, which was forwarded to the job.
    """
    previous = read_job(run_dir)
    seconds = previous.seconds if previous else 0.0
    job = Job(run_dir, tuple(overrides), seconds=seconds)
    write_job(job)
    start = time.monotonic()
    end = run_isolated(command, run_dir / ERROR_FILE)
    status, reason = classify_end(end, run_dir, scores=scores)
    job = job._replace(status=status, reason=reason, seconds=seconds + time.monotonic() - start)
    write_job(job)
    if end.signal is not None:
        raise SystemExit(get_stop_code(end.signal))
    result = read_result(run_dir) if job.is_finished else None
    return job._replace(result=result or RunResult())


def classify_end(end: ProcessEnd, run_dir: Path, *, scores: bool) -> tuple[str, str]:
    """The status of a job whose process has ended, and the reason of a failure in one line."""
    code = end.exit_code
    if code in STOPPED_CODES or (code and end.signal is not None):
        return STOPPED, ""
    if code < 0:
        return FAILED, f"killed by signal {-code} ({signal.Signals(-code).name})"
    if code:
        return FAILED, read_error(run_dir) or f"exit code {code}"
    # A job without a result was requeued by SLURM.
    return (STOPPED if scores and read_result(run_dir) is None else FINISHED), ""


def read_error(run_dir: Path) -> str:
    """The error that a job recorded, in one line; empty if there is none."""
    try:
        text = (run_dir / ERROR_FILE).read_text(encoding="utf-8")
    except OSError:
        return ""
    return " ".join(extract_error_message(text).split())


def report_sweep(sweep_dir: Path, command: str) -> int:
    """Print and write the table of a sweep, and print the command that continues it.

    Returns:
        The exit code: 0 if every job is finished, else 1.
    """
    ranking = rank_jobs(read_jobs(sweep_dir))
    console = Console()
    if ranking.jobs:
        write_sweep_csv(sweep_dir / "sweep.csv", ranking)
        write_sweep_page(sweep_dir / "sweep.html", ranking, command)
        console.print(render_sweep_table(ranking))
        folder = relative_to_cwd(sweep_dir)
        written = f"written to {folder}/sweep.csv, {folder}/sweep.html"
        console.print(written, soft_wrap=True, highlight=False, markup=False)
    lines = [ranking.headline, f"to continue: {command}"]
    if comparison := suggest_comparison(ranking):
        lines.append(f"to compare the two best: {comparison}")
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)
    return 0 if all(job.is_finished for job in ranking.jobs) else 1


def render_sweep_table(ranking: Ranking) -> Table:
    """A table of all jobs for the console."""
    table = Table(title=Text(f"sweep, by {ranking.monitor} ({ranking.mode} is best)"))
    for name in ("", *ranking.varying, ranking.monitor, "time", "status", "folder"):
        table.add_column(Text(name), overflow="fold")
    for position, job in enumerate(ranking.jobs, start=1):
        status = f"{job.status}: {job.reason}" if job.reason else job.status
        score, time_spent = format_job_score(job.result.score), format_duration(job.seconds)
        cells = [str(position), *ranking.values_of(job), score, time_spent, status, job.folder.name]
        table.add_row(*(Text(escape_lines(text)) for text in cells))
    return table


def write_sweep_csv(path: Path, ranking: Ranking) -> None:
    """Write all jobs, best first: place, folder, the keys that vary, the score, seconds, status and reason."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["place", "folder", *ranking.varying, ranking.monitor, "seconds", "status", "reason"])
        for position, job in enumerate(ranking.jobs, start=1):
            score = "" if job.result.score is None else job.result.score
            seconds = round(job.seconds, 1)
            values = [job.folder.name, *ranking.values_of(job), score, seconds, job.status, job.reason]
            writer.writerow(
                [position, *(escape_csv_cell(value) if isinstance(value, str) else value for value in values)]
            )
