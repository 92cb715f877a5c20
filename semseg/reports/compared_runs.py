"""Read the files of finished evaluations, to be compared. No torch."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from semseg.config.schema import MIOU_RULES
from semseg.errors import ConfigError, DataError, describe_reason
from semseg.evaluation.image_files import COUNTS_FILE, ImageCounts, read_image_counts
from semseg.storage.commands import entry_command
from semseg.storage.run_folders import CHECKPOINT_FOLDER, FOLDS_FILE, METRICS_FILE, find_newest_evaluation
from semseg.storage.run_results import JOB_FILE, rank_jobs, read_job
from semseg.system.text import escape_unprintable, shorten_repr

HEADLINE_NAMES = {
    "mean_iou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "overall_score": "overall score",
    "mean_accuracy": "mean accuracy",
    "frequency_weighted_iou": "frequency-weighted IoU",
    "mean_dice": "mean Dice",
}
EVALUATION_FOLDER = re.compile(r"eval(-\d+)?")  # in the folder of a run


class ComparedRun(NamedTuple):
    """The files of one evaluation."""

    name: str  # distinct from the names of the other runs
    folder: Path  # holds metrics.json
    metrics: dict[str, Any]  # metrics.json
    images: dict[str, float | None] | None  # file -> mean IoU, 0..1; None if there is no per_image.csv
    counts: ImageCounts | None = None  # None if an earlier version evaluated

    @property
    def checkpoint(self) -> str | None:
        """The file of the network; None if it is not known."""
        checkpoint = self.metrics.get("checkpoint")
        return checkpoint if isinstance(checkpoint, str) else None

    @property
    def rule(self) -> str:
        """How the mean IoU treats absent classes."""
        rule = self.metrics.get("mean_iou_rule")
        return rule if rule in MIOU_RULES else "present"


def read_evaluations(folders: Sequence[str]) -> tuple[ComparedRun, ...]:
    """Read the evaluations in `folders`, each an evaluation folder or a run folder with eval/ below it.

    Raises:
        ConfigError: if a folder holds no evaluation, or two folders are the same evaluation.
        DataError: if a file of an evaluation cannot be read.
    """
    paths = [find_evaluation_folder(folder) for folder in folders]
    for index, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:index]]:
            raise ConfigError(f"runs: {folders[index]} is listed twice. List each evaluation once.")
    runs = [name_giving_folder(path) for path in paths]
    names = choose_names(runs) if len(set(runs)) == len(runs) else choose_distinct_names(paths)
    return tuple(read_evaluation(name, path) for name, path in zip(names, paths, strict=True))


def read_evaluation(name: str, folder: Path) -> ComparedRun:
    """Read the evaluation in `folder`.

    Raises:
        DataError: if one of its files cannot be read.
    """
    metrics = read_metrics(folder / METRICS_FILE)
    counts = read_image_counts(folder / COUNTS_FILE, len(metrics["classes"]))
    return ComparedRun(name, folder, metrics, read_image_scores(folder / "per_image.csv"), counts)


def name_giving_folder(folder: Path) -> Path:
    """Return the folder whose name distinguishes an evaluation: of <run folder>/eval, that of the run."""
    folder = folder.absolute()
    return folder.parent if EVALUATION_FOLDER.fullmatch(folder.name) and folder.parent.name else folder


def find_evaluation_folder(folder: str) -> Path:
    """Return the folder that holds the metrics.json of an evaluation; of a run, that of its newest one.

    Raises:
        ConfigError: if there is none.
    """
    path = Path(folder).expanduser()
    found = path if (path / METRICS_FILE).is_file() else find_newest_evaluation(path)
    if found is None and not path.exists():
        raise ConfigError(f"runs: {folder}: there is no such folder.")
    if found is None and path.is_file() and path.name == METRICS_FILE:
        raise ConfigError(f"runs: {folder} is a file. Give its folder: {path.parent}.")
    if found is None and (jobs := sorted(file.parent for file in path.glob(f"*/{JOB_FILE}"))):
        kind = "cross-validation, and its folds" if (path / FOLDS_FILE).exists() else "sweep, and its jobs"
        raise ConfigError(
            f"runs: {folder} is a {kind} are runs. Give several of the {len(jobs)} folders below it, such as {jobs[0]}."
        )
    if found is None:
        network = path.parent if (path.parent / CHECKPOINT_FOLDER).is_dir() else folder
        raise ConfigError(
            f"runs: {folder} holds no evaluation (neither {METRICS_FILE} nor eval/{METRICS_FILE}). "
            f"Evaluate it first: {entry_command()} mode=eval {shlex.quote(f'ckpt={network}')}"
        )
    return found


def choose_names(folders: Sequence[Path]) -> list[str]:
    """Name runs by their folders; jobs of a sweep, whose folders are hashes, by the overrides that differ."""
    jobs = [job for folder in folders if (job := read_job(folder)) is not None]
    if len(jobs) == len(folders):
        ranking = rank_jobs(jobs)
        names = [" ".join(map("=".join, ranking.differing_settings_of(job).items())) for job in jobs]
        if all(names) and len(set(names)) == len(names):
            return [escape_unprintable(name) for name in names]
    return choose_distinct_names(folders)


def choose_distinct_names(folders: Sequence[Path]) -> list[str]:
    """Shorten the paths to the last parts that are needed to distinguish them.

    >>> choose_distinct_names([Path("one/a"), Path("two/a")])
    ['one/a', 'two/a']
    """
    parts = [folder.absolute().parts for folder in folders]
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def read_metrics(path: Path) -> dict[str, Any]:
    """Read and check metrics.json of an evaluation.

    Raises:
        DataError: if the file is not the metrics.json of an evaluation.
    """
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as the scores of an evaluation ({describe_reason(error)}).") from error
    classes = metrics.get("classes") if isinstance(metrics, dict) else None
    if not isinstance(classes, list) or not classes:
        raise DataError(f"{path}: holds no class scores. Only files that mode=eval wrote can be compared.")
    for entry in classes:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not is_score(entry.get("iou")):
            raise DataError(f"{path}: the scores of a class are damaged: {shorten_repr(entry)}. Evaluate again.")
    for key in HEADLINE_NAMES:
        if not is_score(metrics.get(key)):
            raise DataError(f"{path}: {key} is damaged: {shorten_repr(metrics[key])}. Evaluate again.")
    return metrics


def is_score(value: object) -> bool:
    """Whether `value` is a fraction from 0 to 1, or None (nothing was scored)."""
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)  # pyright: ignore[reportOperatorIssue]


def read_image_scores(path: Path) -> dict[str, float | None] | None:
    """Read the mean IoU of each image; None if there is no such table.

    Raises:
        DataError: if a column is missing or holds anything but numbers.
    """
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = {row["file"]: float(row["mean_iou"]) if row["mean_iou"] else None for row in csv.DictReader(file)}
        if not all(isinstance(file, str) and is_score(score) for file, score in rows.items()):
            raise ValueError("a mean IoU must be from 0 to 1")
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: is not the per-image table of an evaluation ({error!r}). Evaluate again.") from error
    return rows
