from __future__ import annotations

import io
import unicodedata
import zipfile
from pathlib import Path

import pytest

from semseg.data.store import UnusedFiles
from semseg.errors import ConfigError, DataError
from semseg.prediction.inputs import choose_output_paths, find_inputs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.jpg", "b.PNG", "notes.txt", ".hidden.jpg", "sub/a.jpg", "sub/film.mp4", "sub/deep/c.tiff"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outputs_of(source: str, run_dir: str = "out", stdin: str = "") -> dict[str, str]:
    """Output path -> file, for all inputs."""
    inputs = find_inputs(source, Path(run_dir), io.StringIO(stdin))
    return {item.output_path.as_posix(): item.path.as_posix() for item in inputs}


def test_a_folder_gives_images_and_videos_at_every_depth(folder: Path) -> None:
    assert outputs_of("photos") == {
        "a": "photos/a.jpg",
        "b": "photos/b.PNG",
        "sub/a": "photos/sub/a.jpg",
        "sub/deep/c": "photos/sub/deep/c.tiff",
        "sub/film": "photos/sub/film.mp4",
    }
    assert [item.is_video for item in find_inputs("photos/sub", Path("out"))] == [False, False, True]


def test_a_file_a_pattern_a_list_and_standard_input(folder: Path) -> None:
    assert outputs_of("photos/sub/a.jpg") == {"a": "photos/sub/a.jpg"}
    assert outputs_of("photos/**/*.jpg") == {"a": "photos/a.jpg", "sub/a": "photos/sub/a.jpg"}
    (folder / "photos/list.txt").write_text("\ufeff# mine\nsub/a.jpg\n\na.jpg\nsub/a.jpg\n")
    assert outputs_of("photos/list.txt") == {"sub/a": "photos/sub/a.jpg", "a": "photos/a.jpg"}  # in order, each once
    assert outputs_of("-", stdin="photos/b.PNG\nphotos/a.jpg\n") == {"b": "photos/b.PNG", "a": "photos/a.jpg"}


def test_a_photograph_that_a_list_spells_in_several_ways_is_predicted_once(folder: Path) -> None:
    lines = ["photos/a.jpg", "./photos/a.jpg", "photos/sub/../a.jpg", str(folder / "photos/a.jpg")]
    assert list(outputs_of("-", stdin="\n".join(lines)).values()) == ["photos/a.jpg"]


def test_a_file_with_the_characters_of_a_pattern_in_its_name_is_a_file(folder: Path) -> None:
    (folder / "photo[1].jpg").touch()
    assert outputs_of("photo[1].jpg") == {"photo[1]": "photo[1].jpg"}


def test_paths_of_a_list_need_not_exist(folder: Path) -> None:
    assert outputs_of("-", stdin="nowhere/x.jpg\n") == {"x": "nowhere/x.jpg"}  # reading it reports the error


def test_outputs_of_other_runs_below_a_folder_are_not_inputs(folder: Path) -> None:
    before = outputs_of("photos")
    (folder / "photos/runs/first/.hydra").mkdir(parents=True)
    (folder / "photos/runs/first/a_panel.png").touch()
    assert outputs_of("photos") == before
    assert outputs_of("photos/runs/first") == {"a_panel": "photos/runs/first/a_panel.png"}  # named itself


def test_earlier_outputs_are_not_inputs(folder: Path) -> None:
    (folder / "photos/out/sub").mkdir(parents=True)
    (folder / "photos/out/sub/a_ids.png").touch()
    (folder / "photos/out/.hydra").mkdir()
    assert "out/sub/a_ids" not in outputs_of("photos", "photos/out")
    assert not any("out" in place for place in outputs_of("photos/**/*.*", "photos/out"))


@pytest.mark.parametrize(
    ("word", "error", "part"),
    [
        ("https://a.org/x.jpg", ConfigError, "URLs are not supported"),
        ("nowhere", DataError, "no such file or folder"),
        ("photos/*.bmp", DataError, "no images or videos"),
        ("-", DataError, "no images or videos"),
    ],
)
def test_nothing_to_predict_is_an_error(folder: Path, word: str, error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        outputs_of(word)


@pytest.mark.parametrize("word", ["photos/sub", "photos/sub/a.jpg", "-"])
def test_outputs_must_not_go_where_inputs_are(folder: Path, word: str) -> None:
    with pytest.raises(ConfigError, match="run_dir=photos/sub: holds inputs"):
        outputs_of(word, "photos/sub", stdin="photos/sub/a.jpg\n")


@pytest.mark.parametrize(("word", "run_dir"), [("photos/sub", "photos"), ("photos", "photos"), (".", "photos/sub")])
def test_outputs_must_not_go_into_folders_of_images(folder: Path, word: str, run_dir: str) -> None:
    (folder / "photos/a.jpg").unlink()
    (folder / "photos/b.PNG").unlink()
    (folder / "x.jpg").touch()
    if word == "photos/sub":
        (folder / "photos/sub/sub").mkdir()
        (folder / "photos/sub/sub/x.jpg").touch()
    with pytest.raises(ConfigError, match=f"run_dir={run_dir}: holds inputs"):
        outputs_of(word, run_dir)


def test_a_video_and_a_folder_of_its_name_have_different_output_paths(folder: Path) -> None:
    (folder / "photos/sub/film").mkdir()
    (folder / "photos/sub/film/000000.jpg").touch()
    places = outputs_of("photos/sub")
    assert places["film_mp4"] == "photos/sub/film.mp4" and "film/000000" in places and "film" not in places


def test_all_files_have_different_output_paths() -> None:
    files = [Path(name) for name in ("x/a.jpg", "x/a.png", "x/a_jpg.jpg", "x/y/a.jpg", "x/b.tar.png")]
    assert [place.as_posix() for place in choose_output_paths(files, None)] == [
        "a_jpg",
        "a_png",
        "a_jpg_2",
        "y/a",
        "b.tar",
    ]
    differ_in_case = [Path(name) for name in ("a.jpg", "A.jpg", "B.png", "b.jpg")]
    places = [place.as_posix() for place in choose_output_paths(differ_in_case, None)]
    assert places == ["a_jpg", "A_jpg_2", "B_png", "b_jpg"]


def test_an_array_beside_an_image_of_its_name_is_no_image(folder: Path) -> None:
    names = set(outputs_of("photos"))
    some = next(iter((folder / "photos").glob("*.jpg")))
    some.with_suffix(".npy").touch()
    assert set(outputs_of("photos")) == names


@pytest.mark.reliability
def test_c29_inputs_below_linked_folders_are_found_once(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more/d.jpg").touch()
    (folder / "photos/more").symlink_to(folder / "more")
    (folder / "photos/sub/back").symlink_to(folder / "photos")
    targets = ["a", "b", "more/d", "sub/a", "sub/deep/c", "sub/film"]
    assert list(outputs_of("photos")) == targets
    assert list(outputs_of("photos/**/*.jpg").values()) == ["photos/a.jpg", "photos/more/d.jpg", "photos/sub/a.jpg"]


@pytest.mark.reliability
def test_c31_files_that_are_not_inputs_are_counted(folder: Path) -> None:
    unused = UnusedFiles()
    (folder / "photos/dangling.jpg").symlink_to(folder / "nowhere")
    (folder / "photos/x.HEIC").touch()  # predicting it fails, with the reason
    inputs = find_inputs("photos", Path("out"), unused=unused)
    assert [item.path.name for item in inputs] == ["a.jpg", "b.PNG", "a.jpg", "c.tiff", "film.mp4", "x.HEIC"]
    for part in ("1 .txt (notes.txt)", "1 hidden (.hidden.jpg)", "1 broken link (dangling.jpg)"):
        assert part in unused.describe("photos")


def test_world_files_of_images_are_used(folder: Path) -> None:
    for name in ("a.jgw", "sub/deep/c.TFW", "other.tfw", "b.new"):
        (folder / "photos" / name).touch()
    for source in ("photos", "photos/**/*"):
        unused = UnusedFiles()
        find_inputs(source, Path("out"), unused=unused)
        described = unused.describe("photos")
        assert "1 .tfw (other.tfw)" in described and "1 .new (b.new)" in described
        assert ".jgw" not in described and "c.TFW" not in described


@pytest.mark.reliability
@pytest.mark.parametrize("name", ["a[1]", "*", "a?", "{x,y}", "a b", "-x", "100%d", "'q'"])
def test_c33_an_existing_folder_is_not_a_pattern(folder: Path, name: str) -> None:
    for place in (name, "a1", "ab", "x"):
        (folder / place).mkdir(exist_ok=True)
        (folder / place / "[1].jpg").touch()
        (folder / place / "1.jpg").touch()
    assert sorted(outputs_of(name).values()) == [f"{name}/1.jpg", f"{name}/[1].jpg"]
    assert sorted(outputs_of(f"{name}/*.jpg").values()) == [f"{name}/1.jpg", f"{name}/[1].jpg"]
    assert list(outputs_of(f"{name}/[1].jpg").values()) == [f"{name}/[1].jpg"]


@pytest.mark.reliability
def test_c30_inputs_and_lists_are_found_in_either_unicode_form(folder: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "photos/é.jpg") for form in ("NFC", "NFD"))
    (folder / decomposed).touch()
    for word in (composed, decomposed, composed.replace(".jpg", ".*")):
        assert list(outputs_of(word).values()) == [decomposed]
    assert list(outputs_of("-", stdin=f"\ufeff{composed}\nphotos\\sub\\a.jpg\n").values()) == [
        decomposed,
        "photos/sub/a.jpg",
    ]


@pytest.mark.reliability
def test_c34_an_archive_is_a_folder(folder: Path) -> None:
    with zipfile.ZipFile(folder / "photos.zip", "w") as file:
        file.writestr("x\\a.jpg", b"a")
        file.writestr("__MACOSX/x/._a.jpg", b"a")
    assert outputs_of("photos.zip") == {"x/a": "photos.zip/x/a.jpg"}


@pytest.mark.reliability
def test_c35_a_list_that_is_not_utf8_is_an_error(folder: Path) -> None:
    (folder / "list.txt").write_bytes(b"caf\xe9.jpg\n")
    with pytest.raises(DataError, match=r"list\.txt: the list cannot be read: it is not UTF-8 text \(byte 3\)"):
        outputs_of("list.txt")
    assert list(outputs_of("-", stdin="~nobody.jpg\n").values()) == ["~nobody.jpg"]
