"""Damaged videos: frames that cannot be read are counted and reported, and the others keep their numbers."""

from __future__ import annotations

import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from test_predictor import Brightest

from semseg.data.classes import ClassTable
from semseg.data.label_map import LabelMap
from semseg.errors import DataError
from semseg.modes.predict import PredictionJob
from semseg.prediction.inputs import Input
from semseg.prediction.predictor import PredictionSettings, Predictor
from semseg.prediction.video import FrameClock, LostFramesError, read_frames

pytestmark = pytest.mark.reliability

NUM_FRAMES = 40


def film(path: Path, codec: str) -> bytes:
    """A film whose frame k has the brightness 6 k above, and noise below."""
    noise = np.random.default_rng(0)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10, (320, 240))
    for number in range(NUM_FRAMES):
        pixels = np.full((240, 320, 3), 6 * number, np.uint8)
        pixels[60:] += noise.integers(0, 6, (180, 320, 3), np.uint8)
        writer.write(pixels)
    writer.release()
    return path.read_bytes()


def read(path: Path) -> tuple[list[int], list[float], str]:
    """The numbers of the readable frames, the numbers that they show, and the error at the end."""
    numbers, visible = [], []
    try:
        for frame in read_frames(path):
            numbers.append(frame.number)
            visible.append(float(frame.pixels[:60].mean()) / 6)
    except LostFramesError as error:
        return numbers, visible, str(error)
    return numbers, visible, ""


KINDS = [
    ("a.avi", "MJPG"),
    ("a.avi", "XVID"),
    ("a.mp4", "mp4v"),
    ("a.mov", "mp4v"),
    ("a.mkv", "mp4v"),
    ("a.mkv", "MJPG"),
]


@pytest.mark.parametrize(("name", "codec"), KINDS)
def test_c26_frames_around_damaged_bytes_keep_their_numbers(
    tmp_path: Path, name: str, codec: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    whole = film(path, codec)
    assert read(path)[::2] == (list(range(NUM_FRAMES)), "")
    noise = np.random.default_rng(1).integers(0, 256, 6000, np.uint8).tobytes()
    path.write_bytes(whole[: len(whole) // 2] + noise + whole[len(whole) // 2 + 6000 :])
    numbers, visible, message = read(path)
    assert len(numbers) > 25 and numbers[-1] == NUM_FRAMES - 1
    assert np.abs(np.array(numbers) - visible).max() < 3.5  # a concealed frame shows the previous one
    assert np.median(np.abs(np.array(numbers) - visible)) < 0.5
    assert f"{name}: {NUM_FRAMES - len(numbers)} of {NUM_FRAMES} frames cannot be read" in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "codec"), KINDS)
def test_c26_a_truncated_video_is_reported(
    tmp_path: Path, name: str, codec: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    whole = film(path, codec)
    path.write_bytes(whole[: len(whole) // 2])
    if name.endswith(("mp4", "mov")):  # the index of the frames is at the end
        with pytest.raises(ValueError, match="cannot be decoded as a video"):
            next(read_frames(path))
    else:
        numbers, _, message = read(path)
        assert 10 < len(numbers) < 25 and numbers == list(range(len(numbers)))
        assert f"{NUM_FRAMES - len(numbers)} of {NUM_FRAMES} frames cannot be read" in message
        assert f"the first after frame {numbers[-1]}" in message
    assert capfd.readouterr() == ("", "")


def test_c26_prediction_writes_readable_frames_by_number_and_reports_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    whole = film(path, "MJPG")
    path.write_bytes(whole[: len(whole) // 2] + bytes(6000) + whole[len(whole) // 2 + 6000 :])
    classes = ClassTable(("red", "green", "blue"), ((200, 0, 0), (0, 180, 0), (0, 0, 250)))
    net = Predictor(Brightest().eval(), classes, LabelMap(3), PredictionSettings([16], 64))  # pyright: ignore[reportArgumentType]
    job = PredictionJob(net, tmp_path / "out", ["ids", "overlay"])
    progress: list[float] = []
    (failure,) = job.predict_all([Input(path, Path("a"))], progress.append)
    assert len(progress) > 20 and progress == sorted(progress) and 0 < progress[0] < 0.1 and progress[-1] == 1
    assert "of 40 frames cannot be read" in failure
    written = sorted(int(file.name[:6]) for file in (tmp_path / "out/a").iterdir())
    assert written == read(path)[0]
    assert Image.open(tmp_path / f"out/a/{written[0]:06d}_ids.png").size == (320, 240)
    assert (tmp_path / "out/a_overlay.mp4").is_file()


def test_a_video_in_a_zip_archive_has_the_frames_of_the_file(tmp_path: Path) -> None:
    film(tmp_path / "film.avi", "MJPG")
    with zipfile.ZipFile(tmp_path / "films.zip", "w") as archive:
        archive.write(tmp_path / "film.avi", "sub/film.avi")
    assert read(tmp_path / "films.zip" / "sub" / "film.avi") == read(tmp_path / "film.avi")
    with pytest.raises(DataError, match=r"films\.zip/other\.avi: there is no such file"):
        read(tmp_path / "films.zip" / "other.avi")


def test_the_clock_counts_frames_of_uneven_rate_and_uses_time_after_failed_reads() -> None:
    even, uneven = FrameClock(10.0), FrameClock(10.0)
    assert [even.tick(time, 0) for time in (0, 100, 200, 600)] == [0, 1, 2, 6]
    assert [uneven.tick(time, 0) for time in (0, 130, 200, 600)] == [0, 1, 2, 3]
    assert uneven.tick(1000, num_failed=2) == 7
    assert even.tick(600, num_failed=1) == 7  # never a number twice


@pytest.mark.parametrize("num_gaps", [1, 9, 30, 90])
def test_frames_that_are_shown_for_longer_are_no_gaps(num_gaps: int) -> None:
    shown = [2 if number % (900 // num_gaps) == 450 // num_gaps else 1 for number in range(900)]
    times = [sum(shown[:number]) for number in range(900)]
    clock = FrameClock(30 * 900 / sum(shown))  # the average rate, as FFmpeg reports it
    assert [clock.tick(1000 / 30 * time, 0) for time in times] == list(range(900))


def test_a_lost_frame_of_a_constant_rate_is_a_gap_late_in_a_film_too() -> None:
    clock = FrameClock(29.97)
    times = [*range(20_000), *range(20_001, 20_010)]
    assert [clock.tick(1000 / 29.97 * time, 0) for time in times] == times


def test_decoders_stay_silent_after_the_environment_was_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(400))
    for _ in range(2):
        monkeypatch.delenv("OPENCV_FFMPEG_LOGLEVEL", raising=False)
        with pytest.raises(DataError, match="cannot be decoded as a video"):
            list(read_frames(tmp_path / "a.mp4"))
    assert capfd.readouterr() == ("", "")
