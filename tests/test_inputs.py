from __future__ import annotations

import io
from pathlib import Path

import pytest

from semseg.errors import ConfigError, DataError
from semseg.inputs import find_inputs, places


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.jpg", "b.PNG", "notes.txt", ".hidden.jpg", "sub/a.jpg", "sub/film.mp4", "sub/deep/c.tiff"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(word: str, run_dir: str = "out", stdin: str = "") -> dict[str, str]:
    """Place of the outputs -> file, of all inputs."""
    inputs = find_inputs(word, Path(run_dir), io.StringIO(stdin))
    return {item.place.as_posix(): item.path.as_posix() for item in inputs}


def test_a_folder_gives_images_and_videos_at_every_depth(folder: Path) -> None:
    assert found("photos") == {
        "a": "photos/a.jpg",
        "b": "photos/b.PNG",
        "sub/a": "photos/sub/a.jpg",
        "sub/deep/c": "photos/sub/deep/c.tiff",
        "sub/film": "photos/sub/film.mp4",
    }
    assert [item.is_video for item in find_inputs("photos/sub", Path("out"))] == [False, False, True]


def test_a_file_a_pattern_a_list_and_standard_input(folder: Path) -> None:
    assert found("photos/sub/a.jpg") == {"a": "photos/sub/a.jpg"}
    assert found("photos/**/*.jpg") == {"a": "photos/a.jpg", "sub/a": "photos/sub/a.jpg"}
    (folder / "photos/list.txt").write_text("\ufeff# mine\nsub/a.jpg\n\na.jpg\nsub/a.jpg\n")
    assert found("photos/list.txt") == {"sub/a": "photos/sub/a.jpg", "a": "photos/a.jpg"}  # in order, each once
    assert found("-", stdin="photos/b.PNG\nphotos/a.jpg\n") == {"b": "photos/b.PNG", "a": "photos/a.jpg"}


def test_a_file_with_the_characters_of_a_pattern_in_its_name_is_a_file(folder: Path) -> None:
    (folder / "photo[1].jpg").touch()
    assert found("photo[1].jpg") == {"photo[1]": "photo[1].jpg"}


def test_what_a_list_names_is_taken_whether_it_is_there_or_not(folder: Path) -> None:
    assert found("-", stdin="nowhere/x.jpg\n") == {"x": "nowhere/x.jpg"}  # reading says what is wrong with it


def test_earlier_outputs_are_no_inputs(folder: Path) -> None:
    (folder / "photos/out/sub").mkdir(parents=True)
    (folder / "photos/out/sub/a_ids.png").touch()
    assert "out/sub/a_ids" not in found("photos", "photos/out")
    assert not any("out" in place for place in found("photos/**/*.*", "photos/out"))


@pytest.mark.parametrize(
    ("word", "error", "part"),
    [
        ("https://a.org/x.jpg", ConfigError, "addresses are not opened"),
        ("nowhere", DataError, "no such file or folder"),
        ("photos/*.bmp", DataError, "no images or videos"),
        ("-", DataError, "no images or videos"),
    ],
)
def test_nothing_to_predict_is_said(folder: Path, word: str, error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        found(word)


@pytest.mark.parametrize("word", ["photos/sub", "photos/sub/a.jpg", "-"])
def test_outputs_must_not_go_where_inputs_are(folder: Path, word: str) -> None:
    with pytest.raises(ConfigError, match="run_dir=photos/sub: holds inputs"):
        found(word, "photos/sub", stdin="photos/sub/a.jpg\n")


def test_no_two_files_have_one_place() -> None:
    files = [Path(name) for name in ("x/a.jpg", "x/a.png", "x/a_jpg.jpg", "x/y/a.jpg", "x/b.tar.png")]
    assert [place.as_posix() for place in places(files, None)] == ["a_jpg", "a_png", "a_jpg_2", "y/a", "b.tar"]
