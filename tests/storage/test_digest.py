from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from semseg.errors import DownloadError
from semseg.storage.digest import digests_of, mismatch, note_of, parse_digest, recall, remember

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of b"abc", FIPS 180-2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "net.pth"
    path.write_bytes(b"abc")
    return path


def test_the_sha256_is_always_among_the_digests(path: Path) -> None:
    assert digests_of(path) == {"sha256": ABC}
    assert digests_of(path, parse_digest("md5:" + "0" * 32)) == {"sha256": ABC, "md5": hashlib.md5(b"abc").hexdigest()}


def test_the_beginning_of_a_sha256_will_do() -> None:
    assert mismatch({"sha256": ABC}, parse_digest(f"sha256:{ABC[:8]}")) == ""
    assert mismatch({"sha256": ABC}, parse_digest("sha256:ba7816be")) == f"its sha256 is {ABC}, but should be ba7816be"


def test_what_is_remembered_is_recalled_until_the_file_is_written(path: Path) -> None:
    assert recall(path) is None
    remember(path, {"sha256": ABC, "md5": "0" * 32})
    known = recall(path)
    assert known is not None
    assert known.digests == {"sha256": ABC, "md5": "0" * 32}
    assert known.is_current(path)
    path.write_bytes(b"abcd")
    assert not known.is_current(path)


@pytest.mark.parametrize("rest", ["", "# not JSON\n", "# []\n", '# {"size": 3}\n'])
def test_a_note_of_sha256sum_counts_but_says_nothing_of_the_state(path: Path, rest: str) -> None:
    note_of(path).write_text(f"{ABC}  net.pth\n{rest}")
    known = recall(path)
    assert known is not None
    assert known.first_seen.hex == ABC
    assert not known.is_current(path)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_the_note(path: Path) -> None:
    remember(path, digests_of(path))
    subprocess.run(["sha256sum", "--check", "--strict", note_of(path).name], cwd=path.parent, check=True)


@pytest.mark.parametrize("content", ["", "hello", ABC[:-1] + "  net.pth\n"])
def test_a_damaged_note_is_told(path: Path, content: str) -> None:
    note_of(path).write_text(content)
    with pytest.raises(DownloadError, match=r"net\.pth\.sha256: holds no SHA-256"):
        recall(path)
