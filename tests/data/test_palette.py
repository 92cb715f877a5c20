"""The table of generated colours: unchanged, distinct, and what the script writes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from semseg.data.classes import ClassTable
from semseg.data.palette import generated_palette

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_palette_does_not_change() -> None:
    palette = generated_palette(512)
    some = {index: palette[index] for index in (0, 1, 2, 18, 149, 255, 511)}
    assert some == {
        0: (93, 0, 255), 1: (0, 139, 0), 2: (255, 70, 162), 18: (162, 209, 23), 149: (232, 232, 209),
        255: (116, 232, 93), 511: (116, 232, 46),
    }  # fmt: skip
    digest = hashlib.sha256(bytes(channel for colour in palette for channel in colour)).hexdigest()
    assert digest == "64885e3eba8343db7b9bb96a661721e88993d87344bf0bea18a31466c2e72743"
    assert ClassTable.from_names(["a", "b"]).palette == palette[:2]


def test_the_script_writes_the_table_of_the_package(tmp_path: Path) -> None:
    script = REPOSITORY / "tools/make_palette.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "palette.csv")], check=True, cwd=tmp_path)
    assert (tmp_path / "palette.csv").read_text() == (REPOSITORY / "semseg/data/palette.csv").read_text()


def test_generated_colours_differ_clearly_and_do_not_change_with_their_number() -> None:
    palette = np.array(generated_palette(150), np.int64)
    assert generated_palette(20) == generated_palette(150)[:20]
    distance = np.abs(palette[:, None] - palette[None]).max(-1) + 255 * np.eye(150, dtype=np.int64)
    assert distance.min() >= 23  # one step of the grid
    first = palette[:12]
    assert (np.abs(first[:, None] - first[None]).sum(-1) + 255 * np.eye(12, dtype=np.int64)).min() > 90
    assert palette.max(1).min() > 60  # none is nearly black
    assert len(set(generated_palette(512))) == 512
    assert generated_palette(600)[512:] == generated_palette(88)


def dichromat(rgb: np.ndarray, opsin: int) -> np.ndarray:
    """Linear RGB without the red (0) or the green (1) cones, by the cones of Vienot, Brettel and Mollon 1999."""
    to_cones = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    lost = np.eye(3)
    lost[opsin] = [[0, 2.02344, -2.52581], [0.494207, 0, 1.24827]][opsin]
    return rgb @ (np.linalg.inv(to_cones) @ lost @ to_cones).T


@pytest.mark.parametrize("opsin", [0, 1], ids=["protanopia", "deuteranopia"])
def test_the_colours_of_few_classes_differ_for_colour_blind_people_too(opsin: int) -> None:
    linear = (np.array(generated_palette(19)) / 255) ** 2.2
    seen = np.clip(dichromat(linear, opsin), 0, 1) ** (1 / 2.2) * 255
    distance = np.abs(seen[:, None] - seen[None]).sum(-1) + 999 * np.eye(19)
    assert distance.min() > 30
