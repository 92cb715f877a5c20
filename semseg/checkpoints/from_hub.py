"""Trained networks of transformers as `ckpt`: hf:<owner>/<name>[@<revision>], or a folder of their layout."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from semseg.checkpoints.initialise import is_counter, shorten_names
from semseg.config.compose import compose_config
from semseg.config.origin import WeightsOrigin
from semseg.config.preprocessing import Preprocessing
from semseg.config.schema import BUILT_IN_CLASSES, HUB_PREFIX, DataConfig, DownloadConfig, ModelConfig
from semseg.config.validate import check_config
from semseg.data.classes import ClassTable, built_in_classes
from semseg.errors import CheckpointError, ConfigError, suggest
from semseg.storage.hub import CONFIG, HubFolder, fetch_from_hub, is_network_folder, open_local_folder, parse_hub_name
from semseg.storage.hub_list import HUB_ZOO
from semseg.system.text import shorten_repr

if TYPE_CHECKING:  # an extra
    from semseg.nets.libraries.transformers import NetworkDescription

MIN_SAME_NAMES = 0.8  # share of the names of a table that makes it the table of a built-in data set


def is_on_hub(spec: str) -> bool:
    """Whether `ckpt=spec` names a network of the hub, or a folder in transformers' layout."""
    return spec.startswith(HUB_PREFIX) or is_network_folder(Path(spec).expanduser())


def open_hub_folder(spec: str, download: DownloadConfig) -> HubFolder:
    """The files that `hf:<owner>/<name>[@<revision>]`, or a folder, means.

    Raises:
        ConfigError: for another form of name, with the nearest one of the zoo, and if the library is not installed.
        DownloadError, CheckpointError: if the files cannot be had.
    """
    if not spec.startswith(HUB_PREFIX):
        return open_local_folder(Path(spec).expanduser())
    name = spec.removeprefix(HUB_PREFIX)
    try:
        return fetch_from_hub(parse_hub_name(name), download)
    except ConfigError as error:
        hint = suggest(name, HUB_ZOO, prefix="zoo:")
        raise ConfigError(f"{error}{hint}") from None


class TrainedNetwork(NamedTuple):
    """A network of the hub with everything that is needed to use it."""

    source: str
    weights: dict[str, Tensor]
    model: ModelConfig  # rebuilds the network without its files
    data: DataConfig  # the data set whose classes it has
    classes: ClassTable
    convention: Preprocessing
    origin: WeightsOrigin
    note: str  # what it is, in one line


def read_from_hub(spec: str, download: DownloadConfig, data: DataConfig) -> TrainedNetwork:
    """A trained network of the hub, or of a folder in transformers' layout.

    Its classes have the colours of the data set whose names they have.

    Args:
        download: whether a connection may be opened, and for how long it waits.
        data: the data set if its classes are those of the network.

    Raises:
        ConfigError, DownloadError, CheckpointError: if it cannot be had, or is not a trained network for semantic
            segmentation.
    """
    files = open_hub_folder(spec, download)
    try:
        from semseg.checkpoints.hub import read_hub_weights  # noqa: PLC0415 - an extra
        from semseg.nets.libraries.description import read_description  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(f"{spec}: needs the package {error.name}.") from error
    source = f"{HUB_PREFIX}{files.origin.source}@{files.origin.revision}" if spec.startswith(HUB_PREFIX) else spec
    check_task(files.path, source)
    network = read_description(files)
    weights, unused = read_hub_weights(network)
    problem = find_missing(network, list(weights))
    if problem:
        raise CheckpointError(f"{source}: {problem}{describe_start(network)}")
    data_name, classes = choose_class_table(network.class_names)
    model = ModelConfig(
        library="transformers",
        name=network.origin.source,
        revision=network.origin.revision or None,
        config=network.config,
        encoder={"weights": "none", "frozen": False},
    )
    return TrainedNetwork(
        source,
        weights,
        model,
        choose_data(network, data_name, data),
        classes,
        network.convention,
        network.origin,
        describe(network, source, data_name, unused),
    )


def check_task(folder: Path, source: str) -> None:
    """Refuse a network of another task, by the class of transformers that its configuration names.

    Raises:
        CheckpointError: with that class.
    """
    from semseg.nets.libraries.families import ALL_FAMILIES  # noqa: PLC0415 - an extra

    try:
        plain: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        names = [str(name) for name in plain.get("architectures") or ()]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return  # reported where it is read
    known = {family.class_name for family in ALL_FAMILIES.values()}
    if not names or known & set(names):
        return
    way_out = "Choose another network: mode=models lists some."
    if plain.get("model_type") in ALL_FAMILIES:
        way_out = "To train one from it: model=transformers model.name=<its name>."
    raise CheckpointError(f"{source}: is a {shorten_repr(names[0])}, not trained for semantic segmentation. {way_out}")


def find_missing(network: NetworkDescription, names: Sequence[str]) -> str | None:
    """A sentence if weights of the network are not in its files; they would be random."""
    from semseg.nets.libraries.families import build_from_config  # noqa: PLC0415 - an extra

    with torch.device("meta"):
        expected = build_from_config(network.config, len(network.class_names)).state_dict()
    missing = [name for name in expected if name not in set(names) and not is_counter(name)]
    return f"lacks {len(missing)} weights of its network ({shorten_names(missing)})." if missing else None


def describe_start(network: NetworkDescription) -> str:
    """What can be done with a network of which only a part was trained."""
    return f" It is a start for training: model=transformers model.name={network.origin.source}."


def choose_class_table(names: Sequence[str]) -> tuple[str | None, ClassTable]:
    """The built-in data set that has these names, with its table; or a table of the names with generated colours."""
    own = [normalise_name(name) for name in names]
    for data_name in BUILT_IN_CLASSES:
        table = built_in_classes(data_name)
        same = sum(normalise_name(name) == found for name, found in zip(table.names, own, strict=False))
        if table.num_classes == len(own) and same >= MIN_SAME_NAMES * len(own):
            return data_name, table
    return None, ClassTable.from_names(names)


def normalise_name(name: str) -> str:
    """The first word of a name, to compare names of different spellings.

    >>> normalise_name("Bed "), normalise_name("screen door;screen")
    ('bed', 'screendoor')
    """
    return re.sub(r"[^a-z0-9]", "", re.split("[,;]", name.lower())[0])


def choose_data(network: NetworkDescription, data_name: str | None, given: DataConfig) -> DataConfig:
    """The data set of the network: the given one if it is that, that of configs/data/, or one without files."""
    if data_name is None:
        reduces = network.reduces_labels
        return DataConfig(
            name=network.origin.source,
            num_classes=len(network.class_names),
            first_id=1 if reduces else 0,
            ignore=[0] if reduces else [],
        )
    if given.classes == data_name:
        return given
    return check_config(compose_config([f"data={data_name}"])).data


def describe(network: NetworkDescription, source: str, data_name: str | None, unused: Sequence[str]) -> str:
    """One line with the kind of the network, its classes, and what of its files is not used."""
    classes = f"{len(network.class_names)} classes{f' of {data_name}' if data_name else ''}"
    left = f"; not used: {len(unused)} weights ({shorten_names(list(unused))})" if unused else ""
    return f"{source}: {network.config.get('model_type')}, {classes}{left}"
