"""What mode=check suggests: the commands that check again and train, and the recipe that it writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from semseg.checkpoints.network import build_network, without_weights
from semseg.checks.dataset import Diagnosis, ScannedSplit
from semseg.checks.description import describe_data_set
from semseg.checks.objects import MIN_OBJECTS, summarise_objects, view_of
from semseg.checks.recipe import (
    BASE_RECIPE,
    REPLACING_KEYS,
    DataFacts,
    Machine,
    choose_settings,
    make_recipe,
)
from semseg.config.load import load_config
from semseg.config.override_keys import list_given_keys, override_key
from semseg.config.preprocessing import RGB
from semseg.config.recipes import find_experiment, list_chosen_options, read_recipe
from semseg.config.schema import FINE_STRIDE, Config, DataConfig, config_to_plain, flatten_sections
from semseg.config.uses import find_idle_data_keys, refuse_idle_keys
from semseg.data.bands import BandOptions
from semseg.data.classes import ClassTable
from semseg.data.crops import NATIVE
from semseg.data.geometry import Size, canvas_size
from semseg.data.label_map import LabelMap
from semseg.errors import ConfigError
from semseg.nets.interfaces import SegmentationNetwork
from semseg.nets.meta import build_on_meta
from semseg.nets.step_memory import estimate_step_memory
from semseg.storage.commands import format_command, relative_to_cwd
from semseg.system.memory import get_total_memory

ASSUMED_MEMORY = 8 * 2**30  # bytes, of a machine that does not say how much it has
PLACE_KEYS = ("data.images", "data.masks")  # which lists cannot stand beside
RECIPE_RATES = ("optim.lr", "optim.lr_encoder")
OWN_WORDS = ("mode=", "check.", "run_dir=", "output=")  # beginnings of overrides that are for the check alone


def training_command(overrides: Sequence[str], suggestions: dict[str, str], output: Path | None) -> str:
    """The command that trains with all suggestions; what `output` holds is left out if it is given."""
    words = apply_suggestions(overrides, suggestions)
    if output is not None:
        words = [f"experiment={relative_to_cwd(output)}", *leave_out_data(overrides)]
    return format_command(words)


def check_command(overrides: Sequence[str], diagnosis: Diagnosis) -> str:
    """The command that checks again, with all suggestions."""
    own = [word for word in overrides if word.startswith(OWN_WORDS) and not word.startswith("mode=")]
    return format_command(["mode=check", *apply_suggestions(overrides, diagnosis.suggestions), *own])


def leave_out_data(overrides: Sequence[str]) -> list[str]:
    """The overrides that are neither about the data set nor for the check alone."""
    return [
        word
        for word in overrides
        if not word.startswith((*OWN_WORDS, "experiment=")) and override_key(word).partition(".")[0] != "data"
    ]


def apply_suggestions(overrides: Sequence[str], suggestions: dict[str, str]) -> list[str]:
    """The overrides of a run on the checked data set, with suggestions in place of those with the same keys.

    Lists take the place of folders, and of all else that says where images are.
    """
    kept = [word for word in overrides if not word.startswith(OWN_WORDS) and override_key(word) not in suggestions]
    suggested = [f"{key}={value}" for key, value in suggestions.items()]
    if any(key.endswith(".list") for key in suggestions):
        kept = [word for word in kept if "data.train.list" not in suggestions or override_key(word) not in PLACE_KEYS]
        idle = dict(find_idle_data_keys(load_config(["mode=check", *kept, *suggested])[0].data))
        kept = [word for word in kept if override_key(word) not in idle]
    return [*kept, *suggested]


def describe_checked_data(overrides: Sequence[str], suggestions: dict[str, str], output: Path) -> dict[str, Any]:
    """The section `data` of the recipe: the data set with all suggestions."""
    words = ["mode=check", *apply_suggestions(overrides, suggestions)]
    data, base = (load_config(each)[0].data for each in (words, ["data=folder"]))
    return describe_data_set(data if data.name != base.name else replace(data, name=output.stem), base, output)


def collect_facts(
    data: DataConfig, diagnosis: Diagnosis, train: ScannedSplit, label_map: LabelMap, classes: ClassTable
) -> DataFacts:
    """What a recipe is chosen by."""
    sizes = [Size(facts.height, facts.width) for _, facts in train.usable_pairs]
    objects = summarise_objects(train, label_map.class_index, classes.names, view_of(data, FINE_STRIDE))
    sides = {each.name: each.median_side for each in objects if each.num_objects >= MIN_OBJECTS}
    shares = [row.share for row in diagnosis.classes]
    return DataFacts(sizes, shares, sides, len(data.band_names) == len(RGB), set(RGB) <= set(data.band_names))


def choose_recipe(
    config: Config, overrides: Sequence[str], diagnosis: Diagnosis, facts: DataFacts, output: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """The content of `output`, and the reason of each of its settings by key."""
    data = describe_checked_data(overrides, diagnosis.suggestions, output)
    others = leave_out_data(overrides)
    chosen = find_experiment(overrides)
    base = read_recipe(chosen or BASE_RECIPE)
    network, is_given = compose_network(others, chosen or BASE_RECIPE)
    net = build_meta_network(network, len(diagnosis.classes))

    def estimate_memory(size: Size, batch_size: int) -> int | None:
        canvas = net.image_size or canvas_size([size], net.size_divisor)
        memory = estimate_step_memory(net, canvas, batch_size)
        return None if memory is None else memory.with_momentum

    given = list_given_keys(overrides)
    if config.data.resize == NATIVE or "data.resize" in given:
        facts = facts._replace(given_resize=config.data.resize)
    described = dict(flatten_sections({"data": data}))
    given_data = [key for key in (*described, *given) if key.startswith("data.") and key not in diagnosis.suggestions]
    if "data.short_edges" in given_data:
        facts = facts._replace(given_edge=max(config.data.short_edges))
    decided = [*given_data, *list_decided_keys(others)]
    batch_size = data.get("batch_size")
    facts = facts._replace(
        given_batch=batch_size if isinstance(batch_size, int) else None,  # auto is resolved by each run
        given_epochs=config.trainer.max_epochs if "trainer.max_epochs" in decided else None,
        epoch_steps=data.get("steps_per_epoch"),
        max_steps=config.trainer.max_steps,
    )
    rates = {key: value for key, value in flatten_sections(base) if key in RECIPE_RATES and not chosen}
    others = [word for word in others if word != "optim.lr=auto"]  # which is computed from the rate of the recipe
    if "optim.lr" in list_given_keys(others):
        rates.pop("optim.lr", None)
    machine = measure_machine(config)
    if list_chosen_options(base).get("model/encoder") != "timm":
        machine = machine._replace(has_timm=True)  # nothing has to take its place
    choices = choose_settings(facts, machine, rates, estimate_memory)
    if net.image_size is not None:  # the network's size is that of the crops
        choices = [choice for choice in choices if choice.key not in ("data.crop", "augment.crop")]
    decided += ["model"] if is_given else []
    recipe, reasons = make_recipe(choices, {"name": output.stem, **data}, base, decided)
    return recipe, dict.fromkeys(diagnosis.suggestions, "suggested by the check of all files") | reasons


def compose_network(overrides: Sequence[str], experiment: str) -> tuple[Config, bool]:
    """The configuration whose network trains with these overrides, and whether they choose it, not the experiment."""
    words = ["data=folder", "data.num_classes=2", *overrides]
    if REPLACING_KEYS.isdisjoint(list_given_keys(overrides)):
        with suppress(ConfigError):  # for keys of another network, which the experiment's does not have
            config = load_config([f"experiment={experiment}", *words])[0]
            refuse_idle_keys(config, overrides)
            return config, False
    return load_config(words)[0], True


def list_decided_keys(overrides: Sequence[str]) -> Iterator[str]:
    """The keys that overrides decide: of trainer=<option>, which says where to train, those that the option changes."""
    for key, word in zip(map(override_key, overrides), overrides, strict=True):
        if key != "trainer":
            yield key
            continue
        default, chosen = (
            dict(flatten_sections({"trainer": config_to_plain(load_config(words)[0])["trainer"]}))
            for words in (["data=folder", "data.num_classes=2"], ["data=folder", "data.num_classes=2", word])
        )
        yield from (name for name, value in chosen.items() if default.get(name) != value)


def build_meta_network(config: Config, num_classes: int, bands: BandOptions | None = None) -> SegmentationNetwork:
    """The network on the meta device, in training mode."""
    model = without_weights(config.model)
    return build_on_meta(lambda: build_network(model, num_classes, config.download, bands)).train()


def measure_machine(config: Config) -> Machine:
    """The device that trains with this configuration, and its memory."""
    has_timm = find_spec("timm") is not None
    if torch.cuda.is_available() and config.trainer.accelerator in ("auto", "gpu", "cuda"):
        return Machine(True, torch.cuda.get_device_properties(0).total_memory, has_timm)
    return Machine(False, get_total_memory() or ASSUMED_MEMORY, has_timm)
