"""Frames of video files, and videos of pictures, by OpenCV's FFmpeg."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import cv2
import numpy as np

from semseg.errors import DataError
from semseg.reports.draw import Pixels

# Why a video cannot be read is in our own sentence, not in lines of OpenCV's and FFmpeg's on standard error.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

CODEC = "mp4v"  # MPEG-4 part 2: the one that OpenCV's own build can always write
DEFAULT_RATE = 25.0  # where a file does not say


COUNTING_SUFFIXES = (".avi", ".m4v", ".mov", ".mp4")  # whose header has the number of frames; others a duration
UNEVEN = 0.1  # of the time between two frames: a video whose frames are off by more has no even rate
AVI_SEARCHED = 2**24  # bytes at the beginning and at the end
MOST_FAILED = 1000  # reads in a row that fail; then there is nothing behind them


class LostFramesError(DataError):
    """Some frames of a video could not be read; the others could."""


class Frame(NamedTuple):
    """A picture of a video."""

    pixels: Pixels  # (H, W, 3) uint8 RGB, turned as the file says
    rate: float  # of the video, frames per second
    number: int  # in the video, from 0; those that cannot be read have numbers too


def frames_of(path: Path) -> Iterator[Frame]:
    """The frames of a video in order; those that cannot be decoded are passed over.

    Raises:
        DataError: if there is no such file, or it has no frame that can be decoded.
        LostFramesError: behind the last frame, if frames were passed over or the file breaks off.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    capture = cv2.VideoCapture(str(path))
    try:
        rate = capture.get(cv2.CAP_PROP_FPS) or DEFAULT_RATE
        announced = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        clock, gap, count, number = Clock(rate), None, 0, -1
        found = frames_found(path, announced)
        while (pixels := next_frame(capture, announced - clock.number)) is not None:
            before, count = number, count + 1
            number = clock.tick(capture.get(cv2.CAP_PROP_POS_MSEC), pixels.num_failed)
            number = found[number] if number < len(found) else number
            gap = before if gap is None and number != before + 1 else gap
            yield Frame(np.asarray(cv2.cvtColor(pixels.bgr, cv2.COLOR_BGR2RGB), np.uint8), rate, number)
        if not count:
            raise DataError(f"{path}: is not a video that can be decoded, or has no frame.")
        total = number + 1
        if is_cut_off(path, announced - total, rate, announced) or (gap is not None and announced > total):
            gap, total = number if gap is None else gap, announced
        if gap is not None:
            raise LostFramesError(
                f"{path}: {total - count} of {total} frames cannot be read, the first behind frame {gap}: the video is "
                "damaged or breaks off. Get it again."
            )
    finally:
        capture.release()


class Clock:
    """Numbers the frames that are read.

    A frame has the number behind that of the one before. If reads failed between them, or time jumps in a video that
    was even until then, the time between them says how many frames there were.
    """

    def __init__(self, rate: float) -> None:
        self.rate, self.number, self.is_even = rate, -1, True
        self._time = 0.0  # of the last frame, in frames

    def tick(self, milliseconds: float, num_failed: int) -> int:
        """The number of a frame that was read at this time, after so many reads that failed."""
        time = milliseconds * self.rate / 1000
        passed = time - self._time if self.number >= 0 else 1.0 + num_failed
        self.is_even = self.is_even and abs(passed - round(passed)) < UNEVEN and passed > 0
        self.number += max(1, round(passed)) if num_failed or self.is_even else 1
        self._time = time
        return self.number


class Decoded(NamedTuple):
    """A frame as OpenCV gives it."""

    bgr: Pixels
    num_failed: int  # reads that failed before it


def next_frame(capture: cv2.VideoCapture, num_left: int) -> Decoded | None:
    """The next frame that can be decoded; None if none of those that are left can."""
    for num_failed in range(max(1, min(num_left, MOST_FAILED))):
        is_read, pixels = capture.read()
        if is_read:
            return Decoded(np.asarray(pixels, np.uint8), num_failed)
    return None


def frames_found(path: Path, announced: int) -> list[int]:
    """The numbers of the frames of an AVI file that FFmpeg finds: it passes over those whose beginning is damaged, and
    counts on as if they had never been. Empty for other files, and for those without their index.
    """
    if path.suffix.lower() != ".avi" or not path.stat().st_size:
        return []
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        movie, index = data.find(b"movi", 0, AVI_SEARCHED), data.rfind(b"idx1", max(0, len(data) - AVI_SEARCHED))
        length = int.from_bytes(data[index + 4 : index + 8], "little") // 16 * 16
        if min(movie, index) < 0 or index + 8 + length > len(data):
            return []
        rows = [data[place : place + 16] for place in range(index + 8, index + 8 + length, 16)]
        frames = [row for row in rows if row[2:4] in (b"dc", b"db")]
        if len(frames) != announced:
            return []
        places = [
            movie + int.from_bytes(row[8:12], "little") for row in frames
        ]  # an index of whole files counts from 0
        places = places if data[places[0] : places[0] + 4] == frames[0][:4] else [place - movie for place in places]
        starts = zip(frames, places, strict=True)
        return [number for number, (row, place) in enumerate(starts) if data[place : place + 4] == row[:4]]


def is_cut_off(path: Path, num_missing: int, rate: float, announced: int) -> bool:
    """Whether frames are missing at the end; a duration is not exact, and may be that of the sound."""
    if path.suffix.lower() in COUNTING_SUFFIXES:
        return num_missing > 0
    return num_missing > max(rate, announced / 20)


class VideoWriters:
    """Videos `<target>_<name>.mp4`, each begun with its first picture and finished on leaving the context.

    A video that is left by an error is removed.

    Raises:
        DataError: on leaving, if the disk did not take all frames; the video that was there before stays.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._open: dict[str, cv2.VideoWriter] = {}
        self._counts: dict[str, int] = {}  # pictures added
        self._token = uuid.uuid4().hex  # no other process has the same temporary names

    def __enter__(self) -> VideoWriters:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._open.values():
            writer.release()
        try:
            for name in self._open if error is None else ():
                self._finish(name, self.target.with_name(f"{self.target.name}_{name}.mp4"))
        finally:
            for name in self._open:
                self._temporary(name).unlink(missing_ok=True)

    def _finish(self, name: str, path: Path) -> None:
        """Put a finished video in its place. OpenCV does not report a full disk: the frames are counted instead."""
        capture = cv2.VideoCapture(str(self._temporary(name)))
        written = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        if written != self._counts[name]:
            raise DataError(
                f"{path}: the video cannot be written in full ({written} of {self._counts[name]} frames). Is the disk "
                "full?"
            )
        self._temporary(name).replace(path)

    def add(self, name: str, picture: Pixels, rate: float) -> None:
        """Add a picture (H, W, 3) RGB to video `name`; all of one video have one size.

        Raises:
            DataError: if the video cannot be written.
        """
        # MPEG-4 wants even sides: an odd one gets its last row or column twice.
        bottom, right = picture.shape[0] % 2, picture.shape[1] % 2
        even = cv2.copyMakeBorder(picture, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
        if name not in self._open:
            path = self._temporary(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            size = (even.shape[1], even.shape[0])
            self._open[name] = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*CODEC), rate, size)
            if not self._open[name].isOpened():
                raise DataError(f"{path}: the video cannot be written ({CODEC}, {size[0]} x {size[1]}).")
        self._counts[name] = self._counts.get(name, 0) + 1
        self._open[name].write(cv2.cvtColor(even, cv2.COLOR_RGB2BGR))

    def _temporary(self, name: str) -> Path:
        return self.target.with_name(f".{self.target.name[:40]}_{name}.{self._token}.tmp.mp4")
