"""Where runs lie and what they hold: checkpoints, evaluations and predictions in the folder of their run. No torch.

runs/<time>_train/checkpoints/   eval/   eval-2/   predict/   ...
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from semseg.config.overrides import RECORD_FOLDER
from semseg.errors import CheckpointError, ConfigError, find_nearest
from semseg.storage.commands import entry_command

CHECKPOINT_FOLDER = "checkpoints"  # inside a run folder
CHECKPOINT_SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors")
METRICS_FILE = "metrics.json"  # of an evaluation
AVERAGE_FILE = "average.ckpt"  # of mode=average
FOLDS_FILE = "folds.json"  # of mode=crossval: the images of every fold
# What the modes write into a run folder itself, without the outputs of a prediction.
RESULT_NAMES = (
    "config.yaml", "model.txt", "result.json", "report.html", "automatic.json",
    METRICS_FILE, "per_class.csv", "per_image.csv", "per_image.npz", "confusion.npz", "precision_recall.csv",
    "label_errors.csv", "class_maps.zip", "panels",
    "check.json", "check.html", "compare.json", "compare.csv", "compare.html", "average.json", AVERAGE_FILE,
    "crossval.json", "crossval.csv", "crossval.html", "folds.json",
)  # fmt: skip


def expand_path(path: object) -> Path:
    """A path of the configuration, whose ~ is the home directory also where no shell has seen it: in a recipe."""
    return Path(os.path.expanduser(str(path)))  # noqa: PTH111 - Path raises an error for unknown users


def is_of_run(folder: Path) -> bool:
    """Whether a command of ours has written into a folder, or the training whose results are below its run."""
    return any((place / RECORD_FOLDER).is_dir() for place in (folder, folder.parent))


def find_foreign_file(folder: Path) -> Path | None:
    """The first file or folder that has the name of a result in a folder that no command of ours has written."""
    if is_of_run(folder) or (folder / CHECKPOINT_FOLDER).exists():  # or a copy of a run without its hidden files
        return None
    return next((folder / name for name in RESULT_NAMES if os.path.lexists(folder / name)), None)


# ---- checkpoints


def find_checkpoint(spec: str, runs_dir: Path, prefer: tuple[str, str] = ("best", "last"), key: str = "ckpt") -> Path:
    """The file that `ckpt=`, or another `key`, names: a file, a run folder, or last / best of the newest run.

    In a run folder it is the first checkpoint of `prefer` that exists.

    Raises:
        CheckpointError: if there is none; it lists the files that exist.
    """
    path = Path(spec).expanduser()
    if spec in ("last", "best"):
        found = find_newest_file(runs_dir, f"*/{CHECKPOINT_FOLDER}/{spec}.ckpt")
        if found is None:
            raise CheckpointError(
                f"{key}={spec}: no {spec}.ckpt in any run below {runs_dir.resolve()}{describe_folder(runs_dir)}. "
                f"Give a file or a run folder, or train first: {entry_command()}."
            )
        return found
    if os.path.isdir(path):  # noqa: PTH112 - Path raises an error for a name that is too long
        found = find_in_run(path, prefer)
        if found is not None:
            return found
        raise CheckpointError(f"{key}={spec}: no best.ckpt or last.ckpt in this folder{describe_folder(path)}.")
    if not os.path.isfile(path):  # noqa: PTH113
        nearest = find_nearest(path.name, list_networks(path.parent))
        hint = f". Did you mean {key}={Path(spec).with_name(nearest)}?" if nearest else ""
        raise CheckpointError(f"{key}={spec}: there is no such file{hint or f'{describe_folder(path.parent)}.'}")
    return path


def find_in_run(folder: Path, prefer: tuple[str, ...] = ("best", "last")) -> Path | None:
    """The first checkpoint of `prefer` in a run folder, or None."""
    files = (place / f"{name}.ckpt" for name in prefer for place in (folder / CHECKPOINT_FOLDER, folder))
    return next((file for file in files if file.is_file()), None)


def list_networks(folder: Path) -> list[str]:
    """The names of the run folders with a checkpoint, and of the checkpoints, in a folder."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return [path.name for path in paths if path.suffix in CHECKPOINT_SUFFIXES or find_in_run(path)]


def find_newest_file(folder: Path, pattern: str) -> Path | None:
    """The most recently written file that matches, or None."""
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def describe_folder(folder: Path) -> str:
    """` (there: a, b, ...)` for an error message about a folder."""
    if not folder.is_dir():
        return f" ({folder} does not exist)"
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return f" (there: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''})" if names else " (the folder is empty)"


def find_run_folder(spec: object, runs_dir: Path) -> Path | None:
    """The folder of the run whose checkpoint `ckpt=spec` names; None for a network of no run, and several."""
    if not spec or not isinstance(spec, str):
        return None
    try:
        path = find_checkpoint(spec, runs_dir)
    except (CheckpointError, OSError):  # a published network, or a mistake, which is reported when it is read
        return None
    folder = path.absolute().parent
    return folder.parent if folder.name == CHECKPOINT_FOLDER else None


# ---- folders below a run


def list_result_folders(run_dir: Path, mode: str) -> list[Path]:
    """The folders of a mode's results below a run: eval, eval-2, ..."""
    folders = [run_dir / mode, *run_dir.glob(f"{mode}-*")]
    return [folder for folder in folders if folder.is_dir()]


def find_newest_evaluation(run_dir: Path) -> Path | None:
    """The newest folder with the scores of a network below its run; None if it was not evaluated."""
    files = [folder / METRICS_FILE for folder in list_result_folders(run_dir, "eval")]
    files = [file for file in files if file.is_file()]
    return max(files, key=lambda file: file.stat().st_mtime_ns).parent if files else None


def choose_follow_up_folder(run_dir: Path, mode: str) -> Path:
    """The folder of a mode that training runs at its end: the first that no command of its own has filled.

    A run that continues replaces the results of its follow-ups, and leaves those of other commands.
    """
    for number in itertools.count(1):
        folder = run_dir / (mode if number == 1 else f"{mode}-{number}")
        if not (folder / RECORD_FOLDER).exists():
            return folder
    raise AssertionError("unreachable: the count has no end")


# ---- new folders


def claim_folder(folder: Path, mark: str = "_") -> Path:
    """Create `folder`, or <folder>_2, <folder>_3, ... if it exists already, such as that of a run of the same second.

    Args:
        mark: stands before the number.

    Raises:
        ConfigError: if it cannot be created.
    """
    try:
        for number in itertools.count(1):
            candidate = folder if number == 1 else folder.with_name(f"{folder.name}{mark}{number}")
            with contextlib.suppress(FileExistsError):
                candidate.mkdir(parents=True)  # succeeds in one process only, however many try
                return candidate
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot create this run folder ({error.strerror}). Set run_dir or runs_dir."
        ) from None
    raise AssertionError("unreachable: the count has no end")


def require_folder_path(folder: Path, keys: str = "run_dir or runs_dir") -> None:
    """Check that a folder can be where this path says.

    Args:
        keys: that set it.

    Raises:
        ConfigError: if it, or what it lies below, is a file or a broken link.
    """
    existing = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), None)
    if existing is not None and not existing.is_dir():
        raise ConfigError(f"{folder}: cannot be created, because {existing} is no folder. Set {keys}.")


def list_missing_folders(folder: Path) -> list[Path]:
    """`folder` and the folders above it that do not exist, the innermost first."""
    return list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))


def remove_unused_folders(folders: list[Path]) -> None:
    """Remove folders that a command has created, the innermost first, unless it has written more than its record."""
    for number, folder in enumerate(folders):
        with contextlib.suppress(OSError):
            if number == 0 and not any(_iterate_results(folder)):
                shutil.rmtree(folder)
            else:
                folder.rmdir()  # only if it is empty


def _iterate_results(folder: Path) -> Iterator[Path]:
    """The files below a folder that are not empty, without the record of its command line."""
    for path, folders, files in os.walk(folder):
        if Path(path) == folder and RECORD_FOLDER in folders:
            folders.remove(RECORD_FOLDER)
        yield from (Path(path, file) for file in files if Path(path, file).stat().st_size)
