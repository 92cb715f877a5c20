"""Lightning's Trainer from the sections of the configuration."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import AdvancedProfiler, SimpleProfiler
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from semseg.checkpoints.atomic_io import AtomicCheckpointIO
from semseg.config.schema import EARLY_STOPPING, SyncBNConfig, TrainerConfig
from semseg.config.tables import announce_table
from semseg.errors import ConfigError, check_choice
from semseg.nets.gpu import configure_gpu
from semseg.nets.precision import choose_weight_type
from semseg.syncbn.plugin import build_layer_sync
from semseg.system.text import format_quantity
from semseg.training.loggers.external import logger_error, require_logger_package
from semseg.training.resume import get_validation_interval

Created = TypeVar("Created")
# Custom classes by name. A section callbacks.<name> or logger.<name> without `_target_` holds arguments.
CALLBACKS: dict[str, Callable[..., Callback]] = {}
LOGGERS: dict[str, Callable[..., Logger]] = {}
announce_table("callbacks", CALLBACKS)
announce_table("logger", LOGGERS)

OWN_TRAINER_KEYS = ("max_nonfinite_steps", "probe_memory", "log_images")  # our own keys, unknown to Lightning
PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}


def create_trainer(
    settings: TrainerConfig,
    syncbn: SyncBNConfig,
    run_dir: Path,
    *,
    callbacks: list[Callback],
    loggers: list[Logger],
    has_val: bool,
    is_training: bool,
) -> pl.Trainer:
    """Lightning's Trainer, with our checkpoints and synchronised normalisation.

    Args:
        settings: the section `trainer`.
        syncbn: the section `syncbn`.
        run_dir: the folder of the run.
        has_val: whether there are validation images.
        is_training: whether checkpoints are written.

    Raises:
        ConfigError: if Lightning refuses the values.
    """
    given = {key: value for key, value in vars(settings).items() if key not in OWN_TRAINER_KEYS}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    accelerator = choose_accelerator(settings.accelerator)
    check_gpu_numbers(settings)
    refuse_double_precision(settings.precision, accelerator)
    if accelerator == "cpu" and settings.precision == "16-mixed":  # Lightning would replace it
        raise ConfigError("trainer.precision=16-mixed: is for GPUs. Use bf16-mixed on a CPU.")
    if accelerator == "cpu":
        options["devices"] = count_ranks_here(settings, accelerator)  # Lightning's CPU accelerator takes a count only
    if not has_val:
        options["limit_val_batches"] = 0
    options["strategy"] = create_strategy(settings, syncbn, accelerator)
    if accelerator == "gpu":
        configure_gpu()
    if settings.profiler is not None:
        options["profiler"] = PROFILERS[settings.profiler](dirpath=run_dir, filename="profile")
    plugins = build_layer_sync(syncbn.name, syncbn.convention, accelerator, syncbn.group)
    try:
        trainer = pl.Trainer(
            **options,
            default_root_dir=run_dir,
            callbacks=callbacks,
            logger=loggers or False,
            plugins=[AtomicCheckpointIO(), *([plugins] if plugins else [])],
            # Every rank has its own sub-batches: see SegmentationData.
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_checkpointing=is_training,
        )
        leave_sigterm_alone(trainer)
        return trainer
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error


def create_strategy(settings: TrainerConfig, syncbn: SyncBNConfig, accelerator: str) -> str | Strategy:
    """trainer.strategy; with several devices, DistributedDataParallel without the copies that are not needed here.

    Gradients are views of the buckets that are exchanged, which saves as much memory as the weights take. Buffers are
    equal on all ranks already if syncbn reduces over all of them; by default DDP sends them from rank 0 at every step.
    """
    if settings.strategy == "auto" and not has_several(settings, accelerator):
        return settings.strategy
    sends_buffers = syncbn.name == "off" or syncbn.group == "node"
    # The first name replaces the second one from PyTorch 2.13 on.
    names = ("forward_sync_buffers", "broadcast_buffers")
    name = next(name for name in names if name in inspect.signature(DistributedDataParallel).parameters)
    options: dict[str, Any] = {"gradient_as_bucket_view": True, name: sends_buffers}
    if settings.strategy == "ddp_find_unused_parameters_true":
        options["find_unused_parameters"] = True
    return DDPStrategy(**options)


def has_several(settings: TrainerConfig, accelerator: str) -> bool:
    """Whether Lightning would start or join several processes for these devices."""
    return count_ranks_here(settings, accelerator) * settings.num_nodes > 1


def count_ranks_here(settings: TrainerConfig, accelerator: str) -> int:
    """The devices of a run on this machine, each of which has a process; `accelerator` is cpu, gpu or mps."""
    devices, num_here = settings.devices, torch.cuda.device_count() if accelerator == "gpu" else 1
    return len(devices) if isinstance(devices, list) else num_here if devices in ("auto", -1) else int(devices)


def leave_sigterm_alone(trainer: pl.Trainer) -> None:
    """Keep Lightning from exchanging over the device, at every step of several ranks, whether one of them got SIGTERM.

    Ranks would wait for the device and for each other there. Saver stops all of them at the same step by itself.
    """
    loop = trainer.fit_loop.epoch_loop
    assert hasattr(loop, "_broadcast_sigterm_tensor"), "Lightning has changed; see whether it still exchanges SIGTERM"
    loop._broadcast_sigterm_tensor = lambda: None


def choose_accelerator(name: str) -> str:
    """cpu, gpu (CUDA) or mps (an Apple GPU) for trainer.accelerator, as `auto` and `gpu` resolve on this machine.

    Raises:
        ConfigError: if a GPU is requested and there is none.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return "gpu" if has_cuda else "mps" if has_mps else "cpu"
    if name == "mps" and not has_mps:
        raise ConfigError("trainer.accelerator=mps: PyTorch sees no Apple GPU here. Use trainer.accelerator=auto.")
    if name == "gpu" and has_mps and not has_cuda:
        return "mps"
    if name in ("gpu", "cuda") and not has_cuda:
        raise ConfigError(f"trainer.accelerator={name}: PyTorch sees no GPU here. Use trainer=cpu.")
    return "gpu" if name == "cuda" else name


def use_one_device(settings: TrainerConfig) -> TrainerConfig:
    """The settings for one process on the first of trainer.devices."""
    first = settings.devices[:1] if isinstance(settings.devices, list) else 1
    return replace(settings, devices=first, num_nodes=1, strategy="auto")


def refuse_double_precision(precision: str, accelerator: str) -> None:
    """Refuse float64 on Apple's GPUs, which do not have it.

    Raises:
        ConfigError: with what to use instead.
    """
    if accelerator == "mps" and choose_weight_type(precision) == torch.float64:
        raise ConfigError(f"trainer.precision={precision}: Apple's GPUs have no float64. Use trainer=cpu with it.")


def check_gpu_numbers(settings: TrainerConfig) -> None:
    """Check that the GPUs of trainer.devices exist here: the first ones if it is a count, else those with its numbers.

    Raises:
        ConfigError: if one does not, with their number here; for trainer.accelerator see `choose_accelerator`.
    """
    devices = settings.devices
    if choose_accelerator(settings.accelerator) != "gpu" or devices in ("auto", -1):
        return
    num_here, num_needed = torch.cuda.device_count(), max(devices) + 1 if isinstance(devices, list) else int(devices)
    if num_needed <= num_here:
        return
    if num_here == 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        return  # every process may see its own GPU only, which Lightning allows too
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    raise ConfigError(
        f"trainer.devices={str(devices).replace(' ', '')}: PyTorch sees {format_quantity(num_here, 'GPU')} here{hint}, "
        "numbered from 0. Use one of them, or trainer.devices=auto for all."
    )


def describe_device(trainer: pl.Trainer) -> str:
    """The devices of a trainer, such as "2 x NVIDIA H200" or "cpu"."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{trainer.world_size} x {name}" if trainer.world_size > 1 else name


def name_device(accelerator: str) -> str:
    """The name of this process's device: that of a GPU from NVIDIA or AMD, else its type, such as cpu or mps."""
    return torch.cuda.get_device_name() if accelerator == "gpu" else accelerator


def create_callbacks(
    sections: Mapping[str, dict[str, Any]], settings: TrainerConfig, *, has_val: bool
) -> list[Callback]:
    """The callbacks of the section `callbacks`.

    Args:
        settings: the section `trainer`.
        has_val: whether there are validation images.

    Raises:
        ConfigError: if one of them monitors what is not known when it looks, is in no table, or does not take its
            options.
    """
    for name, section in sections.items():
        check_monitor(name, section, settings, has_val=has_val)
    return [
        instantiate(section) if "_target_" in section else create_own("callbacks", CALLBACKS, name, section)
        for name, section in sections.items()
    ]


def check_monitor(name: str, section: Mapping[str, Any], settings: TrainerConfig, *, has_val: bool) -> None:
    """Refuse a callback that would never see the score that it monitors, or fail because it is not there yet.

    Raises:
        ConfigError: with the key to set.
    """
    monitor, interval = str(section.get("monitor")), get_validation_interval(settings, has_val=has_val)
    if monitor.startswith("val/") and not interval:
        reason = "trainer.limit_val_batches is 0" if has_val else "data.val is empty"
        raise ConfigError(f"callbacks.{name}.monitor={monitor}: there is no validation, {reason}.")
    if section.get("_target_") != EARLY_STOPPING:
        return
    key, given = f"callbacks.{name}.check_on_train_epoch_end", section.get("check_on_train_epoch_end")
    if monitor.startswith("val/") and given:
        raise ConfigError(f"{key}=true: {monitor} is known after validation only. Set it to false.")
    is_checked_by_epoch = settings.check_val_every_n_epoch == 1 if given is None else given  # as Lightning chooses
    if not interval and not is_checked_by_epoch:
        raise ConfigError(
            f"{key}: there is no validation, after which {monitor} would be checked. Set it to true, which checks it "
            "after every epoch."
        )


def create_loggers(sections: Mapping[str, dict[str, Any]]) -> list[Logger]:
    """The loggers of the section `logger`.

    Raises:
        ConfigError: if the package of one is not installed or refuses to open it, if one is in no table, or does not
            take its options.
    """
    return [
        create_logger(section) if "_target_" in section else create_own("logger", LOGGERS, name, section)
        for name, section in sections.items()
    ]


def create_logger(section: dict[str, Any]) -> Logger:
    """One of our loggers.

    Raises:
        ConfigError: if its package is not installed, or refuses to open it.
    """
    require_logger_package(section["_target_"])
    try:
        return instantiate(section)
    except InstantiationException as error:
        raise logger_error(section["_target_"].rpartition(".")[2], error.__cause__ or error) from error


def create_own(group: str, table: Mapping[str, Callable[..., Created]], name: str, options: dict[str, Any]) -> Created:
    """The callback or logger `name` that a program has added to `table`.

    Raises:
        ConfigError: if there is none, or it does not take these options.
    """
    create = table[check_choice(group, name, table)]
    signature = inspect.signature(create)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigError(f"{group}.{name}={options}: its arguments {signature} do not fit: {error}.") from None
    return create(**options)
