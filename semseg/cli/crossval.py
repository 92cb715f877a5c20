"""mode=crossval: train once for every fold, each in a process of its own, and report mean and deviation. No torch.

The folds are jobs as those of a sweep: a finished one is skipped when the same command runs again in the same folder,
and the others resume from their checkpoints.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from semseg.cli.sweep import run_job
from semseg.config.override_keys import override_key
from semseg.config.overrides import quote_value, record_overrides
from semseg.config.schema import Config
from semseg.data.folds import assign_folds, name_group
from semseg.data.sources import DataSource
from semseg.errors import ConfigError
from semseg.reports.crossval_page import Fold, report_folds
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import entry_script, format_command, relative_to_cwd
from semseg.storage.run_folders import FOLDS_FILE
from semseg.storage.run_results import RESULT_FILE, Job, RunResult, find_finished_job, find_scores, write_result
from semseg.system.process import announce_sweep
from semseg.system.text import format_quantity

OWN_KEYS = ("mode", "run_dir", "data.fold", "after_training")  # that the jobs get values of their own for


def run_folds(config: Config, overrides: list[str], run_dir: Path) -> int:
    """Run the jobs of all folds that are not finished, and report all that are; returns the exit code.

    Args:
        run_dir: the folder of this cross-validation.

    Raises:
        SemsegError: if the data set is missing, cannot be cut into the folds, or has other images than when this
            cross-validation began, before anything is trained.
    """
    folds = config.data.folds
    assert folds is not None, "config/uses.py asks for it"
    write_folds(run_dir, assign_images(config, folds))
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
        if job is not None and find_scores(folder) is None:
            job = None  # its evaluation was stopped or deleted, and is repeated without training
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
    scores = {number: find_scores(job.folder) for number, job in enumerate(jobs) if job.is_finished}
    finished = [Fold(number, path) for number, path in scores.items() if path is not None]
    mean_iou = report_folds(run_dir, finished, folds, command)
    if len(finished) == folds:
        write_result(run_dir, RunResult(mean_iou, "mean IoU"))  # for a sweep
    else:
        (run_dir / RESULT_FILE).unlink(missing_ok=True)
    for number, job in enumerate(jobs):
        if number not in scores:
            print(f"fold {number}: {job.status}{f': {job.reason}' if job.reason else ''}")
        elif scores[number] is None:
            print(f"fold {number}: has no evaluation")
    print(f"to continue: {command}" if len(finished) < folds else f"networks: {relative_to_cwd(run_dir)}/fold_*")
    return stop_code or int(len(finished) < folds)


def assign_images(config: Config, folds: int) -> list[list[str]]:
    """Read the data set once, and print how large the folds are, without data.limit.

    Returns:
        the paths below data.root of the images of each fold, sorted.

    Raises:
        SemsegError: if the data set is missing, or cannot be cut into so many folds.
    """
    source = DataSource(replace(config.data, fold=0, mix=None, limit=None))
    records = [*source.records("train"), *source.records("val")]
    assigned = assign_folds(records, source.split_root, folds, config.data.group)
    groups = {name_group(record.image, source.split_root, config.data.group) for record in records}
    images: list[list[str]] = [[] for _ in range(folds)]
    for record, fold in zip(records, assigned, strict=True):
        images[fold].append(Path(os.path.relpath(record.image, source.split_root)).as_posix())
    print(
        f"{format_quantity(len(records), 'image')} in {format_quantity(len(groups), 'group')}, {folds} folds of "
        f"{', '.join(str(len(names)) for names in images)} images",
        flush=True,
    )
    return [sorted(names) for names in images]


def write_folds(run_dir: Path, images: list[list[str]]) -> None:
    """Write which images are in which fold, if no fold has been trained before.

    Raises:
        ConfigError: if one has, with other images in the folds: scores of both partitions have no common mean.
    """
    path = run_dir / FOLDS_FILE
    if path.exists() and any(run_dir.glob("fold_*")):
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            change = describe_change(before, images)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path}: cannot be read ({type(error).__name__}). Give another run_dir.") from None
        if before != images:
            raise ConfigError(
                f"run_dir={relative_to_cwd(run_dir)}: its folds were trained with {change} ({FOLDS_FILE} there lists "
                "the images of each). Give another run_dir."
            )
        return
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(images, indent=1) + "\n", encoding="utf-8")


def describe_change(before: list[list[str]], images: list[list[str]]) -> str:
    """What differs between the folds of earlier and of now, the former first."""
    if len(before) != len(images):
        return f"data.folds={len(before)}, and it is {len(images)} now"
    former, present = (set(itertools.chain(*folds)) for folds in (before, images))
    if former == present:
        return "the same images in other folds, because data.group has changed"
    example = min(former ^ present)
    return (
        f"other images: {len(former)} then, {len(present)} now, such as {example}, which was "
        f"{'among them and is missing' if example in former else 'not among them'}"
    )
