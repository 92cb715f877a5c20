"""mode=bench: how fast this machine loads, trains and evaluates with this network and data, and what limits it."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.table import Table

from semseg.build import build_data, build_module, build_trainer
from semseg.checkpoints.network import build_network, without_weights
from semseg.config.schema import BenchConfig, Config
from semseg.data.batch import Batch
from semseg.data.sources import DataSource
from semseg.datamodule import SegmentationData
from semseg.errors import DataError
from semseg.evaluation.evaluator import Speed
from semseg.evaluation.tables import format_speed
from semseg.lit_module import SegmentationModule
from semseg.modes.automatic import choose_automatic, resolve_value_range
from semseg.nets.gpu import wait_for_device
from semseg.nets.interfaces import SegmentationNetwork
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import relative_to_cwd
from semseg.storage.ranks import print_once
from semseg.system.memory import get_peak_memory
from semseg.system.processors import count_processors
from semseg.training.trainer import choose_accelerator

MAX_WAITING = 0.1  # fraction of the time; above it, loading is the bottleneck
MAX_PADDING = 0.25  # fraction of the pixels; above it, padding is reported


class LoadingSpeed(NamedTuple):
    """The throughput of the loader alone."""

    images_per_s: float
    padding: float  # fraction of the pixels that belong to no image
    workers: int


class TrainingSpeed(NamedTuple):
    """Training as a whole: loader, transfer, network and optimiser. Medians over the steps."""

    images_per_s: float  # over all devices
    step_s: float
    waiting_s: float  # for a sub-batch
    memory: int | None  # peak in bytes, of the device if it is a CUDA GPU, else of this process; None if unknown

    @property
    def waiting_fraction(self) -> float:
        """The fraction of the time spent waiting for sub-batches."""
        return self.waiting_s / (self.waiting_s + self.step_s)


class BenchResult(NamedTuple):
    """All measurements, and the advice that follows from them."""

    loading: LoadingSpeed
    stepping: TrainingSpeed
    evaluating: Speed | None  # None if there are no images to evaluate
    advice: list[str]


class StepTimer(Callback):
    """Times the steps after the first few, in which memory is allocated and kernels are compiled."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.waiting_times: list[float] = []
        self.step_times: list[float] = []
        self._lap_start = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._record(self.waiting_times, batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        wait_for_device(pl_module.device)
        self._record(self.step_times, batch_idx)

    def _record(self, times: list[float], batch_idx: int) -> None:
        now = time.perf_counter()
        if batch_idx >= self.warmup:
            times.append(now - self._lap_start)
        self._lap_start = now


def run(config: Config, overrides: list[str]) -> None:
    """Time the loader alone, training, and evaluation; print a table and the settings to change; write bench.json.

    Raises:
        DataError: if there are fewer images than one step takes.
    """
    steps = config.bench.warmup + config.bench.steps
    limits = {"max_steps": steps, "max_epochs": 1, "limit_train_batches": None, "limit_val_batches": 0}
    trainer_config = replace(config.trainer, **limits)
    config = replace(config, trainer=trainer_config, data=replace(config.data, steps_per_epoch=steps))
    source = resolve_value_range(DataSource(config.data))
    config = replace(config, data=source.config)
    config, choices = choose_automatic(config, overrides, source)
    for choice in choices:
        print_once(f"automatic: {choice}")
    trainer = build_trainer(config, source)
    if len(source.training_records()) < config.data.batch_size * trainer.world_size:
        raise DataError(f"data.train has {len(source.training_records())} images, fewer than one step takes.")
    net = build_network(without_weights(config.model), source.classes.num_classes, config.download, source.bands)
    data = build_data(config, source, net)
    data.trainer = trainer  # whose ranks share the images and the processors
    loading = time_loader(data, config.bench)
    stepping = time_steps(trainer, build_module(config, net, source.classes), data, config)
    evaluating = time_evaluation(config, source, net) if source.has(config.eval.split) else None
    if not trainer.is_global_zero:
        return
    figures = BenchResult(loading, stepping, evaluating, give_advice(config, loading, stepping, trainer.num_devices))
    console = Console(soft_wrap=True, highlight=False)
    console.print(figures_table(figures, config))
    for line in figures.advice:
        console.print(line, markup=False)
    path = Path(config.run_dir) / "bench.json"
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(figures_to_dict(figures), indent=2) + "\n")
    console.print(f"written {relative_to_cwd(path)}", markup=False)


def time_loader(data: SegmentationData, config: BenchConfig) -> LoadingSpeed:
    """Time the loader of this rank alone, with its workers, and measure its padding."""
    loader = data.train_dataloader()
    stream = iter(loader.loader_from(0))
    for _ in itertools.islice(stream, config.warmup):
        pass
    started = time.perf_counter()
    batches = list(itertools.islice(stream, config.steps))
    seconds = time.perf_counter() - started
    loader.close()
    inside = sum(int(batch.size.prod(1).sum()) for batch in batches)
    canvas = sum(batch.image[:, 0].numel() for batch in batches)
    images = sum(len(batch.paths) for batch in batches)
    return LoadingSpeed(images / seconds, 1 - inside / canvas, loader.num_workers)


def time_steps(
    trainer: pl.Trainer, module: SegmentationModule, data: SegmentationData, config: Config
) -> TrainingSpeed:
    """Time training steps; nothing is saved."""
    timer = StepTimer(config.bench.warmup)
    trainer.callbacks.append(timer)  # pyright: ignore[reportAttributeAccessIssue]
    trainer.fit(module, datamodule=data)
    waiting, step = statistics.median(timer.waiting_times), statistics.median(timer.step_times)
    images = config.data.batch_size * trainer.world_size
    memory = (
        torch.cuda.max_memory_allocated()
        if choose_accelerator(config.trainer.accelerator) == "gpu"
        else get_peak_memory()
    )
    return TrainingSpeed(images / (waiting + step), step, waiting, memory)


def time_evaluation(config: Config, source: DataSource, net: SegmentationNetwork) -> Speed:
    """Time the first images of eval.split, as mode=eval evaluates them."""
    options = replace(config.trainer, max_steps=-1, limit_val_batches=None)
    config = replace(config, mode="eval", trainer=options)
    trainer = build_trainer(config, source)
    data, module = build_data(config, source, net), build_module(config, net, source.classes)
    seen = itertools.accumulate(len(group) for group in data.eval_groups("test")[:: trainer.world_size])
    trainer.limit_test_batches = 1 + sum(count < config.bench.images for count in seen)
    trainer.test(module, datamodule=data, verbose=False)
    assert module.evaluation is not None, "the test loop ends with scores"
    return module.evaluation.speed


def give_advice(config: Config, loading: LoadingSpeed, stepping: TrainingSpeed, ranks_here: int) -> list[str]:
    """What limits training, and the settings to change, the most promising first."""
    needed = config.data.batch_size / stepping.step_s  # images per second that one device can process
    speeds = f"one device can process {needed:.1f} images/s, its loader alone delivers {loading.images_per_s:.1f}"
    if stepping.waiting_fraction > MAX_WAITING:
        keys = settings_for_loading(config, loading, needed, ranks_here)
        bottleneck = "Loading"
    else:
        keys = settings_for_network(config, stepping)
        bottleneck = "The network"
    fraction = f"{stepping.waiting_fraction:.0%} of the time is spent waiting"
    advice = [f"{bottleneck} is the bottleneck: {fraction}; {speeds}. Settings to try: {', '.join(keys)}."]
    if loading.padding > MAX_PADDING:
        advice.append(
            f"{loading.padding:.0%} of the pixels are padding: images of different shapes share a sub-batch. "
            "Lower data.batch_size, and raise trainer.accumulate_grad_batches instead."
        )
    return advice


def settings_for_loading(config: Config, loading: LoadingSpeed, needed: float, ranks_here: int) -> list[str]:
    """Settings that load images faster."""
    cores = max(1, count_processors() // ranks_here)
    needed_workers = math.ceil(max(1, loading.workers) * needed / loading.images_per_s)
    keys = [f"data.num_workers={min(needed_workers, cores)}"] if loading.workers < min(needed_workers, cores) else []
    if config.data.decode == "exact":
        keys.append("data.decode=fast")
    if config.data.label_cache is None:
        keys.append("data.label_cache=<a folder>")
    if config.augment.is_on:
        keys.append("augment=none")
    return [*keys, f"more cores (this machine has {cores} per device)", "smaller files on disk"]


def settings_for_network(config: Config, stepping: TrainingSpeed) -> list[str]:
    """Settings that make a step faster, or use more of the device."""
    on_gpu = choose_accelerator(config.trainer.accelerator) == "gpu"
    keys = []
    if on_gpu and config.trainer.precision.startswith("32"):
        keys.append("trainer.precision=bf16-mixed")
    if not config.model.channels_last:
        keys.append("model.channels_last=true")
    if not config.model.compile:
        keys.append("model.compile=true")
    if (
        on_gpu
        and (stepping.memory or 0) < torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2
    ):
        keys.append(f"data.batch_size={2 * config.data.batch_size}")
    return [*keys, "smaller data.short_edges", "a smaller network (mode=models)"]


def figures_table(figures: BenchResult, config: Config) -> Table:
    """One row per measurement."""
    loading, stepping, evaluating, _ = figures
    table = Table(title=f"{config.model.title} on {config.data.name}", show_header=False)
    table.add_row("loading alone", f"{loading.images_per_s:.1f} images/s, workers: {loading.workers}")
    table.add_row("padding", f"{loading.padding:.1%} of the pixels")
    table.add_row("training", f"{stepping.images_per_s:.2f} images/s")
    table.add_row("a step", f"{stepping.step_s * 1e3:.0f} ms, and {stepping.waiting_s * 1e3:.0f} ms of waiting")
    table.add_row("peak memory", "unknown" if stepping.memory is None else f"{stepping.memory / 2**30:.2f} GiB")
    if evaluating is not None:
        table.add_row(f"evaluation, {config.eval.scales}", format_speed(evaluating))
    return table


def figures_to_dict(figures: BenchResult) -> dict[str, Any]:
    """The content of bench.json."""
    return {
        "loading": figures.loading._asdict(),
        "training": figures.stepping._asdict() | {"waiting": figures.stepping.waiting_fraction},
        "evaluation": None if figures.evaluating is None else figures.evaluating._asdict(),
        "advice": figures.advice,
    }
