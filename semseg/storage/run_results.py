"""Results of runs for a sweep: the result and the state of each job, and the ranking of all. No torch.

However the jobs are started (one after the other, in parallel, on a cluster), all information about them is in their
folders. So a sweep that is started again finds its finished jobs.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from semseg.config.override_keys import override_key, split_override
from semseg.config.overrides import RECORD_FOLDER
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import shorten_overrides
from semseg.storage.run_folders import METRICS_FILE
from semseg.system.text import escape_unprintable

RESULT_FILE = "result.json"  # written when a run completes: the score and its name
JOB_FILE = "job.json"  # the overrides and the state of a job
STARTED, FINISHED, FAILED, STOPPED = "started", "finished", "failed", "stopped"


class RunResult(NamedTuple):
    """The result of a run."""

    score: float | None = None  # None: nothing was scored
    monitor: str = "score"  # name of the score
    mode: str = "max"  # which is better: max or min
    follow_ups: tuple[tuple[str, str], ...] = ()  # mode and folder of what followed training, by after_training


class Job(NamedTuple):
    """One job of a sweep."""

    folder: Path
    overrides: tuple[str, ...]
    status: str = STARTED
    reason: str = ""  # why it failed, or is not ranked
    seconds: float = 0.0  # all attempts together
    result: RunResult = RunResult()

    @property
    def is_finished(self) -> bool:
        return self.status == FINISHED


def job_overrides(overrides: Iterable[str]) -> list[str]:
    """The overrides of a job without those that only concern its sweep.

    >>> job_overrides(["hparams_search=grid", "optim.lr=0.1"])
    ['optim.lr=0.1']
    """
    return [word for word in overrides if override_key(word) != "hparams_search"]


def job_name(overrides: Iterable[str]) -> str:
    """Name of a job's folder: the same for the same overrides in any order and any sweep.

    >>> job_name(["seed=1", "optim.lr=0.1"]) == job_name(["optim.lr=0.1", "hparams_search=grid", "seed=1"])
    True
    """
    return hashlib.sha256("\n".join(sorted(job_overrides(overrides))).encode()).hexdigest()[:12]


# For hydra.sweep.subdir. Registered here because a job may run in a process that imports only its function.
OmegaConf.register_new_resolver("job_name", job_name, replace=True)


def write_result(run_dir: Path, result: RunResult) -> None:
    """Write the result of a run to its folder."""
    content = result._asdict() | {"follow_ups": dict(result.follow_ups)}
    if not result.follow_ups:
        del content["follow_ups"]
    with atomic_write(run_dir / RESULT_FILE) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_result(run_dir: Path) -> RunResult | None:
    """The result of a run; None if it has none or it cannot be read."""
    content = _read_json_object(run_dir / RESULT_FILE)
    if content is None:
        return None
    score = content.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        score = None
    mode = "min" if content.get("mode") == "min" else "max"
    found = content.get("follow_ups")
    if not isinstance(found, dict):
        found = {"eval": "eval"} if has_earlier_evaluation(run_dir) else {}
    follow_ups = tuple((str(key), str(name)) for key, name in found.items())
    return RunResult(score, escape_unprintable(content.get("monitor", "score")), mode, follow_ups)


def has_earlier_evaluation(run_dir: Path) -> bool:
    """Whether an evaluation followed the training of a run of an earlier version, whose result does not say so."""
    folder = run_dir / "eval"
    scores, result = folder / METRICS_FILE, run_dir / RESULT_FILE
    is_ours = scores.is_file() and not (folder / RECORD_FOLDER).exists()  # that of a command has a record
    return is_ours and scores.stat().st_mtime_ns >= result.stat().st_mtime_ns


def read_job(folder: Path) -> Job | None:
    """The job of a folder; None if it has none or it cannot be read."""
    content = _read_json_object(folder / JOB_FILE)
    if content is None:
        return None
    try:
        overrides, seconds = tuple(map(str, content["overrides"])), float(content["seconds"])
        status, reason = str(content["status"]), str(content["reason"])
    except (KeyError, TypeError, ValueError):
        return None
    result = read_result(folder) if status == FINISHED else None
    return Job(folder, overrides, status, reason, seconds, result or RunResult())


def write_job(job: Job) -> None:
    """Write a job to its folder; its result is in a separate file."""
    content = {"overrides": job.overrides, "status": job.status, "reason": job.reason, "seconds": job.seconds}
    with atomic_write(job.folder / JOB_FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_jobs(sweep_dir: Path) -> list[Job]:
    """All jobs of a sweep, sorted by their overrides."""
    jobs = (read_job(path.parent) for path in sweep_dir.glob(f"*/{JOB_FILE}"))
    return sorted((job for job in jobs if job is not None), key=lambda job: job.overrides)


def find_finished_job(run_dir: Path, overrides: Sequence[str], *, scores: bool) -> Job | None:
    """The job of `run_dir` if it finished with exactly these overrides, and with a result if it `scores`."""
    job = read_job(run_dir)
    if job is None or not job.is_finished or sorted(job.overrides) != sorted(overrides):
        return None
    return None if scores and read_result(run_dir) is None else job


def find_scores(run_dir: Path) -> Path | None:
    """The scores of the evaluation that followed the training of a run (after_training); None if there are none.

    An evaluation by a command of its own is in another folder below the run.
    """
    folder = dict((read_result(run_dir) or RunResult()).follow_ups).get("eval")
    path = None if folder is None else run_dir / folder / METRICS_FILE
    return path if path is not None and path.is_file() else None


class Ranking(NamedTuple):
    """The jobs of a sweep in order."""

    jobs: tuple[Job, ...]  # those with a score first, the best at the top
    varying: tuple[str, ...]  # keys that do not have the same value in all jobs
    monitor: str  # name of the score
    mode: str  # which score is better: max or min

    def values_of(self, job: Job) -> list[str]:
        """The value of `job` for each of the varying keys; empty if it does not set a key."""
        given = parse_settings(job)
        return [given.get(key, "") for key in self.varying]

    def differing_settings_of(self, job: Job) -> dict[str, str]:
        """The varying keys that `job` sets, with their values."""
        given = parse_settings(job)
        return {key: given[key] for key in self.varying if key in given}

    @property
    def headline(self) -> str:
        """The number of jobs, and of those with each status."""
        counts = Counter(job.status for job in self.jobs)
        states = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
        return f"{len(self.jobs)} job{'' if len(self.jobs) == 1 else 's'}: {states or 'none was started'}"


def rank_jobs(jobs: Sequence[Job]) -> Ranking:
    """Sort jobs by their score, in the direction that their results name.

    Jobs with another score than the first one (checkpoint.monitor) cannot be compared with it, and come behind.
    """
    result = next((job.result for job in jobs if job.result.score is not None), RunResult())
    scored, others = [], []
    for job in jobs:
        has_other = (job.result.monitor, job.result.mode) != (result.monitor, result.mode)
        if job.result.score is None:
            others.append(job)
        elif has_other:
            reason = f"{job.result.monitor} {job.result.score:.4f}, {job.result.mode} is best, is not compared"
            others.append(job._replace(result=RunResult(), reason=reason))
        else:
            scored.append(job)
    best_first = sorted(scored, key=lambda job: job.result.score or 0.0, reverse=result.mode == "max")
    return Ranking((*best_first, *others), varying_keys(jobs), result.monitor, result.mode)


def parse_settings(job: Job) -> dict[str, str]:
    """The overrides of a job as keys and values.

    >>> parse_settings(Job(Path("x"), ("+a.b=1", "model/encoder='resnet18'")))
    {'a.b': '1', 'model/encoder': 'resnet18'}
    """
    pairs = map(split_override, shorten_overrides(job.overrides))
    return {key: value.strip("\"'") for key, value in pairs}


def varying_keys(jobs: Sequence[Job]) -> tuple[str, ...]:
    """Keys that do not have the same value in all jobs."""
    settings = [parse_settings(job) for job in jobs]
    keys = dict.fromkeys(key for values in settings for key in values)
    return tuple(key for key in keys if len({values.get(key) for values in settings}) > 1)


def _read_json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is none. A damaged file is reported by a warning."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        return content
    warnings.warn(f"{path}: cannot be read, so it counts as missing", stacklevel=1)
    return None
