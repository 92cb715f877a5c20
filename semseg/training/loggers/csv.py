"""The log of a run as CSV files, one row a step, that a resumed run goes on with."""

from __future__ import annotations

import contextlib
import csv
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

Row = dict[str, float | str]
FIRST_COLUMNS = ("step", "epoch")
MEASURED = ("time/", "memory")  # how names start whose values no second run would repeat
FLUSH_SECONDS = 5.0


class CSVLog(Logger):
    """Writes `<folder>/metrics.csv`, `<folder>/speed.csv` and pictures in `<folder>/../panels`.

    What the settings of a run decide is in metrics.csv, equal to the last byte in every repetition; times and memory
    are in speed.csv. Both files are whole at any moment, and empty cells mean "not measured".

    Lightning's CSVLogger starts a new file for every resumed run, or deletes the old one; here the rows of steps
    that are done again are forgotten (`forget_from`), so that every step is there once.

    Args:
        folder: made if it is not there; files in it are read first.
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
        """The run folder has the whole configuration in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add `metrics` to the row of `step`."""
        measured = {name: value for name, value in metrics.items() if name.startswith(MEASURED)}
        self.metrics.add(int(step or 0), {name: metrics[name] for name in metrics if name not in measured})
        self.speed.add(int(step or 0), measured)
        if time.monotonic() - self._saved_at >= FLUSH_SECONDS:
            with contextlib.suppress(OSError):  # the rows are kept; the next checkpoint, or the end, reports it
                self.save()

    @rank_zero_only
    def log_picture(self, name: str, pixels: Pixels, step: int) -> None:
        """Write a picture (H, W, 3) as `panels/<name>/<step>.png` in the run folder."""
        path = self.folder.parent / "panels" / name / f"{step:08d}.png"
        try:
            with atomic_write(path) as temporary:
                Image.fromarray(pixels).save(temporary, "png")
        except OSError as error:
            told = describe_write_error(error, path.parent)
            if told is None:
                raise
            warnings.warn(told, stacklevel=1)  # a picture is not worth a run

    def forget_from(self, step: int) -> None:
        """Drop the rows of `step` and of all later ones."""
        for file in (self.metrics, self.speed):
            file.forget_from(step)

    def forget_columns(self, step: int, prefix: str) -> None:
        """Drop the values of `step` whose names start with `prefix`."""
        self.metrics.forget_columns(step, prefix)

    @rank_zero_only
    def save(self) -> None:
        """Bring the files up to date.

        Raises:
            OSError: if one cannot be written; it is as it was then, and its rows are kept for the next time.
        """
        self._saved_at = time.monotonic()
        self.metrics.save()
        self.speed.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


class RowFile:
    """A CSV file with one row for each step, in memory until it is saved."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._rows: dict[int, Row] = {int(row["step"]): row for row in read_rows(path)}
        except (KeyError, TypeError, ValueError, csv.Error) as error:  # and bytes that are no text
            raise DataError(
                f"{path}: this log is damaged ({type(error).__name__}: {shorten_repr(str(error))}). "
                "Mend it, or move it away: the run goes on without its old rows."
            ) from None
        self._has_news = False

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Put `values` into the row of `step`; without any there is no row."""
        if not values:
            return
        row = self._rows.setdefault(step, {"step": step})
        row.update({name: number(value) for name, value in values.items()})
        self._has_news = True

    def forget_from(self, step: int) -> None:
        self._rows = {at: row for at, row in self._rows.items() if at < step}
        self._has_news = True

    def forget_columns(self, step: int, prefix: str) -> None:
        row = self._rows.get(step, {})
        for name in [name for name in row if name.startswith(prefix)]:
            del row[name]

    def save(self) -> None:
        """Write the file if there is anything new, whole or not at all."""
        if not self._has_news:
            return
        names = {name: None for row in self._rows.values() for name in row}
        first = [name for name in FIRST_COLUMNS if name in names or name == "step"]
        columns = [*first, *sorted(name for name in names if name not in FIRST_COLUMNS)]
        with atomic_write(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self._rows[step] for step in sorted(self._rows))
        self._has_news = False


def number(value: Any) -> float:
    """A Python number, whatever kind of scalar it was."""
    return value.item() if hasattr(value, "item") else value


def read_rows(path: Path) -> list[Row]:
    """The rows of a log as they were written, without empty cells; none if the file is not there.

    Raises:
        ValueError, csv.Error: if it is no such table.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames is not None and "step" not in rows.fieldnames:
            raise ValueError("it has no column step")
        return [{name: value for name, value in row.items() if value != ""} for row in rows]
