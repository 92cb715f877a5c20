"""What differs between the configurations that networks were trained with. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from semseg.config.schema import flatten_sections
from semseg.reports.curves import run_folder_of_checkpoint

NOT_SET = "not set"
# Keys that say what to do with a network, or where its files are.
LEFT_OUT = {
    "mode", "quiet", "verbose", "runs_dir", "run_dir", "ckpt", "resume", "resume_force", "input", "output", "format",
    "runs", "run", "after_training", "predict", "serve", "export", "check", "bench", "download", "logger",
}  # fmt: skip
# Keys that do not change the weights, or hardly ever: they come last.
MINOR = {
    "eval", "checkpoint", "data.root", "data.num_workers", "data.worker_timeout_s", "data.label_cache",
    "data.max_pixels", "data.hint", "trainer.log_every_n_steps", "trainer.log_images", "trainer.enable_progress_bar",
    "trainer.profiler", "trainer.probe_memory", "trainer.num_sanity_val_steps", "trainer.limit_val_batches",
}  # fmt: skip

Configuration = Mapping[str, Any]  # nested mappings with text as keys


class KeyDifference(NamedTuple):
    """A key whose value is not the same for all networks."""

    key: str  # such as optim.lr
    values: tuple[str, ...]  # one for each network
    is_minor: bool  # does not change the weights, or hardly ever


def read_configuration(metrics: Mapping[str, Any], folder: Path) -> Configuration | None:
    """Return what the network of an evaluation was trained with; None if it is not known.

    Args:
        metrics: metrics.json; earlier versions did not store the configuration there, but the run may still exist.
        folder: that of the evaluation.
    """
    stored = metrics.get("trained_with")
    if isinstance(stored, dict):
        return stored
    return next((config for run in list_run_folders(metrics, folder) if (config := _read_yaml(run))), None)


def list_run_folders(metrics: Mapping[str, Any], folder: Path) -> list[Path]:
    """List the folders that may be those of the training: that of the checkpoint, and the one above the evaluation."""
    checkpoint = metrics.get("checkpoint")
    above = folder.absolute().parent
    return [above] if not isinstance(checkpoint, str) else [run_folder_of_checkpoint(checkpoint), above]


def _read_yaml(run: Path) -> Configuration | None:
    path = run / "config.yaml"
    if not path.is_file():
        return None
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return None
    return content if isinstance(content, dict) and content.get("mode") == "train" else None  # pyright: ignore[reportReturnType]


def compare_configurations(
    configurations: Sequence[Configuration | None], defaults: Configuration | None = None
) -> list[KeyDifference]:
    """Return the keys that differ, the minor ones last; a network without a configuration is left out of the question.

    Args:
        defaults: of all keys. An earlier version has trained without a newer key as with its default.

    >>> compare_configurations([{"optim": {"lr": 0.1}, "seed": 1}, {"optim": {"lr": 0.2}, "seed": 1}])
    [KeyDifference(key='optim.lr', values=('0.1', '0.2'), is_minor=False)]
    """
    given = dict(flatten_sections(defaults or {}))
    tables = [None if config is None else {**given, **dict(flatten_sections(config))} for config in configurations]
    keys = dict.fromkeys(key for table in tables if table is not None for key in table if not has_prefix(key, LEFT_OUT))
    differences = []
    for key in keys:
        values = [format_override(key, table) for table in tables]
        if len({value for value, table in zip(values, tables, strict=True) if table is not None}) > 1:
            differences.append(KeyDifference(key, tuple(values), has_prefix(key, MINOR)))
    return sorted(differences, key=lambda difference: difference.is_minor)


def has_prefix(key: str, prefixes: set[str]) -> bool:
    """Whether a key or a section that holds it is one of `prefixes`."""
    parts = key.split(".")
    return any(".".join(parts[:length]) in prefixes for length in range(1, len(parts) + 1))


def format_override(key: str, table: Mapping[str, Any] | None) -> str:
    """Format the value of a key as in a command line."""
    if table is None:
        return "not known"
    if key not in table:
        return NOT_SET
    value = table[key]
    return value if isinstance(value, str) and value else json.dumps(value)
