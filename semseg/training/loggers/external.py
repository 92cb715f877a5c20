"""TensorBoard, Weights & Biases and MLflow. Each takes pictures, and continues the record of a resumed run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from semseg.errors import ConfigError, install_command
from semseg.reports.draw import Pixels
from semseg.storage.atomic import atomic_write
from semseg.storage.ranks import is_first_rank

LOGGER_EXTRAS = {"TensorBoard": ("tensorboard", "tb"), "WandB": ("wandb", "wandb"), "MLflow": ("mlflow", "mlflow")}


@runtime_checkable
class PictureLogger(Protocol):
    """A logger that stores pictures as well as numbers."""

    def log_picture(self, name: str, pixels: Pixels, step: int) -> None:
        """Store a picture (H, W, 3) of `step` under `name`."""
        ...


class TensorBoard(TensorBoardLogger):
    """Event files in `folder`."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, name="", version="", default_hp_metric=False)

    @rank_zero_only
    def log_picture(self, name: str, pixels: Pixels, step: int) -> None:
        self.experiment.add_image(f"panels/{name}", pixels, step, dataformats="HWC")


class WandB(WandbLogger):
    """Weights & Biases, its files in `folder`.

    Args:
        folder: in the run folder, after which the run is named; it holds the id by which a resumed run is recognised.
        project: created if missing.
        offline: open no connection; `wandb sync` uploads the files later.
    """

    def __init__(self, folder: str, project: str, offline: bool) -> None:
        known_id = get_or_create_id(Path(folder) / "wandb_id") if is_first_rank() else None
        super().__init__(run_name_of(folder), folder, known_id, offline, project=project)
        del self._wandb_init["anonymous"]  # wandb warns that it has no effect

    @rank_zero_only
    def log_picture(self, name: str, pixels: Pixels, step: int) -> None:
        self.log_image(f"panels/{name}", [pixels])  # wandb counts its own steps; the metrics hold ours

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:  # a later run of this process is a new one
            self._experiment.finish(0 if status == "success" else 1)
            self._experiment = None


class MLflow(MLFlowLogger):
    """An MLflow experiment.

    Args:
        folder: in the run folder, after which the run is named; it holds the id by which a resumed run is recognised.
        experiment: created if missing.
        tracking_uri: address of a server or a database.
        store: the folder to use if tracking_uri is None.
    """

    def __init__(self, folder: str, experiment: str, tracking_uri: str | None, store: str) -> None:
        # MLflow no longer develops its file store, and refuses it without this.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self.id_file = Path(folder) / "mlflow_id"
        known_id = self.id_file.read_text().strip() if self.id_file.is_file() else None
        super().__init__(experiment, run_name_of(folder), tracking_uri, save_dir=store, run_id=known_id)
        self.is_resumed = known_id is not None

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Store the settings; those of a resumed run stay as they were, because MLflow refuses others."""
        if self.is_resumed:
            return
        super().log_hyperparams(params)
        write_text(self.id_file, str(self.run_id))

    @rank_zero_only
    def log_picture(self, name: str, pixels: Pixels, step: int) -> None:
        self.experiment.log_image(self.run_id, pixels, key=f"panels_{name}", step=step)


def run_name_of(folder: str) -> str:
    """The name of a run: that of the folder above its folder of logs."""
    return Path(folder).absolute().parent.name


def get_or_create_id(file: Path) -> str:
    """The id in `file`; a new one is written there if the file is missing."""
    if not file.is_file():
        write_text(file, secrets.token_hex(8))
    return file.read_text().strip()


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def require_logger_package(target: str) -> None:
    """Fail early if the package of a logger is not installed.

    Args:
        target: the logger's _target_ in the configuration.

    Raises:
        ConfigError: naming the extra to install.
    """
    package, extra = LOGGER_EXTRAS.get(target.rpartition(".")[2], ("", ""))
    if package and find_spec(package) is None:
        raise ConfigError(f"logger={package} needs {package}: {install_command(extra)}")


def log_settings(loggers: Sequence[Logger], settings: dict[str, Any]) -> None:
    """Open every logger, and log the whole configuration of the run as plain data.

    Raises:
        ConfigError: if one of them cannot be opened, for example without a login or with its server down.
    """
    for logger in loggers:
        try:
            logger.log_hyperparams(settings)
        except Exception as error:  # every library has its own
            raise logger_error(type(logger).__name__, error) from error


def logger_error(name: str, error: BaseException | None) -> ConfigError:
    """The error, in one line, for a logger that its library refuses to open."""
    return ConfigError(f"logger: {name} cannot be opened: {' '.join(str(error).split())[:300]}")
