"""The log of a run as one CSV file, one row a step, that a resumed run goes on with."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.loggers import Logger

from semseg.files import replacing

Row = dict[str, float | str]
FIRST_COLUMNS = ("step", "epoch")
FLUSH_SECONDS = 5.0


class CSVLog(Logger):
    """Writes `<folder>/metrics.csv`. The file is whole at any moment, and empty cells mean "not measured".

    Lightning's CSVLogger starts a new file for every resumed run, or deletes the old one; here the rows of steps
    that are done again are forgotten (`forget_from`), so that every step is there once.

    Args:
        folder: made if it is not there; a file in it is read first.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._rows: dict[int, Row] = {int(row["step"]): row for row in read_rows(self.path)}
        self._has_news = False
        self._saved_at = float("-inf")

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> int:
        return 0

    @property
    def log_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder has the whole configuration in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add `metrics` to the row of `step`."""
        row = self._rows.setdefault(int(step or 0), {"step": int(step or 0)})
        row.update({name: number(value) for name, value in metrics.items()})
        self._has_news = True
        if time.monotonic() - self._saved_at >= FLUSH_SECONDS:
            self.save()

    def forget_from(self, step: int) -> None:
        """Drop the rows of `step` and of all later ones."""
        self._rows = {at: row for at, row in self._rows.items() if at < step}
        self._has_news = True

    def forget_columns(self, step: int, prefix: str) -> None:
        """Drop the values of `step` whose names start with `prefix`."""
        row = self._rows.get(step, {})
        for name in [name for name in row if name.startswith(prefix)]:
            del row[name]

    @rank_zero_only
    def save(self) -> None:
        """Bring the file up to date."""
        if not self._has_news:
            return
        names = {name: None for row in self._rows.values() for name in row}
        columns = [*FIRST_COLUMNS, *sorted(name for name in names if name not in FIRST_COLUMNS)]
        with replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self._rows[step] for step in sorted(self._rows))
        self._has_news, self._saved_at = False, time.monotonic()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def number(value: Any) -> float:
    """A Python number, whatever kind of scalar it was."""
    return value.item() if hasattr(value, "item") else value


def read_rows(path: Path) -> list[Row]:
    """The rows of a log as they were written, without empty cells; none if the file is not there."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]
