"""Stage 5: what the files of a network of transformers say about it: configuration, class names, preprocessing.

semseg/storage/hub.py finds the files, in a folder, in the cache of the hub or on the hub; semseg/checkpoints/hub.py
reads the weights. Only JSON is read here, and no code of a file is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from semseg.config.preprocessing import Preprocessing
from semseg.config.schema import DownloadConfig
from semseg.errors import CheckpointError, ConfigError, describe_reason, suggest
from semseg.nets.interfaces import NetworkKeys
from semseg.nets.libraries.families import build_from_config, find_family, read_library_config
from semseg.nets.libraries.transformers import NetworkDescription, TransformersNetwork, plain_config
from semseg.storage.hub import CONFIG, PROCESSORS, HubFolder, fetch_from_hub, open_local_folder, parse_hub_name
from semseg.storage.ranks import print_once
from semseg.system.text import shorten_repr

MAX_JSON_BYTES = 64 * 2**20
FIXED_ENTRIES = ("model_type", "backbone_config", "num_labels")  # what no option changes


def describe_hub_network(
    name: str, revision: str | None = None, download: DownloadConfig | None = None
) -> NetworkDescription:
    """Read the description of a network; its files are fetched if they are neither a folder nor in the hub's cache.

    Args:
        name: of the hub, or a local folder with config.json and model.safetensors.
        revision: a branch, tag or commit of the hub; None: `main`.

    Raises:
        CheckpointError: if a file is missing or damaged, or the network is of an unsupported family.
        DownloadError: if the hub cannot be reached or refuses.
        ConfigError: if the package transformers is not installed.
    """
    return read_description(locate_files(name, revision, download or DownloadConfig()))


def read_description(files: HubFolder) -> NetworkDescription:
    """Read the description of the network in a folder; see `describe_hub_network`."""
    folder, origin = files
    source = f"{origin.source}@{origin.revision[:8]}" if origin.revision else origin.source
    plain = read_json(folder / CONFIG, source)
    try:
        family = find_family(plain.get("model_type"), f"{source}: {CONFIG}")
        names = read_class_names(plain)
        config = plain_config(read_library_config(plain, len(names)))
    except ConfigError as error:
        raise CheckpointError(error_with_source(error, source)) from error
    processor = read_processor(folder, source)
    if processor is None:
        print_once(
            f"{source}: has no {PROCESSORS[0]}; mean {list(family.convention.mean)} and standard deviation "
            f"{list(family.convention.std)} are those of its family"
        )
    convention = read_convention(processor or {}, family.convention, source)
    reduces_labels = any((processor or {}).get(key) is True for key in ("do_reduce_labels", "reduce_labels"))
    return NetworkDescription(folder, origin, config, names, convention, reduces_labels)


def error_with_source(error: ConfigError, source: str) -> str:
    text = str(error)
    return text if text.startswith(source) else f"{source}: {text}"


# ---- the files


def locate_files(name: str, revision: str | None, download: DownloadConfig) -> HubFolder:
    """The folder with the files of a network, and where they come from.

    Raises:
        CheckpointError: if there is no such folder, or files are missing.
        DownloadError: if they cannot be fetched.
        ConfigError: for a revision of a folder, for no name at all, and if the package is not installed.
    """
    if not name:
        raise ConfigError("model.name: give the name of a network of the Hugging Face hub, or a local folder.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision:
            raise ConfigError(f"model.revision={revision}: {name} is a folder, which has no revisions. Leave it out.")
        return open_local_folder(folder)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"model.name={name}: there is no such folder, and it is no name of the Hugging Face hub, such as "
            "nvidia/segformer-b0-finetuned-ade-512-512."
        )
    hub_name = parse_hub_name(f"{name}@{revision}" if revision else name)
    return fetch_from_hub(hub_name, download)


def read_json(path: Path, source: str) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        CheckpointError: if it is missing, or holds anything else.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError("larger than 64 MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: {path.name} cannot be read ({describe_reason(error)}).") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{source}: {path.name} holds a {type(content).__name__}, expected an object.")
    return content


# ---- what the files say


def read_class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes by index, from id2label; without it, numbered ones.

    Raises:
        ConfigError: if id2label does not number the classes from 0.

    >>> read_class_names({"id2label": {"1": "sky", "0": "wall"}})
    ('wall', 'sky')
    """
    names = config.get("id2label")
    if names is None:
        count = config.get("num_labels", 2)  # as transformers
        if type(count) is not int or not 0 < count < 2**15:
            raise ConfigError(f"its num_labels is {shorten_repr(count)}.")
        return tuple(f"LABEL_{index}" for index in range(count))
    try:
        by_index = {int(index): str(name) for index, name in names.items()}
    except (AttributeError, ValueError, TypeError):
        raise ConfigError(f"its id2label is damaged ({shorten_repr(names)}).") from None
    if not by_index or sorted(by_index) != list(range(len(by_index))):
        raise ConfigError(f"its id2label does not number its classes from 0 to {len(by_index) - 1}.")
    return tuple(by_index[index] for index in range(len(by_index)))


def read_processor(folder: Path, source: str) -> dict[str, Any] | None:
    """The settings of the image processor; None if no file has them."""
    for name in PROCESSORS:
        if (folder / name).is_file():
            content = read_json(folder / name, source)
            inner = content.get("image_processor")
            if isinstance(inner, dict):
                return inner
            if name == PROCESSORS[0]:
                return content
    return None


def read_convention(processor: Mapping[str, Any], default: Preprocessing, source: str) -> Preprocessing:
    """The preprocessing of pixel values that the settings of an image processor describe.

    Args:
        default: of the family, for settings that are missing. A family with BGR pixels has no normalisation.

    Raises:
        CheckpointError: if a value is damaged.
    """
    is_flipped = processor.get("do_flip_channel_order", default.channel_order == "bgr")
    factor = processor.get("rescale_factor", 1 / 255)
    scale = factor if processor.get("do_rescale", True) else 1.0
    mean, std = processor.get("image_mean"), processor.get("image_std")
    is_normalised = processor.get("do_normalize", default.std != (1.0, 1.0, 1.0))
    plain = {
        "channel_order": "bgr" if is_flipped else "rgb",
        "scale": scale,
        "mean": as_channels(default.mean if mean is None else mean) if is_normalised else [0.0] * 3,
        "std": as_channels(default.std if std is None else std) if is_normalised else [1.0] * 3,
        "antialias": True,
    }
    try:
        return Preprocessing.from_plain(plain)
    except ValueError as error:
        raise CheckpointError(f"{source}: its image processor is damaged: {error}.") from None


def as_channels(value: Any) -> Any:
    """A value for each channel, of one or of three numbers."""
    return [value] * 3 if isinstance(value, int | float) else list(value) if isinstance(value, tuple) else value


# ---- the network


def build_transformers(num_classes: int, keys: NetworkKeys) -> TransformersNetwork:
    """The network that model.name names, or that of a checkpoint (model.config), with initial weights.

    `description` of the network is what its files say; None for that of a checkpoint, which needs none.

    Raises:
        ConfigError: for a family, a variant or an option that transformers does not have.
        CheckpointError: if a file is missing or damaged.
        DownloadError: if the files cannot be fetched.
    """
    unknown = [f"model.encoder.{key}" for key in keys.encoder_options]
    if keys.arch:
        unknown.append("model.arch")
    if unknown:
        raise ConfigError(f"{unknown[0]}: model=transformers has no such key; model.name names the whole network.")
    if keys.config:
        return build_from_config(change_config(keys.config, keys.options), num_classes)
    if keys.download is None:
        raise ConfigError(f"model.name={keys.name}: is described by files, which are not read here.")
    description = describe_hub_network(keys.name, keys.revision, keys.download)
    plain = change_config(description.config, keys.options)
    net = build_from_config(plain, num_classes, description.convention, description.source)
    net.description, net.revision = description, description.origin.revision or None
    return net


def change_config(plain: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of transformers with other values for some of its entries (model.options).

    Raises:
        ConfigError: for an entry that it does not have, with the nearest one, and for a value of another kind.
    """
    for name, value in options.items():
        if name not in plain or name in FIXED_ENTRIES:
            hint = suggest(name, [key for key in plain if key not in FIXED_ENTRIES], prefix="model.options.")
            raise ConfigError(
                f"model.options.{name}: the configuration of {plain.get('model_type')} has no such entry that can be "
                f"set.{hint}"
            )
        if not is_same_kind(value, plain[name]):
            raise ConfigError(f"model.options.{name}={value}: must be of the kind of {shorten_repr(plain[name])}.")
    return {**plain, **options}


def is_same_kind(value: Any, present: Any) -> bool:
    """Whether `value` can replace `present`: a number a number, a text a text; None is replaced by anything."""
    if present is None or value is None:
        return True
    if isinstance(present, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, type(present)) and isinstance(value, bool) == isinstance(present, bool)
