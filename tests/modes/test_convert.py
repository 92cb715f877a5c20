"""mode=convert through the real command line; then what other modes make of its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers.command_line import TINY, run, run_here
from helpers.published_files import served, write_files
from semseg.checkpoints.format import load_weights, read_checkpoint, write_ckpt, write_safetensors
from semseg.modes.convert import write_published


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with published files of a network of 3 classes in `baseline-old`, converted to `net.ckpt`."""
    folder = tmp_path_factory.mktemp("convert")
    write_files(folder / "baseline-old", "resnet18_dilated8", "c1_deepsup", 3, bookkeeping=2)
    output = run(folder, "mode=convert", "ckpt=baseline-old", "output=net.ckpt")
    assert "resnet18 at output stride 8 + c1 with deep supervision, 3 classes, input bgr_mean" in output
    assert "written net.ckpt" in output
    yield folder
    shutil.rmtree(folder)  # 400 MB


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name


@pytest.mark.slow
def test_a_converted_checkpoint_has_the_weights_and_what_belongs_to_them(folder: Path) -> None:
    saved = read_checkpoint(folder / "net.ckpt")
    original = load_weights(folder / "baseline-old" / "encoder_epoch_20.pth")
    kept = {f"encoder.{name}": value for name, value in original.items() if "_tmp_" not in name}
    encoder = {name: value for name, value in saved.weights.items() if name.startswith("encoder.")}
    assert_same_weights(encoder, kept)
    assert saved.convention.channel_order == "bgr"
    assert (saved.classes.num_classes, saved.epoch) == (3, 20)
    assert saved.config.model.encoder["output_stride"] == 8


@pytest.mark.slow
def test_every_round_trip_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    saved = read_checkpoint(folder / "net.ckpt")
    write_safetensors(tmp_path / "net.safetensors", saved)
    write_ckpt(tmp_path / "net.ckpt", read_checkpoint(tmp_path / "net.safetensors"))
    assert (tmp_path / "net.ckpt").read_bytes() == (folder / "net.ckpt").read_bytes()

    again = write_safetensors(tmp_path / "again" / "net.safetensors", read_checkpoint(tmp_path / "net.ckpt"))
    for path in again:
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()

    files = write_published(tmp_path / "published", saved)
    for path in write_published(tmp_path / "published_again", read_checkpoint(tmp_path / "net.safetensors")):
        assert path.read_bytes() == (tmp_path / "published" / path.name).read_bytes()
    for path in files:
        kept = {n: v for n, v in load_weights(folder / "baseline-old" / path.name).items() if "_tmp_" not in n}
        assert_same_weights(load_weights(path), kept)


@pytest.mark.slow
def test_the_command_line_writes_safetensors_and_published_files(folder: Path) -> None:
    run_here(folder, "mode=convert", "ckpt=net.ckpt", "output=out/net.safetensors")
    assert set(load_file(folder / "out" / "net.safetensors")) == set(read_checkpoint(folder / "net.ckpt").weights)
    assert json.loads((folder / "out" / "net.json").read_text())["convention"]["channel_order"] == "bgr"
    run_here(folder, "mode=convert", "ckpt=out/net.safetensors", "output=old_code")
    assert sorted(path.name for path in (folder / "old_code").iterdir()) == [
        "decoder_epoch_20.pth",
        "encoder_epoch_20.pth",
    ]


@pytest.mark.slow
def test_a_name_that_says_no_format_writes_nothing(folder: Path) -> None:
    output = run_here(folder, "mode=convert", "ckpt=net.ckpt", "output=net.onnx", code=2)
    assert "output=net.onnx: must end in .ckpt or .safetensors, or be a folder" in output
    assert not (folder / "net.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["other.json", "missing.json", "broken"])
def test_safetensors_that_lost_their_description_are_reported(folder: Path, tmp_path: Path, damage: str) -> None:
    from semseg.errors import CheckpointError

    path = tmp_path / "net.safetensors"
    _, description = write_safetensors(path, read_checkpoint(folder / "net.ckpt"))
    if damage == "missing.json":
        description.unlink()
    if damage == "other.json":
        entry = json.loads(description.read_text())
        description.write_text(json.dumps(entry | {"order": entry["order"][1:]}))
    if damage == "broken":
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"net\.(json|safetensors): .*") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_converted_checkpoint_evaluates_predicts_and_starts_a_new_run(folder: Path) -> None:
    scenes = ["data=scenes", "data.root=scenes", "data.make.num_train=2", "data.make.num_val=2", "data.num_workers=0"]
    small = ["data.short_edges=[32]", "data.max_long_edge=64", "eval.scales=[32]", "trainer.accelerator=cpu"]
    output = run_here(
        folder, *scenes, *small, "init_from=net.ckpt", "run_dir=tuned", "data.batch_size=1", "data.steps_per_epoch=1",
        "trainer.max_epochs=1",
    )  # fmt: skip
    assert "re-initialised" in output and "decoder.conv_last.weight" in output
    tuned = read_checkpoint(folder / "tuned" / "checkpoints" / "last.ckpt")
    assert tuned.convention.channel_order == "bgr"
    assert tuned.config.model.encoder["name"] == "resnet18"
    assert tuned.classes.num_classes != 3
    # The convention is that of the weights after a resume too.
    run_here(
        folder, *scenes, *small, "init_from=net.ckpt", "run_dir=tuned", "data.batch_size=1", "data.steps_per_epoch=1",
        "trainer.max_epochs=2", "resume=auto",
    )  # fmt: skip
    assert read_checkpoint(folder / "tuned" / "checkpoints" / "last.ckpt").convention.channel_order == "bgr"
    image = next((folder / "scenes" / "images" / "validation").iterdir())
    run_here(folder, "mode=predict", "ckpt=net.ckpt", f"input={image}", "eval.scales=[32]", "run_dir=predicted")
    assert list((folder / "predicted").glob("*_ids.png"))


@pytest.mark.slow
def test_what_a_folder_cannot_say_is_printed_with_the_overrides_that_do(folder: Path) -> None:
    run_here(folder, *TINY, "run_dir=plain")
    printed = run_here(folder, "mode=convert", "ckpt=plain", "output=of_plain")
    assert "weights alone; read them with model.encoder.output_stride=32; not in them: classes" in printed
    words = ["mode=convert", "ckpt=of_plain", "model.encoder.output_stride=32", "output=again.ckpt"]
    assert "output stride 32 + c1" in run_here(folder, *words)
    printed = run_here(folder, "mode=convert", "ckpt=net.ckpt", "output=of_net")
    assert printed.endswith("The files hold weights alone; read them with model.convention=bgr_mean\n")
    write_files(folder / "new", "resnet18_dilated8", "c1_deepsup", 3)
    assert "weights alone" not in run_here(folder, "mode=convert", "ckpt=new", "output=of_new")

    last = folder / "plain/checkpoints/last.ckpt"
    before = last.read_bytes()
    (folder / "copy.ckpt").write_bytes(before)
    for output in ("plain/checkpoints/last.ckpt", "plain/checkpoints/new.ckpt", "copy.ckpt"):
        refused = run_here(folder, "mode=convert", "ckpt=net.ckpt", f"output={output}", code=2)
        assert f"output={output}: would replace a checkpoint of a training run" in refused
    assert last.read_bytes() == before == (folder / "copy.ckpt").read_bytes()
    run_here(folder, "mode=convert", "ckpt=net.ckpt", "output=again.ckpt")  # has no run to lose


@pytest.mark.long
def test_the_demonstration_of_the_original_brings_weights_and_picture(folder: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    write_files(site / "model/pytorch/ade20k-resnet18dilated-ppm_deepsup", "resnet18_dilated8", "ppm_deepsup")
    picture = site / "data/ADEChallengeData2016/images/validation/ADE_val_00001519.jpg"
    picture.parent.mkdir(parents=True)
    Image.fromarray(np.full((60, 80, 3), 90, np.uint8)).save(picture)
    with served(site) as server:
        mirrors = f"download.mirrors={{sceneparsing.csail.mit.edu:['{server}']}}"
        output = run_here(
            folder, "mode=predict", "ckpt=zoo:resnet18_dilated8_ppm_deepsup", mirrors, "download.retries=0",
            f"download.cache={tmp_path / 'cache'}", "eval.scales=[64]", "run_dir=demonstration",
        )  # fmt: skip
    assert "resnet18 at output stride 8 + ppm with deep supervision, 150 classes" in output
    panel = Image.open(folder / "demonstration" / "ADE_val_00001519_panel.png")
    assert panel.width >= 2 * 80 and panel.height > 60
