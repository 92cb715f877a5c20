"""The groups of configs/ and their options. No torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

# configs/ is inside the package in a wheel, and beside it in a checkout.
PACKAGE_DIR = Path(__file__).resolve().parents[1]
CONFIG_DIR = next(path for path in (PACKAGE_DIR / "configs", PACKAGE_DIR.parent / "configs") if path.is_dir())
# Sections with options of their own, and the option that has all keys; the other options change some of them.
COMPLETE_OPTIONS = {
    "data": "ade20k", "augment": "none", "optim": "sgd", "schedule": "poly", "loss": "cross_entropy",
    "syncbn": "reduce", "trainer": "default",
}  # fmt: skip


def list_options(group: str) -> list[str]:
    """The names of the options of a group in configs/, sorted."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def list_groups() -> list[str]:
    """Names of all configuration groups: model, model/encoder, data, ..."""
    return list(_find_groups())


@cache
def _find_groups() -> tuple[str, ...]:
    folders = (path.relative_to(CONFIG_DIR) for path in CONFIG_DIR.rglob("*") if path.is_dir())
    return tuple(sorted(folder.as_posix() for folder in folders if folder.parts[0] != "hydra"))
