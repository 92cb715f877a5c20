"""mode=convert: write the same weights in another format, without loss."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from semseg.build import find_network, restore_network
from semseg.checkpoints.format import SAFETENSORS, SavedNetwork, copy_detached, write_ckpt, write_safetensors
from semseg.config.schema import Config
from semseg.errors import ConfigError
from semseg.storage.atomic import atomic_write
from semseg.storage.ranks import print_once


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
    for path in write_network(output, saved):
        print(f"written {path}")


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
