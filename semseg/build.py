"""From the configuration to objects. The only place that knows which class a name stands for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.loggers import Logger

from semseg.callbacks import EndOnSigterm, PlainProgress, checkpoints
from semseg.checkpoint import SavedNetwork
from semseg.config import Config, ModelConfig, network_options
from semseg.data.sources import DataSource
from semseg.errors import CheckpointError, ConfigError
from semseg.nets.registry import build_segmenter
from semseg.nets.segmenter import Segmenter
from semseg.syncbn.plugin import layer_sync
from semseg.weights import load_encoder_weights


def build_net(config: ModelConfig, num_classes: int) -> Segmenter:
    """The network with fresh weights; the encoder's from model.encoder.weights if that names a file.

    Raises:
        ConfigError: for unknown names and options.
        CheckpointError: if the weight file does not fit.
    """
    encoder, encoder_options = network_options(config.encoder, "encoder")
    decoder, decoder_options = network_options(config.decoder, "decoder")
    net = build_segmenter(encoder, decoder, num_classes, encoder_options, decoder_options)
    weights = config.encoder.get("weights", "none")
    if weights not in (None, "none"):
        load_encoder_weights(net.encoder, Path(weights).expanduser())
    return net


def restore_net(saved: SavedNetwork) -> Segmenter:
    """The network of a checkpoint, with its weights, in eval mode.

    Raises:
        CheckpointError: if any weight is missing, unexpected or of another shape.
    """
    model = saved.config.model
    model.encoder = model.encoder | {"weights": "none"}  # the checkpoint has them
    net = build_net(model, saved.classes.num_classes)
    try:
        net.load_state_dict(saved.weights)
    except RuntimeError as error:
        raise CheckpointError(f"{saved.path}: its weights do not fit its own configuration: {error}") from None
    return net.eval()


def build_trainer(config: Config, source: DataSource) -> pl.Trainer:
    """Lightning's Trainer, with our checkpoints, progress and synchronised normalisation.

    Raises:
        ConfigError: if Lightning refuses the values.
    """
    options: dict[str, Any] = {key: value for key, value in vars(config.trainer).items() if value is not None}
    options["devices"] = device_count_or_list(config)
    if not source.has("val"):
        options["limit_val_batches"] = 0
    plugins = layer_sync(config.syncbn.name, config.syncbn.convention, accelerator(config), config.syncbn.group)
    try:
        return pl.Trainer(
            **options,
            default_root_dir=config.run_dir,
            callbacks=callbacks(config, source),
            logger=loggers(config),
            plugins=[plugins] if plugins else None,
            # Every rank has its own sub-batches: see SegmentationData.
            use_distributed_sampler=False,
            enable_model_summary=False,
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
    """Those of the configuration, and ours."""
    ours: list[Callback] = [EndOnSigterm()]
    if config.mode == "train":
        ours += checkpoints(Path(config.run_dir), has_val=source.has("val"))
    if config.trainer.enable_progress_bar:
        ours.append(RichProgressBar() if sys.stdout.isatty() else PlainProgress())
    configured = [instantiate(section) for section in config.callbacks.values()]
    return ours + (configured if config.mode == "train" else [])


def loggers(config: Config) -> list[Logger] | bool:
    """Those of the configuration; none outside training."""
    if config.mode != "train":
        return False
    return [instantiate(section) for section in config.logger.values()]
