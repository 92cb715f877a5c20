"""Our checkpoint format, and where checkpoints are found.

A checkpoint is a Lightning file with one more entry, FORMAT_KEY: plain dicts, lists and numbers that
say how to build the network again, so that evaluation and prediction need nothing else. Everything
loads with weights_only=True; nothing in a file can name code to run.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from semseg.config import Config, as_plain, check
from semseg.data.classes import ClassTable
from semseg.errors import CheckpointError, ConfigError

FORMAT_KEY = "semseg"
FORMAT_VERSION = 1
FOLDER = "checkpoints"  # inside a run folder
NET_PREFIX = "net."  # of the network's weights in the Lightning state dict


class SavedNetwork(NamedTuple):
    """What a checkpoint holds."""

    path: Path
    weights: dict[str, Tensor]  # encoder.* and decoder.*
    config: Config  # of the run that wrote it
    classes: ClassTable
    epoch: int
    step: int


def describe(config: Config, classes: ClassTable) -> dict[str, Any]:
    """The entry FORMAT_KEY of a checkpoint: plain data only."""
    return {
        "format": FORMAT_VERSION,
        "config": as_plain(config),
        "classes": {"names": list(classes.names), "palette": [list(colour) for colour in classes.palette]},
    }


def read_checkpoint(path: Path) -> SavedNetwork:
    """Read one of our checkpoints, weights on the CPU.

    Raises:
        CheckpointError: if the file is missing, damaged, or not one of ours.
    """
    content = load_plain(path)
    entry = content.get(FORMAT_KEY)
    if not isinstance(entry, dict) or "state_dict" not in content:
        found = ", ".join(list(map(str, content))[:4])
        raise CheckpointError(f"{path}: not a checkpoint of semseg (it holds {found}, ...).")
    if entry.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {entry.get('format')}, this version of semseg reads format {FORMAT_VERSION}."
        )
    weights = {
        name.removeprefix(NET_PREFIX): tensor
        for name, tensor in content["state_dict"].items()
        if name.startswith(NET_PREFIX)
    }
    names, palette = entry["classes"]["names"], entry["classes"]["palette"]
    try:
        config = check(DictConfig(OmegaConf.create(entry["config"])))
    except ConfigError as error:
        raise CheckpointError(f"{path}: its saved configuration does not fit this version: {error}") from None
    return SavedNetwork(
        path=path,
        weights=weights,
        config=config,
        classes=ClassTable(tuple(names), tuple((r, g, b) for r, g, b in palette)),
        epoch=int(content.get("epoch", 0)),
        step=int(content.get("global_step", 0)),
    )


def load_plain(path: Path) -> dict[str, Any]:
    """torch.load of tensors and plain containers, with errors that name the file.

    Raises:
        CheckpointError: if the file is missing, empty, damaged, holds code, or is no dict.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        kind = "a damaged checkpoint" if zipfile.is_zipfile(path) or path.suffix == ".ckpt" else "not a checkpoint"
        raise CheckpointError(f"{path}: {kind} ({first_line(error)}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors.")
    return content


def first_line(error: Exception) -> str:
    """The first line of an error, or its class if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def find_checkpoint(spec: str, runs_dir: Path) -> Path:
    """The file that `ckpt=` means: a file, a run folder, or last / best of the newest run.

    A run folder means its best checkpoint, or its last one if there is no best.

    Raises:
        CheckpointError: if there is none; it lists what is there.
    """
    path = Path(spec).expanduser()
    if spec in ("last", "best"):
        found = newest(runs_dir, f"*/{FOLDER}/{spec}.ckpt")
        if found is None:
            raise CheckpointError(
                f"ckpt={spec}: no {spec}.ckpt in any run below {runs_dir.resolve()}{listing(runs_dir)}. "
                "Give a file or a run folder, or train first: python run.py."
            )
        return found
    if path.is_dir():
        for name in ("best.ckpt", "last.ckpt"):
            for folder in (path / FOLDER, path):
                if (folder / name).is_file():
                    return folder / name
        raise CheckpointError(f"ckpt={spec}: no best.ckpt or last.ckpt in this folder{listing(path)}.")
    if not path.is_file():
        raise CheckpointError(f"ckpt={spec}: there is no such file{listing(path.parent)}.")
    return path


def newest(folder: Path, pattern: str) -> Path | None:
    """The most recently written file that matches, or None."""
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def listing(folder: Path) -> str:
    """` (there: a, b, ...)` for an error message; empty if the folder is not there."""
    if not folder.is_dir():
        return f" ({folder} does not exist)"
    names = sorted(path.name for path in folder.iterdir())
    return f" (there: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''})" if names else " (it is empty)"


def inherit(saved: Config, given: Config, overrides: list[str]) -> Config:
    """The configuration for using a checkpoint: the saved one, with what the user gave on top.

    The network always comes from the checkpoint; data and evaluation settings come from it unless
    they are given on the command line (a whole group such as data=camvid, or single keys).

    Raises:
        ConfigError: if the command line asks for another network.
    """
    keys = [word.lstrip("+").partition("=")[0] for word in overrides]
    for key in keys:
        if key.partition(".")[0].partition("/")[0] == "model" and key not in FREE_MODEL_KEYS:
            raise ConfigError(f"{key}: the network comes from ckpt, so it cannot be set here.")
    merged, ours = OmegaConf.structured(given), OmegaConf.structured(saved)
    merged.model = ours.model
    for section in ("data", "eval"):
        if section in keys or "experiment" in keys:
            continue
        wanted = [key for key in keys if key.startswith(f"{section}.")]
        kept = {key: OmegaConf.select(merged, key) for key in wanted}
        merged[section] = ours[section]
        for key, value in kept.items():
            OmegaConf.update(merged, key, value)
    for key in FREE_MODEL_KEYS:
        if key in keys:
            OmegaConf.update(merged, key, OmegaConf.select(OmegaConf.structured(given), key))
    return check(merged)


# How a network is run, not which one it is.
FREE_MODEL_KEYS = ("model.channels_last", "model.compile")
