"""What mode=check chooses for a data set and a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from semseg.checks.recipe import (
    BASE_RECIPE,
    DataFacts,
    Machine,
    choose_settings,
    make_recipe,
    write_recipe,
)
from semseg.config.groups import CONFIG_DIR
from semseg.config.load import load_config
from semseg.config.recipes import list_chosen_options, read_recipe
from semseg.data.geometry import Size
from semseg.errors import ConfigError

CPU, GPU = Machine(False, 16 * 2**30), Machine(True, 80 * 2**30)
STREET = DataFacts([Size(360, 480)] * 367, [0.3, 0.6, 0.1], {"pole": 12.0})
DEFECTS = DataFacts([Size(2000, 3000)] * 100, [0.999, 0.001], {"scratch": 9.0})


def memory(canvas: Size, batch_size: int) -> int:
    return canvas.height * canvas.width * batch_size * 3000


def choose(facts: DataFacts, machine: Machine = CPU) -> dict[str, Any]:
    return {choice.key: choice.value for choice in choose_settings(facts, machine, {"optim.lr": 0.003}, memory)}


def test_photographs_are_resized_to_edges_that_a_cpu_can_train() -> None:
    chosen = choose(STREET)
    assert chosen["data.resize"] == "short_edge" and "data.crop" not in chosen
    assert (chosen["data.short_edges"], chosen["eval.scales"]) == ([360], [360])
    assert (chosen["augment.scale"], chosen["augment.crop"]) == ([0.5, 2.0], [320, 320])
    assert chosen["data.max_long_edge"] == 480
    assert (chosen["data.batch_size"], chosen["optim.lr"], chosen["trainer.max_epochs"]) == (4, 0.003, 22)


def test_a_gpu_gets_larger_images_larger_batches_and_more_passes() -> None:
    chosen = choose(DataFacts([Size(1080, 1920)] * 367, [0.5, 0.5], {}), GPU)
    assert (chosen["eval.scales"], chosen["data.short_edges"], chosen["augment.crop"]) == ([512], [512], [448, 448])
    assert (chosen["data.batch_size"], chosen["optim.lr"]) == (16, 0.006)  # four times the batch, twice the rate
    assert chosen["trainer.max_epochs"] == 200 and chosen["ema.decay"] == 0.99  # 4400 steps
    assert chosen["ema.start_step"] == 2200


def test_what_was_given_decides_what_is_computed_from_it() -> None:
    chosen = choose(STREET._replace(given_epochs=10))  # 10 x 91 steps
    assert (chosen["trainer.max_epochs"], chosen["trainer.check_val_every_n_epoch"]) == (10, 1)
    assert (chosen["schedule.warmup_steps"], chosen["ema.start_step"]) == (45, 455)
    chosen = choose(STREET._replace(given_batch=2))
    assert (chosen["data.batch_size"], chosen["optim.lr"], chosen["ema.start_step"]) == (2, 0.00212, 11 * 183)
    chosen = choose(STREET._replace(epoch_steps=1000))  # as many steps as without
    assert (chosen["trainer.max_epochs"], chosen["ema.start_step"]) == (2, 1000)
    assert choose(STREET._replace(max_steps=100))["schedule.warmup_steps"] == 5


def test_a_batch_fits_in_the_memory_and_no_image_is_twice_in_it() -> None:
    assert choose(STREET, Machine(False, 2**30))["data.batch_size"] == 1
    assert choose(DataFacts([Size(60, 80)] * 9, [1.0], {}), GPU)["data.batch_size"] == 2


def test_small_objects_in_large_images_keep_their_pixels() -> None:
    chosen = choose(DEFECTS)
    assert (chosen["data.resize"], chosen["data.crop"], chosen["data.crop_foreground"]) == ("native", [512, 512], 0.33)
    assert "data.short_edges" not in chosen and "eval.scales" not in chosen
    reasons = {choice.key: choice.reason for choice in choose_settings(DEFECTS, CPU, {}, memory)}
    assert "half of the objects of scratch would have less than 1.6 pixels a side" in reasons["data.resize"]
    large = DEFECTS._replace(object_sides={"scratch": 200.0})
    assert choose(large)["data.resize"] == "short_edge"


@pytest.mark.parametrize(("resize", "preset"), [("native", "microscopy"), ("short_edge", "none")])
def test_bands_without_colours_get_a_preset_that_leaves_them_alone(resize: str, preset: str) -> None:
    radar = STREET._replace(given_resize=resize, has_three_bands=False, has_colours=False)
    assert choose(radar)["augment"] == preset
    options = load_config([f"augment={preset}", "data=folder", "data.num_classes=2"])[0].augment
    assert not any((options.brightness, options.contrast, options.saturation, options.hue))


def test_the_resolution_and_the_crop_that_were_given_are_kept(tmp_path: Path) -> None:
    choices = choose_settings(STREET._replace(given_resize="native"), CPU, {}, memory)
    content, reasons = make_recipe(
        choices, {"root": "photos", "resize": "native"}, read_recipe(BASE_RECIPE), ["data.resize"]
    )
    assert reasons["data.resize"] == "as it was given"
    assert content["data"]["crop"] == [384, 480] and "short_edges" not in content["data"] and "augment" not in content
    resized = choose_settings(DEFECTS._replace(given_resize="short_edge"), CPU, {}, memory)
    assert {choice.key for choice in resized} >= {"data.short_edges", "augment.crop"}
    assert "data.crop" not in {choice.key for choice in resized}
    for given in ("data.crop", "augment.crop"):
        for facts in (STREET, DEFECTS):
            content, _ = make_recipe(choose_settings(facts, CPU, {}, memory), {}, read_recipe(BASE_RECIPE), [given])
            assert "crop" not in content["data"] and "crop" not in content.get("augment", {})


def test_crops_at_native_resolution_keep_the_size_of_objects() -> None:
    content, _ = make_recipe(
        choose_settings(DEFECTS, CPU, {}, memory), {"root": "photos"}, read_recipe(BASE_RECIPE), []
    )
    assert "augment" not in content  # the preset alone


def test_without_timm_the_encoder_is_one_of_torchvision() -> None:
    assert "model/encoder" not in choose(STREET)
    assert choose(STREET, CPU._replace(has_timm=False))["model/encoder"] == "torchvision"


@pytest.fixture
def recipe() -> tuple[dict[str, Any], dict[str, str]]:
    choices = choose_settings(STREET, CPU, {"optim.lr": 0.003}, memory)
    return make_recipe(choices, {"name": "a", "root": "photos", "num_classes": 3}, read_recipe(BASE_RECIPE), [])


def test_the_file_trains_what_was_chosen_and_is_a_data_set_too(
    recipe: tuple[dict[str, Any], dict[str, str]], tmp_path: Path
) -> None:
    content, reasons = recipe
    file = tmp_path / "sub" / "a.yaml"
    write_recipe(file, content, reasons, "python run.py experiment=a.yaml")
    assert yaml.safe_load(file.read_text()) == content
    lines = file.read_text().splitlines()
    assert all("  # " in line for line in lines if line.strip().startswith(("batch_size:", "short_edges:", "lr:")))
    config = load_config([f"experiment={file}"])[0]
    assert (config.data.root, config.data.short_edges) == (str(tmp_path / "sub" / "photos"), [360])
    assert (config.optim.name, config.optim.lr, config.eval.scales) == ("adamw", 0.003, [360])
    assert load_config([f"data={file}"])[0].data == config.data
    write_recipe(file, content, reasons, "")  # the same content
    with pytest.raises(ConfigError, match="exists with another content"):
        write_recipe(file, {**content, "seed": 1}, reasons, "")


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_can_be_the_base(path: Path, tmp_path: Path) -> None:
    choices = choose_settings(STREET, CPU, {}, memory)
    data = {"name": "a", "root": "photos", "num_classes": 3}
    content, reasons = make_recipe(choices, data, read_recipe(path.stem), [])
    file = tmp_path / "a.yaml"
    write_recipe(file, content, reasons, "python run.py experiment=a.yaml", path.stem)
    assert f"are those of experiment={path.stem}" in file.read_text()
    config = load_config([f"experiment={file}"])[0]
    assert (config.data.root, config.data.num_classes) == (str(tmp_path / "photos"), 3)
    assert config.run_dir.endswith("_train") and (config.after_training, config.input) == ([], None)
    assert config.optim.lr == load_config([f"experiment={path.stem}", "data=folder", "data.num_classes=3"])[0].optim.lr


def test_recipes_may_start_from_another_one_or_be_empty(tmp_path: Path) -> None:
    (tmp_path / "mine.YAML").write_text("# @package _global_\ndefaults: [own_data, _self_]\noptim: {lr: 1e-4}\n")
    recipe = read_recipe(str(tmp_path / "mine.YAML"))
    assert list_chosen_options(recipe)["model/encoder"] == "timm" and recipe["model"]["label_stride"] == 2
    assert (recipe["optim"]["lr"], recipe["optim"]["lr_encoder"]) == (1e-4, 0.0005)
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert read_recipe(str(tmp_path / "empty.yaml")) == {"defaults": []}
    assert read_recipe("[own_data]") == read_recipe("own_data")
    several = read_recipe("[own_data,quickstart]")
    assert list_chosen_options(several)["data"] == "scenes" and several["schedule"]["warmup_steps"] == 20
    assert several["optim"]["lr"] == read_recipe("own_data")["optim"]["lr"]


def test_short_edges_that_were_given_decide_the_crop_and_the_scale_of_evaluation() -> None:
    chosen = {choice.key: choice.value for choice in choose_settings(STREET._replace(given_edge=512), CPU, {}, memory)}
    assert (chosen["eval.scales"], chosen["augment.crop"]) == ([512], [448, 448])
    assert "optim.lr_images" not in chosen


def test_a_file_with_its_own_values_first_can_be_the_base(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# @package _global_\ndefaults:\n  - _self_\n  - override /optim: adamw\nseed: 3\n")
    content, _ = make_recipe(choose_settings(STREET, CPU, {}, memory), {}, read_recipe(str(file)), [])
    assert content["seed"] == 3 and {"override /optim": "adamw"} in content["defaults"]


def test_what_the_user_set_is_left_to_the_command_line() -> None:
    choices = choose_settings(STREET, CPU, {"optim.lr": 0.003}, memory)
    given = ["model=upernet50", "trainer.max_epochs=3", "augment=none", "data.batch_size=2"]
    content, _ = make_recipe(choices, {"root": "photos", "batch_size": 2}, read_recipe(BASE_RECIPE), given)
    groups = [next(iter(entry)).removeprefix("override /") for entry in content["defaults"]]
    assert groups == ["data", "optim", "schedule", "loss"]
    assert content["model"] == {"channels_last": True}
    assert content["data"]["batch_size"] == 2 and "max_epochs" not in content["trainer"]
