"""Logs, results, evaluations and caches that are damaged are named, or done without; text from files stays text."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from semseg.config.overrides import read_saved_overrides
from semseg.data.classes import ClassTable
from semseg.data.header_cache import load_cache
from semseg.errors import ConfigError, DataError
from semseg.evaluation.metrics import ConfusionMatrix
from semseg.evaluation.result_files import write_rows
from semseg.reports.compared_runs import read_evaluations
from semseg.reports.comparison import compare_runs
from semseg.reports.curves import read_metrics_log
from semseg.storage.run_results import JOB_FILE, RESULT_FILE, read_job, read_result
from semseg.system.text import escape_csv_cell, escape_lines, escape_unprintable
from semseg.training.loggers.csv import RowFile

SPOILED = [b"", b"\xff\xfe\x00", b"step\nabc\n", b"[" * 99999, b"null", b'{"a": 1e999}', b"\x00" * 40, b"a,b\n1"]
METRICS = {"mean_iou": 0.5, "classes": [{"name": "sky", "iou": 0.5}, {"name": "road", "iou": None}]}


@pytest.mark.reliability
@pytest.mark.parametrize("content", SPOILED)
def test_h7_a_damaged_log_is_named_or_has_no_rows(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    if content:
        with pytest.raises(DataError, match=re.escape(f"{path}: this log is damaged")):
            RowFile(path)
    else:
        assert RowFile(path)._rows == {}
    with pytest.warns(UserWarning, match=r"metrics\.csv") if b"\xff" in content else nothing():
        read_metrics_log(path)


class nothing:  # noqa: N801 - a context
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("content", SPOILED)
def test_h7_damaged_results_and_caches_count_as_missing_and_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / RESULT_FILE).write_bytes(content)
    (tmp_path / JOB_FILE).write_bytes(content)
    if content.startswith(b"{"):
        assert read_result(tmp_path) is not None and read_job(tmp_path) is None
    else:
        with pytest.warns(UserWarning, match=r"result\.json: cannot be read"):
            assert read_result(tmp_path) is None
        with pytest.warns(UserWarning, match=r"job\.json: cannot be read"):
            assert read_job(tmp_path) is None
    assert not {name: row for name, row in load_cache(tmp_path / RESULT_FILE).items() if isinstance(row, list)}
    with pytest.raises(ConfigError, match=str(tmp_path)):
        read_saved_overrides(tmp_path / RESULT_FILE)


@pytest.mark.reliability
@pytest.mark.parametrize(
    "changes",
    [
        {"classes": [1, 2]}, {"classes": [{"name": 1, "iou": 0.5}]}, {"classes": [{"name": "sky", "iou": "high"}]},
        {"classes": [{"iou": 0.5}]}, {"classes": {}}, {"mean_iou": "high"}, {"mean_iou": [1]},
        {"mean_iou": float("nan")},
    ],
)  # fmt: skip
def test_h7_damaged_evaluations_are_named(changes: dict[str, Any], tmp_path: Path) -> None:
    for name, content in (("a", METRICS), ("b", METRICS | changes)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=str(tmp_path / "b" / "metrics.json")):
        compare_runs(read_evaluations([str(tmp_path / "a"), str(tmp_path / "b")]))


@pytest.mark.reliability
@pytest.mark.parametrize("table", ["images.csv", "per_image.csv"])
def test_h7_a_damaged_table_of_images_is_named(table: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "per_image.csv").write_bytes(b"file,mean_iou\na.jpg,\xff\n" if table == "images.csv" else b"file\nx\n")
    with pytest.raises(DataError, match=r"per_image\.csv"):
        read_evaluations([str(tmp_path)])


@pytest.mark.reliability
def test_h8_names_with_control_characters_are_escaped_wherever_classes_come_from(tmp_path: Path) -> None:
    name, shown = "sky\x1b[31m\u202e", "sky\\x1b[31m\\u202e"
    (tmp_path / "classes.csv").write_text(f"index,name,R,G,B\n0,{name},1,2,3\n")
    (tmp_path / "classes.txt").write_text(f"{name}\n")
    (tmp_path / "classes.json").write_text(json.dumps([{"name": name, "color": [1, 2, 3]}]))
    tables = [ClassTable.from_file(tmp_path / f"classes.{suffix}") for suffix in ("csv", "txt", "json")]
    tables.append(ClassTable.from_plain({"names": [name], "palette": [[1, 2, 3]]}))
    assert [table.names for table in tables] == [(shown,)] * 4


@pytest.mark.reliability
def test_h8_text_of_files_moves_no_cursor_and_starts_no_formula(tmp_path: Path) -> None:
    assert escape_unprintable("a\nb\x1b]0;title\x07") == "a\\nb\\x1b]0;title\\x07"
    assert escape_unprintable("Straße 道路 [red]") == "Straße 道路 [red]"
    assert escape_unprintable("\udcff") == "\\udcff"
    assert escape_lines("a:\n\tb\x1b") == "a:\n\tb\\x1b"
    assert [escape_csv_cell(text) for text in ("=1+1", "+1", "-1", "@a", "a=1")] == [
        "'=1+1",
        "'+1",
        "'-1",
        "'@a",
        "a=1",
    ]
    write_rows(tmp_path / "per_class.csv", [{"name": "=cmd|' /C calc'!A0", "iou": -0.5}])
    with (tmp_path / "per_class.csv").open(newline="") as file:
        assert list(csv.reader(file))[1] == ["'=cmd|' /C calc'!A0", "-0.5"]


@pytest.mark.reliability
def test_h9_a_confusion_matrix_without_memory_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semseg.evaluation.metrics.get_free_memory", lambda: 16 * 10**9)
    with pytest.raises(ConfigError, match=r"data\.num_classes=32767: .* 34\.4 GB, .* 16\.0 GB"):
        ConfusionMatrix(32767)
    assert ConfusionMatrix(1000).matrix.shape == (1000, 1000)
