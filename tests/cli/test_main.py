"""The door, through the real command line: messages, exit codes, no torch before the configuration is checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from semseg.config.compose import CONFIG_DIR
from semseg.config.overrides import parse_device_indices, quote_override

RUN = CONFIG_DIR.parent / "run.py"


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RUN), *words], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def test_help_lists_models_and_data_sets_by_name(tmp_path: Path) -> None:
    page = command("--help", cwd=tmp_path)
    assert page.returncode == 0
    for word in ("upernet50", "resnet50_dilated8_ppm_deepsup", "ade20k", "camvid", "scenes", "mode=predict"):
        assert word in page.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optim.lrr=3"], "Did you mean optim.lr?"),
        (["lr=3"], "Did you mean optim.lr?"),
        (["modle=upernet50"], "Did you mean model?"),
        (["model=upernet51"], "Did you mean model=upernet50?"),
        (["model/decoder=upernett"], "Did you mean model/decoder=upernet?"),
        (["data=cam_vid"], "Did you mean data=camvid?"),
        (["mode=evl"], "Did you mean mode=eval?"),
        (["model.encoder.weigths=x"], "Did you mean model.encoder.weights?"),
        (["optim.lr=abc"], "optim.lr=abc"),
        (["trainer.devices=0"], "trainer.devices=0"),
        (["optim.lr"], "not of the form key=value"),
        (["data.name=a=b"], "Quote the value"),
        (["mode=eval"], "needs ckpt="),
    ],
)
def test_a_mistake_ends_in_three_lines_and_exit_code_2_and_leaves_nothing(
    words: list[str], expected: str, tmp_path: Path
) -> None:
    result = command(*words, cwd=tmp_path)
    assert result.returncode == 2
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 3
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_is_composed_and_checked_without_torch() -> None:
    code = (
        "import sys; from semseg.config.compose import compose_config; from semseg.config.validate import check_config;"
        "check_config(compose_config(['model=upernet50']));"
        "assert not {'torch', 'pytorch_lightning', 'cv2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=RUN.parent, check=True)


def test_missing_data_is_one_line_that_says_where_and_how(tmp_path: Path) -> None:
    result = command("data.root=nowhere", cwd=tmp_path)
    assert result.returncode == 1
    assert "nowhere" in result.stderr and "mode=download data=ade20k" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("trainer.devices=0-3", "trainer.devices=[0,1,2,3]"),
        ("trainer.devices=0,2", "trainer.devices=[0,2]"),
        ("trainer.devices=8", "trainer.devices=8"),
        ("trainer.devices=auto", "trainer.devices=auto"),
        ("ckpt=a=b.ckpt", 'ckpt="a=b.ckpt"'),
        ("input=my photos/a,b.jpg", 'input="my photos/a,b.jpg"'),
        ("data.train.images=im[1]", 'data.train.images="im[1]"'),
        ("data.val.list=a;b.csv", 'data.val.list="a;b.csv"'),
        ("data.root=日本", 'data.root="日本"'),
        ("run_dir=2024_11_28", 'run_dir="2024_11_28"'),  # a number to Hydra
        ("data.root=true", 'data.root="true"'),
        ("data.masks=null", "data.masks=null"),
        ("input=photos/**/*.jpg", "input=photos/**/*.jpg"),
        ("run_dir=runs/${now:%Y}", "run_dir=runs/${now:%Y}"),
        ("optim.lr=0.1", "optim.lr=0.1"),
        ("--help", "--help"),
    ],
)
def test_command_line_words_are_made_fit_for_hydra(typed: str, read: str) -> None:
    assert quote_override(typed) == read


@pytest.mark.reliability
def test_c33_what_is_there_under_this_very_name_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert quote_override("data.root=[a]") == "data.root=[a]"
    (tmp_path / "[a]").mkdir()
    assert quote_override("data.root=[a]") == 'data.root="[a]"'


def test_a_comma_in_a_sweep_stays_a_sweep() -> None:
    assert quote_override("trainer.devices=1,2", sweep=True) == "trainer.devices=1,2"
    assert quote_override("trainer.devices=0-1", sweep=True) == "trainer.devices=[0,1]"


def test_device_ranges_may_be_mixed() -> None:
    assert parse_device_indices("0,2-4") == [0, 2, 3, 4]


def test_home_is_expanded_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert quote_override("data.root=~/data") == 'data.root="/home/someone/data"'
