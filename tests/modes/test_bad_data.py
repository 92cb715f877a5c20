"""Faults of a data set through the real command line, read by the process that trains and by two workers alike."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from helpers.command_line import run_here
from helpers.fork_server import FORK_CHILDREN, run_python
from helpers.in_process import TINY_RUN
from helpers.tiny_program import PROGRAM
from semseg.nets.registry import ENCODERS, Constructor

pytestmark = pytest.mark.reliability

WORDS = [
    "data=folder", "data.root=.", "data.num_classes=3", "data.train.list=train.csv", "data.val.list=val.csv",
    "data.train.images=null", "data.train.masks=null", "data.steps_per_epoch=3", "trainer.max_epochs=1",
    "trainer.log_images=0",
]  # fmt: skip
TRAIN, VAL = range(6), range(6, 8)


def write_data(folder: Path) -> None:
    """Eight images of 48 x 40 pixels with masks of the ids 1, 2, 3; all steps take every training image."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for number in (*TRAIN, *VAL):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(image(folder, number))
        Image.fromarray(rng.integers(1, 4, (40, 48), np.uint8)).save(mask(folder, number))
    for name, numbers in (("train", TRAIN), ("val", VAL)):
        rows = [f"images/{number}.jpg,masks/{number}.png" for number in numbers]
        (folder / f"{name}.csv").write_text("\n".join(["image,mask", *rows]) + "\n")


def image(folder: Path, number: int) -> Path:
    return folder / "images" / f"{number}.jpg"


def mask(folder: Path, number: int) -> Path:
    return folder / "masks" / f"{number}.png"


def save_mask(folder: Path, number: int, *, value: int, size: tuple[int, int] = (48, 40)) -> None:
    Image.new("L", size, value).save(mask(folder, number))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_byte(path: Path) -> None:
    """Change a byte of the pixels, which a PNG's checksum does not survive."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def turn(folder: Path) -> None:
    """Store image 0 on its side, with the orientation that turns it upright."""
    with Image.open(image(folder, 0)) as picture:
        exif = picture.getexif()
        exif[274] = 6
        picture.transpose(Image.Transpose.ROTATE_90).save(image(folder, 0), exif=exif)


class Fault(NamedTuple):
    """What is done to the data set, and what the command line then prints; None: it trains."""

    spoil: Callable[[Path], object]
    message: str | None
    words: tuple[str, ...] = ()


FAULTS = {
    "c1 truncated image": Fault(lambda folder: cut(image(folder, 3)), "images/3.jpg: the JPEG is truncated"),
    "c1 advice": Fault(lambda folder: cut(image(folder, 3)), "give data.on_bad=skip"),
    "c1 left out": Fault(lambda folder: cut(image(folder, 3)), None, ("data.on_bad=skip", "data.max_bad=1")),
    "c1 too many left out": Fault(
        lambda folder: [cut(image(folder, number)) for number in range(4)],
        "more than data.max_bad=0.01 allows", ("data.on_bad=skip",),
    ),
    "c2 damaged mask": Fault(lambda folder: spoil_byte(mask(folder, 2)), "masks/2.png"),
    "c3 empty image": Fault(lambda folder: image(folder, 1).write_bytes(b""), "images/1.jpg"),
    "c3 missing mask": Fault(lambda folder: mask(folder, 1).unlink(), "masks/1.png"),
    "c4 too many pixels": Fault(lambda _: None, "data.max_pixels", ("data.max_pixels=1000",)),
    "c5 turned image": Fault(turn, None),
    "c6 grey image": Fault(
        lambda folder: Image.new("L", (48, 40), 7).save(image(folder, 0)), None
    ),
    "c7 mask of colours": Fault(
        lambda folder: Image.new("RGB", (48, 40), (9, 8, 7)).save(mask(folder, 0)),
        "masks/0.png",
        ("data.mask_type=ids",),
    ),
    "c9 unknown id": Fault(lambda folder: save_mask(folder, 4, value=9), "masks/4.png: label ids 9 (1920 pixels)"),
    "c9 in validation": Fault(lambda folder: save_mask(folder, 7, value=9), "masks/7.png: label ids 9 (1920 pixels)"),
    "c10 sizes that differ": Fault(lambda folder: save_mask(folder, 4, value=1, size=(40, 40)), "masks/4.png"),
    "c11 nothing scored": Fault(
        lambda folder: [save_mask(folder, number, value=0) for number in TRAIN], None
    ),
    "c14 a bad line": Fault(lambda folder: (folder / "train.csv").write_text("image,mask\na.jpg,x,y\n"), "train.csv:2"),
    "c15 too few images": Fault(lambda _: None, "data.train has 6 images, one step takes 7", ("data.batch_size=7",)),
    "c18 in both splits": Fault(
        lambda folder: (folder / "val.csv").write_text((folder / "train.csv").read_text()), None
    ),
}  # fmt: skip


CHECKED_AT_START = ("c14 a bad line", "c15 too few images", "c18 in both splits")  # before any worker starts
READ_BY_WORKERS = ("c1 truncated image", "c1 left out", "c2 damaged mask", "c9 in validation")  # the others: long


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers"),
    [
        *((name, 0) for name in FAULTS),
        *(
            pytest.param(name, 2, marks=[] if name in READ_BY_WORKERS else pytest.mark.long)
            for name in FAULTS
            if name not in CHECKED_AT_START
        ),
    ],
)
def test_c28_group_c_is_the_same_with_workers_and_without(name: str, workers: int, tmp_path: Path) -> None:
    write_data(tmp_path)
    fault = FAULTS[name]
    fault.spoil(tmp_path)
    words = [*WORDS, *TINY_RUN, *fault.words, f"data.num_workers={workers}", "run_dir=run"]
    with patch.dict(ENCODERS, {"tiny": Constructor("helpers.in_process", "TinyEncoder")}):
        output = run_here(tmp_path, *words, code=0 if fault.message is None else 1)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if fault.message is None:
        assert not errors and "best mean IoU" in output
    else:
        assert len(errors) == 1 and fault.message in errors[0]
        assert "Traceback" not in output
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize("words", [["data.num_workers=4"], ["trainer.devices=2", "data.num_workers=2"]])
def test_c28_an_unknown_id_ends_the_command_within_seconds(words: list[str], tmp_path: Path) -> None:
    write_data(tmp_path)
    for number in TRAIN:
        save_mask(tmp_path, number, value=9)
    ended = run_python(
        str(PROGRAM), *WORDS, *TINY_RUN, *words, "data.batch_size=1", "run_dir=run", cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", FORK_CHILDREN: "1"}, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "Traceback" not in ended.stdout and "label ids 9 (1920 pixels)" in ended.stdout
    assert not processes_in(tmp_path)


def processes_in(folder: Path) -> list[str]:
    """The processes whose working directory is a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == folder:
                found.append(process.name)
    return found
