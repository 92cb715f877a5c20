from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from helpers.in_process import configured
from semseg.build import restore_network
from semseg.checkpoints.format import FORMAT_KEY, describe_network, read_checkpoint
from semseg.checkpoints.network import build_network
from semseg.config.inherit import inherit_config
from semseg.config.schema import PredictConfig, config_to_plain
from semseg.data.classes import ClassTable
from semseg.errors import CheckpointError, ConfigError
from semseg.storage.run_folders import find_checkpoint

CLASSES = ClassTable.from_names(["sky", "road"])
SMALL = ["data=scenes", "model/encoder=resnet18", "model.encoder.weights=none", "model/decoder=c1", "eval.scales=[64]"]


@pytest.fixture(scope="module")
def saved_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = configured(*SMALL)
    net = build_network(config.model, 2)
    path = tmp_path_factory.mktemp("run") / "checkpoints" / "best.ckpt"
    path.parent.mkdir()
    weights = {f"net.{name}": value for name, value in net.state_dict().items()}
    torch.save(
        {
            "state_dict": weights,
            "epoch": 3,
            "global_step": 7,
            FORMAT_KEY: describe_network(config_to_plain(config), CLASSES, net.convention),
        },
        path,
    )
    return path


@pytest.mark.slow
def test_a_network_comes_back_from_its_file_alone(saved_file: Path) -> None:
    saved = read_checkpoint(saved_file)
    assert (saved.epoch, saved.step, saved.classes) == (3, 7, CLASSES)
    net = restore_network(saved)
    assert not net.training
    assert all(torch.equal(value, saved.weights[name]) for name, value in net.state_dict().items())


def test_settings_that_earlier_versions_took_do_not_keep_a_network_from_being_read(
    saved_file: Path, tmp_path: Path
) -> None:
    content = torch.load(saved_file, weights_only=True)
    content["semseg"]["config"]["trainer"]["strategy"] = "ddp_spawn"
    content["semseg"]["config"]["predict"]["save"] = []
    torch.save(content, tmp_path / "old.ckpt")
    config = read_checkpoint(tmp_path / "old.ckpt").config
    assert config.trainer.strategy == "auto" and config.predict.save == PredictConfig().save


def test_a_run_folder_means_its_best_checkpoint(saved_file: Path) -> None:
    assert find_checkpoint(str(saved_file.parent.parent), Path("runs")) == saved_file
    assert find_checkpoint(str(saved_file), Path("runs")) == saved_file


def test_last_means_the_newest_run(tmp_path: Path) -> None:
    for age, name in enumerate(["new", "old"]):
        path = tmp_path / name / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    assert find_checkpoint("last", tmp_path).parent.parent.name == "new"


@pytest.mark.parametrize("spec", ["last", "best", "nowhere.ckpt"])
def test_a_checkpoint_that_is_not_there_is_an_error_that_lists_what_is(spec: str, tmp_path: Path) -> None:
    (tmp_path / "some_run").mkdir()
    with pytest.raises(CheckpointError, match="ckpt="):
        find_checkpoint(spec, tmp_path)


def test_a_run_of_a_similar_name_is_suggested(tmp_path: Path) -> None:
    path = tmp_path / "facades_run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.touch()
    (tmp_path / "facades_rum.yaml").touch()
    (tmp_path / ".git").mkdir()
    with pytest.raises(CheckpointError, match=r"Did you mean ckpt=\S*facades_run\?"):
        find_checkpoint(str(tmp_path / "facades_rum"), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(str(tmp_path / "nowhere"), tmp_path)
    assert ".git" not in str(caught.value)


def test_an_empty_run_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"no best\.ckpt or last\.ckpt.*notes\.txt"):
        find_checkpoint(str(tmp_path), tmp_path)


def test_a_damaged_file_is_named(saved_file: Path, tmp_path: Path) -> None:
    for name, content in {
        "cut.ckpt": saved_file.read_bytes()[:5000],
        "empty.ckpt": b"",
        "page.ckpt": b"<html>404 not found</html>",
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=name) as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value)
        if name == "cut.ckpt":
            assert "cut off. Restore it" in str(caught.value) and "likelihood" not in str(caught.value)


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"not a checkpoint of semseg.*conv1\.weight"):
        read_checkpoint(path)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_a_checkpoint_cannot_run_code(saved_file: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    content = torch.load(saved_file, weights_only=True)
    torch.save({**content, "extra": Payload(marker)}, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=r"bad\.ckpt"):
        read_checkpoint(tmp_path / "bad.ckpt")
    assert not marker.exists()


def test_weights_that_do_not_fit_are_reported(saved_file: Path) -> None:
    saved = read_checkpoint(saved_file)
    del saved.weights["encoder.conv1.weight"]
    with pytest.raises(CheckpointError, match=r"encoder\.conv1\.weight"):
        restore_network(saved)


@pytest.mark.slow
def test_settings_come_from_the_checkpoint_unless_given() -> None:
    saved = configured(*SMALL, "data.max_long_edge=123")
    plain = configured("mode=eval", "ckpt=x")
    inherited = inherit_config(saved, plain, ["mode=eval", "ckpt=x"])
    assert (inherited.data.name, inherited.data.max_long_edge, inherited.eval.scales) == ("scenes", 123, [64])
    assert inherited.model.encoder["name"] == "resnet18"

    words = ["mode=eval", "ckpt=x", "eval.flip=true", "data.num_workers=0"]
    some = inherit_config(saved, configured(*words), words)
    assert (some.data.name, some.data.num_workers, some.eval.scales, some.eval.flip) == ("scenes", 0, [64], True)

    words = ["mode=eval", "ckpt=x", "data=camvid"]
    assert inherit_config(saved, configured(*words), words).data.name == "camvid"


def test_an_experiment_changes_only_what_it_sets_and_machines_have_their_own_workers() -> None:
    saved = configured(*SMALL, "data.max_long_edge=123", "data.num_workers=7")
    words = ["mode=eval", "ckpt=x", "experiment=own_data"]
    inherited = inherit_config(saved, configured(*words), words)
    assert (inherited.data.name, inherited.data.max_long_edge, inherited.eval.scales) == ("scenes", 123, [64])
    assert inherited.data.batch_size == 4 and inherited.data.num_workers is None


def test_a_width_of_boundaries_is_for_runs_that_score_them() -> None:
    words = ["mode=eval", "ckpt=x", "eval.boundary_ratio=0.1"]
    with pytest.raises(ConfigError, match=r"^eval\.boundary_ratio=0\.1: has no effect\."):
        inherit_config(configured(*SMALL), configured(*words), words)
    inherited = inherit_config(configured(*SMALL, "eval.boundary_iou=true"), configured(*words), words)
    assert (inherited.eval.boundary_iou, inherited.eval.boundary_ratio) == (True, 0.1)


def test_another_network_cannot_be_asked_of_a_checkpoint() -> None:
    words = ["mode=eval", "ckpt=x", "model=upernet50"]
    saved = configured(*SMALL)
    with pytest.raises(ConfigError, match="comes from ckpt"):
        inherit_config(saved, configured(*words), words)
