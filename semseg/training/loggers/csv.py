"""The log of a run as CSV files, one row per step, which a resumed run continues."""

from __future__ import annotations

import contextlib
import csv
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_fabric.utilities.rank_zero import rank_zero_only
from PIL import Image
from pytorch_lightning.loggers import Logger

from semseg.errors import DataError
from semseg.reports.draw import Pixels
from semseg.storage.atomic import atomic_write, describe_write_error
from semseg.system.text import shorten_repr

MetricsRow = dict[str, float | str]
FIRST_COLUMNS = ("step", "epoch")
MEASURED = ("time/", "memory")  # prefixes of metrics that differ from run to run
FLUSH_SECONDS = 5.0


class CSVLog(Logger):
    """Writes `<folder>/metrics.csv`, `<folder>/speed.csv` and pictures in `<folder>/../panels`.

    Reproducible metrics are in metrics.csv, which is identical in every repetition of a run; times and memory are in
    speed.csv. Both files are complete at any moment, and empty cells mean "not measured".

    Lightning's CSVLogger starts a new file for every resumed run, or deletes the old one; here the rows of steps
    that are repeated are dropped (`drop_from`), so that every step is listed once.

    Args:
        folder: created if missing; files in it are read first.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.metrics, self.speed = RowFile(self.folder / "metrics.csv"), RowFile(self.folder / "speed.csv")
        self._saved_at = float("-inf")

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> int:
        return 0

    @property
    def log_dir(self) -> str:
        return str(self.folder)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml in the run folder holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add `metrics` to the row of `step`."""
        measured = {name: value for name, value in metrics.items() if name.startswith(MEASURED)}
        self.metrics.add(int(step or 0), {name: metrics[name] for name in metrics if name not in measured})
        self.speed.add(int(step or 0), measured)
        if time.monotonic() - self._saved_at >= FLUSH_SECONDS:
            self.save()

    @rank_zero_only
    def log_picture(self, name: str, pixels: Pixels, step: int) -> None:
        """Write a picture (H, W, 3) as `panels/<name>/<step>.png` in the run folder."""
        path = self.folder.parent / "panels" / name / f"{step:08d}.png"
        try:
            with atomic_write(path) as temporary:
                Image.fromarray(pixels).save(temporary, "png")
        except OSError as error:
            message = describe_write_error(error, path.parent)
            if message is None:
                raise
            warnings.warn(message, stacklevel=1)  # a missing picture must not end a run

    @rank_zero_only
    def drop_from(self, step: int, epoch: int) -> None:
        """Drop the rows of `step` and of all later ones, of which a run repeats those of `epoch` and of later ones.

        If earlier epochs are among them, because an epoch has fewer steps now, the files are kept under another name.
        """
        drops_finished_epochs = self.metrics.has_earlier_epochs(step, epoch)
        for file in (self.metrics, self.speed):
            if drops_finished_epochs:
                kept = file.keep_copy(f"until_epoch_{epoch}")
                print(f"{file.path}: rows of finished epochs have the numbers of steps to come; kept as {kept.name}")
            file.drop_from(step)

    @rank_zero_only
    def drop_columns(self, step: int, prefix: str) -> None:
        """Drop the values of `step` whose names start with `prefix`."""
        self.metrics.drop_columns(step, prefix)

    @rank_zero_only
    def save(self) -> None:
        """Write both files if they can be written; otherwise the next checkpoint, or the end of the run, reports it."""
        with contextlib.suppress(OSError):
            self.write()

    @rank_zero_only
    def write(self) -> None:
        """Write both files.

        Raises:
            OSError: if one cannot be written; it stays as it was, and its rows are kept for the next time.
        """
        self._saved_at = time.monotonic()
        self.metrics.save()
        self.speed.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write both files; what cannot be written is a warning, because the run itself is complete."""
        try:
            self.write()
        except OSError as error:
            message = describe_write_error(error, self.folder)
            if message is None:
                raise
            warnings.warn(message, stacklevel=1)


class RowFile:
    """A CSV file with one row for each step, in memory until it is saved."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._rows: dict[int, MetricsRow] = {int(row["step"]): row for row in read_rows(path)}
        except (KeyError, TypeError, ValueError, csv.Error) as error:  # ValueError also for bytes that are not UTF-8
            raise DataError(
                f"{path}: this log is damaged ({type(error).__name__}: {shorten_repr(str(error))}). "
                "Fix it, or move it away: the run then continues without its old rows."
            ) from None
        self._has_changed = False

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Put `values` into the row of `step`; nothing if there are none."""
        if not values:
            return
        row = self._rows.setdefault(step, {"step": step})
        row.update({name: to_python_number(value) for name, value in values.items()})
        self._has_changed = True

    def has_earlier_epochs(self, step: int, epoch: int) -> bool:
        """Whether rows of `step` and later ones are of epochs before `epoch`."""
        return any(number >= step and float(row.get("epoch", epoch)) < epoch for number, row in self._rows.items())

    def keep_copy(self, name: str) -> Path:
        """Copy the file as it is to another one beside it."""
        kept = self.path.with_name(f"{self.path.stem}_{name}{self.path.suffix}")
        if self.path.is_file():
            with atomic_write(kept) as temporary:
                shutil.copyfile(self.path, temporary)
        return kept

    def drop_from(self, step: int) -> None:
        self._rows = {number: row for number, row in self._rows.items() if number < step}
        self._has_changed = True

    def drop_columns(self, step: int, prefix: str) -> None:
        row = self._rows.get(step, {})
        for name in [name for name in row if name.startswith(prefix)]:
            del row[name]
            self._has_changed = True

    def save(self) -> None:
        """Write the file atomically, if anything has changed."""
        if not self._has_changed:
            return
        names = {name: None for row in self._rows.values() for name in row}
        first = [name for name in FIRST_COLUMNS if name in names or name == "step"]
        columns = [*first, *sorted(name for name in names if name not in FIRST_COLUMNS)]
        with atomic_write(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self._rows[step] for step in sorted(self._rows))
        self._has_changed = False


def to_python_number(value: Any) -> float:
    """A Python number from any kind of scalar."""
    return value.item() if hasattr(value, "item") else value


def read_rows(path: Path) -> list[MetricsRow]:
    """The rows of a log as they were written, without empty cells; none if there is no file.

    Raises:
        ValueError, csv.Error: if the file is not such a table.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames is not None and "step" not in rows.fieldnames:
            raise ValueError("it has no column named step")
        return [{name: value for name, value in row.items() if value != ""} for row in rows]
