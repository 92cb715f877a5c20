"""mode=data: the data sets that are configured, and whether they are on this machine. No torch."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from semseg.config.compose import list_options
from semseg.config.load import load_config
from semseg.config.schema import Config, DataConfig
from semseg.data import store
from semseg.data.classes import built_in_classes
from semseg.data.sources import BUILT_IN_CLASSES


def run(config: Config, overrides: list[str]) -> None:
    """Print the table; no image is opened."""
    kept = [word for word in overrides if word.startswith("data.root=")]
    table = Table(title="data sets: data=<name>", caption="docs/data.md has their layouts; data.root=<path> moves one")
    for name in ("data", "classes", "root", "here"):
        table.add_column(name, overflow="fold")
    for name in list_options("data"):
        data = load_config([f"data={name}", *(kept if config.data.name == name else [])])[0].data
        table.add_row(name, num_classes(data), data.root, whether_here(data))
    Console().print(table)


def num_classes(data: DataConfig) -> str:
    """How many classes a data set has, or who says so."""
    if data.num_classes is not None:
        return str(data.num_classes)
    if data.classes in BUILT_IN_CLASSES:
        return str(built_in_classes(str(data.classes)).num_classes)
    return "yours" if data.classes is None else str(data.classes)


def whether_here(data: DataConfig) -> str:
    """Yes, or no, and the first thing that is missing."""
    root = Path(data.root).expanduser()
    if data.make is not None:
        return "yes" if root.is_dir() else "drawn when it is needed"
    wanted = [place for split in (data.train, data.val) for place in (split.list, split.images, split.masks) if place]
    missing = [path for path in (root, *(root / place for place in wanted)) if not is_there(path)]
    if not missing:
        return "yes"
    if data.archive is not None and missing[0] == root:
        return f"no: mode=download data={data.name}"
    return "no" if missing[0] == root else f"in part: {missing[0]} is not there"


def is_there(path: Path) -> bool:
    return store.is_folder(path) or store.is_file(path)
