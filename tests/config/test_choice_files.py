"""Files anywhere on disk as options of groups: data=plants.yaml, experiment=recipe.yaml."""

from __future__ import annotations

import ntpath
from pathlib import Path
from types import SimpleNamespace

import pytest

from semseg.config import choice_files
from semseg.config.choice_files import split_choice
from semseg.config.compose import compose_with_hydra
from semseg.config.load import load_config
from semseg.config.overrides import RECORD_FOLDER, parse_overrides, record_overrides
from semseg.config.schema import Config
from semseg.errors import ConfigError


def load(*words: str) -> Config:
    return load_config(list(words))[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a folder `sub` for files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_data_file_holds_what_differs_from_a_folder_and_its_paths_start_beside_it(folder: Path) -> None:
    write(folder / "sub" / "plants.yaml", "root: ../photos\nnum_classes: 5\nclasses: null\n")
    data = load("data=sub/plants.yaml", "data.batch_size=3").data
    assert (data.name, data.root, data.num_classes) == ("plants", str(folder / "photos"), 5)
    assert (data.val_fraction, data.train.images, data.batch_size) == (0.1, "images", 3)  # of data=folder; as given
    assert load("data=sub/plants.yaml", "data.root=here").data.root == "here"


def test_a_data_file_without_a_root_describes_its_own_folder(folder: Path) -> None:
    write(folder / "sub" / "my plants.yml", "num_classes: 2\n")
    data = load("data=sub/my plants.yml").data
    assert (data.name, data.root) == ("my plants", str(folder / "sub"))


@pytest.mark.slow
def test_a_data_file_of_images_and_masks_has_its_class_table_beside_it(folder: Path) -> None:
    write(folder / "sub" / "plants.yaml", "images: a\nmasks: /b\nclasses: names.txt\nval: {list: val.csv}\n")
    data = load("data=sub/plants.yaml").data
    beside = folder / "sub"
    assert (data.images, data.masks) == (str(beside / "a"), "/b")
    assert (data.classes, data.val.list) == (str(beside / "names.txt"), str(beside / "val.csv"))


def test_the_further_data_sets_of_a_data_file_start_beside_it_too(folder: Path) -> None:
    text = "num_classes: 2\nmix: [{root: ../more, share: 0.5}, {images: i, masks: m, share: 0.1, classes: c.csv}]\n"
    write(folder / "sub" / "plants.yaml", text)
    first, second = load("data=sub/plants.yaml").data.mix
    assert first == {"root": str(folder / "more"), "share": 0.5}
    assert {second[key] for key in ("images", "masks", "classes")} == {str(folder / "sub" / name) for name in
                                                                      ("i", "m", "c.csv")}  # fmt: skip


def test_a_file_may_name_another_base(folder: Path) -> None:
    write(folder / "streets.yaml", "defaults: [camvid]\nshort_edges: [300]\n")
    data = load("data=streets.yaml").data
    assert (data.name, data.classes, data.short_edges) == ("streets", "camvid", [300])
    assert data.root == "data/camvid"  # of the base, so below the working directory


def test_an_experiment_file_changes_groups_and_keys_and_the_command_line_wins(folder: Path) -> None:
    write(folder / "long.yaml", "defaults:\n  - override /optim: adamw\ntrainer: {max_epochs: 7}\nseed: 1\n")
    config = load("experiment=long.yaml", "seed=2")
    assert (config.optim.name, config.trainer.max_epochs, config.seed) == ("adamw", 7, 2)


def test_a_recipe_has_a_data_set_beside_it_that_other_commands_use_by_its_name(folder: Path) -> None:
    text = "defaults:\n  - override /data: folder\ndata: {root: plants, num_classes: 4}\noptim: {lr: 0.5}\n"
    write(folder / "sub" / "recipe.yaml", text)
    trained, used = load("experiment=sub/recipe.yaml"), load("data=sub/recipe.yaml")
    root = str(folder / "sub" / "plants")
    assert (trained.data.root, trained.data.num_classes, trained.optim.lr) == (root, 4, 0.5)
    assert (used.data.root, used.data.num_classes, used.data.name, used.optim.lr) == (root, 4, "recipe", 0.02)


def test_the_data_set_of_a_recipe_starts_from_that_of_its_defaults(folder: Path) -> None:
    write(folder / "fast.yaml", "defaults:\n  - override /data: camvid\ndata: {short_edges: [200]}\n")
    for words in ("data=fast.yaml", "experiment=fast.yaml"):
        data = load(words).data
        assert (data.classes, data.root, data.short_edges) == ("camvid", "data/camvid", [200])


@pytest.mark.parametrize(("group", "text", "check"), [
    ("optim", "lr: 0.5\n", lambda config: (config.optim.lr, config.optim.momentum) == (0.5, 0.9)),
    ("augment", "blur: 0.5\n", lambda config: config.augment.blur == 0.5),
    ("model/decoder", "name: c1\n", lambda config: config.model.decoder == {"name": "c1"}),
])  # fmt: skip
def test_every_group_takes_files(group: str, text: str, check, folder: Path) -> None:
    write(folder / "mine.yaml", text)
    assert check(load(f"{group}=mine.yaml"))


@pytest.mark.parametrize(
    ("group", "text", "parts"),
    [
        ("data", "num_clases: 5\n", ["data.num_clases", "Did you mean data.num_classes?"]),
        ("data", "train: {imges: a}\n", ["data.train.imges", "data.train.images"]),
        ("data", "num_classes: five\n", ["data.num_classes=five"]),
        ("data", "val_fraction: 2\n", ["data.val_fraction=2"]),
        ("data", "- a\n", ["keys and values"]),
        ("data", "a: [\n", ["cannot be read as YAML"]),
        ("data", "defaults: [camvd]\n", ["Did you mean camvid?"]),
        ("data", "defaults: [other.yaml]\n", ["other.yaml is not an option of configs/"]),
        ("data", "# @package model\nname: x\n", ["@package model"]),
        ("data", "data: {num_clases: 5}\n", ["data.num_clases", "Did you mean data.num_classes?"]),
        ("experiment", "optim: {lrr: 1}\n", ["optim.lrr", "optim.lr?"]),
        ("experiment", "model: upernet50\n", ["- override /model: upernet50"]),
        ("experiment", "hydra: {run: {dir: x}}\n", ["'hydra'"]),
        ("experiment", "defaults: [override /hydra/launcher: x]\n", ["hydra/launcher=x"]),
    ],
)
def test_a_wrong_file_is_named_with_its_mistake(group: str, text: str, parts: list[str], folder: Path) -> None:
    write(folder / "mine.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load(f"{group}=mine.yaml")
    assert str(caught.value).startswith("mine.yaml: ")
    assert all(part in str(caught.value) for part in parts)


def test_a_file_that_does_not_exist_is_named_with_the_file_that_is_similar(folder: Path) -> None:
    write(folder / "facades.yaml", "root: facades\n")
    with pytest.raises(ConfigError, match=r"Did you mean data=facades\.yaml\?"):
        load("data=facades.yml")


def test_a_file_that_does_not_exist_is_named_with_the_option_of_that_name(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data=camvd\.yaml: there is no such file\. Did you mean data=camvid\?"):
        load("data=camvd.yaml")


def test_a_sweep_over_files_and_options_gives_a_job_for_each(folder: Path) -> None:
    for name in ("a", "b c"):
        write(folder / f"{name}.yaml", "num_classes: 2\n")
    overrides = parse_overrides(["-m", "data=a.yaml,camvid,b c.yaml"])
    assert overrides == ["-m", f'data={folder}/a.yaml,camvid,"{folder}/b c.yaml"']
    compose_with_hydra(overrides[1:], sweep=True)


@pytest.mark.slow
def test_a_recorded_command_line_needs_neither_the_files_nor_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(folder / "sub" / "plants.yaml", "root: ../photos\nnum_classes: 5\n")
    experiment = write(folder / "long.yaml", "defaults:\n  - override /optim: adamw\nseed: 1\n")
    before, overrides = load_config(["data=sub/plants.yaml", "experiment=long.yaml", "data.flip=false"])
    record = record_overrides(overrides)
    for name, text in record.items():
        (folder / "run" / RECORD_FOLDER).mkdir(parents=True, exist_ok=True)
        write(folder / "run" / RECORD_FOLDER / name, text)
    for path in (data, experiment):
        path.unlink()
    monkeypatch.chdir(folder / "sub")
    after, again = load_config(["mode=rerun", "run=../run"])
    assert (after.data, after.optim, after.seed) == (before.data, before.optim, 1)
    assert record_overrides(again) == record  # a repetition of a repetition


def test_a_file_of_windows_is_the_option_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its absolute path starts with a drive, and not with a slash."""
    path = r"C:\Users\me\plants.yaml"
    assert split_choice(f"data/{path}") is None
    monkeypatch.setattr(choice_files, "os", SimpleNamespace(path=ntpath))
    assert split_choice(f"data/{path}") == ("data", path)
    assert split_choice(f"model/encoder/{path}") == ("model/encoder", path)
    assert split_choice("data/ade20k.yaml") is None
