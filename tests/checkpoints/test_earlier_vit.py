"""Checkpoints of vision transformers from before their blocks could be chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import tiny_vit
from helpers.in_process import configured
from semseg.checkpoints.format import (
    EARLIER_VIT_MAPS,
    FORMAT_KEY,
    TIMM_MAPS,
    SavedNetwork,
    read_checkpoint,
    write_ckpt,
)
from semseg.checkpoints.network import build_network, load_network
from semseg.data.classes import ClassTable

assert tiny_vit.default_cfgs  # registers the networks


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "maps"), [("tiny_dinov3", EARLIER_VIT_MAPS), ("test_convnext", TIMM_MAPS)], ids=["vit", "convnext"]
)
def test_a_checkpoint_of_an_earlier_version_gives_the_logits_that_it_gave(
    name: str, maps: dict[str, object], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    words = ["model/encoder=timm", f"model.encoder.name={name}", "model.encoder.weights=none", "model/decoder=upernet",
             "model.decoder.width=8", "data=folder", "data.num_classes=3"]  # fmt: skip
    if name == "tiny_dinov3":
        words += ["model.encoder.blocks=[1,2,3]", "model.encoder.pyramid=false", "model.encoder.final_norm=false"]
    config = configured(*words)
    net = build_network(config.model, 3).eval()
    write_ckpt(
        tmp_path / "net.ckpt",
        SavedNetwork("", net.state_dict(), config, ClassTable.from_names(["a", "b", "c"]), net.convention),
    )
    content = torch.load(tmp_path / "net.ckpt", weights_only=True)
    for key in maps:
        del content[FORMAT_KEY]["config"]["model"]["encoder"][key]  # as it was written then
    torch.save(content, tmp_path / "net.ckpt")
    saved = read_checkpoint(tmp_path / "net.ckpt")
    assert {key: saved.config.model.encoder[key] for key in maps} == maps
    image = torch.randn(1, 3, 64, 96)
    assert torch.equal(load_network(saved)(image).main, net(image).main)
