"""Several saved networks as one, ckpt=[a,b,c]: which may be averaged, and the network that does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from semseg.checkpoints.format import SavedNetwork
from semseg.config.preprocessing import Preprocessing
from semseg.data.bands import describe_bands, format_value_range
from semseg.data.sources import make_label_map
from semseg.errors import CheckpointError, ConfigError
from semseg.nets.ensemble import Ensemble
from semseg.nets.interfaces import SegmentationNetwork, choose_size_divisor


def join_networks(members: Sequence[SavedNetwork]) -> SavedNetwork:
    """An ensemble of networks; its settings are those of the first one.

    Raises:
        CheckpointError: if their classes, label ids, bands or resizing differ, with the two files and values.
    """
    first = complete_pixel_type(members)
    for other in members[1:]:
        problem = next(find_obstacles(first, other), None)
        if problem is not None:
            raise CheckpointError(
                f"{first.source} and {other.source} cannot be averaged: {problem} Give networks that were trained for "
                "the same classes on images that are read in the same way."
            )
    # Explicit divisors are those of the members, see build_ensemble.
    model = replace(first.config.model, size_divisor=None, label_stride=None)
    return first._replace(
        source=", ".join(member.source for member in members),
        config=replace(first.config, model=model),
        weights={},
        graph=None,
        members=tuple(members),
    )


def complete_pixel_type(members: Sequence[SavedNetwork]) -> SavedNetwork:
    """The first network, with the pixel type of any of them: checkpoints of earlier versions do not know theirs."""
    dtype = next((member.convention.dtype for member in members if member.convention.dtype), "")
    return members[0]._replace(convention=members[0].convention._replace(dtype=dtype))


def find_obstacles(first: SavedNetwork, other: SavedNetwork) -> Iterator[str]:
    """A sentence for everything that makes the probabilities of two networks incomparable."""
    names, others = first.classes.names, other.classes.names
    if len(names) != len(others):
        yield f"they have {len(names)} and {len(others)} classes."
    elif names != others:
        index = next(index for index, pair in enumerate(zip(names, others, strict=True)) if pair[0] != pair[1])
        yield f"class {index} is {names[index]} in the one and {others[index]} in the other."
    else:
        ids = [make_label_map(saved.config.data, saved.classes).class_ids for saved in (first, other)]
        if ids[0] != ids[1]:
            yield f"their classes have the ids {list(ids[0])[:8]} and {list(ids[1])[:8]} in label files."
    yield from find_other_images(first.convention, other.convention)
    resizes = first.config.data.resize, other.config.data.resize
    if resizes[0] != resizes[1]:
        yield f"data.resize was {resizes[0]} and {resizes[1]}."


def find_other_images(first: Preprocessing, other: Preprocessing) -> Iterator[str]:
    """A sentence for everything that makes two networks read or resize an image differently.

    How its values are normalised is not among it: every network of an ensemble does that by itself.
    """
    if first.bands != other.bands:
        yield f"their images have the bands {describe_bands(first.bands)} and {describe_bands(other.bands)}."
    types = first.dtype or other.dtype, other.dtype or first.dtype
    if types[0] != types[1]:
        yield f"they were trained on {types[0]} and {types[1]} values."
    if bool(first.ranges) != bool(other.ranges):
        ranges = next(each.ranges for each in (first, other) if each.ranges)
        yield f"only one of them has a data.value_range, {format_value_range(ranges)}."
    if first.antialias != other.antialias:
        yield "evaluation resizes images with antialiasing for one of them, without for the other (model.convention)."


def describe_differences(members: Sequence[SavedNetwork]) -> str:
    """A sentence about settings of evaluation that differ, of which those of the first network are used."""
    first = members[0].config
    settings = {
        "eval.scales": [member.config.eval.scales for member in members],
        "data.max_long_edge": [member.config.data.max_long_edge for member in members],
    }
    used = {"eval.scales": first.eval.scales, "data.max_long_edge": first.data.max_long_edge}
    differing = [
        f"{key}={used[key]}" for key, values in settings.items() if any(value != used[key] for value in values)
    ]
    return f"the networks were trained with different settings; used are {', '.join(differing)}" if differing else ""


def build_ensemble(saved: SavedNetwork, nets: Sequence[SegmentationNetwork]) -> Ensemble:
    """The network of `join_networks`.

    Args:
        nets: those of `saved.members`, with their weights.

    Raises:
        ConfigError: for a single network.
    """
    if len(nets) < 2:
        raise ConfigError("ckpt: a mean needs at least two networks.")
    divisors = [
        choose_size_divisor(net, member.config.model.size_divisor)
        for member, net in zip(saved.members, nets, strict=True)
    ]
    ensemble = Ensemble(nets, divisors)
    ensemble.convention = saved.convention
    return ensemble.eval()  # pyright: ignore[reportReturnType]
