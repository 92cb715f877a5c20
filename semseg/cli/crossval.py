"""mode=crossval: train once for every fold, each in a process of its own, and report mean and deviation. No torch.

The folds are jobs as those of a sweep: a finished one is skipped when the same command runs again in the same folder,
and the others resume from their checkpoints.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from semseg.cli.sweep import run_job
from semseg.config.override_keys import override_key
from semseg.config.overrides import quote_value, record_overrides
from semseg.config.schema import Config
from semseg.data.folds import assign_folds, name_group
from semseg.data.sources import DataSource
from semseg.reports.crossval_page import Fold, report_folds
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import entry_script, format_command, relative_to_cwd
from semseg.storage.run_folders import METRICS_FILE
from semseg.storage.run_results import Job, find_finished_job
from semseg.system.process import announce_sweep
from semseg.system.text import format_quantity

OWN_KEYS = ("mode", "run_dir", "data.fold", "after_training")  # that the jobs get values of their own for
SCORES_FOLDER = "eval"  # of a job: the evaluation of its best network on its fold


def run_folds(config: Config, overrides: list[str], run_dir: Path) -> int:
    """Run the jobs of all folds that are not finished, and report all that are; returns the exit code.

    Args:
        run_dir: the folder of this cross-validation.

    Raises:
        SemsegError: if the data set is missing or cannot be cut into the folds, before anything is trained.
    """
    folds = config.data.folds
    assert folds is not None, "config/uses.py asks for it"
    describe_folds(config, folds)
    for path, text in record_overrides(overrides).items():
        with atomic_write(run_dir / ".hydra" / path, durable=False) as temporary:
            temporary.write_text(text, encoding="utf-8")
    kept = [word for word in overrides if override_key(word) not in OWN_KEYS]
    after = list(dict.fromkeys(["eval", *config.after_training]))
    command = format_command([*kept, "mode=crossval", f"run_dir={relative_to_cwd(run_dir)}"])
    announce_sweep()
    jobs: list[Job] = []
    stop_code = 0
    for fold in range(folds):
        folder = run_dir / f"fold_{fold}"
        words = [*kept, "mode=train", f"data.fold={fold}", f"after_training=[{','.join(after)}]"]
        job = find_finished_job(folder, words, scores=True)
        where = "finished earlier" if job else relative_to_cwd(folder)
        print(f"fold {fold} ({fold + 1} of {folds}): {where}", flush=True)
        if job is None:
            call = [sys.executable, str(entry_script()), *words]
            call += [f"{key}={quote_value(folder)}" for key in ("hydra.run.dir", "run_dir")]
            try:
                job = run_job(call, words, folder, scores=True)
            except SystemExit as request:  # after a signal, which was forwarded to the job
                stop_code = int(request.code or 0)
                break
        jobs.append(job)
    finished = [
        Fold(number, job.folder / SCORES_FOLDER / METRICS_FILE) for number, job in enumerate(jobs) if job.is_finished
    ]
    report_folds(run_dir, finished, folds, command)
    for number, job in enumerate(jobs):
        if not job.is_finished:
            print(f"fold {number}: {job.status}{f': {job.reason}' if job.reason else ''}")
    print(f"to continue: {command}" if len(finished) < folds else f"networks: {relative_to_cwd(run_dir)}/fold_*")
    return stop_code or int(len(finished) < folds)


def describe_folds(config: Config, folds: int) -> None:
    """Read the data set once, and print how large the folds are, without data.limit.

    Raises:
        SemsegError: if it is missing, or cannot be cut into so many folds.
    """
    source = DataSource(replace(config.data, fold=0, mix=None, limit=None))
    records = [*source.records("train"), *source.records("val")]
    assigned = assign_folds(records, source.split_root, folds, config.data.group)
    groups = {name_group(record.image, source.split_root, config.data.group) for record in records}
    sizes = [assigned.count(fold) for fold in range(folds)]
    print(
        f"{format_quantity(len(records), 'image')} in {format_quantity(len(groups), 'group')}, {folds} folds of "
        f"{', '.join(map(str, sizes))} images",
        flush=True,
    )
