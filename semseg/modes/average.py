"""mode=average: the mean of the weights of several networks, kept if it is better than the best of them."""

from __future__ import annotations

import itertools
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from semseg.build import build_data, build_module, build_trainer, choose_device, find_network, restore_network
from semseg.checkpoints.ensemble import complete_pixel_type, find_obstacles
from semseg.checkpoints.format import SavedNetwork, refuse_nonfinite_weights, write_ckpt
from semseg.checkpoints.initialise import find_differences
from semseg.config.inherit import inherit_config
from semseg.config.schema import ARCHITECTURE_KEYS, Config, list_checkpoints
from semseg.data.bands import format_value_range
from semseg.data.batch import Batch
from semseg.data.sources import DataSource, require_masks
from semseg.errors import CheckpointError, ConfigError
from semseg.evaluation.thresholds import find_best_threshold
from semseg.lit_module import SegmentationModule
from semseg.modes.eval import open_source
from semseg.nets.interfaces import SegmentationNetwork
from semseg.nets.precision import create_autocast
from semseg.reports.templates import format_percent
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import entry_command, relative_to_cwd
from semseg.storage.ranks import print_once
from semseg.storage.run_folders import AVERAGE_FILE
from semseg.system.text import escape_lines, format_quantity
from semseg.training.trainer import use_one_device

SCORES_FILE = "average.json"  # in the run folder
NUM_IMAGES = 1000  # of train, at most, on which normalisation statistics are measured again
FREE_KEYS = ("weights", "frozen")  # of model.encoder: how a network was trained, not which one it is


class SplitScore(NamedTuple):
    """What a network reaches on a split."""

    mean_iou: float | None
    threshold: float | None  # two classes: of the highest F1 score


def run(config: Config, overrides: list[str]) -> float | None:
    """Average the weights, measure normalisation statistics, and compare; returns the score of the average.

    Raises:
        SemsegError: if a network cannot be read, the networks are not of one architecture, or the data set has no
            images to train or to validate.
    """
    members = [find_network(spec, config, overrides) for spec in list_checkpoints(config.ckpt)]
    refuse_repeated_networks(members)
    members[0] = complete_pixel_type(members)
    for other in members[1:]:
        refuse_other_network(members[0], other)
    config = inherit_config(members[0].config, config, overrides)
    config = replace(
        config,
        data=replace(config.data, on_bad="error"),
        augment=members[0].config.augment,  # statistics are those of training batches: of its crops and scales
        trainer=use_one_device(config.trainer),
    )
    source = open_source(config.data, members[0])
    require_masks(config.eval.split, source.records(config.eval.split))
    source.training_records()
    scores: list[float | None] = []
    for member in members:
        net = restore_network(member)
        refuse_nonfinite_weights(net.state_dict(), member.source)
        scores.append(score_on_split(net, config, source).mean_iou)
        print_once(f"{relative_to_cwd(Path(member.source))}: mean IoU {format_percent(scores[-1])}")
    weights = average_weights([member.weights for member in members])
    averaged = members[0]._replace(weights=weights, epoch=0, step=0)
    net = restore_network(averaged)
    num_images = measure_statistics(net, config, source)
    # Before the evaluation, in which trainer.precision may change the type of the network.
    weights = {name: value.to("cpu", copy=True) for name, value in net.state_dict().items()}
    score, threshold = score_on_split(net, config, source)
    averaged = averaged._replace(weights=weights, threshold=threshold)
    best = max((iou for iou in scores if iou is not None), default=None)
    is_better = score is not None and (best is None or score > best)
    print_scores(members, scores, score, num_images)
    folder = Path(config.run_dir)
    if is_better:
        write_ckpt(folder / AVERAGE_FILE, averaged)
    content = {
        "networks": [
            {"file": member.source, "mean_iou": iou} for member, iou in zip(members, scores, strict=True)
        ],
        "mean_iou": score, "images": num_images, "split": config.eval.split, "is_kept": is_better,
    }  # fmt: skip
    with atomic_write(folder / SCORES_FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    file = relative_to_cwd(folder / AVERAGE_FILE)
    command = f"{entry_command()} mode=predict {shlex.quote(f'ckpt={file}')} input=<image or folder>"
    kept = f"better than each of them: written to {file}\nto predict: {command}"
    print(escape_lines(kept if is_better else "not better than the best of them: not kept"))
    return score


def refuse_repeated_networks(members: Sequence[SavedNetwork]) -> None:
    """Refuse a file that is given twice: its mean with itself would only measure the statistics again.

    Raises:
        ConfigError: with the file.
    """
    counts = Counter(str(Path(member.source).resolve()) for member in members)
    for path, count in counts.items():
        if count > 1:
            raise ConfigError(f"ckpt: {relative_to_cwd(Path(path))} is given {count} times. Give each network once.")


def refuse_other_network(first: SavedNetwork, other: SavedNetwork) -> None:
    """Refuse two networks whose weights cannot be averaged.

    Raises:
        CheckpointError: with the two files and the difference.
    """
    problem = next(find_differences_of_networks(first, other), None)
    if problem is not None:
        raise CheckpointError(
            f"{first.source} and {other.source} cannot be averaged: {problem} Give networks of one architecture that "
            "started from the same weights. The mean of probabilities takes others too: mode=eval ckpt=[...]."
        )


def find_differences_of_networks(first: SavedNetwork, other: SavedNetwork) -> Iterator[str]:
    """A sentence for everything that makes the weights of two networks incomparable."""
    if first.graph is not None or other.graph is not None:
        yield "an exported network has no weights to average."
        return
    yield from find_obstacles(first, other)
    for field in ("ranges", "channel_order", "scale", "mean", "std"):
        values, others = (getattr(saved.convention, field) for saved in (first, other))
        if values != others:
            yield describe_other_convention(field, values, others)
    for key in ARCHITECTURE_KEYS:
        values = [getattr(saved.config.model, key) for saved in (first, other)]
        if key not in ("name", "revision", "config") and values[0] != values[1]:
            yield f"model.{key} is {values[0]} and {values[1]}."
    encoders = [
        {key: value for key, value in saved.config.model.encoder.items() if key not in FREE_KEYS}
        for saved in (first, other)
    ]
    if encoders[0] != encoders[1]:
        yield f"model.encoder is {encoders[0]} and {encoders[1]}."
    yield from (f"{problem}." for problem in find_differences(other.weights, first.weights))


def describe_other_convention(field: str, values: Any, others: Any) -> str:
    """A sentence about a field of the preprocessing that differs between two networks."""
    if field == "ranges" and values and others:
        return (
            f"data.value_range is {format_value_range(values)} and {format_value_range(others)}, which auto measures "
            "on the training images of each run."
        )
    shown = (list(each) if isinstance(each, tuple) else each for each in (values, others))
    return f"the {field} of their normalisation is {' and '.join(map(str, shown))} (model.convention)."


def average_weights(weights: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each floating-point tensor, summed in float64; counts are those of the first network."""
    first = weights[0]
    return {
        name: torch.stack([member[name].double() for member in weights]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in first.items()
    }


def score_on_split(net: SegmentationNetwork, config: Config, source: DataSource) -> SplitScore:
    """Score a network on eval.split, as mode=eval does."""
    trainer = build_trainer(replace(config, mode="eval"), source)
    module = build_module(config, net.eval(), source.classes)
    trainer.test(module, datamodule=build_data(config, source, net), verbose=False)
    assert module.scores is not None and module.evaluation is not None, "the test loop ends with scores"
    return SplitScore(module.scores.mean_iou, find_best_threshold(module.evaluation.thresholds))


@torch.no_grad()
def measure_statistics(net: SegmentationNetwork, config: Config, source: DataSource) -> int:
    """Measure the statistics of batch normalisation again: averages over training sub-batches; returns the images.

    Those of averaged weights are not the averages of the statistics (Izmailov et al. 2018, "Averaging Weights Leads to
    Wider Optima", section 3.3). Layers whose statistics training leaves alone (model.freeze_bn, a frozen encoder) keep
    theirs; 0 if there are no others. So do layers that never see more than one value per channel.
    """
    device = choose_device(config.trainer)
    module = build_module(config, net, source.classes).to(device)
    layers = find_measured_layers(module)
    if not layers:
        return 0
    module.eval()  # dropout stays off
    momenta, counts = [layer.momentum for layer in layers], [count_batches(layer).clone() for layer in layers]
    for layer in layers:
        count_batches(layer).zero_()  # the first sub-batch replaces what a layer has
        layer.momentum = None  # the plain mean over all sub-batches
        layer.train()
    data = build_data(config, source, net)
    batch_size = config.data.batch_size
    num_batches = max(1, min(NUM_IMAGES, len(source.training_records())) // batch_size)
    loader = data.train_dataloader()
    try:
        for batch in itertools.islice(loader.loader_from(0), num_batches):
            run_forward(module, batch, device, config.trainer.precision)
    finally:
        loader.close()
        for layer, momentum, count in zip(layers, momenta, counts, strict=True):
            layer.momentum = momentum
            if not count_batches(layer):  # such a layer has seen single values only
                count_batches(layer).copy_(count)
        module.eval()
    return num_batches * batch_size


def count_batches(layer: _BatchNorm) -> Tensor:
    """() the number of sub-batches in the statistics of a layer, as the tensor that the layer updates."""
    assert layer.num_batches_tracked is not None, "layers that track statistics count sub-batches"
    return layer.num_batches_tracked


def find_measured_layers(module: SegmentationModule) -> list[_BatchNorm]:
    """The layers of batch normalisation whose statistics move in training."""
    module.train()
    layers = [layer for layer in module.net.modules() if isinstance(layer, _BatchNorm)]
    return [layer for layer in layers if layer.training and layer.track_running_stats]


def run_forward(module: SegmentationModule, batch: Batch, device: torch.device, precision: str) -> None:
    """Run a training sub-batch through the network."""
    with create_autocast(precision, device):
        module.net(module.prepare_input(batch.image.to(device), batch.size.to(device)))


def print_scores(
    members: Sequence[SavedNetwork], scores: Sequence[float | None], score: float | None, num_images: int
) -> None:
    """Print the scores of the networks and of their average."""
    table = Table()
    table.add_column("weights")
    table.add_column("mean IoU", justify="right")
    for member, iou in zip(members, scores, strict=True):
        table.add_row(Text(str(relative_to_cwd(Path(member.source)))), format_percent(iou))
    measured = f", statistics of {format_quantity(num_images, 'image')}" if num_images else ""
    table.add_row(Text(f"their mean{measured}"), format_percent(score))
    Console().print(table)
