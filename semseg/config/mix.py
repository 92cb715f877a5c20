"""Further data sets of a training (data.mix): each entry of the list as the configuration of a data set of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from semseg.config.schema import DataConfig, SplitConfig
from semseg.errors import ConfigError, suggest

# Keys of `data` that an entry may have; what it leaves out is as in the main data set.
DATA_KEYS = (
    "root", "train", "images", "masks", "image_suffix", "mask_suffix", "classes", "first_id", "ignore", "map",
    "mask_type", "label_orientation", "ignore_colors",
)  # fmt: skip
ENTRY_KEYS = ("share", "class_map", *DATA_KEYS)
EXAMPLE = "[{root: more_data, share: 0.5}]"


@dataclass(frozen=True)
class MixPart:
    """One of the further data sets."""

    key: str  # for messages: data.mix[0]
    share: float  # of the training images
    data: DataConfig  # of its training images
    has_own_classes: bool  # whether its classes are mapped by name; else ids mean what they mean in the main data set
    class_map: Mapping[str, str | None]  # name of one of its classes -> one of the main data set; None: not scored


def read_mix(data: DataConfig) -> list[MixPart]:
    """The further data sets of a training.

    Raises:
        ConfigError: if data.mix is no list of such entries, or leaves no share to the main data set.
    """
    entries = [] if data.mix is None else data.mix
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"data.mix={data.mix}: must be a list of data sets with their shares, such as {EXAMPLE}.")
    parts = [read_part(f"data.mix[{number}]", entry, data) for number, entry in enumerate(entries)]
    total = sum(part.share for part in parts)
    if total >= 1 - 1e-9:
        raise ConfigError(
            f"data.mix: the shares sum to {total:g}, which leaves nothing to the main data set. Lower "
            "them: it has what is left."
        )
    return parts


def read_part(key: str, entry: Mapping[str, Any], data: DataConfig) -> MixPart:
    """One entry of data.mix.

    Raises:
        ConfigError: for unknown keys, wrong types, and if it names no images.
    """
    for name in entry:
        if name not in ENTRY_KEYS:
            hint = suggest(str(name), ENTRY_KEYS)
            raise ConfigError(f"{key}.{name}: there is no such key.{hint} Valid: {', '.join(ENTRY_KEYS)}.")
    share = entry.get("share")
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share < 1:
        raise ConfigError(f"{key}.share={share}: must be the fraction of the training images, above 0 and below 1.")
    class_map = entry.get("class_map") or {}
    if not isinstance(class_map, dict) or not all(isinstance(name, str | None) for name in class_map.values()):
        raise ConfigError(
            f"{key}.class_map={class_map}: must be names of its classes with those of the main data set, or null: "
            "{bus: car, sky: null}."
        )
    has_own_classes = entry.get("classes") is not None
    if class_map and not has_own_classes:
        raise ConfigError(f"{key}.class_map: needs {key}.classes=<table>, whose names it maps.")
    given = {name: entry[name] for name in DATA_KEYS if name in entry}
    return MixPart(
        key,
        float(share),
        build_part_config(key, given, data),
        has_own_classes,
        {str(name): target for name, target in class_map.items()},
    )


def build_part_config(key: str, given: Mapping[str, Any], data: DataConfig) -> DataConfig:
    """The configuration of a data set: that of the main one with other values for these keys.

    Raises:
        ConfigError: for a value of another type, and if no images are named.
    """
    named = [name for name in ("root", "train", "images", "masks") if given.get(name)]
    if not named or ("images" in named) != ("masks" in named):
        raise ConfigError(f"{key}: must name its files: root=<folder>, or images=<folder> and masks=<folder>.")
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), dict(given)))
    except OmegaConfBaseException as error:
        name = str(error.full_key or error.key or "")
        reason = str(error.msg or error).splitlines()[0].rstrip(".")
        raise ConfigError(f"{key}.{name}: {reason}.") from None
    assert isinstance(typed, DataConfig)
    own = {name: getattr(typed, name) for name in given}
    base = replace(
        data,
        name=key,
        mix=None,
        val=SplitConfig(),
        test=SplitConfig(),
        val_fraction=0.0,
        folds=None,
        fold=None,
        group=None,
        make=None,
        archive=None,
        hint="",
    )
    if "images" not in named:
        base = replace(base, images=None, masks=None)
    if "classes" in own:  # the meaning of the ids is that of these classes
        base = replace(base, num_classes=None, map=None)
    part = replace(base, **own)
    if not (part.images or part.train.list or part.train.images):
        raise ConfigError(
            f"{key}: does not say which files below {part.root} are images: train={{images: images, masks: masks}}."
        )
    problem = next(part.find_problems(), None)
    if problem is not None:
        raise ConfigError(problem.replace("data.", f"{key}.", 1))
    return part


def find_mix_problems(data: DataConfig) -> Iterator[str]:
    """A sentence if data.mix is wrong."""
    try:
        read_mix(data)
    except ConfigError as error:
        yield str(error)


assert set(DATA_KEYS) <= {item.name for item in fields(DataConfig)}
