"""Archives of data sets are unpacked whole; hostile ones leave nothing behind."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from semseg.errors import DataError
from semseg.storage import archive
from semseg.storage.archive import extract_archive


class Entry(NamedTuple):
    """One entry of an archive that is made for a test."""

    name: str
    content: bytes = b"abc"
    kind: int = stat.S_IFREG  # file type of the Unix mode


class Hostile(NamedTuple):
    """What an archive holds besides one good file, and what is said about it."""

    entries: list[Entry]
    reason: str  # pattern


HARD_LINK = -1  # no mode of its own: a kind of entry of tar files; zip files get an encrypted entry in its place
ZEROS = bytes(archive.MIN_SUSPICIOUS + 1)
HOSTILE = {
    "up": Hostile([Entry("set/../../evil")], r"'set/\.\./\.\./evil'.*leads out of the folder"),
    "absolute": Hostile([Entry("/tmp/semseg_evil")], "'/tmp/semseg_evil'.*absolute"),
    "drive": Hostile([Entry("C:/evil")], "'C:/evil'.*absolute"),
    "backslashes": Hostile([Entry("set\\..\\..\\evil")], "evil'.*leads out of the folder"),
    "link": Hostile([Entry("set/link", b"/etc", stat.S_IFLNK), Entry("set/link/evil")], "'set/link'.*link or a device"),
    "hard link": Hostile([Entry("set/link", b"/etc/passwd", HARD_LINK)], "'set/link'.*(link or a device|encrypted)"),
    "device": Hostile([Entry("set/zero", b"", stat.S_IFCHR)], "'set/zero'.*link or a device"),
    "two of one name": Hostile([Entry("set/a"), Entry("set/./a")], r"'set/\./a'.*two entries have this name"),
    "1000 to 1": Hostile([Entry("set/zeros", ZEROS)], "'set/zeros'.*200 times its size"),
    "many": Hostile([Entry(f"set/{number}", b"") for number in range(12)], "'set/9'.*more than 10 entries"),
    "file as folder": Hostile([Entry("set/a"), Entry("set/a/b")], "'set/a/b'.*its folder is a file"),
    "no name": Hostile([Entry(".")], r"'\.'.*no name"),
}
TAR_TYPES = {stat.S_IFLNK: tarfile.SYMTYPE, stat.S_IFCHR: tarfile.CHRTYPE, HARD_LINK: tarfile.LNKTYPE}


def make(path: Path, entries: list[Entry]) -> Path:
    """A zip or tar file, by the suffix of `path`."""
    if path.suffix == ".zip":
        make_zip(path, entries)
    else:
        make_tar(path, entries)
    return path


def make_zip(path: Path, entries: list[Entry]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for entry in entries:
            info = zipfile.ZipInfo(entry.name)
            info.external_attr = max(entry.kind, 0) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, entry.content)
            info.flag_bits |= entry.kind == HARD_LINK  # bit 0: encrypted; it goes into the directory at the end


def make_tar(path: Path, entries: list[Entry]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as file:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.type = TAR_TYPES.get(entry.kind, tarfile.DIRTYPE if entry.name.endswith("/") else tarfile.REGTYPE)
            if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = entry.content.decode()
            else:
                info.size = len(entry.content)
            file.addfile(info, io.BytesIO(entry.content))


def tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz"])
def test_one_top_folder_becomes_the_folder_whatever_it_is_called(tmp_path: Path, suffix: str) -> None:
    entries = [Entry("Set/", b""), Entry("Set/a/1.png", b"one"), Entry("Set/b.txt", b"two"), Entry("Set/c/", b"")]
    extract_archive(make(tmp_path / f"set.{suffix}", entries), tmp_path / "deep" / "data")
    assert tree(tmp_path / "deep" / "data") == {"a/1.png": b"one", "b.txt": b"two"}
    assert (tmp_path / "deep" / "data" / "c").is_dir()
    assert [path.name for path in (tmp_path / "deep").iterdir() if path.suffix != ".lock"] == ["data"]


@pytest.mark.parametrize("names", [["a.txt", "b/c.txt"], ["a.txt"], ["./a/1.txt", "./b/2.txt"]])
def test_several_things_at_the_top_stay_where_they_are(tmp_path: Path, names: list[str]) -> None:
    for suffix in ("zip", "tar"):
        folder = tmp_path / f"{suffix}_folder"
        extract_archive(make(tmp_path / f"set.{suffix}", [Entry(name) for name in names]), folder)
        assert list(tree(folder)) == [name.removeprefix("./") for name in names]


def test_a_tar_file_that_ends_with_a_zip_file_is_a_tar_file(tmp_path: Path) -> None:
    inner = make(tmp_path / "inner.zip", [Entry("a")]).read_bytes()
    extract_archive(make(tmp_path / "outer.tar", [Entry("b"), Entry("inner.zip", inner)]), tmp_path / "set")
    assert list(tree(tmp_path / "set")) == ["b", "inner.zip"]


@pytest.mark.reliability
@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_g5_a_hostile_archive_is_refused_before_anything_is_written(
    tmp_path: Path, case: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "many":
        assert archive.MAX_ENTRIES == 1_000_000
        monkeypatch.setattr(archive, "MAX_ENTRIES", 10)
    path = make(tmp_path / f"set.{suffix}", [Entry("set/good"), *HOSTILE[case].entries])
    monkeypatch.setattr(archive, "write_members", None)
    with pytest.raises(DataError, match=HOSTILE[case].reason) as error:
        extract_archive(path, tmp_path / "data" / "set")
    assert str(path) in str(error.value)
    assert [item.name for item in (tmp_path / "data").iterdir() if item.suffix != ".lock"] == []


def test_a_high_ratio_is_harmless_below_16_mib(tmp_path: Path) -> None:
    path = make(tmp_path / "set.zip", [Entry("zeros", bytes(1 << 20))])
    assert path.stat().st_size < (1 << 20) / 200
    extract_archive(path, tmp_path / "set")
    assert (tmp_path / "set" / "zeros").stat().st_size == 1 << 20


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    path = make(tmp_path / "set.zip", [Entry("a")])
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "mine").write_text("precious")
    with pytest.raises(DataError, match=r"set: exists and is not empty"):
        extract_archive(path, folder)
    assert tree(folder) == {"mine": b"precious"}
    (folder / "mine").unlink()
    extract_archive(path, folder)
    assert tree(folder) == {"a": b"abc"}


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "set").symlink_to("large_disk")
    extract_archive(make(tmp_path / "set.zip", [Entry("a")]), tmp_path / "set")
    assert tree(tmp_path / "large_disk") == {"a": b"abc"}
    assert (tmp_path / "set").is_symlink()


@pytest.mark.reliability
def test_g5_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    left = tmp_path / ".set.unpacking"
    left.mkdir()
    (left / "half").touch()
    extract_archive(make(tmp_path / "set.zip", [Entry("a")]), tmp_path / "set")
    assert tree(tmp_path / "set") == {"a": b"abc"}
    assert not left.exists()


def test_a_process_that_is_interrupted_halfway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, members: object, folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(archive, "write_members", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract_archive(make(tmp_path / "set.zip", [Entry("a")]), tmp_path / "set")
    assert {path.name for path in tmp_path.iterdir()} == {"set.zip", ".set.lock"}


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz"])
def test_an_archive_that_is_cut_short_is_reported_wherever_it_ends(tmp_path: Path, suffix: str) -> None:
    path = make(tmp_path / f"set.{suffix}", [Entry("a", os.urandom(3000)), Entry("b", os.urandom(3000))])
    whole = path.read_bytes()
    for length in (*range(0, 6100, 211), 512 + 3072):  # the last: between two members of a tar file
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=str(path)):
            extract_archive(path, tmp_path / "set")
        assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(("suffix", "place"), [("zip", 1500), ("tar.gz", 1500), ("tar", 512 + 3072)])
def test_a_damaged_byte_is_reported(tmp_path: Path, suffix: str, place: int) -> None:
    path = make(tmp_path / f"set.{suffix}", [Entry("a", os.urandom(3000)), Entry("b", os.urandom(3000))])
    whole = bytearray(path.read_bytes())
    whole[place] ^= 0xFF  # in a plain tar file, a header: its contents have no checksums
    path.write_bytes(whole)
    with pytest.raises(DataError, match=str(path)):
        extract_archive(path, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_wrong_size_in_an_archive_is_reported(tmp_path: Path) -> None:
    path = make(tmp_path / "set.zip", [Entry("a", bytes(1000))])
    honest, lie = (1000).to_bytes(4, "little"), (10).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(honest, lie))
    with pytest.raises(DataError, match=r"entry 'a': it is damaged"):
        extract_archive(path, tmp_path / "set")


def test_an_archive_that_the_disk_cannot_hold_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2))
    with pytest.raises(DataError, match=r"unpacks to 3 bytes, but .* has room for 2"):
        extract_archive(make(tmp_path / "set.zip", [Entry("a")]), tmp_path / "set")


def test_an_archive_without_files_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="contains no files"):
        extract_archive(make(tmp_path / "set.zip", [Entry("a/", b"")]), tmp_path / "set")


@pytest.mark.reliability
def test_c34_zip_files_of_windows_and_macos_are_unpacked(tmp_path: Path) -> None:
    entries = [
        Entry("set\\a\\1.png", b"one"),
        Entry("set/b.txt"),
        Entry("__MACOSX/set/._b.txt"),
        Entry("set/.DS_Store"),
    ]
    extract_archive(make(tmp_path / "set.zip", entries), tmp_path / "data")
    assert tree(tmp_path / "data") == {"a/1.png": b"one", "b.txt": b"abc"}
