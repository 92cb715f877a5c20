"""The modes that print something and leave nothing behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.console import Console

from helpers.command_line import RUN, run_here
from helpers.hub_configs import HUB_CONFIGS
from helpers.in_process import configured
from semseg.checkpoints.zoo import PUBLISHED_SCORES, ZOO
from semseg.data.scenes import make_scenes
from semseg.errors import SemsegError
from semseg.modes import data, doctor, models
from semseg.modes.doctor import ERROR, OK, WARNING, CheckResult
from semseg.storage.hub_list import HUB_ZOO


@pytest.mark.parametrize("width", [80, 120])
def test_the_models_are_listed_with_their_cost_published_score_and_licence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    models.run(configured("mode=models"), [])
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    table = lines[: next(number for number, line in enumerate(lines) if line.startswith("M: "))]
    rows: dict[str, list[str]] = {}  # those of networks to train, where one of the zoo has the same name
    for line in table:
        if line.split():
            rows.setdefault(line.split()[0], line.split()[1:])
    assert len([line for line in table if line.split()]) == len(models.list_models()) + len(ZOO) + len(HUB_ZOO) + 6
    # 11.2 million of ResNet-18's layers with the deep stem, 0.9 of two heads of C1 (3 x 3 to 128, 256 channels, 150).
    assert rows["resnet18_dilated8_c1_deepsup"][:5] == ["12.2", "116", "8", "33.8", "a"]
    assert rows["linear_dinov3_vit_small"][2:] == ["16", "47.0", "b", "dinov3-license"]
    assert rows["segformer_b0"][:5] == ["3.8", "17", "4", "37.4", "e"]
    assert rows["eomt_large"][-1] == "mit" and rows["hrnetv2_c1"][-2:] == ["not", "stated"]
    assert rows["mask2former_swin_tiny"] == ["47.4", "4", "47.7", "g", "cc-by-nc-4.0"]  # not counted without values
    assert {*models.list_models(), *HUB_ZOO, *ZOO} <= set(rows)
    assert all(f"\n  {mark}  " in "\n".join(lines) for mark in "abcdefgh")


def test_every_network_has_a_cost_in_the_file_and_no_other() -> None:
    hub = {f"zoo:{name}" for name in HUB_ZOO}
    message = "run: python tests/golden/make_model_costs.py"
    assert set(models.read_costs()) == {*models.list_models(), *hub}, message
    assert set(HUB_CONFIGS) == set(HUB_ZOO)


@pytest.mark.slow
def test_costs_in_the_file_are_those_of_the_networks() -> None:
    costs = models.read_costs()
    assert models.measure_model("resnet18_dilated8_c1_deepsup") == costs["resnet18_dilated8_c1_deepsup"]
    assert models.measure_model("linear_dinov3_vit_small") == costs["linear_dinov3_vit_small"]
    pytest.importorskip("transformers")
    assert models.describe_on_meta(HUB_CONFIGS["segformer_b0"]()) == costs["zoo:segformer_b0"]


@pytest.mark.long
@pytest.mark.parametrize("name", [*models.list_models(), *(f"zoo:{name}" for name in HUB_CONFIGS)])
def test_all_costs_in_the_file_are_those_of_the_networks(name: str) -> None:
    is_on_hub = name.startswith("zoo:")
    found = models.describe_on_meta(HUB_CONFIGS[name[4:]]()) if is_on_hub else models.measure_model(name)
    assert found == models.read_costs()[name], "run: python tests/golden/make_model_costs.py"


def test_the_scores_are_those_of_the_readme_and_the_recipes() -> None:
    readme = (RUN.parent / "README.md").read_text()
    rows = re.findall(r"^\| (?:`(\w+)`[^|]*)?\| (one|five) \| ([\d.]+) \| ([\d.]+) \|", readme, re.MULTILINE)
    found: dict[str, list[tuple[float, float]]] = {}
    name = ""
    for model, _, mean_iou, accuracy in rows:
        name = model or name
        found.setdefault(name, []).append((float(mean_iou), float(accuracy)))
    assert found == {name: [tuple(score) for score in scores] for name, scores in PUBLISHED_SCORES.items()}
    for name, scores in PUBLISHED_SCORES.items():
        recipe = (RUN.parent / "configs" / "experiment" / f"published_{name}.yaml").read_text()
        assert all(f"{number:.2f}" in recipe for score in scores for number in score), name


@pytest.mark.slow
def test_data_sets_are_found_where_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "camvid"
    make_scenes(root, num_train=2, num_val=1, seed=0)
    words = ("data=camvid", f"data.root={root}")
    assert data.describe_availability(configured(*words).data) == "yes"
    (root / "validation.odgt").unlink()
    assert data.describe_availability(configured(*words).data).startswith(f"in part: {root / 'validation.odgt'}")
    assert data.describe_availability(configured(*words, f"data.root={tmp_path / 'no'}").data) == "no"
    assert (
        data.describe_availability(configured(f"data.root={tmp_path / 'no'}").data) == "no: mode=download data=ade20k"
    )
    data.run(configured("mode=data", *words), ["mode=data", *words])
    assert re.search(r"camvid +│ 11 .*in part", capsys.readouterr().out)


def test_drawn_scenes_have_a_number_of_classes_before_they_are_drawn(tmp_path: Path) -> None:
    assert data.describe_num_classes(configured("data=scenes", f"data.root={tmp_path / 'no'}").data) == "11"
    assert data.describe_num_classes(configured("data=folder").data) == "yours"


def levels(results: list[CheckResult]) -> dict[str, str]:
    return {result.name: result.level for result in results}


@pytest.mark.slow
def test_this_machine_can_train(tmp_path: Path) -> None:
    found = doctor.check_machine(tmp_path / "runs", num_workers=2)
    assert ERROR not in levels(found).values(), found
    assert levels(found)["training step"] == levels(found)["loader"] == OK
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_is_reported_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> CheckResult:
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(doctor, "check_training_step", broken)
    monkeypatch.setattr(doctor, "MIN_SHARED_MEMORY", 2**60)
    monkeypatch.setattr(doctor, "MIN_DISK_SPACE", 2**60)
    monkeypatch.setattr(doctor, "check_loader", lambda workers: CheckResult(OK, "loader", ""))
    found = doctor.check_machine(tmp_path, num_workers=4)
    assert {"training step": ERROR, "disk": WARNING}.items() <= levels(found).items()
    if doctor.SHARED_MEMORY.is_dir():
        assert levels(found)["shared memory"] == WARNING
        assert levels(doctor.check_machine(tmp_path, num_workers=0))["shared memory"] == OK
    monkeypatch.setattr(doctor, "Console", lambda: Console(width=200))
    with pytest.raises(SemsegError, match=r"^NOT READY: training step\. See above\.$") as caught:
        doctor.run(configured("mode=doctor", f"runs_dir={tmp_path}"), [])
    assert caught.value.exit_code == 1
    assert "RuntimeError: CUDA error: no kernel image is available for execution" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    finding = doctor.attempt("disk", lambda: doctor.check_disk(tmp_path / "runs"))
    assert finding.level == ERROR and str(tmp_path) in finding.text


def test_a_file_in_place_of_the_folder_of_runs_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    finding = doctor.attempt("disk", lambda: doctor.check_disk(tmp_path / "runs" / "mine"))
    assert finding.level == ERROR
    assert finding.text.endswith(f"cannot be created, because {tmp_path / 'runs'} is no folder. Set runs_dir.")


@pytest.mark.slow
def test_no_run_folder_is_made(tmp_path: Path) -> None:
    output = run_here(tmp_path, "mode=data")
    assert "cityscapes_labelids" in output
    assert not list(tmp_path.iterdir())
