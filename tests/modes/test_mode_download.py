"""mode=download through the real command line, from a server on this machine."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from helpers.command_line import run_here as run
from helpers.local_server import LocalServer, local_server
from semseg.config.groups import CONFIG_DIR

PATH = "/ADEChallengeData2016.zip"
COUNTS = "3 training and 2 validation images with labels"


def tiny_ade20k() -> bytes:
    """A zip file in the layout of ADE20K's, with 3 + 2 pairs."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for split, count in (("training", 3), ("validation", 2)):
            for number in range(count):
                for folder, suffix, mode in (("images", "jpg", "RGB"), ("annotations", "png", "L")):
                    picture = io.BytesIO()
                    Image.new(mode, (6, 4)).save(picture, "jpeg" if suffix == "jpg" else "png")
                    file.writestr(f"ADEChallengeData2016/{folder}/{split}/{number}.{suffix}", picture.getvalue())
    return content.getvalue()


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with local_server() as server:
        server.files[PATH] = tiny_ade20k()
        yield server


def words(server: LocalServer, *, num_train: int = 3) -> list[str]:
    """A command line that has the tiny archive in place of ADE20K's."""
    digest = hashlib.sha1(server.files[PATH]).hexdigest()
    return [
        "mode=download", "data=ade20k",
        f'data.archive.url="{server.url(PATH)}"', f'data.archive.digest="sha1:{digest}"',
        f"data.archive.num_train={num_train}", "data.archive.num_val=2", "download.cache=cache", "download.delay_s=0",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_data_set_is_downloaded_unpacked_and_counted_once(server: LocalServer, tmp_path: Path) -> None:
    output = run(tmp_path, *words(server))
    assert f"data/ADEChallengeData2016: {COUNTS}\n" in output
    assert len(list((tmp_path / "data" / "ADEChallengeData2016").rglob("*.*g"))) == 10
    assert (tmp_path / "cache" / "data" / "ADEChallengeData2016.zip").is_file()
    again = run(tmp_path, *words(server))
    assert f"data/ADEChallengeData2016: exists already, {COUNTS}\n" in again
    assert len(server.asked) == 1


@pytest.mark.slow
def test_an_incomplete_data_set_is_reported(server: LocalServer, tmp_path: Path) -> None:
    more = run(tmp_path, *words(server, num_train=4), "data.root=elsewhere", code=1)
    assert f"error: elsewhere: has {COUNTS}, but data=ade20k has 4 training" in more
    (tmp_path / "elsewhere" / "annotations" / "training" / "1.png").unlink()
    lost = run(tmp_path, *words(server), "data.root=elsewhere", code=1)
    assert "error: elsewhere: data=ade20k is incomplete there. Remove elsewhere and run mode=download again" in lost
    assert "1 of 3 images" in lost


@pytest.mark.slow
def test_a_damaged_archive_is_not_unpacked(server: LocalServer, tmp_path: Path) -> None:
    right = words(server)
    server.files[PATH] = server.files[PATH][:-1]
    output = run(tmp_path, *right, code=1)
    assert hashlib.sha1(server.files[PATH]).hexdigest() in output
    assert "or unpack it to data/ADEChallengeData2016 yourself, or set data.root to its folder." in output
    assert "Traceback" not in output
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_other_data_sets_say_which_can_be_downloaded(tmp_path: Path) -> None:
    output = run(tmp_path, "mode=download", "data=camvid", code=2)
    assert "error: data=camvid: there is nothing to download. mode=download works with data=ade20k." in output


def test_the_numbers_of_ade20k_are_the_published_ones() -> None:
    archive = OmegaConf.load(CONFIG_DIR / "data" / "ade20k.yaml").archive
    assert (archive.num_train, archive.num_val) == (20_210, 2_000)
    assert archive.digest == "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"


@pytest.mark.slow
def test_no_torch_is_imported() -> None:
    check = "import sys, semseg.modes.download; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=CONFIG_DIR.parent, check=True)
