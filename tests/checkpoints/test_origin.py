"""The source and the licence of weights: printed before they are fetched, kept in checkpoints, and inherited."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.in_process import configured, fit, prepare_run
from semseg.checkpoints.format import FORMAT_KEY, open_weights, read_checkpoint, write_ckpt, write_safetensors
from semseg.checkpoints.network import build_network, imagenet_origin
from semseg.config.origin import WeightsOrigin, describe_licence
from semseg.config.schema import DownloadConfig
from semseg.errors import CheckpointError, DownloadError
from semseg.nets.encoders.timm import find_weights_file
from semseg.nets.registry import build_encoder

ORIGIN = WeightsOrigin("owner/net", "apache-2.0", "0123456789abcdef")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose network started from weights with an origin."""
    folder = tmp_path_factory.mktemp("origin")
    prepared = prepare_run(folder / "scenes", folder / "run", "trainer.max_steps=1")
    prepared.net.origin = ORIGIN
    prepared.fit()
    return folder / "run"


def test_a_checkpoint_keeps_the_origin_in_every_format(run: Path, tmp_path: Path) -> None:
    saved = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert saved.origin == ORIGIN
    write_ckpt(tmp_path / "a.ckpt", saved)
    write_safetensors(tmp_path / "a.safetensors", saved)
    for name in ("a.ckpt", "a.safetensors"):
        assert read_checkpoint(tmp_path / name).origin == open_weights(tmp_path / name).origin == ORIGIN


def test_a_resumed_run_keeps_it(run: Path) -> None:
    words = ["data=scenes", f"data.root={run.parent / 'scenes'}", "data.make.num_train=4", "data.make.num_val=1"]
    prepared = prepare_run(run.parent / "scenes", run, "trainer.max_steps=2", *words)
    assert prepared.net.origin is None
    prepared.fit(run / "checkpoints" / "last.ckpt")
    assert read_checkpoint(run / "checkpoints" / "last.ckpt").origin == ORIGIN


def test_the_encoder_of_a_checkpoint_brings_its_origin(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "checkpoints" / "last.ckpt"
    config = read_checkpoint(file).config
    config.model.encoder["weights"] = str(file)
    from unittest.mock import patch

    from helpers.command_line import TINY_ENCODERS
    from semseg.nets.registry import ENCODERS

    with patch.dict(ENCODERS, TINY_ENCODERS):
        assert build_network(config.model, 11).origin == ORIGIN
    assert f"weights: {ORIGIN}" in capsys.readouterr().out


def test_a_checkpoint_without_an_origin_loads_and_a_damaged_one_is_refused(run: Path, tmp_path: Path) -> None:
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    del content[FORMAT_KEY]["origin"]
    torch.save(content, tmp_path / "old.ckpt")
    assert read_checkpoint(tmp_path / "old.ckpt").origin is None
    for damage in ({"source": 1}, "x", ORIGIN.as_plain() | {"more": ""}, ORIGIN.as_plain() | {"licence": "x" * 1000}):
        content[FORMAT_KEY]["origin"] = damage
        torch.save(content, tmp_path / "bad.ckpt")
        with pytest.raises(CheckpointError, match="its description is damaged: the origin of its weights must"):
            read_checkpoint(tmp_path / "bad.ckpt")


def test_the_licence_is_printed_before_weights_are_fetched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model/encoder=timm", "model.encoder.name=test_vit.r160_in1k", "model.encoder.weights=imagenet"]
    config = configured("data=folder", *words, "model/decoder=c1")
    with pytest.raises(DownloadError, match="not in the cache"):
        build_network(config.model, 3, DownloadConfig(cache=str(tmp_path), offline=True))
    assert "weights: timm/test_vit.r160_in1k, licence: apache-2.0" in capsys.readouterr().out


@pytest.mark.slow
def test_weights_of_torchvision_have_no_stated_licence() -> None:
    encoder = build_encoder("torchvision", name="resnet18")
    origin = imagenet_origin(encoder)
    assert origin is not None and str(origin).endswith(".pth, licence: not stated")
    assert find_weights_file({"hf_hub_id": None, "url": ""}) is None


@pytest.mark.parametrize("licence", ["", "unknown", "None", " ", None])
def test_what_is_not_known_is_not_stated(licence: str | None) -> None:
    assert describe_licence(licence) == "not stated"


def test_a_run_from_random_weights_has_none(tmp_path: Path) -> None:
    from helpers.in_process import SHORT_RUN

    words = [*SHORT_RUN, f"data.root={tmp_path / 'scenes'}", f"run_dir={tmp_path / 'run'}", "trainer.max_steps=1"]
    assert "origin" not in fit(configured(*words))[FORMAT_KEY]
