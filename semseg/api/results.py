"""What the calls return: the folder of a run, its scores and tables, and its page, which notebooks show. No torch."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from semseg.config.overrides import RECORD_FOLDER
from semseg.reports.curves import read_metrics_log
from semseg.storage.run_folders import METRICS_FILE, find_in_run
from semseg.storage.run_results import find_scores
from semseg.system.text import restore_csv_cell

if TYPE_CHECKING:
    import pandas as pd

PAGE_HEIGHT = 640  # pixels of a page in a notebook
CHECK_FILE = "check.json"
NUM_SHOWN = 4  # pictures of a prediction in a notebook
PICTURE_SUFFIXES = ("_overlay.png", "_panel.png", "_color.png")  # in the order in which a notebook prefers them

TEXT_COLUMNS = ("file", "label", "predicted")  # of tables, whose names may look like numbers
TableRow = Mapping[str, Any]


def tabulate_rows(rows: Sequence[TableRow]) -> pd.DataFrame | list[TableRow]:
    """The rows as a DataFrame where pandas is installed, else as they are."""
    if find_spec("pandas") is None:
        return list(rows)
    import pandas as pd  # noqa: PLC0415 - optional

    return pd.DataFrame(list(rows))


@dataclass(frozen=True)
class RunFolder:
    """What every call has written: the files are the same as those of the command line."""

    folder: Path

    @property
    def page(self) -> Path | None:
        """The page of the run, which opens in a browser; None if there is none."""
        names = ("report.html", "check.html")
        return next((self.folder / name for name in names if (self.folder / name).is_file()), None)

    def _repr_html_(self) -> str | None:
        """The page in a frame, for notebooks."""
        if self.page is None:
            return None
        content = escape(self.page.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{content}" style="width: 100%; height: {PAGE_HEIGHT}px; border: 0"></iframe>'


@dataclass(frozen=True)
class TrainingRun(RunFolder):
    """A finished training run."""

    score: float | None  # the best one on the validation images, 0..1; None without validation

    @property
    def ckpt(self) -> Path | None:
        """Its best checkpoint, or the last one without validation; None if none was written (trainer.fast_dev_run)."""
        return find_in_run(self.folder)

    @property
    def last_ckpt(self) -> Path | None:
        """Its last checkpoint, from which a longer run continues."""
        return find_in_run(self.folder, ("last",))

    @property
    def history(self) -> pd.DataFrame | list[TableRow]:
        """The logged values: a row for each step at which something was logged; missing values are NaN or left out."""
        columns: dict[str, dict[int, float]] = {}
        for log in sorted((self.folder / "logs").rglob("metrics.csv")):
            for name, points in read_metrics_log(log).items():
                columns.setdefault(name, {}).update(points)
        steps = sorted({step for points in columns.values() for step in points})
        return tabulate_rows(
            [
                {"step": step, **{name: points[step] for name, points in columns.items() if step in points}}
                for step in steps
            ]
        )

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation that followed training (after_training=[eval]); None without one."""
        scores = find_scores(self.folder)
        return None if scores is None else Evaluation(scores.parent)


@dataclass(frozen=True)
class Evaluation(RunFolder):
    """The scores of a network on a split."""

    @cached_property
    def scores(self) -> dict[str, Any]:
        """The content of metrics.json: mean_iou, pixel_accuracy, mean_dice, ... (0..1), and what was evaluated."""
        return json.loads((self.folder / METRICS_FILE).read_text(encoding="utf-8"))

    @property
    def mean_iou(self) -> float | None:
        """The mean IoU, 0..1, under the rule of the data set; None if nothing was scored."""
        return self.scores["mean_iou"]

    @property
    def classes(self) -> pd.DataFrame | list[TableRow]:
        """A row for each class: its scores, pixels and id."""
        return tabulate_rows(self.scores["classes"])

    @property
    def images(self) -> pd.DataFrame | list[TableRow]:
        """A row for each image: its scores, seconds and size."""
        return read_table(self.folder / "per_image.csv")

    @property
    def label_errors(self) -> pd.DataFrame | list[TableRow]:
        """A row for each region whose label may be wrong, the surest first; empty without eval.label_errors=true."""
        from semseg.evaluation.result_files import LABEL_ERRORS_FILE  # noqa: PLC0415 - imports torch

        return read_table(self.folder / LABEL_ERRORS_FILE)

    @property
    def confusion(self) -> NDArray[np.int64]:
        """(K, K) pixel counts; rows are labels, columns predictions."""
        return np.array(self.scores["confusion"], np.int64)


@dataclass(frozen=True)
class Predictions(RunFolder):
    """The files that a network has predicted."""

    @property
    def files(self) -> list[Path]:
        """The files in the folder, sorted, those of earlier calls with this run_dir too, without records of the run."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        own = (self.folder / "classes.json",)
        return sorted(path for path in found if path not in own and RECORD_FOLDER not in path.parts)

    def _repr_html_(self) -> str | None:
        """The first pictures, for notebooks."""
        for suffix in PICTURE_SUFFIXES:
            pictures = [path for path in self.files if path.name.endswith(suffix)]
            if pictures:
                return "".join(map(embed_picture, pictures[:NUM_SHOWN]))
        return None


@dataclass(frozen=True)
class DataCheck(RunFolder):
    """What is right and wrong with a data set."""

    @cached_property
    def content(self) -> dict[str, Any]:
        """The content of check.json."""
        return json.loads((self.folder / CHECK_FILE).read_text(encoding="utf-8"))

    @property
    def verdict(self) -> str:
        """The result in one line."""
        return self.content["verdict"]

    @property
    def is_ready(self) -> bool:
        """Whether a network can be trained on the data set as it stands."""
        from semseg.checks.dataset import NOT_READY  # noqa: PLC0415 - imports torch

        return self.verdict != NOT_READY

    @property
    def notices(self) -> pd.DataFrame | list[TableRow]:
        """A row for each finding, the most severe first."""
        return tabulate_rows(self.content["notices"])

    @property
    def suggestions(self) -> dict[str, str]:
        """Overrides that mend what was found, by key."""
        return self.content["suggestions"]

    @property
    def command(self) -> str:
        """The command line that trains with the suggestions, or checks again."""
        return self.content["command"]


def read_table(path: Path) -> pd.DataFrame | list[TableRow]:
    """The rows of a CSV file; none if it does not exist."""
    if not path.is_file():
        return tabulate_rows([])
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return tabulate_rows(
        [
            {name: restore_csv_cell(text) if name in TEXT_COLUMNS else parse_cell(text) for name, text in row.items()}
            for row in rows
        ]
    )


def parse_cell(text: str | None) -> int | float | str | None:
    """The value of a cell of a CSV file: a number, text, or None if it is empty."""
    if not text:
        return None
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def embed_picture(path: Path) -> str:
    """A PNG file as an element of a page."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(path.name)}" style="max-width: 100%">'
