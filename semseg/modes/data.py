"""mode=data: list the configured data sets, and whether they are on this machine. No torch."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from semseg.config.groups import list_options
from semseg.config.load import load_config
from semseg.config.schema import BUILT_IN_CLASSES, Config, DataConfig
from semseg.data import store
from semseg.data.classes import built_in_classes
from semseg.data.scenes import SCENE_CLASSES


def run(config: Config, overrides: list[str]) -> None:
    """Print the table; no image is opened."""
    root = [override for override in overrides if override.startswith("data.root=")]
    table = Table(
        title="data sets: data=<name>", caption="docs/data.md describes their layouts; data.root=<path> sets the folder"
    )
    for name in ("data", "classes", "root", "here"):
        table.add_column(name, overflow="fold")
    for name in list_options("data"):
        data = load_config([f"data={name}", *(root if config.data.name == name else [])])[0].data
        table.add_row(name, describe_num_classes(data), data.root, describe_availability(data))
    Console().print(table)


def describe_num_classes(data: DataConfig) -> str:
    """The number of classes of a data set, or what defines it."""
    if data.num_classes is not None:
        return str(data.num_classes)
    if data.classes in BUILT_IN_CLASSES:
        return str(built_in_classes(str(data.classes)).num_classes)
    if data.make is not None:
        return str(SCENE_CLASSES.num_classes)
    return "yours" if data.classes is None else str(data.classes)


def describe_availability(data: DataConfig) -> str:
    """Whether the files exist; if not, the first that is missing."""
    root = Path(data.root).expanduser()
    if data.make is not None:
        return "yes" if root.is_dir() else "drawn at first use"
    names = [name for split in (data.train, data.val) for name in (split.list, split.images, split.masks) if name]
    missing = [path for path in (root, *(root / name for name in names)) if not path_exists(path)]
    if not missing:
        return "yes"
    if data.archive is not None and missing[0] == root:
        return f"no: mode=download data={data.name}"
    return "no" if missing[0] == root else f"in part: {missing[0]} is missing"


def path_exists(path: Path) -> bool:
    """Whether a file or folder exists, also inside an archive."""
    return store.is_folder(path) or store.is_file(path)
