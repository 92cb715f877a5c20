from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.browser import evaluate_in_browser, needs_browser
from helpers.command_line import RUN, run_here
from semseg.config.schema import Config
from semseg.errors import ConfigError, DataError
from semseg.modes import compare as mode
from semseg.reports.compare_page import render_compare_page
from semseg.reports.comparison import choose_distinct_names, compare_runs, read_evaluations

SKY, ROAD = "sky", "<b>[red]road[/red]</b>"


def evaluation(
    folder: Path, ious: list[float | None], images: dict[str, float | str] | None = None, **facts: Any
) -> str:
    """The files of an evaluation of two classes."""
    folder.mkdir(parents=True)
    scored = [iou for iou in ious if iou is not None]
    classes = [
        {"index": n, "name": name, "iou": iou} for n, (name, iou) in enumerate(zip((SKY, ROAD), ious, strict=True))
    ]
    content = {
        "mean_iou": sum(scored) / len(scored),
        "pixel_accuracy": 0.5,
        "split": "val",
        "classes": classes,
        **facts,
    }
    (folder / "metrics.json").write_text(json.dumps(content))
    if images is not None:
        rows = [f"{file},0.5,{score},0.1" for file, score in images.items()]
        (folder / "per_image.csv").write_text("\n".join(["file,pixel_accuracy,mean_iou,seconds", *rows, ""]))
    return str(folder)


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return [
        evaluation(tmp_path / "base", [0.5, 0.2], {"a.jpg": 0.4, "b.jpg": 0.6, "c.jpg": ""}),
        evaluation(tmp_path / "new", [0.4, 0.8], {"a.jpg": 0.5, "b.jpg": 0.1, "c.jpg": 0.3}),
    ]


def run(tmp_path: Path, runs: list[str]) -> dict[str, Any]:
    mode.run(Config(mode="compare", runs=runs, run_dir=str(tmp_path / "out")), [])
    return json.loads((tmp_path / "out" / "compare.json").read_text())


def test_differences_are_to_the_first_run_and_the_largest_change_comes_first(tmp_path: Path, runs: list[str]) -> None:
    content = run(tmp_path, runs)
    assert content["base"] == "base"
    headline = {row["name"]: row for row in content["headline"]}
    assert headline["mean IoU"]["differences"] == pytest.approx([0.25])
    assert headline["pixel accuracy"]["differences"] == [0]
    assert [row["name"] for row in content["images"]] == ["b.jpg", "a.jpg", "c.jpg"]
    assert content["images"][2]["differences"] == [None]
    assert content["notes"] == []
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.index("&lt;b&gt;[red]road[/red]&lt;/b&gt;") < page.index("sky")


def test_the_table_of_classes_goes_into_a_csv_file(tmp_path: Path, runs: list[str]) -> None:
    run(tmp_path, runs)
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    assert list(rows[0]) == ["index", "name", "iou base", "iou new", "difference new"]
    assert rows[1]["name"] == ROAD and float(rows[1]["difference new"]) == pytest.approx(0.6)


def test_the_console_shows_the_runs_side_by_side(
    tmp_path: Path, runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, runs)
    output = capsys.readouterr().out
    assert "+60.00" in output and "-10.00" in output and "[red]road[/red]" in output
    assert "compare.html" in output


def test_images_are_compared_on_the_intersection_and_its_size_is_reported(tmp_path: Path, runs: list[str]) -> None:
    third = evaluation(tmp_path / "third", [0.5, 0.2], {"b.jpg": 0.7, "d.jpg": 0.1})
    content = run(tmp_path, [*runs, third])
    assert [row["name"] for row in content["images"]] == ["b.jpg"]
    assert content["images"][0]["differences"] == pytest.approx([-0.5, 0.1])
    assert "1 images in common (base: 3, new: 3, third: 2)" in content["notes"][0]


def test_without_a_table_of_images_everything_else_is_compared(tmp_path: Path, runs: list[str]) -> None:
    content = run(tmp_path, [runs[0], evaluation(tmp_path / "old", [0.5, None])])
    assert content["images"] == []
    assert content["notes"] == ["no per_image.csv in old: images are not compared."]
    assert content["classes"][1]["differences"] == [None]


def test_different_settings_of_evaluations_are_noted(tmp_path: Path, runs: list[str]) -> None:
    other = evaluation(tmp_path / "other", [0.5, 0.2], {"a.jpg": 1, "b.jpg": 1, "c.jpg": 1}, split="test", scales=[300])
    notes = run(tmp_path, [runs[0], other])["notes"]
    assert len(notes) == 2
    assert "split differs (base: val, other: test)" in notes[0]
    assert "scales differs (base: not stored, other: [300])" in notes[1]


def test_a_run_folder_means_the_evaluation_in_it(tmp_path: Path, runs: list[str]) -> None:
    evaluation(tmp_path / "train" / "eval", [0.5, 0.2])
    base, other = read_evaluations([runs[0], str(tmp_path / "train")])
    assert (base.name, other.name) == ("base", "train")
    assert other.folder == tmp_path / "train" / "eval"


def test_names_are_as_long_as_needed_to_distinguish_runs() -> None:
    assert choose_distinct_names([Path("/r/a/eval"), Path("/r/b/eval")]) == ["a/eval", "b/eval"]


@pytest.mark.parametrize("change", ["names", "number"])
def test_runs_with_other_classes_are_rejected(tmp_path: Path, runs: list[str], change: str) -> None:
    file = Path(runs[1]) / "metrics.json"
    content = json.loads(file.read_text())
    if change == "names":
        content["classes"][1]["name"] = "river"
    else:
        content["classes"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"class 1 is .*road.* but 'river' in new|new has 1"):
        compare_runs(read_evaluations(runs))


def test_an_error_about_a_folder_without_evaluation_suggests_the_command(tmp_path: Path, runs: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"nowhere holds no evaluation .* python run.py mode=eval ckpt="):
        read_evaluations([runs[0], str(tmp_path / "nowhere")])


def test_the_same_run_twice_is_rejected(runs: list[str]) -> None:
    with pytest.raises(ConfigError, match="listed twice"):
        read_evaluations([runs[0], runs[0] + "/."])


@pytest.mark.parametrize(("file", "text"), [("metrics.json", "{"), ("metrics.json", "[]"), ("per_image.csv", "a\n1\n")])
def test_a_broken_file_is_named(runs: list[str], file: str, text: str) -> None:
    (Path(runs[1]) / file).write_text(text)
    with pytest.raises(DataError, match=file):
        read_evaluations(runs)


def test_panels_of_evaluations_are_shown(runs: list[str]) -> None:
    (Path(runs[0]) / "panels").mkdir()
    Image.fromarray(np.zeros((600, 900, 3), np.uint8)).save(Path(runs[0]) / "panels" / "b.png")
    page = render_compare_page(compare_runs(read_evaluations(runs)))
    assert page.count("data:image/jpeg") == 1
    assert "new: better than base on 1 images, worse on 1, equal on 0" in page


def test_a_broken_panel_is_named(runs: list[str]) -> None:
    (Path(runs[0]) / "panels").mkdir()
    (Path(runs[0]) / "panels" / "b_panel.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"b_panel\.png: cannot be read"):
        render_compare_page(compare_runs(read_evaluations(runs)))


@pytest.mark.slow
def test_the_command_line_compares_without_torch(tmp_path: Path, runs: list[str]) -> None:
    probe = "import sys; from semseg.cli.main import main; main(); assert 'torch' not in sys.modules"
    words = ["mode=compare", f"runs=[{','.join(runs)}]", f"run_dir={tmp_path}/out"]
    result = subprocess.run(
        [sys.executable, "-c", probe, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(RUN.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "compare.html").is_file()


@pytest.mark.slow
def test_one_run_is_too_few(tmp_path: Path) -> None:
    assert "mode=compare needs at least two" in run_here(tmp_path, "mode=compare", "runs=[a]", code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_browser
def test_the_page_sorts_and_fits_a_phone(tmp_path: Path, runs: list[str]) -> None:
    run(tmp_path, runs)
    answer = evaluate_in_browser(
        tmp_path / "out" / "compare.html",
        """(() => {
          const table = document.querySelector("#classes table");
          table.tHead.rows[0].cells[4].querySelector("button").click();
          const order = [...table.tBodies[0].rows].map((row) => row.cells[4].innerText);
          return [order, innerWidth, document.documentElement.scrollWidth];
        })()""",
        width=390,
    )
    assert answer == [["+60.00", "-10.00"], 390, 390]
