"""What mode=train prints before the first step: network, weights, data, steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console

from semseg.checkpoints.initialise import LoadReport
from semseg.config.schema import Config, TrainerConfig
from semseg.data.sources import DataSource
from semseg.datamodule import SegmentationData
from semseg.modes.train_start import Start
from semseg.storage.commands import relative_to_cwd
from semseg.system.processors import choose_num_workers
from semseg.system.text import format_quantity
from semseg.training.callbacks.console import build_config_tree
from semseg.training.start_summary import abbreviate_path, shorten_list


def print_details(
    console: Console, config: dict[str, Any], overrides: list[str], start: Start, loaded: LoadReport | None
) -> None:
    """Print what verbose=true adds: the whole configuration, and every weight that was not loaded.

    Args:
        config: the configuration of the run as plain data.
        loaded: the weights that were loaded from `start.network`.
    """
    console.print(build_config_tree(config, overrides))
    if start.network is not None and loaded is not None:
        console.print(loaded.make_table(start.network.source))


def describe_weights(start: Start, loaded: LoadReport | None, data: SegmentationData) -> str:
    """Whether the run is new or resumes, and from which weights."""
    if start.state is not None:
        conditions, accumulate = data.run_conditions(), start.config.trainer.accumulate_grad_batches
        step = start.state.compute_resume_step(accumulate, conditions.batches_per_epoch)
        return f"resuming from {relative_to_cwd(start.state.path)} at step {step} of {conditions.total_steps}"
    if start.network is not None and loaded is not None:
        return f"a new run from {start.network.source}: {loaded.describe()}"
    weights = start.config.model.encoder.get("weights") or "none"
    sources = {"none": "random", "imagenet": "encoder from ImageNet"}
    return f"a new run: {sources.get(weights, f'encoder from {weights}')}"


def describe_data(source: DataSource, width: int) -> dict[str, str]:
    """The images and classes of a run, in two rows.

    Args:
        width: of a line in characters; names that do not fit are left out.
    """
    names, ids, ignored = source.classes.names, source.label_map.class_ids, source.label_map.ignored_ids
    unscored = shorten_list([str(raw_id) for raw_id in ignored], width // 3) or "none"
    start, end = f"{len(names)}: ", f"; not scored: {unscored}"
    listed = shorten_list(
        [f"{raw_id} {name}" for raw_id, name in zip(ids, names, strict=True)], width - len(start + end)
    )
    images = f"{source.config.name}: {format_quantity(len(source.records('train')), 'image')} to train"
    if source.has("val"):
        images = f"{images}, {len(source.records('val'))} to validate"
    root = relative_to_cwd(Path(source.root))
    return {
        "data": f"{images}, in {abbreviate_path(str(root), width - len(images) - len(', in '))}",
        **describe_mix(source, width),
        "classes": f"{start}{listed}{end}",
    }


def describe_mix(source: DataSource, width: int) -> dict[str, str]:
    """The shares of the data sets of data.mix, in a row; none without them.

    Args:
        width: of a line in characters.
    """
    if not source.parts:
        return {}
    counts = Counter(record.source for record in source.training_records())
    rows = [f"{source.shares[0]:.0%} of the images from {source.config.name}"]
    for part in source.parts:
        root = abbreviate_path(str(relative_to_cwd(Path(part.source.root))), max(12, width // 3))
        rows.append(f"{part.share:.0%} from {format_quantity(counts[part.number], 'image')} in {root}")
    return {"mix": ", ".join(rows)}


def describe_steps(config: Config, trainer: pl.Trainer, data: SegmentationData) -> dict[str, str]:
    """What a step takes, and how many there are, in two rows."""
    sizes, limits, conditions = config.data, config.trainer, data.run_conditions()
    edges = "/".join(map(str, sizes.short_edges))
    view = f"short edges {edges}, long edges up to {sizes.max_long_edge}"
    if data.is_native:
        height, width = data.crop or (0, 0)
        view = f"native resolution, crops of {height} x {width}, {data.foreground:.0%} around a pixel of a class"
    parts = [format_quantity(sizes.batch_size, "image")]
    if trainer.world_size > 1:
        parts.append(f"on each of {trainer.world_size} devices")
    if limits.accumulate_grad_batches > 1:
        parts.append(f"x {limits.accumulate_grad_batches} accumulated")
    steps = math.ceil(conditions.batches_per_epoch / limits.accumulate_grad_batches)
    unreached = "".join(f" ({note})" for note in describe_unreached(config, conditions.total_steps))
    workers = choose_num_workers(sizes.num_workers, trainer.num_devices)
    return {
        "batch": f"{' '.join(parts)}, {view}, "
        f"padded to multiples of {data.size_divisor}, labels at 1/{data.label_stride}",
        "training": f"{format_quantity(conditions.total_steps, 'step')}{unreached}, {steps} an epoch"
        f", {config.optim.name} with {describe_rates(config)}, {config.loss.terms.formula}"
        f", {limits.precision} on {conditions.accelerator}, {format_quantity(workers, 'worker')}",
    }


def describe_unreached(config: Config, num_steps: int) -> Iterator[str]:
    """A note on every setting that would change something after the last step."""
    warm_up = config.schedule.warmup_steps if config.schedule.name != "poly" else 0
    if warm_up >= num_steps:
        yield f"all of them warm-up: schedule.warmup_steps={warm_up}"
    if config.ema.decay is not None and config.ema.start_step >= num_steps:
        yield f"none of them averaged: ema.start_step={config.ema.start_step}"


def describe_rates(config: Config) -> str:
    """The base learning rates of the decoder and, where it has another one, of the encoder."""
    encoder, decoder = config.optim.encoder_rate, config.optim.decoder_rate
    has_other = encoder != decoder and not config.model.encoder.get("frozen")
    return f"lr {decoder:g}" + (f" (encoder {encoder:g})" if has_other else "")


def describe_validation(limits: TrainerConfig, data: SegmentationData) -> dict[str, str]:
    """A row that says which steps of a run with validation images are not validated; none if all are."""
    conditions = data.run_conditions()
    interval = math.ceil(conditions.batches_per_epoch / limits.accumulate_grad_batches) * limits.check_val_every_n_epoch
    steps = conditions.total_steps
    if limits.fast_dev_run or limits.limit_val_batches == 0 or not data.source.has("val") or steps % interval == 0:
        return {}
    key = f"trainer.check_val_every_n_epoch={limits.check_val_every_n_epoch}"
    if interval > steps:
        reason = f"the run ends at step {steps} and the first would be after step {interval}"
        return {"validation": f"none, because {reason}: no score, no best.ckpt, no report ({key})"}
    last = steps - steps % interval
    return {
        "validation": f"the last is after step {last}: the weights of the end, after step {steps}, get no score ({key})"
    }
