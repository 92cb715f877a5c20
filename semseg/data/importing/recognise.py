"""What data=folder cannot read as it is: the export of an annotation tool, or masks beside the images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from semseg.config.schema import DataConfig
from semseg.data import store
from semseg.data.folders import IMAGE_SUFFIXES
from semseg.data.importing.formats import FoundExport, find_exports
from semseg.errors import DataError

# Ends of the stems of masks that lie beside their images.
BESIDE_SUFFIXES = (
    "_mask", "-mask", ".mask", "_masks", "_label", "_labels", "-label", "_gt", "_seg", "_segmentation", "_annotation",
    "_lbl",
)  # fmt: skip


def has_default_layout(data: DataConfig) -> bool:
    """Whether the configuration says nothing about files but the root, and the two folders are not there."""
    train = data.train
    is_default = (train.list, train.images, train.masks, data.images) == (None, "images", "masks", None)
    root = store.resolve_path(data.root)
    has_folders = all(store.is_folder(root / name) for name in ("images", "masks"))
    return is_default and not data.mask_suffix and store.is_folder(root) and not has_folders


def recognise_exports(data: DataConfig) -> list[FoundExport]:
    """The formats of annotation tools that the folder of a data set has; empty if it may be a data set."""
    if not has_default_layout(data):
        return []
    try:
        return find_exports(store.resolve_path(data.root))
    except DataError:
        return []


def recognise_masks_beside(data: DataConfig) -> dict[str, str]:
    """Overrides for a folder of images with their masks beside them (a.jpg, a_mask.png); empty if it is none."""
    if not has_default_layout(data):
        return {}
    root = store.resolve_path(data.root)
    paths = [path for path in store.list_files_below(root) if path.suffix.lower() in IMAGE_SUFFIXES]
    stems = {path.with_suffix("") for path in paths}
    counts = Counter(
        suffix
        for path in paths
        for suffix in BESIDE_SUFFIXES
        if path.stem.endswith(suffix) and path.with_name(path.stem.removesuffix(suffix)) in stems
    )
    suffix, count = max(counts.items(), key=lambda each: each[1], default=("", 0))
    if 4 * count <= len(paths):  # each pair is two files
        return {}
    return {"data.train.images": ".", "data.train.masks": ".", "data.mask_suffix": suffix}


def name_output(root: Path) -> Path:
    """A folder for the data set that is made of an export."""
    plain = root.with_suffix("") if root.suffix.lower() == store.ARCHIVE_SUFFIX else root
    return Path(f"{plain.resolve().name}_masks")
