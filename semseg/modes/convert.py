"""mode=convert: write the same weights in another format, without loss."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from semseg.build import find_network, restore_network
from semseg.checkpoints.format import (
    SAFETENSORS,
    SavedNetwork,
    copy_detached,
    load_plain,
    write_ckpt,
    write_safetensors,
)
from semseg.config.preprocessing import PREPROCESSING
from semseg.config.schema import Config, flatten_sections
from semseg.errors import CheckpointError, ConfigError, SemsegError
from semseg.storage.atomic import atomic_write
from semseg.storage.ranks import print_once
from semseg.storage.run_folders import CHECKPOINT_FOLDER, is_of_run


def run(config: Config, overrides: list[str]) -> None:
    """Write the network of `ckpt` to `output`: a .ckpt, a .safetensors with its .json, or a folder of published files.

    Tensors keep their bytes, types and order, so that converting back gives the same file again.

    Raises:
        SemsegError: for any error that the user can fix; nothing is written then.
    """
    assert config.ckpt is not None and config.output is not None, "find_mode_problems asks for both"
    saved = find_network(config.ckpt, config, overrides)
    print_once(saved.note)
    restore_network(saved)  # reports weights that do not fit their description before anything is written
    output = Path(config.output).expanduser()
    refuse_training_checkpoint(output)
    for path in write_network(output, saved):
        print(f"written {path}")
    if output.is_dir():
        print_once(describe_losses(output, saved, config))


def refuse_training_checkpoint(output: Path) -> None:
    """Refuse to write over a checkpoint from which a run can be resumed, or among those of a run.

    Raises:
        ConfigError: if it is one.
    """
    folder = output.absolute().parent
    is_of_training = folder.name == CHECKPOINT_FOLDER and is_of_run(folder.parent)
    if not is_of_training and output.suffix == ".ckpt" and output.is_file():
        with suppress(CheckpointError):  # of another kind
            is_of_training = "optimizer_states" in load_plain(output)
    if is_of_training:
        raise ConfigError(f"output={output}: would replace a checkpoint of a training run. Give another name.")


def describe_losses(folder: Path, saved: SavedNetwork, config: Config) -> str:
    """What cannot be known from a folder of published files, and the overrides that say it; empty if nothing."""
    try:
        found = find_network(str(folder), config, [])
    except SemsegError as error:
        return f"The files hold weights alone, and cannot be read without further keys: {error}"
    before, after = (
        dict(flatten_sections({"model": {"encoder": net.config.model.encoder, "decoder": net.config.model.decoder}}))
        for net in (saved, found)
    )
    words = [f"{key}={value}" for key, value in before.items() if key in after and after[key] != value]
    others = []
    if saved.convention != found.convention:
        name = next((name for name, value in PREPROCESSING.items() if value == saved.convention), None)
        (words if name else others).append(f"model.convention={name}" if name else "preprocessing")
    if saved.classes != found.classes:
        others.append("classes")
    if saved.config.data.resize != found.config.data.resize:
        others.append("data.resize")
    parts = [f"read them with {' '.join(words)}"] if words else []
    parts += [f"not in them: {', '.join(others)}"] if others else []
    return f"The files hold weights alone; {'; '.join(parts)}" if parts else ""


def write_network(output: Path, saved: SavedNetwork) -> list[Path]:
    """Write `saved` in the format that the name `output` implies; returns the files.

    Raises:
        ConfigError: for another suffix, or if the output folder is a file.
    """
    if output.suffix == ".ckpt":
        write_ckpt(output, saved)
        return [output]
    if output.suffix == SAFETENSORS:
        return write_safetensors(output, saved)
    if output.suffix or output.is_file():
        raise ConfigError(f"output={output}: must end in .ckpt or {SAFETENSORS}, or be a folder.")
    return write_published(output, saved)


def write_published(folder: Path, saved: SavedNetwork) -> list[Path]:
    """Write encoder_epoch_N.pth and decoder_epoch_N.pth: two flat state dicts, as the original code saves them.

    Raises:
        ConfigError: for a whole network of a library, which has no such parts.
    """
    if saved.config.model.library:
        raise ConfigError(
            f"output={folder}: a folder of two files is for an encoder and a decoder, and {saved.source} is a whole "
            f"network ({saved.config.model.title}). Use output=<file.ckpt or file{SAFETENSORS}>."
        )
    files = []
    for part in ("encoder", "decoder"):
        weights = {
            name.removeprefix(f"{part}."): copy_detached(value)
            for name, value in saved.weights.items()
            if name.startswith(f"{part}.")
        }
        files.append(save_state_dict(folder / f"{part}_epoch_{saved.epoch}.pth", weights))
    return files


def save_state_dict(path: Path, weights: dict[str, Tensor]) -> Path:
    """torch.save of a flat state dict, completely or not at all."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save(weights, file)
    return path
