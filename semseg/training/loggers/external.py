"""The loggers besides the CSV file. Each takes pictures, and goes on with the record of a resumed run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from semseg.config.schema import Config, config_to_plain
from semseg.errors import ConfigError
from semseg.reports.draw import Pixels
from semseg.storage.atomic import atomic_write
from semseg.storage.ranks import is_first_rank

EXTRAS = {"TensorBoard": ("tensorboard", "tb"), "WandB": ("wandb", "wandb"), "MLflow": ("mlflow", "mlflow")}


@runtime_checkable
class TakesPictures(Protocol):
    """A logger that keeps pictures beside the numbers."""

    def log_picture(self, name: str, pixels: Pixels, step: int) -> None:
        """Keep a picture (H, W, 3) of `step` under `name`."""
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
        folder: below that of the run, whose name is the name there; keeps the id by which a resumed run is the same.
        project: made if it is not there.
        offline: open no connection; `wandb sync` uploads the files later.
    """

    def __init__(self, folder: str, project: str, offline: bool) -> None:
        known = run_id(Path(folder) / "wandb_id") if is_first_rank() else None
        super().__init__(name_of(folder), folder, known, offline, project=project)
        del self._wandb_init["anonymous"]  # of no effect, says wandb in a warning

    @rank_zero_only
    def log_picture(self, name: str, pixels: Pixels, step: int) -> None:
        self.log_image(f"panels/{name}", [pixels])  # wandb counts its own steps; the metrics say which one it was

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:  # a later run of this process is another one
            self._experiment.finish(0 if status == "success" else 1)
            self._experiment = None


class MLflow(MLFlowLogger):
    """An MLflow experiment.

    Args:
        folder: below that of the run, whose name is the name there; keeps the id by which a resumed run is the same.
        experiment: made if it is not there.
        tracking_uri: of a server or a database.
        store: the folder that takes their place if tracking_uri is None.
    """

    def __init__(self, folder: str, experiment: str, tracking_uri: str | None, store: str) -> None:
        # MLflow keeps its local files as they are for good, and wants that to be known.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self.id_file = Path(folder) / "mlflow_id"
        known = self.id_file.read_text().strip() if self.id_file.is_file() else None
        super().__init__(experiment, name_of(folder), tracking_uri, save_dir=store, run_id=known)
        self.is_resumed = known is not None

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Keep the settings; those of a resumed run stay as they were, since MLflow refuses others."""
        if self.is_resumed:
            return
        super().log_hyperparams(params)
        write_text(self.id_file, str(self.run_id))

    @rank_zero_only
    def log_picture(self, name: str, pixels: Pixels, step: int) -> None:
        self.experiment.log_image(self.run_id, pixels, key=f"panels_{name}", step=step)


def name_of(folder: str) -> str:
    """The run's name: that of the folder above the one with its logs."""
    return Path(folder).absolute().parent.name


def run_id(file: Path) -> str:
    """The id in `file`, made up and written there if there is none."""
    if not file.is_file():
        write_text(file, secrets.token_hex(8))
    return file.read_text().strip()


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def require_extra(target: str) -> None:
    """Leave early where the package of a logger is not installed.

    Args:
        target: of the logger in the configuration.

    Raises:
        ConfigError: naming the extra to install.
    """
    package, extra = EXTRAS.get(target.rpartition(".")[2], ("", ""))
    if package and find_spec(package) is None:
        raise ConfigError(f"logger={package} needs {package}: pip install 'semseg[{extra}]'")


def log_settings(loggers: Sequence[Logger], config: Config) -> None:
    """Open every logger with the whole configuration of the run.

    Raises:
        ConfigError: if one of them cannot be opened: nobody has logged in, say, or its server is away.
    """
    for logger in loggers:
        try:
            logger.log_hyperparams(config_to_plain(config))
        except Exception as error:  # every library has kinds of its own
            raise not_opened(type(logger).__name__, error) from error


def not_opened(name: str, error: BaseException | None) -> ConfigError:
    """One line for a logger that its library refuses to open."""
    return ConfigError(f"logger: {name} cannot be opened: {' '.join(str(error).split())[:300]}")
