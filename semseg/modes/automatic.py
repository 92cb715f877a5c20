"""Keys with the value `auto` in training: what a run chooses by itself, before anything is built.

What was chosen takes the place of `auto` in the configuration, so that config.yaml, the run card and checkpoints have
plain values. A run that resumes takes what its checkpoint has. Of several ranks the first one chooses, and the others
read its choices from CHOICES_FILE in the run folder, which keeps the reasons too.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch.optim import Optimizer

from semseg.build import build_data, build_module, choose_device, locate_waiting_record, resolve_layout, resolve_reading
from semseg.checkpoints.network import build_network, without_weights
from semseg.config.compose import compose_config
from semseg.config.fields import AUTO
from semseg.config.override_keys import list_given_keys, override_key
from semseg.config.schema import AUTO_RANGE, Config
from semseg.data.band_statistics import measure_bands
from semseg.data.batch import Batch
from semseg.data.geometry import Size
from semseg.data.label_cache import MAX_AUTOMATIC_BYTES
from semseg.data.sources import DataSource
from semseg.errors import ConfigError, SemsegError
from semseg.nets.interfaces import SegmentationNetwork
from semseg.nets.meta import build_on_meta
from semseg.nets.precision import choose_weight_type, create_autocast
from semseg.nets.step_memory import estimate_step_memory
from semseg.storage.atomic import atomic_write
from semseg.storage.ranks import is_first_rank, print_once
from semseg.system.memory import get_free_memory
from semseg.system.processors import choose_num_workers, correct_num_workers, count_processors
from semseg.system.text import format_quantity
from semseg.training.callbacks.out_of_memory import count_missing_state_bytes, report_out_of_memory, run_without_trace
from semseg.training.optim import build_optimizer
from semseg.training.trainer import choose_accelerator, count_ranks_here

CHOICES_FILE = "automatic.json"  # in the run folder
MAX_BATCH_SIZE = 256
GPU_MARGIN = 0.1  # fraction of the free memory that data.batch_size=auto leaves
CPU_MARGIN = 0.3  # the same on a CPU, where memory is estimated and shared with everything else
# Memory of a step on a CPU with its temporary buffers, in units of what is kept for the backward pass.
CPU_BUFFERS = 2.0
MIN_SUB_BATCHES = 4  # of one pass over the images, on every device
WAIT_S, POLL_S = 900.0, 0.2  # for the choices of the first rank
# Environment variables that tell one start of the ranks from another.
START_VARIABLES = (
    "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT",
    "SLURM_STEP_ID",
)  # fmt: skip


class AutomaticChoice(NamedTuple):
    """What was chosen for a key, and why."""

    key: str
    value: Any
    reason: str  # without commas, at which lines are wrapped
    further: Mapping[str, Any] = {}  # keys that follow from it, with their values

    def __str__(self) -> str:
        return (
            ", ".join(f"{key}={format_override_value(value)}" for key, value in self.values.items())
            + f" ({self.reason})"
        )

    @property
    def values(self) -> dict[str, Any]:
        """The values of all keys that it sets."""
        return {self.key: self.value, **self.further}


def format_override_value(value: Any) -> str:
    """A value as on the command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def resolve_value_range(source: DataSource) -> DataSource:
    """The data set with the values that data.value_range=auto stands for, which are printed.

    Raises:
        DataError: if no image of train can be read.
    """
    data = source.config
    if data.value_range != AUTO_RANGE:
        return source
    measured = measure_bands(source.training_records(), source.bands_of("train"), data.max_pixels)
    settings = measured.suggest(data)
    print_once(f"data.value_range=auto: {' '.join(f'{key}={value}' for key, value in settings.items())}")
    return DataSource(measured.apply(data))


def choose_automatic(
    config: Config, overrides: list[str], source: DataSource, saved: dict[str, Any] | None = None
) -> tuple[Config, list[AutomaticChoice]]:
    """The configuration of a training run with a plain value for every key that is `auto`, and what was chosen.

    `source` gets the new section `data` as well.

    Args:
        overrides: of the command line, in Hydra's grammar.
        saved: the configuration of the run that is resumed, as plain data.

    Raises:
        OutOfMemoryError: if not even one image per device fits into memory.
        ConfigError: if a value cannot be chosen here, with what to give instead.
    """
    chooser = Chooser(config, overrides, source)
    if saved is not None:
        for key in find_automatic(config):
            if key != "data.label_cache":  # a folder of this machine
                chooser.apply(keep_choice(key, saved, overrides))
    if chooser.config.data.label_cache == AUTO:  # by every rank, which may be on different machines
        chooser.choose("data.label_cache")
    left = find_automatic(chooser.config)
    if left:
        file = Path(config.run_dir) / CHOICES_FILE
        choices = share_choices(chooser, left, file) if chooser.world_size > 1 else chooser.choose_all(left)
        if is_first_rank():
            write_choices(file, choices, overrides)
    return chooser.config, chooser.choices


def find_automatic(config: Config) -> list[str]:
    """The keys that are still to be chosen; those that others depend on come first."""
    values = {
        "data.label_cache": config.data.label_cache,
        "model.channels_last": config.model.channels_last,
        "data.batch_size": config.data.batch_size,
        "data.num_workers": config.data.num_workers,
        "optim.lr": config.optim.lr,
    }
    return [key for key, value in values.items() if value == AUTO]


def keep_choice(key: str, saved: dict[str, Any], overrides: list[str]) -> AutomaticChoice:
    """The value of a key that a run was started with, and of those that followed from it."""
    plain = OmegaConf.create(saved)
    further = RATE_KEYS if key == "optim.lr" else ()
    given = list_given_keys(overrides)
    kept = {
        name: value for name in further if name not in given and (value := OmegaConf.select(plain, name)) is not None
    }
    return AutomaticChoice(key, OmegaConf.select(plain, key), "as the run was started", kept)


class Chooser:
    """Chooses one key after the other.

    Attributes:
        config: with the choices so far.
        choices: those so far.
    """

    def __init__(self, config: Config, overrides: list[str], source: DataSource) -> None:
        self.config, self.overrides, self.source = config, overrides, source
        self.choices: list[AutomaticChoice] = []
        self.accelerator = choose_accelerator(config.trainer.accelerator)
        self.ranks_here = count_ranks_here(config.trainer, self.accelerator)
        self.world_size = self.ranks_here * config.trainer.num_nodes

    def choose_all(self, keys: list[str]) -> list[AutomaticChoice]:
        """Choose the values of these keys."""
        return [self.choose(key) for key in keys]

    def choose(self, key: str) -> AutomaticChoice:
        """Choose the value of a key."""
        choose: dict[str, Callable[[], AutomaticChoice]] = {
            "data.label_cache": self.choose_label_cache,
            "model.channels_last": self.choose_layout,
            "data.batch_size": self.choose_batch_size,
            "data.num_workers": self.choose_workers,
            "optim.lr": self.choose_rate,
        }
        choice = choose[key]()
        self.apply(choice)
        return choice

    def apply(self, choice: AutomaticChoice) -> None:
        """Put a choice into the configuration, and into that of the data set."""
        for key, value in choice.values.items():
            section, name = key.split(".")
            changed = replace(getattr(self.config, section), **{name: value})
            self.config = replace(self.config, **{section: changed})
        self.source.config = self.config.data
        self.choices.append(choice)

    def choose_label_cache(self) -> AutomaticChoice:
        folder = resolve_reading(self.config, self.source.root).data.label_cache
        reason = (
            "the cache cannot be written or its disk is almost full"
            if folder is None
            else f"{MAX_AUTOMATIC_BYTES >> 30} GiB for all data sets"
        )
        return AutomaticChoice("data.label_cache", folder, reason)

    def choose_workers(self) -> AutomaticChoice:
        processors = max(1, count_processors() // self.ranks_here)
        num_workers = choose_num_workers(None, self.ranks_here)
        reason = f"{format_quantity(processors, 'processor')} a device"
        waiting = locate_waiting_record(self.config, self.source.root).read()
        if waiting is None:
            return AutomaticChoice("data.num_workers", num_workers, f"{reason}; no run before was measured")
        reason += f"; the run before waited {waiting.fraction:.0%} of its time with {waiting.num_workers}"
        return AutomaticChoice(
            "data.num_workers", correct_num_workers(waiting.num_workers, waiting.fraction, processors), reason
        )

    def choose_layout(self) -> AutomaticChoice:
        config = resolve_layout(self.config, self.build_meta_network())
        kind = "GPU" if self.accelerator == "gpu" else self.accelerator.upper()
        reason = f"{config.model.title} in {config.trainer.precision} on a {kind}"
        return AutomaticChoice("model.channels_last", config.model.channels_last, reason)

    def choose_rate(self) -> AutomaticChoice:
        return choose_rate(self.config, self.overrides, self.world_size)

    def choose_batch_size(self) -> AutomaticChoice:
        num_images = len(self.source.training_records())
        most = max(1, min(MAX_BATCH_SIZE, num_images // (MIN_SUB_BATCHES * self.world_size)))
        batch = self.make_largest_image()
        found = self.fit_gpu(batch, most) if self.accelerator == "gpu" else self.fit_memory(batch, most)
        limit = "the most that is chosen"
        if most < MAX_BATCH_SIZE:
            limit = f"{MIN_SUB_BATCHES} sub-batches a pass over {format_quantity(num_images, 'image')}"
        fits = f"{found.bytes_per_image / 2**20:.0f} MiB an image of up to {batch.image.shape[2]} x "
        reason = f"{fits}{batch.image.shape[3]} in {found.budget / 2**30:.1f} GiB"
        return AutomaticChoice(
            "data.batch_size", found.batch_size, f"{reason}; {limit}" if found.batch_size == most else reason
        )

    def build_meta_network(self) -> SegmentationNetwork:
        """The network on the meta device."""
        net = build_on_meta(self.build_net)
        if self.config.model.encoder.get("frozen", False):
            net.backbone.requires_grad_(False)
        return net

    def build_net(self) -> SegmentationNetwork:
        """The network with random weights."""
        source, config = self.source, self.config
        return build_network(without_weights(config.model), source.classes.num_classes, config.download, source.bands)

    def make_largest_image(self) -> Batch:
        """A black sub-batch of one image as large as the plan can produce."""
        before, self.source.config = self.source.config, replace(self.config.data, batch_size=1)
        try:
            config = replace(self.config, data=self.source.config)
            return build_data(config, self.source, self.build_meta_network()).largest_batch()
        finally:
            self.source.config = before

    # ---- memory

    def fit_memory(self, batch: Batch, most: int) -> BatchFit:
        """The largest batch by the memory of this machine, estimated from the shapes of what is kept for backward."""
        free = get_free_memory()
        if free is None:
            raise ConfigError("data.batch_size=auto: this system does not tell its free memory. Give a number.")
        net, canvas = self.build_meta_network().train(), Size(*batch.image.shape[2:])
        one, two = (estimate_step_memory(net, canvas, count) for count in (1, 2))
        if one is None or two is None:
            raise ConfigError(
                f"data.batch_size=auto: the memory that {self.config.model.title} needs cannot be estimated, because "
                "its forward pass reads values of tensors. Give a number."
            )
        scale = choose_weight_type(self.config.trainer.precision).itemsize / torch.float32.itemsize
        per_image = CPU_BUFFERS * scale * max(two.activations - one.activations, 1)
        fixed = CPU_BUFFERS * scale * max(2 * one.activations - two.activations, 0)
        state = sum(map(count_missing_state_bytes, [self.build_optimizer(net)]))
        fixed += scale * (2 + (self.config.ema.decay is not None)) * one.weights + scale * state  # with gradients
        budget = (1 - CPU_MARGIN) * free / self.ranks_here
        count = int((budget - fixed) // per_image)
        return BatchFit(min(max(count, 1), most), per_image, budget)

    def fit_gpu(self, batch: Batch, most: int) -> BatchFit:
        """The largest batch that runs forward and backward on the first GPU of this run, within its free memory.

        Raises:
            OutOfMemoryError: if not even one image does.
        """
        device = choose_device(self.config.trainer)
        net = self.build_net()
        model = replace(self.config.model, compile=False)
        module = build_module(replace(self.config, model=model), net, self.source.classes)
        budget = (1 - GPU_MARGIN) * torch.cuda.mem_get_info(device)[0]
        module.to(device, choose_weight_type(self.config.trainer.precision)).train()
        weights = sum(value.nbytes for value in module.net.parameters() if value.requires_grad)
        kept = count_missing_state_bytes(self.build_optimizer(module.net))
        kept += weights * (self.world_size > 1)  # the buckets in which ranks exchange gradients
        kept += weights * (self.config.ema.decay is not None)
        reserved = torch.empty(kept, dtype=torch.uint8, device=device)

        def measure(count: int) -> int | None:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            large = repeat_images(batch, count, device)
            try:
                with create_autocast(self.config.trainer.precision, device):
                    run_without_trace(module, large)
            except torch.OutOfMemoryError:
                if count == 1:
                    with report_out_of_memory(large):
                        raise
                return None
            return torch.cuda.max_memory_allocated(device)

        try:
            count, per_image = search_batch_size(measure, budget, most)
        finally:
            module.to("cpu")  # all of its memory is free again
            del reserved
            torch.cuda.empty_cache()
        return BatchFit(count, per_image, budget)

    def build_optimizer(self, net: SegmentationNetwork) -> Optimizer:
        """The optimiser, with which its memory is counted; its rate may not be known yet."""
        return build_optimizer(net, replace(self.config.optim, lr=1.0))


class BatchFit(NamedTuple):
    """The batch size of a device, and what it follows from."""

    batch_size: int
    bytes_per_image: float
    budget: float  # bytes


def repeat_images(batch: Batch, count: int, device: torch.device) -> Batch:
    """A sub-batch with `count` times the only image of `batch`, on a device."""
    return batch._replace(
        image=batch.image.to(device).repeat(count, 1, 1, 1),
        label=batch.label.to(device).repeat(count, 1, 1),
        size=batch.size.to(device).repeat(count, 1),
    )


def search_batch_size(measure: Callable[[int], int | None], budget: float, most: int) -> tuple[int, float]:
    """The largest batch size up to `most` whose peak is within the budget, as far as it was tried, and bytes per image.

    Peaks grow by about the same for each image: the size is extrapolated from the sizes tried so far, tried, and
    extrapolated again.

    Args:
        measure: the peak in bytes for a batch size; None if the memory was not enough.

    >>> search_batch_size(lambda count: 10 + 3 * count, budget=100, most=256)
    (30, 3.0)
    """
    peaks: dict[int, int] = {}
    first = measure(1)
    assert first is not None, "one image that does not fit is an error"
    peaks[1], lowest, highest, per_image = first, 1, most + 1, float(first)
    candidate = 2
    while lowest + 1 < highest:
        candidate = min(max(candidate, lowest + 1), highest - 1)
        peak = measure(candidate)
        if peak is not None:
            peaks[candidate] = peak
        if peak is not None and peak <= budget:
            lowest = candidate
        else:
            highest = candidate
        candidate = most + 1
        if len(peaks) > 1:
            largest = max(peaks)
            per_image = max((peaks[largest] - peaks[1]) / (largest - 1), 1.0)
            candidate = int(largest + (budget - peaks[largest]) // per_image)
        if candidate >= highest and highest <= most:  # the memory was not enough, whatever the budget says
            candidate = (lowest + highest) // 2
        if highest - lowest <= max(1, lowest // 16) and lowest > 1:
            break  # close enough: each try takes a step
    return lowest, per_image


# ---- the learning rate

RATE_KEYS = ("optim.lr_encoder", "optim.lr_decoder")


def choose_rate(config: Config, overrides: list[str], world_size: int) -> AutomaticChoice:
    """The rate of the recipe, scaled to the images of a step: linearly for sgd, by the square root for adamw.

    Linear: Goyal et al. 2017 ("Accurate, Large Minibatch SGD", section 2.1); square root, for adaptive methods: Malladi
    et al. 2022 ("On the SDEs and Scaling Rules for Adaptive Gradient Algorithms"). Rates of encoder and decoder that
    the recipe sets, and not the command line, are scaled too.
    """
    optim, given = config.optim, list_given_keys(overrides)
    images = config.data.batch_size * world_size * config.trainer.accumulate_grad_batches
    ratio = images / optim.lr_images
    factor = ratio if optim.name == "sgd" else math.sqrt(ratio)
    base = read_recipe_rate(overrides, optim.name)
    rates = {"optim.lr_encoder": optim.lr_encoder, "optim.lr_decoder": optim.lr_decoder}
    further = {key: rate * factor for key, rate in rates.items() if rate is not None and key not in given}
    rule = "linear for sgd" if optim.name == "sgd" else f"square root for {optim.name}"
    reason = f"{base:g} for {optim.lr_images} images a step; {rule}; {images} now"
    return AutomaticChoice("optim.lr", base * factor, reason, further)


def read_recipe_rate(overrides: list[str], optimizer: str) -> float:
    """The rate that the files of a command line say, without its own optim.lr; if it is auto, that of the optimiser."""
    words = [word for word in overrides if override_key(word) != "optim.lr"]
    rate = compose_config(words).optim.lr
    if rate == AUTO:
        rate = compose_config([f"optim={optimizer}"]).optim.lr
    return float(rate)


# ---- several ranks


def identify_start(overrides: list[str]) -> list[str]:
    """What all ranks of one start have in common, and those of another start mostly have not."""
    return [*(os.environ.get(name, "") for name in START_VARIABLES), *sorted(overrides)]


def share_choices(chooser: Chooser, keys: list[str], file: Path) -> list[AutomaticChoice]:
    """Choose on the first rank, and read its choices on the others.

    Choices of the same start that are in the file already are kept: a rank may have read them.

    Raises:
        SemsegError: if the first rank has not chosen after WAIT_S seconds.
    """
    choices = read_choices(file, keys, chooser.overrides)
    if choices is None and is_first_rank():
        return chooser.choose_all(keys)
    deadline = time.monotonic() + WAIT_S
    while choices is None:
        if time.monotonic() > deadline:
            raise SemsegError(
                f"{file}: the first rank has not chosen {', '.join(keys)} within {WAIT_S / 60:.0f} minutes. Give "
                "values instead of auto, or a run_dir that all machines see."
            )
        time.sleep(POLL_S)
        choices = read_choices(file, keys, chooser.overrides)
    for choice in choices:
        chooser.apply(choice)
    return choices


def write_choices(file: Path, choices: list[AutomaticChoice], overrides: list[str]) -> None:
    """Write choices with their reasons."""
    content = {"choices": [choice._asdict() for choice in choices], "start": identify_start(overrides)}
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_choices(file: Path, keys: list[str], overrides: list[str]) -> list[AutomaticChoice] | None:
    """The choices for `keys` that this start of the ranks has written; None if there are none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        choices = [AutomaticChoice(**row) for row in content["choices"]]
        is_ours = content["start"] == identify_start(overrides)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return choices if is_ours and [choice.key for choice in choices] == keys else None
