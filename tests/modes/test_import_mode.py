"""mode=import as a user walks it: an export, the check that recognises it, the printed commands, and back again."""

from __future__ import annotations

import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from helpers.command_line import run_here
from helpers.exports import (
    CAT,
    HEIGHT,
    WIDTH,
    WRITERS,
    corners,
    expected,
    labelme_content,
    labelme_shape,
    masks_of,
    photo,
    png,
    put,
    write_coco,
)
from helpers.in_process import TINY_RUN, configured
from semseg.config.load import load_config
from semseg.config.overrides import parse_overrides
from semseg.data.labels import read_label
from semseg.errors import ConfigError

pytestmark = pytest.mark.reliability
SMALL = [
    "model/encoder=resnet18",
    "model/decoder=c1",
    "model.encoder.weights=none",
    "data.num_workers=0",
    "check.samples=1",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def printed_command(shown: str, purpose: str) -> list[str]:
    """The words of a command that was printed for a purpose."""
    (line,) = (line for line in shown.splitlines() if line.startswith(f"{purpose}: "))
    return shlex.split(line.partition("run.py ")[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(WRITERS))
def test_the_check_recognises_every_export_and_prints_the_command_that_imports_it(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "pets")
    shown = run_here(tmp_path, "mode=check", "data=folder", "data.root=pets", code=1)
    assert "pets is an export of" in shown and "NOT READY" in shown and "Traceback" not in shown
    words = printed_command(shown, "to import")
    assert words[:3] == ["mode=import", "input=pets", "output=pets_masks"]
    imported = run_here(tmp_path, *words)
    assert "to train: python run.py data=folder data.root=pets_masks" in imported
    assert "not annotated and of the class background" in imported or "every pixel is annotated" in imported
    assert (tmp_path / "pets_masks/semseg.yaml").is_file()


def test_an_export_without_training_images_gets_the_command_that_evaluates(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "pets")
    file.rename(file.with_name("instances_val.json"))
    shown = run_here(tmp_path, "mode=import", "input=pets", "output=masks")
    assert "4 val" in shown and "to train" not in shown and "to check" not in shown
    assert "to evaluate a network: python run.py mode=eval ckpt=best data=folder data.root=masks" in shown


@pytest.mark.slow
def test_an_export_is_imported_checked_trained_on_predicted_and_imported_again(tmp_path: Path) -> None:
    write_coco(tmp_path / "pets", [f"{number:02d}" for number in range(6)])
    shown = run_here(tmp_path, "mode=check", "data=folder", "data.root=pets", code=1)
    shown = run_here(tmp_path, *printed_command(shown, "to import"))
    train, check = (printed_command(shown, purpose) for purpose in ("to train", "to check"))
    report = run_here(tmp_path, *check, *SMALL)
    assert "READY" in report.splitlines() and "0 %" in report  # every pixel is scored
    run_here(tmp_path, *train, *TINY_RUN, "trainer.max_steps=2", "data.steps_per_epoch=2", "run_dir=run")
    words = ["mode=predict", "ckpt=run", "trainer=cpu", "predict.scales=[32]", "data.num_workers=0"]
    words += ["predict.save=[coco,label_studio,ids]", "predict.polygon_tolerance=0", "input=pets_masks/images"]
    run_here(tmp_path, *words, "run_dir=out")
    assert (tmp_path / "out/label_studio.xml").is_file()
    again = ["mode=import", "input=out/coco.json", "output=again", "import.images=pets/images"]
    run_here(tmp_path, *again)
    names = (tmp_path / "again/classes.csv").read_text().split()
    assert [row.split(",")[1] for row in names[1:3]] == ["cat", "dog"]
    for name, mask in masks_of(tmp_path / "again").items():
        assert np.array_equal(mask, read_label(tmp_path / "out" / f"{name}_ids.png"))


@pytest.mark.slow
def test_masks_beside_the_images_need_no_import(tmp_path: Path) -> None:
    for name in "abcdefgh":
        put(tmp_path / "beside" / f"{name}.jpg", photo(name))
        put(tmp_path / "beside" / f"{name}_mask.png", png(expected()))
    shown = run_here(tmp_path, "mode=check", "data=folder", "data.root=beside", "data.num_classes=3", *SMALL)
    assert "READY" in shown.splitlines()
    words = [word for word in shlex.split(shown.splitlines()[-1]) if word.startswith("data.")]
    assert {"data.train.images=.", "data.train.masks=.", "data.mask_suffix=_mask"} <= set(words)
    assert f"│ {HEIGHT}" in shown and f"│ {WIDTH}" in shown


def test_the_description_in_a_folder_is_used_beneath_the_keys_of_the_command_line(tmp_path: Path) -> None:
    root = tmp_path / "my data"
    put(root / "classes.csv", "index,name,R,G,B\n0,cat,1,2,3\n1,dog,4,5,6\n")
    put(
        root / "semseg.yaml", yaml.safe_dump({"name": "pets", "classes": "classes.csv", "train": {"list": "train.csv"}})
    )
    data = load_config(["data=folder", f"data.root={root}", "data.val_fraction=0.3"])[0].data
    assert (data.name, data.root, data.train.list) == ("pets", str(root), "train.csv") and data.val_fraction == 0.3
    assert load_config(["data=camvid", f"data.root={root}"])[0].data.name == "camvid"
    put(root / "semseg.yaml", "# @package _global_\nrunner: 3\n")
    with pytest.raises(ConfigError, match="runner"):
        parse_overrides(["data=folder", f"data.root={root}"])
    put(root / "semseg.yaml", "# @package _global_\nseed: 3\n")
    with pytest.raises(ConfigError, match=r"semseg\.yaml: sets keys of other sections than data"):
        parse_overrides(["data=folder", f"data.root={root}"])


@pytest.mark.slow
def test_keys_of_the_section_import_are_named_as_they_are_written(tmp_path: Path) -> None:
    config = configured("mode=import", "input=a", "output=b", "import.copy=true", "import.unlabelled=ignore")
    assert config.import_.copy and config.import_.unlabelled == "ignore"
    for word, message in (
        ("import.copyy=true", "There is no key 'import.copyy'. Did you mean import.copy?"),
        ("import.copy=maybe", "error: import.copy=maybe: must be true or false."),
        ("import.format=cocoo", "error: import.format=cocoo: not known. Did you mean import.format=coco?"),
        ("import.line_width=0", "error: import.line_width=0.0: must be above 0"),
        ("import=3", "error: import=3: is a section, not a value. Its keys: import.format"),
    ):
        assert message in run_here(tmp_path, "mode=import", "input=a", "output=b", word, code=2)
    shown = run_here(tmp_path, "mode=import", code=2)
    assert "mode=import needs input=" in shown and "mode=import needs output=" in shown
    assert "input=nowhere: there is no such file or folder" in run_here(
        tmp_path, "mode=import", "input=nowhere", "output=b", code=1
    )
    put(tmp_path / "photos" / "a.jpg", photo("a"))
    shown = run_here(tmp_path, "mode=import", "input=photos", "output=b", code=1)
    assert "no format of an annotation tool is recognised. Known are COCO JSON" in shown
    with zipfile.ZipFile(tmp_path / "photos" / "export.zip", "w") as archive:
        archive.writestr("a.txt", "")
    shown = run_here(tmp_path, "mode=import", "input=photos", "output=b", code=1)
    assert "To read export.zip in it, give input=photos/export.zip." in shown
    shown = run_here(tmp_path, "mode=import", "input=photos", "output=photos/b", code=2)
    assert "output=photos/b: lies in the export" in shown and not (tmp_path / "runs").exists()


def test_photographs_whose_rotation_is_assumed_are_shown(tmp_path: Path) -> None:
    put(tmp_path / "e/a.jpg", photo("a", orientation=3))
    put(tmp_path / "e/a.json", labelme_content("a", [labelme_shape("cat", corners(CAT))]))
    shown = run_here(tmp_path, "mode=import", "input=e", "output=out")
    assert "1 photograph turned by EXIF" in shown and (tmp_path / "out/examples/a.png").is_file()
