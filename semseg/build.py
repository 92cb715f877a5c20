"""Builds networks, predictors, modules, data and trainers from the configuration.

The whole configuration goes no further: what is built here gets the sections and values that it uses.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from semseg.checkpoints import zoo
from semseg.checkpoints.ensemble import build_ensemble, describe_differences, join_networks
from semseg.checkpoints.format import SavedNetwork, read_checkpoint, refuse_nonfinite_weights
from semseg.checkpoints.from_hub import is_on_hub, read_from_hub
from semseg.checkpoints.network import load_network
from semseg.checkpoints.published import PUBLISHED_FREE_KEYS, PublishedFiles, find_published_files, read_published
from semseg.config.fields import AUTO
from semseg.config.inherit import inherit_config
from semseg.config.override_keys import override_key
from semseg.config.schema import (
    FINE_STRIDE,
    HUB_PREFIX,
    ONNX,
    ZOO_PREFIX,
    Config,
    DataConfig,
    ModelConfig,
    TrainerConfig,
    config_to_plain,
    list_checkpoints,
)
from semseg.data.classes import ClassTable
from semseg.data.crops import NATIVE, choose_crop
from semseg.data.label_cache import prepare_automatic_cache
from semseg.data.sources import DataSource, load_class_table, make_output_label_map
from semseg.data.store import resolve_path
from semseg.datamodule import SegmentationData
from semseg.errors import ArgumentError, ConfigError, first_line, install_command
from semseg.evaluation.tiled import WindowLayout, choose_layout
from semseg.lit_module import SegmentationModule
from semseg.nets.bands import choose_reading
from semseg.nets.depthwise import is_faster_in_channels_last
from semseg.nets.gpu import configure_gpu
from semseg.nets.interfaces import SegmentationNetwork, choose_size_divisor
from semseg.nets.precision import choose_weight_type
from semseg.nets.registry import OLD_NAMES, ORIGINAL_NAMES
from semseg.nets.segmenter import is_convolutional
from semseg.prediction.predictor import PredictionSettings, Predictor
from semseg.storage.download import cache_folder, fetch_file
from semseg.storage.hub_list import HubEntry
from semseg.storage.ranks import print_once
from semseg.storage.run_folders import expand_path, find_checkpoint
from semseg.system.processors import choose_num_workers, count_processors
from semseg.training.callbacks.bad_images import CountBadImages
from semseg.training.callbacks.console import BarProgress, LineProgress, ReportValidation
from semseg.training.callbacks.ema import MovingAverage
from semseg.training.callbacks.label_warnings import WarnAboutLabels
from semseg.training.callbacks.log_steps import EndOnSignals, LogSteps, checkpoint_callbacks
from semseg.training.callbacks.nonfinite import NonFiniteGuard
from semseg.training.callbacks.out_of_memory import ProbeMemory
from semseg.training.callbacks.panels import LogPanels
from semseg.training.callbacks.report import WriteReport
from semseg.training.callbacks.step_reduction import StepReduction
from semseg.training.callbacks.waiting import RecordWaiting, WaitingRecord
from semseg.training.resume import DropRepeatedSteps, SeedEveryStep
from semseg.training.trainer import (
    check_gpu_numbers,
    choose_accelerator,
    count_ranks_here,
    create_callbacks,
    create_loggers,
    create_trainer,
    name_device,
    refuse_double_precision,
)
from semseg.training.training_state import CheckRestoredState

# Keys of `data` that decide how long it takes to read a sub-batch, and to train on it.
READING_KEYS = (
    "batch_size", "short_edges", "max_long_edge", "resize", "crop", "decode", "train", "images", "limit", "mix"
)  # fmt: skip
EXPORT_EXTRA = ("onnx", "onnxscript", "onnxruntime")  # modules of semseg[export]


def open_network(config: Config, overrides: list[str]) -> tuple[SavedNetwork, Config]:
    """The network that `ckpt` names, and the configuration for using it.

    Raises:
        SemsegError: if there is no such network, or the command line contradicts it.
    """
    assert config.ckpt is not None, "find_mode_problems asks for ckpt"
    saved = find_networks(config, overrides)
    is_published = bool(saved.note) and not saved.config.model.library
    kept = [word for word in overrides if not (is_published and override_key(word) in PUBLISHED_FREE_KEYS)]
    return saved, inherit_config(saved.config, config, kept)


def find_networks(config: Config, overrides: list[str]) -> SavedNetwork:
    """The network of `ckpt`, or the ensemble of several.

    Raises:
        SemsegError: see `find_network`; also if they cannot be averaged.
    """
    members = []
    for spec in list_checkpoints(config.ckpt):
        members.append(find_network(spec, config, overrides))
        print_once(members[-1].note)
    if len(members) == 1:
        return members[0]
    joined = join_networks(members)
    print_once(describe_differences(members))
    return joined


def find_network(spec: str, config: Config, overrides: list[str], key: str = "ckpt") -> SavedNetwork:
    """A checkpoint of ours, published files, a network of the hub or ONNX.

    It is a file, a folder, last, best, zoo:<name>, hf:<name>, or two files with a comma.

    Args:
        key: that names it, for errors.

    Raises:
        CheckpointError: if there is none, or it is damaged.
        DownloadError: if it cannot be fetched.
        ConfigError: if it needs packages that are not installed.
    """
    if spec.startswith(ZOO_PREFIX):
        network = zoo.find_zoo_network(spec)
        if isinstance(network, HubEntry):
            return find_hub_network(f"{HUB_PREFIX}{network.hub_name}", config)
        encoder, decoder = (
            fetch_file(url, config.download, folder=network.folder, manual="or give ckpt=<folder with both files>")
            for url in network.urls()
        )
        return read_published(PublishedFiles(encoder, decoder), config, overrides, network.release)
    files = find_published_files(spec)
    if files is not None:
        return read_published(files, config, overrides)
    if is_on_hub(spec):
        return find_hub_network(spec, config)
    path = find_checkpoint(spec, expand_path(config.runs_dir), key=key)
    if path.suffix.lower() != ONNX:
        saved = read_checkpoint(path)
        print_once(saved.origin and f"{path.name} was trained from: {saved.origin}")
        return saved
    require_export_extra()
    from semseg.export.onnx_runtime import read_exported  # noqa: PLC0415 - the packages of an extra

    return read_exported(path)


def find_hub_network(spec: str, config: Config) -> SavedNetwork:
    """A network of the hub, or a folder in transformers' layout, as if it were a checkpoint; see `find_network`."""
    found = read_from_hub(spec, config.download, config.data)
    used = replace(config, model=found.model, data=found.data)
    return SavedNetwork(
        found.source, found.weights, used, found.classes, found.convention, note=found.note, origin=found.origin
    )


def require_export_extra() -> None:
    """Fail early if the packages of semseg[export] are not installed.

    Raises:
        ConfigError: with the command that installs them.
    """
    missing = [name for name in EXPORT_EXTRA if find_spec(name) is None]
    if missing:
        raise ConfigError(f"exported networks need {', '.join(missing)}: {install_command('export')}")


def restore_network(saved: SavedNetwork) -> SegmentationNetwork:
    """The network of a checkpoint with its weights, or that of an exported file, in eval mode.

    Raises:
        CheckpointError: if any weight is missing, unexpected or of another shape.
    """
    if saved.members:
        return build_ensemble(saved, [restore_network(member) for member in saved.members])
    if saved.graph is None:
        return load_network(saved)
    from semseg.export.onnx_runtime import build_graph_network  # noqa: PLC0415 - the packages of an extra

    return build_graph_network(saved, saved.graph)


def open_predictor(config: Config, overrides: list[str], device: str | int | torch.device | None = None) -> Predictor:
    """The network that `ckpt` names, ready to predict with the settings of `predict` and `eval`.

    Args:
        device: where it runs; None: on the device of trainer.accelerator.

    Raises:
        SemsegError: if there is no such network or device, or the command line contradicts the network.
    """
    # Before anything is downloaded.
    chosen = choose_device(config.trainer) if device is None else parse_device(device)
    saved, config = open_network(config, overrides)
    return create_predictor(saved, config, chosen)


def parse_device(device: str | int | torch.device) -> torch.device:
    """A device by PyTorch's name for it, ready to compute.

    Raises:
        ArgumentError: if PyTorch has no such device here.
    """
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ArgumentError(
            f"device={device!r}: PyTorch has no such device. Use 'cpu', 'cuda', 'cuda:1' or 'mps'."
        ) from None
    num_gpus = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= num_gpus:
        found = f"the last GPU here is cuda:{num_gpus - 1}" if num_gpus else "PyTorch sees no GPU here"
        raise ArgumentError(f"device={device!r}: {found}. Use device='cpu', or leave it out.")
    if chosen.type == "cuda":
        configure_gpu()
    try:
        torch.zeros((), device=chosen).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(f"device={device!r}: cannot be used here ({first_line(error)}).") from None
    return chosen


def create_predictor(saved: SavedNetwork, config: Config, device: torch.device | None = None) -> Predictor:
    """A predictor for a network, with the settings of `predict` and `eval`.

    Args:
        device: where it runs; None: on the device of trainer.accelerator.

    Raises:
        CheckpointError: if its weights do not fit it, or are NaN or infinite.
        ConfigError: if a GPU is requested and there is none, or the data set has another number of classes.
    """
    device = choose_device(config.trainer) if device is None else device
    check_num_classes(config.data, saved)
    options = config.predict
    precision = config.trainer.precision
    net = restore_network(saved).to(device, choose_weight_type(precision))
    refuse_nonfinite_weights(net.state_dict(), saved.source)
    if resolve_layout(config, net, device.type).model.channels_last and is_convolutional(net):
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    settings = PredictionSettings(
        scales=options.scales or config.eval.scales,
        max_long_edge=config.data.max_long_edge,
        size_divisor=config.model.size_divisor,
        flip=options.flip,
        window=options.window,
        stride=options.stride,
        memory_limit_mb=options.memory_limit_mb,
        max_pixels=config.data.max_pixels,
        crop=choose_crop(config.data, config.augment, net.image_size) if config.data.resize == NATIVE else None,
        threshold=choose_threshold(options.threshold, saved),
        min_confidence=options.min_confidence,
        batch_size=config.eval.batch_size,
    )
    predictor = Predictor(
        net,
        saved.classes,
        make_output_label_map(config.data, saved.classes, options.format),
        settings,
        name=saved.title,
        source=str(saved.source),
        precision=precision,
        bands=choose_reading(net.convention, config.data),
        show_bands=config.data.show_bands,
    )
    predictor.check_settings(settings)
    return predictor


def choose_threshold(chosen: float | str | None, saved: SavedNetwork) -> float | None:
    """The probability of predict.threshold; for auto, that in the checkpoint.

    Raises:
        ConfigError: for a network that has not two classes, or that was not validated.
    """
    if chosen is None:
        return None
    num_classes = saved.classes.num_classes
    if num_classes != 2:
        raise ConfigError(
            f"predict.threshold={chosen}: is for networks of two classes, and {saved.source} has {num_classes}. "
            "Leave it out."
        )
    if not isinstance(chosen, str):
        return float(chosen)
    if saved.members:
        raise ConfigError(
            "predict.threshold=auto: the mean of several networks has another best threshold than each of them. "
            "Give one: mode=eval prints it."
        )
    if saved.threshold is None:
        raise ConfigError(
            f"predict.threshold=auto: {saved.source} has no threshold, because none of its validations had pixels "
            "of the second class. Give one: mode=eval prints the best."
        )
    print_once(f"predict.threshold=auto: {saved.threshold:g}, the best of the validation")
    return saved.threshold


def choose_device(settings: TrainerConfig) -> torch.device:
    """The device that predicts: the first of trainer.devices on GPUs, Apple's GPU, or the CPU.

    Raises:
        ConfigError: if a GPU is requested that is not there.
    """
    accelerator = choose_accelerator(settings.accelerator)
    refuse_double_precision(settings.precision, accelerator)
    if accelerator != "gpu":
        return torch.device(accelerator)
    first = settings.devices[0] if isinstance(settings.devices, list) else 0
    check_gpu_numbers(replace(settings, devices=[first]))
    configure_gpu()
    device = torch.device("cuda", first)
    torch.cuda.set_device(device)  # otherwise PyTorch would also allocate on the first GPU, which others may use
    return device


def check_num_classes(data: DataConfig, saved: SavedNetwork) -> None:
    """Refuse a data set, given instead of that of the network, that has another number of classes.

    Raises:
        ConfigError: with both numbers.
    """
    num_classes = data.num_classes
    if data.classes not in (None, saved.config.data.classes):  # the table of the network may be on another machine
        num_classes = load_class_table(data, resolve_path(data.root)).num_classes
    if num_classes not in (None, saved.classes.num_classes):
        raise ConfigError(format_other_classes(data, num_classes, saved))


def format_other_classes(data: DataConfig, num_classes: int, saved: SavedNetwork) -> str:
    """The sentence for a data set with other classes than those of the network."""
    return (
        f"data={data.name} has {num_classes} classes, but {saved.source} was trained for {saved.classes.num_classes}. "
        "Use a data set with the classes of the network."
    )


def resolve_reading(config: Config, root: Path) -> Config:
    """The configuration with plain values for data.label_cache and data.num_workers, if they are `auto`.

    Args:
        root: folder of the data set.
    """
    data = config.data
    if data.label_cache == AUTO:
        folder = prepare_automatic_cache(cache_folder(config.download), root)
        data = replace(data, label_cache=None if folder is None else str(folder))
    if data.num_workers == AUTO:
        ranks = count_ranks_here(config.trainer, choose_accelerator(config.trainer.accelerator))
        data = replace(data, num_workers=choose_num_workers(None, ranks))
    return config if data is config.data else replace(config, data=data)


def locate_waiting_record(config: Config, root: Path) -> WaitingRecord:
    """Where the waiting is recorded of runs with the same network, images, sizes, devices and processors.

    Args:
        config: of the run; its batch size is a number.
        root: folder of the data set.
    """
    plain, accelerator = config_to_plain(config), choose_accelerator(config.trainer.accelerator)
    conditions = [
        {key: plain["data"][key] for key in READING_KEYS}, plain["augment"], config.model.title,
        config.trainer.precision, config.model.compile, count_ranks_here(config.trainer, accelerator),
        name_device(accelerator), count_processors(),
    ]  # fmt: skip
    return WaitingRecord(cache_folder(config.download), root, conditions)


def resolve_layout(config: Config, net: SegmentationNetwork, device: str | None = None) -> Config:
    """The configuration with a plain value for model.channels_last, if it is `auto`.

    Args:
        device: the type of the device; None: that of trainer.accelerator.
    """
    if config.model.channels_last != AUTO:
        return config
    device = device or choose_accelerator(config.trainer.accelerator)
    is_last = is_convolutional(net) and is_faster_in_channels_last(net, device, config.trainer.precision)
    return replace(config, model=replace(config.model, channels_last=is_last))


def build_module(config: Config, net: SegmentationNetwork, classes: ClassTable) -> SegmentationModule:
    """The module that trains and evaluates `net`."""
    config = resolve_layout(config, net)
    return SegmentationModule(
        net,
        classes,
        model_config=config.model,
        loss_config=config.loss,
        optim_config=config.optim,
        schedule_config=config.schedule,
        syncbn_config=config.syncbn,
        eval_config=config.eval,
        miou_rule=config.data.miou_rule,
        max_bad=config.data.max_bad,
        saved_config=config_to_plain(config),
        window_layout=choose_evaluation_layout(config, net),
    )


def choose_evaluation_layout(config: Config, net: SegmentationNetwork) -> WindowLayout | None:
    """The windows of data.resize=native in evaluation, with the keys of `eval`; None for images at a short edge.

    Raises:
        ConfigError: for a window, or a crop, that the network does not take.
    """
    crop = choose_crop(config.data, config.augment, net.image_size)
    if config.data.resize != NATIVE or crop is None:
        return None
    divisor, options = config.model.size_divisor, config.eval
    return choose_layout(net, crop, divisor=divisor, window=options.window, stride=options.stride)


def build_data(config: Config, source: DataSource, net: SegmentationNetwork) -> SegmentationData:
    """The loaders of `source` for `net`.

    Raises:
        ConfigError: if the size divisor is not a multiple of the label stride.
    """
    if AUTO in (source.config.label_cache, source.config.num_workers):
        source.config = resolve_reading(replace(config, data=source.config), source.root).data
    return SegmentationData(
        source,
        net,
        augment_config=config.augment,
        eval_config=config.eval,
        trainer_config=config.trainer,
        seed=config.seed,
        size_divisor=config.model.size_divisor,
        label_stride=choose_label_stride(config, net),
    )


def choose_label_stride(config: Config, net: SegmentationNetwork) -> int:
    """The stride of training labels in pixels: model.label_stride, and what auto and null amount to.

    auto is at most FINE_STRIDE: of objects of 8 x 8 pixels, labels of every 16th pixel have lost most. It divides the
    size divisor, like every stride of labels. The original's networks keep the stride of their logits where images are
    resized as in the original, and networks with a loss of their own always do.
    """
    chosen, model = config.model.label_stride, config.model
    if isinstance(chosen, int):
        return chosen
    is_original = config.data.resize != NATIVE and is_original_network(model)
    if chosen is None or net.label_stride <= FINE_STRIDE or is_original or net.has_own_loss:
        return net.label_stride
    divisor = choose_size_divisor(net, model.size_divisor)
    return next(stride for stride in range(FINE_STRIDE, 0, -1) if divisor % stride == 0)


def is_original_network(model: ModelConfig) -> bool:
    """Whether a network consists of an encoder and a decoder of the 2018 and 2020 releases."""
    if model.library or "library" in model.encoder:
        return False
    names = {"encoder": model.encoder["name"], "decoder": model.decoder["name"]}
    return all(name in OLD_NAMES[kind] or name in ORIGINAL_NAMES[kind] for kind, name in names.items())


def build_trainer(config: Config, source: DataSource) -> pl.Trainer:
    """The trainer of a run, with its callbacks and loggers.

    Raises:
        ConfigError: if Lightning refuses the values, a logger cannot be opened, or a callback monitors a validation
            score and there is no validation.
    """
    is_training, has_val = config.mode == "train", source.has("val")
    callbacks: list[Callback] = training_callbacks(config, source) if is_training else [EndOnSignals()]
    if config.trainer.enable_progress_bar:
        bar = BarProgress(config.data.batch_size if is_training else 0, config.eval.batch_size)
        callbacks.append(bar if sys.stdout.isatty() else LineProgress())
    return create_trainer(
        config.trainer if is_training else replace(config.trainer, fast_dev_run=False),  # it would score one batch
        config.syncbn,
        Path(config.run_dir),
        callbacks=callbacks
        + (create_callbacks(config.callbacks, config.trainer, has_val=has_val) if is_training else []),
        loggers=create_loggers(config.logger) if is_training else [],
        has_val=has_val,
        is_training=is_training,
    )


def training_callbacks(config: Config, source: DataSource) -> list[Callback]:
    """Our callbacks of a training run, in the order in which Lightning calls them."""
    run_dir, trainer, reduction = Path(config.run_dir), config.trainer, StepReduction()
    callbacks: list[Callback] = [
        CheckRestoredState(),
        ProbeMemory(trainer.probe_memory),
        SeedEveryStep(config.seed),
        DropRepeatedSteps(trainer.max_steps),
        NonFiniteGuard(run_dir, trainer.max_nonfinite_steps, reduction),
        LogSteps(),
        WarnAboutLabels(source.classes.names),
        ReportValidation(),
        LogPanels(source, trainer.log_images),
        WriteReport(run_dir, source, trainer.log_images, network=config.model.title, config=config_to_plain(config)),
    ]
    if config.ema.decay is not None:
        callbacks.append(MovingAverage(config.ema.decay, config.ema.start_step))
    callbacks.append(RecordWaiting(locate_waiting_record(config, source.root)))
    if config.data.on_bad == "skip":
        callbacks.append(CountBadImages(config.data.batch_size, config.data.max_bad, reduction))
    return callbacks + checkpoint_callbacks(run_dir, config.checkpoint, reduction, has_val=source.has("val"))
