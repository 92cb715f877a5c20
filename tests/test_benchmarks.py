"""Programs of benchmarks/, small enough for every run of the tests."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import torch
import yaml

from helpers.command_line import run_here
from helpers.fork_server import FORK_CHILDREN, run_python
from semseg.config.load import load_config
from semseg.data.scenes import make_scenes

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PEERS = ("segmentation-models-pytorch", "transformers")
PEER_MODULES = ("segmentation_models_pytorch", "transformers")


@pytest.mark.slow
def test_the_model_of_a_step_counts_a_backward_pass_as_two_forward_passes(tmp_path: Path) -> None:
    program = run_python(str(BENCHMARKS / "step_model.py"), "--height", "256", "--width", "384", cwd=tmp_path)
    assert program.returncode == 0, program.stdout
    rows = [line.strip("|").split("|") for line in program.stdout.splitlines() if line.startswith("| ")]
    tables = [index for index, row in enumerate(rows) if row[0].strip() == "stage"]
    assert len(tables) == 2
    for first in tables:
        end = next(index for index in range(first, len(rows)) if rows[index][0].strip() == "all")
        counts = {row[0].strip(): float(row[1]) for row in rows[first + 1 : end + 1]}
        decoder = counts["decoder"]
        assert 1.9 < counts["decoder, backward"] / decoder < 2.1
        assert counts["all"] > 3 * decoder


@pytest.mark.long
def test_the_measurement_of_a_gpu_runs_in_its_toy_form_and_names_the_best_settings(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", FORK_CHILDREN: "1"}
    program = run_python(str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--toy", cwd=tmp_path, env=environment)
    assert program.returncode == 0, program.stdout
    lines = program.stdout.splitlines()
    assert not [line for line in lines if "skipped" in line and not line.startswith(PEERS)]
    rows = [line for line in lines if re.search(r" \d[\d.e+-]* (TFLOP/s|images/s|s|graphs|times)\b", line)]
    for beginning in (
        "matrix product, bf16", "upernet50, 2 images, tf32, factored", "upernet50, 2 images, bf16, channels_last",
        "2 sizes of upernet50, compiled, later", "graphs that were compiled", "upernet101, 2 images", "inference of",
        "a step with synchronised normalisation", "mode=bench: training with its loader",
        *(f"{peer}, 2 images, float32, eager" for peer, module in zip(PEERS, PEER_MODULES, strict=True)
          if find_spec(module) is not None),
    ):  # fmt: skip
        assert [row for row in rows if row.startswith(beginning)], f"{beginning}: {program.stdout}"
    best = [line for line in lines if line.startswith("best settings of upernet50: 2 images, ")]
    assert len(best) == 1
    (command,) = (line.split()[2:] for line in lines if line.strip().startswith("python run.py"))
    config, _ = load_config([*command, "trainer.accelerator=cpu"])
    assert config.data.batch_size == 2


@pytest.mark.slow
def test_networks_of_every_kind_are_timed_beside_their_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process, which has imported the libraries for other tests.
    monkeypatch.setattr("sys.argv", ["networks.py", "--toy", "--threads", str(torch.get_num_threads())])
    runpy.run_path(str(BENCHMARKS / "networks.py"), run_name="__main__")
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row[0].split()[0] for row in rows] == ["linear_vit_tiny", "smp", "transformers"]
    assert all(0.05 < float(row[column]) < 20 for row in rows for column in (3, 6))


PEER_SIDES = {
    "smp_unet": ("segmentation_models_pytorch", "albumentations"),
    "smp_deeplabv3plus": ("segmentation_models_pytorch", "albumentations"),
    "transformers_segformer_b0": ("transformers",),
}


@pytest.mark.long
def test_every_side_of_the_accuracy_table_trains_predicts_and_adds_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = ["ours", *PEER_SIDES]
    rows = run_on_scenes(tmp_path, monkeypatch, "accuracy", *(word for side in sides for word in ("--side", side)))
    installed = [side for side, names in PEER_SIDES.items() if all(find_spec(name) is not None for name in names)]
    assert [row["side"] for row in rows] == ["ours", *installed]


@pytest.mark.long
def test_the_defaults_of_a_folder_are_a_side_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run_on_scenes(tmp_path, monkeypatch, "accuracy", "--side", "ours_defaults")
    assert [row["side"] for row in rows] == ["ours_defaults"]


@pytest.mark.long
def test_every_ablation_that_is_asked_for_adds_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run_on_scenes(
        tmp_path, monkeypatch, "ablations", *(f"--change={name}" for name in ("none", "Dice", "squashed"))
    )
    assert [row["change"] for row in rows] == ["none", "Dice", "squashed"]


@pytest.mark.long
def test_every_ablation_changes_something_and_has_a_valid_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_scenes(tmp_path / "scenes", num_train=2, num_val=1, seed=1)
    program = import_benchmark(monkeypatch, "ablations")
    monkeypatch.setattr(program, "check_data", lambda options: tmp_path / "check.json")
    (tmp_path / "check.json").write_text(json.dumps({"class_weights": [1.0] * 4}))
    options = argparse.Namespace(
        base="own_data", data=tmp_path / "scenes", encoder="mobilenetv3_small_050", weights="none", toy=False, seed=1,
        short_edge=200,
    )  # fmt: skip
    configs = {
        change: load_config([*program.compose_recipe(words, options), f"run_dir={tmp_path}"])[0]
        for change, words in program.CHANGES.items()
    }
    same = {change for change, config in configs.items() if config == configs["none"]}
    assert same == {"none", *IN_THE_RECIPE}


def test_the_steps_of_an_ablation_are_those_of_its_other_seed_or_of_the_base_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = import_benchmark(monkeypatch, "ablations")
    table = tmp_path / "rows.csv"
    table.write_text("minutes,change,seed,steps\n10,none,1,200\n15,none,1,300\n15,batch 8,1,170\n")
    monkeypatch.setattr(program, "compose_recipe", lambda *_: [])
    monkeypatch.setattr(program, "compare_steps", lambda *_: 2.0)
    options = argparse.Namespace(table=table)
    steps = {
        change: program.count_steps([], {"minutes": "15", "change": change, "seed": "2"}, options)
        for change in ("none", "batch 8", "batch 2")
    }
    assert steps == {"none": 300, "batch 8": 170, "batch 2": 150}


def test_the_tables_of_the_results_are_made_from_the_measured_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (BENCHMARKS.parent / "docs" / "results.md").read_text()
    assert page.count("<!-- end -->") >= 10
    assert import_benchmark(monkeypatch, "report").fill_tables(page) == page, (
        "python benchmarks/report.py docs/results.md"
    )


def test_the_changes_of_a_table_stand_in_the_order_of_the_means_of_their_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = import_benchmark(monkeypatch, "report")
    table = tmp_path / "rows.csv"
    table.write_text(
        "base,change,overrides,seed,steps,miou,iou\na,none,,2,90,61.00,Sky 90.00; Pole 10.00\n"
        "a,none,,1,80,60.00,Sky 92.00; Pole 14.00\na,big,width=9,1,70,60.60,Sky 91.00; Pole 1.00\n"
        "b,none,,1,80,99.00,Sky 99.00; Pole 99.00\n"
    )
    monkeypatch.setitem(report.KINDS, "changes", (table, report.format_changes))
    page = report.fill_tables("text\n<!-- changes base=a -->\nold\n<!-- end -->\ntext\n")
    assert page.splitlines() == [
        "text", "<!-- changes base=a -->", "",
        "| change | overrides | mIoU | mean | steps | pole |", "|---|---|---|---|---|---|",
        "| big | `width=9` | 60.6 | 60.6 | 70 | 1.0 |", "| none |  | 60.0, 61.0 | 60.5 | 80 to 90 | 12.0 |", "",
        "<!-- end -->", "text",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match=r"<!-- changes base=c -->: no row of rows.csv has these entries."):
        report.fill_tables("<!-- changes base=c -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match=r"<!-- prices base=a -->: the kinds of tables are costs, classes, "):
        report.fill_tables("<!-- prices base=a -->\n<!-- end -->\n")


IN_THE_RECIPE = (
    "Dice", "AdamW 0.003, encoder 0.0005", "Dice, AdamW 0.003, encoder 0.0005", "width 128", "one short edge",
    "Dice, AdamW 0.003, encoder 0.0005, label stride 2", "label stride 2", "wide crops", "wide crops, label stride 2",
)  # fmt: skip


@pytest.mark.long
def test_the_recipe_of_the_check_and_the_defaults_each_add_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program, accuracy = import_benchmark(monkeypatch, "checked_recipe"), import_benchmark(monkeypatch, "accuracy")
    monkeypatch.setattr(accuracy, "run_measured", lambda words, *_: run_in_this_process(accuracy, words))
    words = ["--defects", "--toy", "--encoder", "mobilenetv3_small_050", "--weights", "none", "--table", "rows.csv"]
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["checked_recipe.py", *words])
        program.main()
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [(row["data"], row["side"], row["steps"]) for row in csv.DictReader(file)] == [
            ("defects", "defaults", "2"), ("defects", "recipe", "2")
        ]  # fmt: skip
    label = cv2.imread("checked_recipe/defects/masks/training/000.png", cv2.IMREAD_UNCHANGED)
    assert label is not None and set(np.unique(label)) <= {1, 2, 3} and (label > 1).mean() < 0.2


TOY_WORDS = [
    "--data", "scenes", "--toy", "--encoder", "mobilenetv3_small_050", "--weights", "none", "--table", "rows.csv",
]  # fmt: skip


@pytest.mark.long
def test_planted_label_errors_are_looked_for_by_a_network_that_has_not_seen_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_scenes(tmp_path / "scenes", num_train=4, num_val=3, seed=1)
    labels = sorted((tmp_path / "scenes" / "annotations" / "validation").glob("*.png"))
    before = {label: label.read_bytes() for label in labels}
    words = [*TOY_WORDS, "--count", "4", "--plant", "5", "--min-share", "0.002", "--scales", "32"]
    (row,) = run_twice(tmp_path, monkeypatch, "label_errors", words)
    assert (row["planted"], row["plant"]) == ("4", "5") and 0 <= int(row["found_150"]) <= int(row["found"]) <= 4
    assert before == {label: label.read_bytes() for label in labels}  # only the copy was changed
    copied = tmp_path / "label_errors" / "copy-5" / "annotations" / "validation"
    pairs = [(cv2.imread(str(path), -1), cv2.imread(str(copied / path.name), -1)) for path in labels]
    assert 0 < sum(int((label != planted).sum()) for label, planted in pairs) < 0.2 * sum(one.size for one, _ in pairs)


def test_a_planted_error_is_found_by_a_region_with_its_label_that_covers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    program = import_benchmark(monkeypatch, "label_errors")
    mask = np.zeros((40, 40), bool)
    mask[10:20, 10:20] = True
    planted = [program.Planted("a.jpg", 3, 2, mask)]
    right = {"file": "a.jpg", "label_id": "2", "top": "9", "left": "10", "height": "10", "width": "10", "pixels": "95"}
    assert program.find_planted(planted, [right]) == {0}
    for changed in ({"file": "b.jpg"}, {"label_id": "3"}, {"top": "17"}, {"pixels": "400"}):
        assert program.find_planted(planted, [right | changed]) == set(), changed
    label = np.full((40, 40), 2, np.uint8)
    label[10:20, 10:20] = 3
    label[0, 0] = 4
    found = program.find_candidates(7, label, 0.01, 0.5)
    assert found == [program.Candidate(7, 3, (10, 10))]
    assert np.array_equal(program.select_region(label, (10, 10)), mask)


@pytest.mark.long
def test_every_side_of_the_pseudo_labels_adds_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_scenes(tmp_path / "scenes", num_train=6, num_val=2, seed=1)
    (tmp_path / "scenes" / "test.odgt").write_text((tmp_path / "scenes" / "validation.odgt").read_text())
    rows = run_twice(tmp_path, monkeypatch, "pseudo_labels", [*TOY_WORDS, "--labelled", "4", "--confidence", "0.1"])
    assert [(row["side"], row["steps"]) for row in rows] == [
        ("labelled", "2"), ("longer", "4"), ("continued", "2"), ("pseudo", "2"), ("pseudo_continued", "2"), ("all", "2")
    ]  # fmt: skip
    assert 0 < float(rows[3]["kept"]) <= 100 and rows[0]["val"] != "n/a"
    (file,) = (tmp_path / "pseudo_labels").glob("pseudo_continued-*-2/config.yaml")
    config = yaml.safe_load(file.read_text())
    assert Path(config["init_from"]).is_file()
    config = config["data"]
    assert config["mix"][0]["share"] == 0.5 and config["train"]["list"].endswith("labelled-4.odgt")


def run_twice(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: list[str]) -> list[dict[str, str]]:
    """The rows that a program adds when it is called twice, without processes of its own."""
    monkeypatch.chdir(folder)
    program, accuracy = import_benchmark(monkeypatch, name), import_benchmark(monkeypatch, "accuracy")
    monkeypatch.setattr(accuracy, "run_measured", lambda words, *_: run_in_this_process(accuracy, words))
    for _ in range(2):
        monkeypatch.setattr("sys.argv", [f"{name}.py", *words])
        program.main()
    with (folder / "rows.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def run_on_scenes(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, *words: str) -> list[dict[str, str]]:
    """The rows that the toy form of a program writes about drawn scenes, when it is called twice."""
    make_scenes(folder / "scenes", num_train=4, num_val=2, seed=1)
    given = [
        "--data", "scenes", "--split", "val", "--toy", "--encoder", "mobilenetv3_small_050", "--weights", "none",
        "--table", "rows.csv", *words,
    ]  # fmt: skip
    rows = run_twice(folder, monkeypatch, name, given)
    for row in rows:
        assert abs(float(row["miou"]) - float(row["miou_torchmetrics"])) < 0.011
        assert int(row["steps"]) == 2
    return rows


def import_benchmark(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def run_in_this_process(accuracy: ModuleType, words: list[str]) -> NamedTuple:
    """What a program of its own would do, without the seconds that its imports take."""
    program, *rest = words
    if Path(program).name == "run.py":
        run_here(Path.cwd(), *rest)
    else:
        with patch.object(sys, "argv", words):
            runpy.run_path(program, run_name="__main__")
    return accuracy.Usage(cpu_s=1.0, wall_s=1.0, peak_mb=1.0)


def test_the_cpu_time_of_a_program_is_its_own_and_a_failure_ends_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = import_benchmark(monkeypatch, "accuracy")
    usage = accuracy.run_measured(["-S", "-c", "sum(range(3_000_000))"], tmp_path / "log")
    assert 0.01 < usage.cpu_s < 10
    assert usage.peak_mb > 1
    with pytest.raises(SystemExit, match=r"(?s)exit code 3.*no such road"):
        accuracy.run_measured(["-S", "-c", "print('no such road'); raise SystemExit(3)"], tmp_path / "log")
    spent = tmp_path / accuracy.SPENT_FILE
    with pytest.raises(SystemExit, match="the same command continues the run"):
        accuracy.run_measured(["-S", "-c", "raise SystemExit(143)"], tmp_path / "log", spent)
    first = accuracy.Usage(*json.loads(spent.read_text()))
    spent.write_text(json.dumps(first._replace(cpu_s=100.0)))
    assert accuracy.run_measured(["-S", "-c", "pass"], tmp_path / "log", spent).cpu_s > 100


def test_the_steps_of_a_run_are_those_that_fit_into_its_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = import_benchmark(monkeypatch, "accuracy")
    monkeypatch.setattr(accuracy, "time_steps", lambda recipe, steps, work: 10 + 0.5 * steps)
    options = argparse.Namespace(minutes=1.0, work=tmp_path)
    assert accuracy.count_affordable_steps(["optim.lr=1"], options) == 100
    monkeypatch.delattr(accuracy, "time_steps")  # a recipe of the same cost per step is not timed again
    assert accuracy.count_affordable_steps(["optim.lr=2"], options) == 100
    assert accuracy.compare_steps(["optim.lr=1"], ["optim.lr=2"], options) == 1


def test_steps_are_compared_without_the_start_of_their_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = import_benchmark(monkeypatch, "accuracy")
    seconds = {"fast": 0.5, "slow": 1.5}
    monkeypatch.setattr(accuracy, "time_steps", lambda recipe, steps, work: 10 + seconds[recipe[0]] * steps)
    assert accuracy.compare_steps(["fast"], ["slow"], argparse.Namespace(work=tmp_path)) == 3


def test_one_disturbed_program_does_not_change_the_time_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = import_benchmark(monkeypatch, "accuracy")
    calls = iter(range(100))
    monkeypatch.setattr(accuracy, "time_steps", lambda recipe, steps, work: 10 + 0.5 * steps + 20 * (next(calls) == 3))
    options = argparse.Namespace(minutes=1.0, work=tmp_path)
    assert accuracy.compare_steps(["one"], ["other"], options) == 1
    calls = iter([3, *range(50, 60)])
    assert accuracy.count_affordable_steps(["optim.lr=1"], options) == 100


@pytest.mark.long
def test_ways_to_predict_on_a_cpu_are_timed_and_compute_the_same(tmp_path: Path) -> None:
    words = ["--model", "resnet18_dilated8_c1_deepsup", "--height", "64", "--width", "96", "--rounds", "1"]
    program = run_python(str(BENCHMARKS / "prediction.py"), *words, cwd=tmp_path)
    assert program.returncode == 0, program.stdout
    rows = {line[:46].strip(): line[46:].split() for line in program.stdout.splitlines() if line.endswith("%")}
    assert rows.keys() >= {"semseg, float32", "PyTorch, float32", "ONNX Runtime, float32"}
    assert all(len(row) == 4 for row in rows.values()) and rows["ONNX Runtime, float32"][3] == "100.00%"
