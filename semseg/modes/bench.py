"""mode=bench: how fast this machine reads, trains and evaluates with this network and this data, and what limits it."""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.table import Table

from semseg.build import build_trainer
from semseg.checkpoints.network import build_network, without_weights
from semseg.config.schema import BenchConfig, Config
from semseg.data.batch import Batch
from semseg.data.sources import DataSource
from semseg.datamodule import SegmentationData
from semseg.errors import DataError
from semseg.evaluation.evaluator import Speed
from semseg.evaluation.tables import format_speed
from semseg.lit_module import SegmentationModule
from semseg.modes.train import network_name
from semseg.nets.segmenter import Segmenter
from semseg.storage.atomic import atomic_write
from semseg.training.trainer import choose_accelerator

WAITING = 0.1  # share of a step from which reading is what limits
WASTED = 0.25  # share of padding from which it is worth a word


class Loading(NamedTuple):
    """What the loader gives when nobody keeps it waiting."""

    images_per_s: float
    padding: float  # share of the pixels that belong to no image
    workers: int


class Stepping(NamedTuple):
    """Training as it is: loader, transfer, network and optimiser together. Medians of steps."""

    images_per_s: float  # over all devices
    step_s: float
    waiting_s: float  # for a sub-batch
    memory: int  # bytes at the peak: of the device if it is a GPU, else of this process

    @property
    def waiting(self) -> float:
        """The share of the time in which there was nothing to compute."""
        return self.waiting_s / (self.waiting_s + self.step_s)


class Figures(NamedTuple):
    """All that was timed, and what follows from it."""

    loading: Loading
    stepping: Stepping
    evaluating: Speed | None  # None without images to evaluate
    advice: list[str]


class Clock(Callback):
    """Times of the steps after the first few, in which memory is found and kernels are compiled."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.waited: list[float] = []
        self.stepped: list[float] = []
        self._since = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._note(self.waited, batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or only the launch of the kernels is timed
        self._note(self.stepped, batch_idx)

    def _note(self, where: list[float], batch_idx: int) -> None:
        now = time.perf_counter()
        if batch_idx >= self.warmup:
            where.append(now - self._since)
        self._since = now


def run(config: Config, overrides: list[str]) -> None:
    """Time the loader alone, training, and evaluation; print a table and the key to turn; write bench.json.

    Raises:
        DataError: if there are fewer images than one step takes.
    """
    steps = config.bench.warmup + config.bench.steps
    trainer_config = replace(config.trainer, max_steps=steps, max_epochs=1, limit_val_batches=0)
    config = replace(config, trainer=trainer_config, data=replace(config.data, steps_per_epoch=steps))
    source = DataSource(config.data)
    trainer = build_trainer(config, source)
    if len(source.records("train")) < config.data.batch_size * trainer.world_size:
        raise DataError(f"data.train has {len(source.records('train'))} images, fewer than one step takes.")
    net = build_network(without_weights(config.model), source.classes.num_classes, config.download)
    data = SegmentationData(source, config, net)
    loading = time_loader(data, config.bench)
    stepping = time_steps(trainer, SegmentationModule(net, config, source.classes), data, config)
    evaluating = time_evaluation(config, source, net) if source.has(config.eval.split) else None
    if not trainer.is_global_zero:
        return
    figures = Figures(loading, stepping, evaluating, advise(config, loading, stepping, trainer.world_size))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table_of(figures, config))
    for line in figures.advice:
        console.print(line, markup=False)
    path = Path(config.run_dir) / "bench.json"
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(as_plain(figures), indent=2) + "\n")
    console.print(f"written {path}", markup=False)


def time_loader(data: SegmentationData, config: BenchConfig) -> Loading:
    """The loader of rank 0 alone, with its workers, and how much of what it gives is padding."""
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
    return Loading(images / seconds, 1 - inside / canvas, loader.num_workers)


def time_steps(trainer: pl.Trainer, module: SegmentationModule, data: SegmentationData, config: Config) -> Stepping:
    """Real training, of which nothing is kept."""
    clock = Clock(config.bench.warmup)
    trainer.callbacks.append(clock)  # pyright: ignore[reportAttributeAccessIssue]
    trainer.fit(module, datamodule=data)
    waiting, step = statistics.median(clock.waited), statistics.median(clock.stepped)
    images = config.data.batch_size * trainer.world_size
    memory = (
        torch.cuda.max_memory_allocated()
        if choose_accelerator(config.trainer.accelerator) == "gpu"
        else peak_of_process()
    )
    return Stepping(images / (waiting + step), step, waiting, memory)


def time_evaluation(config: Config, source: DataSource, net: Segmenter) -> Speed:
    """The first images of eval.split, as mode=eval does them."""
    options = replace(config.trainer, max_steps=-1, limit_val_batches=None)
    config = replace(config, mode="eval", trainer=options)
    trainer = build_trainer(config, source)
    data, module = SegmentationData(source, config, net), SegmentationModule(net, config, source.classes)
    seen = itertools.accumulate(len(group) for group in data.eval_groups("test")[:: trainer.world_size])
    trainer.limit_test_batches = 1 + sum(count < config.bench.images for count in seen)
    trainer.test(module, datamodule=data, verbose=False)
    assert module.evaluation is not None, "the test loop ends with scores"
    return module.evaluation.speed


def peak_of_process() -> int:
    """Bytes of memory that this process has held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def advise(config: Config, loading: Loading, stepping: Stepping, world_size: int) -> list[str]:
    """What limits training, and which keys change it, the most promising first."""
    needed = config.data.batch_size / stepping.step_s  # images a second that one device could take
    paces = f"one device could take {needed:.1f} images/s, its loader alone gives {loading.images_per_s:.1f}"
    if stepping.waiting > WAITING:
        keys = keys_of_reading(config, loading, needed, world_size)
        told = f"Reading is what limits: {stepping.waiting:.0%} of the time is waiting; {paces}."
    else:
        keys = keys_of_network(config, stepping)
        told = f"The network is what limits: {stepping.waiting:.0%} of the time is waiting; {paces}."
    advice = [f"{told} To try: {', '.join(keys)}."]
    if loading.padding > WASTED:
        advice.append(
            f"{loading.padding:.0%} of the pixels are padding: images of different shapes share a sub-batch. "
            "Fewer of them do with a smaller data.batch_size (and trainer.accumulate_grad_batches)."
        )
    return advice


def keys_of_reading(config: Config, loading: Loading, needed: float, world_size: int) -> list[str]:
    """Settings that bring images faster."""
    cores = (os.cpu_count() or 1) // world_size
    wanted = math.ceil(max(1, loading.workers) * needed / loading.images_per_s)
    keys = [f"data.num_workers={min(wanted, cores)}"] if loading.workers < min(wanted, cores) else []
    if config.data.decode == "exact":
        keys.append("data.decode=fast")
    if config.data.label_cache is None:
        keys.append("data.label_cache=<a folder>")
    if config.augment.is_on:
        keys.append("augment=none")
    return [*keys, f"more cores (these have {cores} for a device)", "smaller files on disk"]


def keys_of_network(config: Config, stepping: Stepping) -> list[str]:
    """Settings that make a step shorter, or more of it."""
    on_gpu = choose_accelerator(config.trainer.accelerator) == "gpu"
    keys = []
    if on_gpu and config.trainer.precision.startswith("32"):
        keys.append("trainer.precision=bf16-mixed")
    if not config.model.channels_last:
        keys.append("model.channels_last=true")
    if not config.model.compile:
        keys.append("model.compile=true")
    if on_gpu and stepping.memory < torch.cuda.get_device_properties(0).total_memory / 2:
        keys.append(f"data.batch_size={2 * config.data.batch_size}")
    return [*keys, "smaller data.short_edges", "a smaller network (mode=models)"]


def table_of(figures: Figures, config: Config) -> Table:
    """What was timed, a row each."""
    loading, stepping, evaluating, _ = figures
    table = Table(title=f"{network_name(config.model)} on {config.data.name}", show_header=False)
    table.add_row("reading alone", f"{loading.images_per_s:.1f} images/s, workers: {loading.workers}")
    table.add_row("padding", f"{loading.padding:.1%} of the pixels")
    table.add_row("training", f"{stepping.images_per_s:.2f} images/s")
    table.add_row("a step", f"{stepping.step_s * 1e3:.0f} ms, and {stepping.waiting_s * 1e3:.0f} ms of waiting")
    table.add_row("memory at most", f"{stepping.memory / 2**30:.2f} GiB")
    if evaluating is not None:
        table.add_row(f"evaluation, {config.eval.scales}", format_speed(evaluating))
    return table


def as_plain(figures: Figures) -> dict[str, Any]:
    """For bench.json."""
    return {
        "loading": figures.loading._asdict(),
        "training": figures.stepping._asdict() | {"waiting": figures.stepping.waiting},
        "evaluation": None if figures.evaluating is None else figures.evaluating._asdict(),
        "advice": figures.advice,
    }
