"""From the configuration to objects. The only place that knows which class a name stands for."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import AdvancedProfiler, SimpleProfiler

from semseg.checkpoints import zoo
from semseg.checkpoints.atomic_io import AtomicCheckpointIO
from semseg.checkpoints.format import (
    SavedNetwork,
    find_checkpoint,
    first_line,
    inherit_config,
    read_checkpoint,
    refuse_nonfinite_weights,
)
from semseg.checkpoints.initialise import find_differences, load_all_weights, load_encoder_weights
from semseg.checkpoints.published import PUBLISHED_FREE_KEYS, PublishedFiles, find_published_files, read_published
from semseg.config.preprocessing import PREPROCESSING
from semseg.config.schema import ONNX, ZOO_PREFIX, Config, DownloadConfig, ModelConfig, split_network_options
from semseg.data.label_map import LabelMap
from semseg.data.sources import DataSource, make_label_map
from semseg.errors import CheckpointError, ConfigError
from semseg.nets.interfaces import Encoder
from semseg.nets.registry import build_segmenter
from semseg.nets.segmenter import Segmenter
from semseg.prediction.predictor import PredictionSettings, Predictor
from semseg.storage.download import fetch_file
from semseg.syncbn.plugin import build_layer_sync
from semseg.system.text import escape_lines
from semseg.training.callbacks.bad_images import CountBadImages
from semseg.training.callbacks.console import BarProgress, PlainProgress, TellValidation
from semseg.training.callbacks.ema import MovingAverage
from semseg.training.callbacks.label_warnings import WarnAboutLabels
from semseg.training.callbacks.log_steps import EndOnSignals, LogSteps, checkpoints
from semseg.training.callbacks.nonfinite import NonFiniteGuard
from semseg.training.callbacks.out_of_memory import ProbeMemory
from semseg.training.callbacks.panels import LogPanels
from semseg.training.loggers.external import not_opened, require_extra
from semseg.training.resume import ForgetRepeatedSteps, SeedEveryStep
from semseg.training.training_state import CheckRestored

OWN_TRAINER_KEYS = ("max_nonfinite_steps", "probe_memory", "log_images")  # that Lightning does not know
PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}
EXPORT_EXTRA = ("onnx", "onnxscript", "onnxruntime")  # modules of semseg[export]


def build_net(config: ModelConfig, num_classes: int, download: DownloadConfig | None = None) -> Segmenter:
    """The network, its encoder filled as model.encoder.weights says, the rest with fresh weights.

    Args:
        download: how to fetch ImageNet weights (model.encoder.weights=imagenet).

    Raises:
        ConfigError: for unknown names and options.
        CheckpointError: if the weight file does not fit.
        DownloadError: if it cannot be fetched.
    """
    encoder, encoder_options = split_network_options(config.encoder, "encoder")
    decoder, decoder_options = split_network_options(config.decoder, "decoder")
    net = build_segmenter(encoder, decoder, num_classes, encoder_options, decoder_options)
    weights = config.encoder.get("weights", "none")
    if weights == "imagenet":
        load_encoder_weights(net.encoder, imagenet_weights(net.encoder, encoder, download or DownloadConfig()))
    elif weights not in (None, "none"):
        load_encoder_weights(net.encoder, Path(weights).expanduser())
    if config.convention != "auto":
        net.convention = PREPROCESSING[config.convention]
    net.has_cpu_kernels = config.winograd
    return net


def imagenet_weights(encoder: Encoder, name: str, download: DownloadConfig) -> Path:
    """The file of an encoder's published ImageNet weights, downloaded if it is not in the cache.

    Raises:
        ConfigError: if none are published for this encoder.
        DownloadError: if they cannot be fetched.
    """
    file = encoder.weights_file
    if file is None:
        raise ConfigError(f"model.encoder.weights=imagenet: none are known for {name}. Give a file, or none.")
    by_hand = "or set model.encoder.weights to a file you have, or to none for random ones"
    return fetch_file(file.url, download, folder="imagenet", digest=file.digest, manual=by_hand)


def without_weights(model: ModelConfig) -> ModelConfig:
    """The same network with fresh weights everywhere: others are loaded into it."""
    return replace(model, encoder=model.encoder | {"weights": "none"})


def open_network(config: Config, overrides: list[str]) -> tuple[SavedNetwork, Config]:
    """The network that `ckpt` means, and the configuration for using it.

    Raises:
        SemsegError: if there is no such network, or the command line contradicts it.
    """
    assert config.ckpt is not None, "config.check asks for ckpt"
    saved = find_network(config.ckpt, config, overrides)
    tell(saved.note)
    kept = [word for word in overrides if not (saved.note and word.partition("=")[0] in PUBLISHED_FREE_KEYS)]
    return saved, inherit_config(saved.config, config, kept)


def find_network(spec: str, config: Config, overrides: list[str]) -> SavedNetwork:
    """A checkpoint of ours, published files or ONNX: a file, a folder, last, best, zoo:<name>, two files with a comma.

    Raises:
        CheckpointError: if there is none, or it is damaged.
        DownloadError: if it cannot be fetched.
        ConfigError: for an ONNX file, if the packages that read it are not installed.
    """
    if spec.startswith(ZOO_PREFIX):
        network = zoo.find_published_network(spec)
        encoder, decoder = (
            fetch_file(url, config.download, folder=network.folder, manual="or give ckpt=<folder with both files>")
            for url in network.urls()
        )
        return read_published(PublishedFiles(encoder, decoder), config, overrides, network.release)
    files = find_published_files(spec)
    if files is not None:
        return read_published(files, config, overrides)
    path = find_checkpoint(spec, Path(config.runs_dir))
    if path.suffix.lower() != ONNX:
        return read_checkpoint(path)
    require_export_extra()
    from semseg.export.onnx_runtime import read_exported  # noqa: PLC0415 - the packages of an extra

    return read_exported(path)


def require_export_extra() -> None:
    """Leave early where the packages of semseg[export] are not installed.

    Raises:
        ConfigError: then.
    """
    missing = [name for name in EXPORT_EXTRA if find_spec(name) is None]
    if missing:
        raise ConfigError(f"ONNX files need {', '.join(missing)}: pip install 'semseg[export]'")


@rank_zero_only
def tell(line: str) -> None:
    """Print a line once, whatever the number of processes; nothing for an empty one."""
    if line:
        print(escape_lines(line), flush=True)


def restore_net(saved: SavedNetwork) -> Segmenter:
    """The network of a checkpoint with its weights, or that of an exported file, in eval mode.

    Raises:
        CheckpointError: if any weight is missing, unexpected or of another shape.
    """
    if saved.graph is not None:
        from semseg.export.onnx_runtime import build_graph_network  # noqa: PLC0415 - the packages of an extra

        return build_graph_network(saved, saved.graph)
    check_network(saved)
    net = build_net(without_weights(saved.config.model), saved.classes.num_classes)
    load_all_weights(net, saved.weights, f"{saved.source}: its weights do not fit its own configuration")
    net.convention = saved.convention
    return net.eval()


def check_network(saved: SavedNetwork) -> None:
    """Refuse a file whose description no network fits, before memory is taken for one.

    Raises:
        CheckpointError: if the network cannot be built, or its weights are missing, unexpected or of another shape.
    """
    if saved.graph is not None:
        return
    fitting = f"{saved.source}: its weights do not fit its own configuration"
    try:
        with torch.device("meta"):
            net = build_net(without_weights(saved.config.model), saved.classes.num_classes)
    except NotImplementedError:  # a network that computes with numbers while it is built
        return
    except Exception as error:  # whatever a network makes of options of a file
        raise CheckpointError(f"{saved.source}: its network cannot be built: {first_line(error)}") from error
    problems = find_differences(saved.weights, net.state_dict())
    if problems:
        raise CheckpointError(f"{fitting}: {'; '.join(problems)}.")


def open_predictor(config: Config, overrides: list[str], device: str | torch.device | None = None) -> Predictor:
    """The network that `ckpt` means, ready to be shown pictures as `predict` and `eval` say.

    Args:
        device: where it runs; None: as trainer.accelerator says.

    Raises:
        SemsegError: if there is no such network, or the command line contradicts it.
    """
    saved, config = open_network(config, overrides)
    if device is None:
        device = "cuda" if accelerator(config) == "gpu" else "cpu"
    options = config.predict
    settings = PredictionSettings(
        options.scales or config.eval.scales,
        config.data.max_long_edge,
        config.model.size_divisor,
        options.flip,
        options.window,
        options.stride,
        options.memory_limit_mb,
        config.data.max_pixels,
    )
    is_ade20k = options.format == "ade20k"  # classes are 1 to K, whatever the data set
    ids = LabelMap(saved.classes.num_classes) if is_ade20k else make_label_map(config.data, saved.classes)
    net = restore_net(saved).to(device)
    refuse_nonfinite_weights(net.state_dict(), saved.source)
    return Predictor(net, saved.classes, ids, settings, name=saved.config.model.name, source=str(saved.source))


def build_trainer(config: Config, source: DataSource) -> pl.Trainer:
    """Lightning's Trainer, with our checkpoints, progress and synchronised normalisation.

    Raises:
        ConfigError: if Lightning refuses the values, or a logger cannot be opened.
    """
    given = {key: value for key, value in vars(config.trainer).items() if key not in OWN_TRAINER_KEYS}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    options["devices"] = device_count_or_list(config)
    if not source.has("val"):
        options["limit_val_batches"] = 0
    if config.trainer.profiler is not None:
        options["profiler"] = PROFILERS[config.trainer.profiler](dirpath=config.run_dir, filename="profile")
    opened = loggers(config)
    plugins = build_layer_sync(config.syncbn.name, config.syncbn.convention, accelerator(config), config.syncbn.group)
    try:
        return pl.Trainer(
            **options,
            default_root_dir=config.run_dir,
            callbacks=callbacks(config, source),
            logger=opened,
            plugins=[AtomicCheckpointIO(), *([plugins] if plugins else [])],
            # Every rank has its own sub-batches: see SegmentationData.
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_checkpointing=config.mode == "train",
        )
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error


def accelerator(config: Config) -> str:
    """cpu or gpu, as `auto` will turn out here.

    Raises:
        ConfigError: if a GPU is asked for and there is none.
    """
    name = config.trainer.accelerator
    if name == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    if name in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(f"trainer.accelerator={name}: PyTorch sees no GPU here. Use trainer=cpu.")
    return "gpu" if name == "cuda" else name


def device_count_or_list(config: Config) -> Any:
    """Lightning's CPU accelerator takes a count only; a list of indices stands for its length."""
    devices = config.trainer.devices
    return len(devices) if isinstance(devices, list) and accelerator(config) == "cpu" else devices


def callbacks(config: Config, source: DataSource) -> list[Callback]:
    """Those of the configuration, and ours.

    Raises:
        ConfigError: if one of them waits for a validation that never comes.
    """
    ours: list[Callback] = [EndOnSignals()]  # in training, signals write a checkpoint first
    if config.mode == "train":
        guard = NonFiniteGuard(Path(config.run_dir), config.trainer.max_nonfinite_steps, config.trainer.precision)
        ours = [
            CheckRestored(),
            ProbeMemory(config.trainer.probe_memory),
            SeedEveryStep(config.seed),
            ForgetRepeatedSteps(config.trainer.max_steps),
            guard,
            LogSteps(),
        ]
        ours += [WarnAboutLabels(source.classes.names), TellValidation()]
        ours.append(LogPanels(source, config.trainer.log_images))
        if config.ema.decay is not None:
            ours.append(MovingAverage(config.ema))
        if config.data.on_bad == "skip":
            ours.append(CountBadImages(config.data.batch_size, config.data.max_bad))
        ours += checkpoints(Path(config.run_dir), config.checkpoint, has_val=source.has("val"))
    if config.trainer.enable_progress_bar:
        bar = BarProgress(config.data.batch_size, config.eval.batch_size)
        ours.append(bar if sys.stdout.isatty() else PlainProgress())
    for name, section in config.callbacks.items():
        monitor = str(section.get("monitor"))
        if monitor.startswith("val/") and not source.has("val"):
            raise ConfigError(f"callbacks.{name}.monitor={monitor}: there is no validation, data.val is empty.")
    configured = [instantiate(section) for section in config.callbacks.values()]
    return ours + (configured if config.mode == "train" else [])


def loggers(config: Config) -> list[Logger] | bool:
    """Those of the configuration; none outside training.

    Raises:
        ConfigError: if the package of one is not installed, or refuses to open it.
    """
    if config.mode != "train":
        return False
    return [open_logger(section) for section in config.logger.values()]


def open_logger(section: dict[str, Any]) -> Logger:
    """One logger of the configuration.

    Raises:
        ConfigError: if its package is not installed, or refuses to open it.
    """
    require_extra(section["_target_"])
    try:
        return instantiate(section)
    except InstantiationException as error:
        raise not_opened(section["_target_"].rpartition(".")[2], error.__cause__ or error) from error
