"""Our checkpoint formats.

A checkpoint is a Lightning file with one more entry, FORMAT_KEY: plain dicts, lists and numbers that describe how to
rebuild the network, so that evaluation and prediction need nothing else. Everything loads with weights_only=True; no
file can name code to run.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from semseg.config.hints import REMOVED_KEYS
from semseg.config.origin import WeightsOrigin
from semseg.config.preprocessing import Preprocessing
from semseg.config.schema import STRATEGIES, Config, PredictConfig, config_to_plain
from semseg.config.validate import check_config
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.data.sources import make_label_map
from semseg.errors import CheckpointError, ConfigError, first_line
from semseg.storage.atomic import atomic_write
from semseg.system.text import escape_unprintable, shorten_repr

FORMAT_KEY = "semseg"
FORMAT_VERSION = 1
SAFETENSORS = ".safetensors"
# Values for keys that earlier configurations lack, where the default of today changes the behaviour.
EARLIER_DEFAULTS = {"data": {"decode": "exact"}, "model": {"encoder": {"frozen": False}}}
# The maps of a network of timm today, and those of a plain ViT before its blocks could be chosen.
TIMM_MAPS = {"blocks": None, "pyramid": None, "final_norm": True}
EARLIER_VIT_MAPS = {"blocks": [-3, -2, -1], "pyramid": False, "final_norm": False}
# Class paths of loggers in the configurations of earlier versions, and their present paths.
MOVED_TARGETS = {
    "semseg.csv_log.CSVLog": "semseg.training.loggers.csv.CSVLog",
    "semseg.loggers.TensorBoard": "semseg.training.loggers.external.TensorBoard",
    "semseg.loggers.WandB": "semseg.training.loggers.external.WandB",
    "semseg.loggers.MLflow": "semseg.training.loggers.external.MLflow",
}
NET_PREFIX = "net."  # prefix of the network's weights in the Lightning state dict
TRAINED_WEIGHTS = "current_model_state"  # what Lightning saves beside a moving average, which is the state_dict


class Graph(NamedTuple):
    """An exported network: one graph with its weights."""

    model: bytes  # an ONNX file, checked
    size_divisor: int
    label_stride: int
    image_size: Size | None = None  # the only one that it takes


class SavedNetwork(NamedTuple):
    """A network with everything that is needed to rebuild and use it."""

    source: str  # its file or files, for messages
    weights: dict[str, Tensor]  # encoder.* and decoder.*, on the CPU; empty if there is a graph
    config: Config  # the run that wrote the file
    classes: ClassTable
    convention: Preprocessing  # how pixel values enter the network
    epoch: int = 0
    step: int = 0
    note: str = ""  # what was assumed about files that do not describe themselves
    graph: Graph | None = None  # for an exported network
    origin: WeightsOrigin | None = None  # of the weights that it started from; None: unknown, or random ones
    threshold: float | None = None  # two classes: of the highest F1 score in its validation; None: not validated
    members: tuple[SavedNetwork, ...] = ()  # of an ensemble, whose other entries are those of the first one

    @property
    def title(self) -> str:
        """What the network is, for titles."""
        titles = [member.config.model.title for member in self.members]
        counted = [f"{titles.count(title)} x {title}" for title in dict.fromkeys(titles)]
        return f"mean of {', '.join(counted)}" if self.members else self.config.model.title


def describe_network(
    config: dict[str, Any],
    classes: ClassTable,
    convention: Preprocessing,
    origin: WeightsOrigin | None = None,
    threshold: float | None = None,
) -> dict[str, Any]:
    """The entry FORMAT_KEY of a checkpoint: plain data only, as `config` is."""
    entry = {
        "format": FORMAT_VERSION,
        "config": config,
        "classes": classes.as_plain(),
        "convention": convention.as_plain(),
    }
    if origin is not None:
        entry["origin"] = origin.as_plain()
    return entry if threshold is None else entry | {"threshold": threshold}


def read_checkpoint(path: Path) -> SavedNetwork:
    """Read a checkpoint of semseg: a .ckpt, or a .safetensors with its .json beside it.

    Raises:
        CheckpointError: if a file is missing, damaged, or of another program.
    """
    return read_safetensors(path) if path.suffix == SAFETENSORS else read_ckpt(path)


def read_ckpt(path: Path) -> SavedNetwork:
    """Read a Lightning checkpoint with our entry; see `read_checkpoint`."""
    return parse_checkpoint(path, load_plain(path))


def parse_checkpoint(path: Path, content: dict[str, Any]) -> SavedNetwork:
    """The network in the content of a Lightning checkpoint; see `read_checkpoint`."""
    entry = content.get(FORMAT_KEY)
    if not isinstance(entry, dict) or "state_dict" not in content:
        found = ", ".join(escape_unprintable(key)[:80] for key in list(content)[:4])
        raise CheckpointError(f"{path}: not a checkpoint of semseg (it contains {found}, ...).")
    weights = {
        name.removeprefix(NET_PREFIX): tensor
        for name, tensor in validate_weights(path, content["state_dict"]).items()
        if name.startswith(NET_PREFIX)
    }
    return network_from_entry(path, entry, weights, content.get("epoch", 0), content.get("global_step", 0))


def validate_weights(path: Path, weights: Any) -> dict[str, Tensor]:
    """Check that `weights` are a dict of names and dense tensors of real numbers in memory, and return them.

    Raises:
        CheckpointError: otherwise.
    """
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path}: its weights are a {type(weights).__name__}, expected a dict of tensors.")
    for name, value in weights.items():
        if not isinstance(name, str) or not is_dense_tensor(value):
            raise CheckpointError(f"{path}: its weight {shorten_repr(name)} is not a dense tensor of real numbers.")
    return weights


def is_dense_tensor(value: Any) -> bool:
    """Whether `value` is a tensor that can be a weight: not sparse, nested, quantised, complex or without data."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_nested or value.is_meta or value.is_quantized or value.is_complex())
    )


def refuse_nonfinite_weights(weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are NaN or infinite before a network computes with them.

    Raises:
        CheckpointError: with the first such weight.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{source}: its weight {escape_unprintable(name)} holds NaN or infinite values, so all of "
                "its results would be wrong. Use an earlier checkpoint."
            )


def is_count(value: Any) -> bool:
    """Whether `value` can be a number of steps or epochs."""
    return type(value) is int and 0 <= value < 2**40


def read_safetensors(path: Path) -> SavedNetwork:
    """Read weights in safetensors and their description in JSON; see `read_checkpoint`."""
    weights = load_safetensors(path)
    description = path.with_suffix(".json")
    try:
        entry = json.loads(description.read_text(encoding="utf-8"))
        epoch, step, order = entry["epoch"], entry["step"], [str(name) for name in entry["order"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{description}: the description of {path.name} cannot be read ({first_line(error)}). "
            "Both files are written together by mode=convert."
        ) from None
    if set(order) != set(weights):
        raise CheckpointError(f"{description}: names other weights than those in {path.name}.")
    return network_from_entry(path, entry, {name: weights[name] for name in order}, epoch, step)


def network_from_entry(path: Path, entry: Any, weights: dict[str, Tensor], epoch: Any, step: Any) -> SavedNetwork:
    """A network from the description that `describe_network` made.

    Raises:
        CheckpointError: if the format or configuration is unknown to this version, or an entry is damaged.
    """
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: its description is a {type(entry).__name__}, expected a dict.")
    if not is_count(entry.get("format")) or entry["format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {shorten_repr(entry.get('format'))}, this version of semseg reads format {FORMAT_VERSION}."
        )
    if not is_count(epoch) or not is_count(step):
        raise CheckpointError(f"{path}: its epoch {shorten_repr(epoch)} or step {shorten_repr(step)} is not a count.")
    try:
        classes = ClassTable.from_plain(entry.get("classes"))
        convention = Preprocessing.from_plain(entry.get("convention"))
        origin = WeightsOrigin.from_plain(entry.get("origin"))
    except ValueError as error:
        raise CheckpointError(f"{path}: its description is damaged: {error}.") from None
    if not isinstance(entry.get("config"), dict) or "${" in str(entry["config"]):
        # The configuration is data: it is compared and read, never resolved with the environment of this machine.
        raise CheckpointError(f"{path}: its saved configuration is not plain data.")
    try:
        complete = DictConfig(add_defaults(entry["config"], EARLIER_DEFAULTS))
        config = check_config(update_saved_config(complete, weights), is_saved=True)
    except ConfigError as error:
        raise CheckpointError(f"{path}: its saved configuration does not fit this version: {error}") from None
    except Exception as error:  # an error of OmegaConf, for anything that is no configuration
        raise CheckpointError(f"{path}: its saved configuration cannot be read ({first_line(error)}).") from None
    try:
        make_label_map(config.data, classes)
    except ConfigError as error:
        raise CheckpointError(f"{path}: its saved configuration contradicts its classes: {error}") from None
    if config.data.num_classes not in (None, classes.num_classes):
        raise CheckpointError(
            f"{path}: it names {classes.num_classes} classes, but its data.num_classes is {config.data.num_classes}."
        )
    threshold = entry.get("threshold")
    if threshold is not None and not (isinstance(threshold, float) and 0 <= threshold <= 1):
        raise CheckpointError(f"{path}: its threshold {shorten_repr(threshold)} is not a probability.")
    return SavedNetwork(
        str(path), weights, config, classes, convention, epoch, step, origin=origin, threshold=threshold
    )


def add_defaults(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A copy with the keys of `defaults` that it lacks, behind its own, because converting must give back their order.

    >>> add_defaults({"b": {"y": 1}, "a": 0}, {"a": 2, "b": {"x": 3}, "c": 4})
    {'b': {'y': 1, 'x': 3}, 'a': 0, 'c': 4}
    """
    merged = dict(config)
    for key, value in defaults.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = add_defaults(merged[key], value)
        else:
            merged.setdefault(key, value)
    return merged


def update_saved_config(config: DictConfig, weights: Collection[str]) -> DictConfig:
    """Update a configuration of an earlier version in place, so that it means the same today; returns it.

    Args:
        weights: the names of the weights beside it.
    """
    for key in REMOVED_KEYS:
        name = key.rpartition(".")[2]
        section = OmegaConf.select(config, key.removesuffix(f".{name}"))
        if isinstance(section, DictConfig):
            section.pop(name, None)
    if OmegaConf.select(config, "trainer.strategy") not in STRATEGIES:
        OmegaConf.update(config, "trainer.strategy", "auto")
    if OmegaConf.select(config, "predict.save") == []:
        OmegaConf.update(config, "predict.save", PredictConfig().save)
    loggers = OmegaConf.select(config, "logger")
    for section in loggers.values() if isinstance(loggers, DictConfig) else ():
        target = str(section.get("_target_")) if isinstance(section, DictConfig) else ""
        if target in MOVED_TARGETS:
            section["_target_"] = MOVED_TARGETS[target]
    encoder = OmegaConf.select(config, "model.encoder")
    if isinstance(encoder, DictConfig) and encoder.get("library") == "timm" and "final_norm" not in encoder:
        encoder.update(EARLIER_VIT_MAPS if is_plain_vit(weights) else TIMM_MAPS)
    return config


def is_plain_vit(weights: Collection[str]) -> bool:
    """Whether an encoder of timm is a plain ViT, by the names of its weights in a file of an earlier version.

    Hiera of SAM 2 has its blocks under the same names, and window positions.
    """
    prefix = "encoder.model.model."
    return f"{prefix}pos_embed_window" not in weights and any(name.startswith(f"{prefix}blocks.") for name in weights)


def write_ckpt(path: Path, saved: SavedNetwork) -> None:
    """Write the network, without optimiser, as a checkpoint for every mode and for init_from."""
    entry = describe_network(
        config_to_plain(saved.config), saved.classes, saved.convention, saved.origin, saved.threshold
    )
    content = {
        "epoch": saved.epoch,
        "global_step": saved.step,
        "state_dict": {NET_PREFIX + name: copy_detached(value) for name, value in saved.weights.items()},
        # Through JSON: equal content gives equal bytes, whatever types its values have.
        FORMAT_KEY: json.loads(json.dumps(entry)),
    }
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def write_safetensors(path: Path, saved: SavedNetwork) -> list[Path]:
    """Write the weights to `path` and their description to a JSON file beside it; returns both files."""
    with atomic_write(path) as temporary:
        save_file({name: copy_detached(value) for name, value in saved.weights.items()}, temporary)
    entry = describe_network(
        config_to_plain(saved.config), saved.classes, saved.convention, saved.origin, saved.threshold
    )
    # safetensors sorts by type and name; this keeps the order of the layers.
    entry |= {"epoch": saved.epoch, "step": saved.step, "order": list(saved.weights)}
    description = path.with_suffix(".json")
    with atomic_write(description) as temporary:
        temporary.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
    return [path, description]


def copy_detached(tensor: Tensor) -> Tensor:
    """A copy with its own memory, so that the file contains these numbers and nothing else."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


class WeightsContent(NamedTuple):
    """What a file of weights holds."""

    tensors: dict[str, Tensor]  # by their names in it
    origin: WeightsOrigin | None  # that of a checkpoint of ours; None: the file says nothing about it
    convention: Preprocessing | None  # likewise


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file; see `open_weights`."""
    return open_weights(path).tensors


def open_weights(path: Path) -> WeightsContent:
    """A weight file, .safetensors or anything torch.load opens.

    A `state_dict` inside the file is used, and the prefix of DataParallel is removed.

    Raises:
        CheckpointError: if the file is missing, damaged, or contains no tensors.
    """
    if path.suffix == SAFETENSORS:
        return WeightsContent(load_safetensors(path), *read_source(path, read_json_beside(path)))
    content = load_plain(path)
    described = read_source(path, content.get(FORMAT_KEY))
    content = content.get("state_dict", content)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: its state_dict is a {type(content).__name__}, expected a dict of tensors.")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    validate_weights(path, tensors)
    if not tensors:
        found = ", ".join(escape_unprintable(key)[:80] for key in list(content)[:4])
        raise CheckpointError(f"{path}: contains no weights (it contains {found}, ...).")
    is_wrapped = all(name.startswith("module.") for name in tensors)
    if is_wrapped:
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return WeightsContent(tensors, *described)


def read_json_beside(path: Path) -> Any:
    """What mode=convert has written beside a safetensors file; None for a file of another program."""
    try:
        return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_source(path: Path, entry: Any) -> tuple[WeightsOrigin | None, Preprocessing | None]:
    """Origin and preprocessing in the entry FORMAT_KEY of a checkpoint; None for what a file does not have.

    Raises:
        CheckpointError: if they are damaged.
    """
    if not isinstance(entry, dict):
        return None, None
    try:
        convention = Preprocessing.from_plain(entry["convention"]) if "convention" in entry else None
        return WeightsOrigin.from_plain(entry.get("origin")), convention
    except ValueError as error:
        raise CheckpointError(f"{path}: its description is damaged: {error}.") from None


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    try:
        return validate_weights(path, load_file(path))
    except CheckpointError:
        raise
    except Exception as error:  # SafetensorError, and KeyError for a data type that torch lacks
        raise CheckpointError(f"{path}: a damaged safetensors file ({first_line(error)}).") from None


def load_plain(path: Path) -> dict[str, Any]:
    """torch.load of tensors and plain containers, with errors that name the file.

    Raises:
        CheckpointError: if the file is missing, empty, damaged, contains code, or is no dict.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty.")
    packed = find_packed_entry(path)
    if packed is not None:
        raise CheckpointError(
            f"{path}: its entry {shorten_repr(packed)} is compressed or overlaps another one, which torch.save never "
            "writes. It was not unpacked."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: {explain_load_failure(path, error)}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors.")
    return content


def find_packed_entry(path: Path) -> str | None:
    """The name of an entry that takes more memory than its bytes in the file; None if there is none.

    Read from the directory of the archive; a file that is no archive has no entries.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return None
    left = path.stat().st_size
    for entry in entries:
        left -= entry.file_size
        if entry.compress_type != zipfile.ZIP_STORED or left < 0:
            return entry.filename
    return None


def explain_load_failure(path: Path, error: Exception) -> str:
    """Why torch.load refused a file. Torch's own message is not used because it advises to load the code as well."""
    foreign = find_foreign_names(path, error)
    if foreign:
        return (
            f"holds more than tensors and plain containers: {', '.join(foreign)}. It was not loaded because that "
            "would run code from the file. If you trust it, save its state dict alone"
        )
    is_foreign = "weights_only" in str(error)
    if zipfile.is_zipfile(path) or path.suffix == ".ckpt":
        reason = "it holds more than tensors and plain containers" if is_foreign else "for example cut off"
        return f"damaged, {reason}. Restore it from a copy, or use last.ckpt or best.ckpt of its run"
    return f"not a checkpoint ({'not tensors and plain containers' if is_foreign else first_line(error)})"


def find_foreign_names(path: Path, error: Exception) -> list[str]:
    """The first few classes and functions that loading the file would call, apart from those that torch allows."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a damaged file, or one from before torch 1.6: torch's error names the first
        names = re.findall(r"GLOBAL ([\w.]+)", str(error))
    return [re.sub(r"[^\w.]", "?", name)[:80] for name in names[:3]]
