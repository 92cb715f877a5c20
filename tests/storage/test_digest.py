from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from semseg.errors import DownloadError
from semseg.storage.digest import parse_digest, read_recorded_digest, record_digest, record_path

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of b"abc", FIPS 180-2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "net.pth"
    path.write_bytes(b"abc")
    return path


@pytest.mark.parametrize("text", [f"sha256:{ABC}", f"sha256:{ABC[:8]}", f"md5:{hashlib.md5(b'abc').hexdigest()}"])
def test_a_file_with_the_expected_digest_has_no_mismatch(path: Path, text: str) -> None:
    digest = parse_digest(text)
    assert digest is not None and digest.find_mismatch(path) == ""


def test_a_mismatch_names_both_digests(path: Path) -> None:
    digest = parse_digest("sha256:ba7816bf")
    assert digest is not None
    path.write_bytes(b"abcd")
    assert hashlib.sha256(b"abcd").hexdigest() in digest.find_mismatch(path)
    assert digest.find_mismatch(path).endswith("should be ba7816bf")


def test_a_recorded_digest_is_read_until_the_record_is_removed(path: Path) -> None:
    assert read_recorded_digest(path) is None
    assert record_digest(path) == ABC
    recorded = read_recorded_digest(path)
    assert recorded is not None and recorded.find_mismatch(path) == ""
    path.write_bytes(b"abcd")
    assert str(record_path(path)) in recorded.find_mismatch(path)


@pytest.mark.parametrize("rest", ["", '# {"size": 3}\n'])
def test_a_record_of_sha256sum_and_of_earlier_versions_counts(path: Path, rest: str) -> None:
    record_path(path).write_text(f"{ABC}  net.pth\n{rest}")
    recorded = read_recorded_digest(path)
    assert recorded is not None and recorded.hex == ABC


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_the_record(path: Path) -> None:
    record_digest(path)
    subprocess.run(["sha256sum", "--check", "--strict", record_path(path).name], cwd=path.parent, check=True)


@pytest.mark.parametrize("content", ["", "hello", ABC[:-1] + "  net.pth\n"])
def test_a_damaged_record_is_reported(path: Path, content: str) -> None:
    record_path(path).write_text(content)
    with pytest.raises(DownloadError, match=r"net\.pth\.sha256: contains no SHA-256"):
        read_recorded_digest(path)
