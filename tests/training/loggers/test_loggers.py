"""What a run leaves in each logger: the same names everywhere, pictures, the settings, and one record when resumed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.errors import MissingConfigException
from PIL import Image

from helpers.in_process import TINY_RUN, configured, fit
from semseg.build import build_trainer
from semseg.config.explain import explain_hydra_error
from semseg.config.schema import Config, config_to_plain
from semseg.data.sources import DataSource
from semseg.errors import ConfigError
from semseg.training.loggers import external
from semseg.training.loggers.csv import CSVLog
from semseg.training.loggers.external import MLflow, WandB, log_settings

# Two epochs of two steps, each with a validation of three images.
RUN = [
    *TINY_RUN, "data.make.num_train=4", "data.make.num_val=3", "data.steps_per_epoch=2", "trainer.max_epochs=2",
    "trainer.log_images=2",
]  # fmt: skip
LOGGED = {
    "train/loss", "train/accuracy", "val/miou", "val/pixel_accuracy", "lr/encoder", "lr/decoder",
    "time/data", "time/step", "epoch",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "scenes"


def run_of(root: Path, run_dir: Path, *words: str) -> Config:
    return configured("data=scenes", *RUN, f"data.root={root}", f"run_dir={run_dir}", *words)


def columns(path: Path) -> tuple[set[str], int]:
    """The names of a CSV log, and its number of rows."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return set(rows[0]), len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_csv_log_has_all_names_and_pictures_of_the_same_images(root: Path, tmp_path: Path, batch_size: int) -> None:
    fit(run_of(root, tmp_path, f"eval.batch_size={batch_size}"))
    metrics, num_steps = columns(tmp_path / "logs/metrics.csv")
    speed, num_measured = columns(tmp_path / "logs/speed.csv")
    assert metrics | speed >= LOGGED and num_steps == num_measured == 4
    assert {"time/data", "time/step"} <= speed and not speed & metrics - {"step"}
    pictures = sorted(path.relative_to(tmp_path / "panels") for path in (tmp_path / "panels").rglob("*.png"))
    assert [path.name for path in pictures] == ["00000002.png", "00000004.png"] * 2  # at steps 2 and 4, of two images
    records = DataSource(run_of(root, tmp_path).data).records("val")
    for index, record in enumerate(records[:2]):
        panel = np.asarray(Image.open(tmp_path / "panels" / f"{index}_{Path(record.image).stem}" / "00000004.png"))
        width = panel.shape[1] // 3
        assert panel[:, :width].tobytes() == np.asarray(Image.open(record.image).convert("RGB")).tobytes()


def test_no_pictures_are_drawn_if_none_are_asked_for(root: Path, tmp_path: Path) -> None:
    fit(run_of(root, tmp_path, "trainer.log_images=0", "trainer.max_epochs=1"))
    assert not (tmp_path / "panels").exists()


def test_several_loggers_get_the_same(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = run_of(root, tmp_path, "logger=[csv,tensorboard]", "trainer.max_epochs=1")
    fit(config)
    events = EventAccumulator(str(tmp_path / "logs/tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= LOGGED
    names = [f"panels/{path.name}" for path in sorted((tmp_path / "panels").iterdir())]
    assert sorted(events.Tags()["images"]) == names and len(names) == 2


@pytest.mark.slow
def test_wandb_keeps_numbers_pictures_and_the_id_of_the_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = run_of(root, tmp_path, "logger=wandb", "logger.wandb.offline=true", "trainer.max_epochs=1")
    seen: list[set[str]] = []
    finalize = WandB.finalize

    def look(self: WandB, status: str) -> None:
        if self._experiment is not None:
            seen.append(set(dict(self.experiment.summary)))
        finalize(self, status)

    monkeypatch.setattr(WandB, "finalize", look)
    fit(config)
    (record,) = (tmp_path / "logs/wandb").glob("offline-run-*")
    assert record.name.endswith((tmp_path / "logs/wandb_id").read_text())
    assert seen[0] >= LOGGED
    assert len(list(record.rglob("media/images/**/*.png"))) == 2
    known = (tmp_path / "logs/wandb_id").read_text()
    assert WandB(str(tmp_path / "logs"), "semseg", offline=True).version == known  # the id of a resumed run


@pytest.mark.slow
def test_mlflow_keeps_numbers_pictures_settings_and_resumes_with_a_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # and leave the environment as it was
    words = ["logger=mlflow", f"logger.mlflow.store={tmp_path / 'mlruns'}"]
    config = run_of(root, tmp_path, *words, "trainer.max_epochs=1")
    log_settings(build_trainer(config, DataSource(config.data)).loggers, config_to_plain(config))
    fit(config)  # a second logger, as in a resumed run
    (run,) = (folder.parent for folder in (tmp_path / "mlruns").glob("*/*/params"))
    assert run.name == (tmp_path / "logs/mlflow_id").read_text()
    assert (run / "params/optim/lr").read_text() == "0.02"
    found = {path.relative_to(run / "metrics").as_posix() for path in (run / "metrics").rglob("*") if path.is_file()}
    assert found >= LOGGED
    assert len(list(run.glob("artifacts/images/*.png"))) == 2
    log_settings(
        [MLflow(str(tmp_path / "logs"), "semseg", None, str(tmp_path / "mlruns"))],
        config_to_plain(run_of(root, tmp_path)),
    )
    assert (run / "params/trainer/max_epochs").read_text() == "1"  # as it began


@pytest.mark.slow
@pytest.mark.parametrize(("option", "extra"), [("tensorboard", "tb"), ("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_logger_that_is_not_installed_is_reported_in_one_line(
    option: str, extra: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(root, tmp_path, f"logger={option}")
    monkeypatch.setattr(external, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf'logger={option} needs {option}: pip install --editable "\.\[{extra}\]"'):
        build_trainer(config, DataSource(config.data))


def test_an_address_that_no_server_has_is_reported_in_one_line(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    config = run_of(root, tmp_path, "logger=mlflow", "logger.mlflow.tracking_uri=nonsense://x")
    with pytest.raises(ConfigError, match=r"^logger: MLflow cannot be opened: .*nonsense://x") as caught:
        build_trainer(config, DataSource(config.data))
    assert "\n" not in str(caught.value)


class Closed(CSVLog):
    """A logger whose server is away."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no answer\nfrom http://tracker")


def test_a_server_that_is_away_is_reported_in_one_line(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^logger: Closed cannot be opened: no answer from http://tracker$"):
        log_settings([Closed(str(tmp_path))], {})


def test_an_unknown_logger_in_a_list_is_reported_with_its_likeness() -> None:
    with pytest.raises(MissingConfigException) as caught:
        configured("logger=[csv,tensorbord]")
    assert "Did you mean logger=tensorboard?" in explain_hydra_error(caught.value, [])
