"""Every value that the schema allows gives a run that takes two steps; values just outside are refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict

from helpers.in_process import TINY_RUN, fit
from semseg.config.compose import compose_config
from semseg.config.fields import MAX_FLOAT, MAX_INT
from semseg.config.schema import Config, get_sections
from semseg.config.validate import check_config, find_cross_problems, find_range_problems
from semseg.errors import ConfigError

pytestmark = pytest.mark.reliability
TRAINING = ("seed", "model", "data", "augment", "optim", "schedule", "loss", "syncbn", "trainer", "ema", "checkpoint")
# Values that would need hours, other machines, other packages, or too much memory.
NOT_TRAINED = {
    "mode", "data.batch_size", "data.num_workers", "trainer.num_nodes", "trainer.profiler", "model.compile",
    "data.make.num_train", "data.make.num_val", "data.make.seed", "data.first_id", "trainer.max_epochs",
    "data.max_pixels", "data.num_classes", "data.mask_type", "syncbn.name", "syncbn.group",
    "data.archive.num_train", "data.archive.num_val", "data.limit",
}  # fmt: skip
Value = int | float | str | bool | None


def leaves(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(dotted key, type, range) of every value of the schema."""
    types, sections = get_type_hints(cls), get_sections(cls)
    for item in fields(cls):
        if item.name in sections:
            yield from leaves(sections[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, types[item.name], dict(item.metadata)


def kinds_of(kind: Any) -> set[Any]:
    """The types of a field's values: int and NoneType for `int | None`; none for lists and mappings."""
    return set() if get_origin(kind) in (list, dict) else {kind, *get_args(kind)}


def inside(kind: Any, limits: dict[str, Any]) -> list[Value]:
    """The ends of a range and values just inside, or all choices."""
    kinds = kinds_of(kind)
    found: list[Value] = list(limits.get("choices", ()))
    found += [None] if type(None) in kinds else []
    found += [True, False] if bool in kinds else []
    low, above, high, below = (limits.get(name) for name in ("low", "above", "high", "below"))
    if int in kinds and low is not None:
        found += [low, low + 1] + ([high - 1, high] if high is not None else [MAX_INT])
    if float in kinds:
        found += [float(low), low + 1e-6] if low is not None else []
        found += [above + 1e-6] if above is not None else []
        found += [float(high)] if high is not None else []
        found += [math.nextafter(below, -math.inf)] if below is not None else []
    return list(dict.fromkeys(found))


def outside(kind: Any, limits: dict[str, Any]) -> list[Value]:
    """Values just outside of a range, NaN and infinite values, and an unknown choice."""
    kinds = kinds_of(kind)
    step = 1 if int in kinds else 1e-6
    low, above, high, below = (limits.get(name) for name in ("low", "above", "high", "below"))
    found: list[Value] = [low - step] if low is not None else []
    found += [end for end in (above, below) if end is not None]
    found += [high + step] if high is not None else []
    if float in kinds:
        found += [math.nan, math.inf, -math.inf, 2 * MAX_FLOAT]
    if int in kinds and limits:
        found += [MAX_INT + 1] if "choices" not in limits else []
    return found + (["nonsense"] if "choices" in limits else [])


LEAVES = list(leaves())
BASE = compose_config([
    "data=scenes", *TINY_RUN, "data.short_edges=[32]", "data.make.num_train=4", "data.make.num_val=1",
    "data.steps_per_epoch=2", "trainer.max_epochs=1", "data.val.list=null", "logger={}",
])  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "scenes"


def changed(**values: Any) -> DictConfig:
    composed = BASE.copy()
    with open_dict(composed):
        for key, value in values.items():
            OmegaConf.update(composed, key, value, force_add=True)
    return composed


def with_value(config: Config, key: str, value: Value) -> Config:
    """A copy of `config` with another value, which is not checked."""
    copied = deepcopy(config)
    *path, last = key.split(".")
    section: Any = copied
    for word in path:
        if getattr(section, word) is None:  # data.make and data.archive
            setattr(section, word, get_sections(type(section))[word]())
        section = getattr(section, word)
    setattr(section, last, value)
    return copied


def problems(config: Config) -> list[str]:
    return [*find_range_problems(config), *find_cross_problems(config)]


def test_i5_every_value_outside_of_its_range_is_refused_with_the_key() -> None:
    config = check_config(BASE)
    refused = {
        (key, value): problems(with_value(config, key, value)) for key, *rest in LEAVES for value in outside(*rest)
    }
    assert len(refused) > 300
    assert [case for case, lines in refused.items() if not any(line.startswith(case[0]) for line in lines)] == []


def test_i5_every_value_inside_its_range_is_accepted_or_contradicts_another_key() -> None:
    config = check_config(BASE)
    refused = {
        (key, value): problems(with_value(config, key, value)) for key, *rest in LEAVES for value in inside(*rest)
    }
    assert len(refused) > 300
    keys = {key for (key, _), lines in refused.items() if lines}
    assert keys <= {
        "mode", "format", "eval.stride", "predict.stride", "loss.label_smoothing", "loss.terms.cross_entropy",
        "model.size_divisor", "model.label_stride", "trainer.max_steps", "export.quantize", "data.crop_foreground",
        "augment.cutmix", "data.fold",
    }  # fmt: skip


TRAINED = [
    (key, kind, limits)
    for key, kind, limits in LEAVES
    if key.partition(".")[0] in TRAINING
    and key not in NOT_TRAINED
    and inside(kind, limits)
    # Paths and names have no range.
    and (limits or str not in kinds_of(kind))
]


@pytest.mark.slow
@pytest.mark.parametrize("takes_all", [False, pytest.param(True, marks=pytest.mark.long)], ids=["last", "all"])
@pytest.mark.parametrize(("key", "kind", "limits"), TRAINED, ids=[leaf[0] for leaf in TRAINED])
def test_i6_two_steps_are_taken_with_every_value_inside_its_range(
    root: Path, tmp_path: Path, *, key: str, kind: Any, limits: dict[str, Any], takes_all: bool
) -> None:
    default: Any = BASE
    for word in key.split("."):
        default = default.get(word) if default is not None else None
    values = [value for value in inside(kind, limits) if value != default]
    for number, value in enumerate(values if takes_all else values[-1:]):
        given = {key: value, "data.root": str(root), "run_dir": str(tmp_path / str(number))}
        try:
            config = check_config(changed(**{"trainer.max_steps": 2, "checkpoint.every_n_steps": 1} | given))
            steps = fit(config)["global_step"]
        except ConfigError as error:  # a value that contradicts another key
            assert (key.rpartition(".")[0] or key) in str(error)
        else:
            assert steps <= 2
