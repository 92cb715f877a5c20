"""Read frames of video files and write videos, with OpenCV's FFmpeg."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import cv2
import numpy as np

from semseg.data import store
from semseg.errors import DataError
from semseg.reports.draw import Pixels
from semseg.storage.atomic import make_folder

CODEC = "mp4v"  # MPEG-4 part 2: every build of OpenCV can write it
DEFAULT_RATE = 25.0  # frames per second, if a file has no rate

FRAME_COUNT_SUFFIXES = (
    ".avi",
    ".m4v",
    ".mov",
    ".mp4",
)  # formats with a frame count in the header; others have a duration
# In a video of constant rate, in frames: the largest deviations of the time between frames, and of the time of one.
MAX_UNEVENNESS, MAX_DRIFT = 0.1, 0.25
MAX_RATE = 1000.0  # frames per second of a video that is written; a header may give its unit of time
AVI_SEARCH_BYTES = 2**24  # searched at the beginning and at the end of a file
MAX_FAILED_READS = 1000  # consecutive failures that end a video


def silence_ffmpeg() -> None:
    """Keep OpenCV and FFmpeg from writing to standard error: our own errors say why a video cannot be read."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


silence_ffmpeg()


def open_capture(file: Path) -> cv2.VideoCapture:
    """Open a video."""
    silence_ffmpeg()  # a call from Python has restored its environment
    return cv2.VideoCapture(str(file))


class LostFramesError(DataError):
    """Some frames of a video could not be read; the others were read."""


class Frame(NamedTuple):
    """A frame of a video."""

    pixels: Pixels  # (H, W, 3) uint8 RGB, rotated as the file specifies
    rate: float  # frames per second of the video
    number: int  # in the video, from 0; unreadable frames are counted too
    announced: int  # frames of the video by its header, which may be wrong; 0: unknown


def read_frames(path: Path) -> Iterator[Frame]:
    """Yield the frames of a video in order; frames that cannot be decoded are skipped.

    A video in a zip archive is unpacked into a temporary file meanwhile, because decoders need one.

    Raises:
        DataError: if there is no such file, or no frame of it can be decoded.
        LostFramesError: after the last frame, if frames were skipped or the file is truncated.
    """
    if path.is_file():
        yield from _read_file_frames(path, path)
        return
    if not store.is_file(path):
        raise DataError(f"{path}: there is no such file.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"video{path.suffix}"
        file.write_bytes(store.read_file(path))
        yield from _read_file_frames(file, path)


def _read_file_frames(file: Path, path: Path) -> Iterator[Frame]:
    """`read_frames` of a file, which messages call `path`."""
    capture = open_capture(file)
    try:
        rate = capture.get(cv2.CAP_PROP_FPS) or DEFAULT_RATE
        announced = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        clock, last_before_gap, count, number = FrameClock(rate), None, 0, -1
        avi_numbers = find_avi_frames(file, announced)
        while (decoded := read_next_frame(capture, announced - clock.number)) is not None:
            previous, count = number, count + 1
            number = clock.tick(capture.get(cv2.CAP_PROP_POS_MSEC), decoded.num_failed)
            number = avi_numbers[number] if number < len(avi_numbers) else number
            if last_before_gap is None and number != previous + 1:
                last_before_gap = previous
            yield Frame(
                np.asarray(cv2.cvtColor(decoded.bgr, cv2.COLOR_BGR2RGB), np.uint8), rate, number, max(0, announced)
            )
        if not count:
            raise DataError(f"{path}: cannot be decoded as a video, or has no frames.")
        if file.suffix.lower() in FRAME_COUNT_SUFFIXES and count >= announced > 0:
            last_before_gap = None  # all are there: some frames are shown for longer
        total = number + 1
        if is_truncated(file, announced - total, rate, announced) or (
            last_before_gap is not None and announced > total
        ):
            last_before_gap, total = number if last_before_gap is None else last_before_gap, announced
        if last_before_gap is not None:
            raise LostFramesError(
                f"{path}: {total - count} of {total} frames cannot be read, the first after frame {last_before_gap}: "
                "the video is damaged or truncated. Obtain it again."
            )
    finally:
        capture.release()


class FrameClock:
    """Numbers the frames that are read.

    A frame has the number after that of the previous frame. If reads failed between them, or the time jumps in a video
    whose rate was constant so far, the number of frames between them follows from their times.
    """

    def __init__(self, rate: float) -> None:
        self.rate, self.number, self.is_even = rate, -1, True
        self._time = self._start = 0.0  # of the last frame, and of the one with number 0, in frames

    def tick(self, milliseconds: float, num_failed: int) -> int:
        """Return the number of a frame with this time, which was read after `num_failed` failed reads."""
        time = milliseconds * self.rate / 1000
        if self.number < 0:
            self._start, self._time = time - num_failed, time - num_failed - 1
        elapsed, drift = time - self._time, self._time - self._start - self.number
        is_regular = elapsed > 0 and abs(elapsed - round(elapsed)) < MAX_UNEVENNESS
        # An average rate differs from that of most frames: their times drift, until one that is shown for longer.
        self.is_even = self.is_even and is_regular and abs(drift) < MAX_DRIFT
        self.number += max(1, round(elapsed)) if num_failed or self.is_even else 1
        self._time = time
        return self.number


class DecodedFrame(NamedTuple):
    """A frame as OpenCV returns it."""

    bgr: Pixels
    num_failed: int  # failed reads before it


def read_next_frame(capture: cv2.VideoCapture, num_left: int) -> DecodedFrame | None:
    """Read the next frame that can be decoded; None if no remaining frame can."""
    for num_failed in range(max(1, min(num_left, MAX_FAILED_READS))):
        is_read, pixels = capture.read()
        if is_read:
            return DecodedFrame(np.asarray(pixels, np.uint8), num_failed)
    return None


def find_avi_frames(path: Path, announced: int) -> list[int]:
    """Return the numbers of the frames that FFmpeg finds in an AVI file.

    FFmpeg skips frames whose beginning is damaged, and does not count them. Empty for other formats, and for files
    without an index.
    """
    if path.suffix.lower() != ".avi" or not path.stat().st_size:
        return []
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        movie = data.find(b"movi", 0, AVI_SEARCH_BYTES)
        index = data.rfind(b"idx1", max(0, len(data) - AVI_SEARCH_BYTES))
        length = int.from_bytes(data[index + 4 : index + 8], "little") // 16 * 16
        if min(movie, index) < 0 or index + 8 + length > len(data):
            return []
        entries = [data[start : start + 16] for start in range(index + 8, index + 8 + length, 16)]
        frames = [entry for entry in entries if entry[2:4] in (b"dc", b"db")]
        if len(frames) != announced:
            return []
        # Offsets count from the list "movi", or in some files from the start of the file.
        offsets = [movie + int.from_bytes(entry[8:12], "little") for entry in frames]
        if data[offsets[0] : offsets[0] + 4] != frames[0][:4]:
            offsets = [offset - movie for offset in offsets]
        chunks = zip(frames, offsets, strict=True)
        return [number for number, (entry, offset) in enumerate(chunks) if data[offset : offset + 4] == entry[:4]]


def is_truncated(path: Path, num_missing: int, rate: float, announced: int) -> bool:
    """Whether frames are missing at the end; a duration is inexact, and may be that of the sound."""
    if path.suffix.lower() in FRAME_COUNT_SUFFIXES:
        return num_missing > 0
    return num_missing > max(rate, announced / 20)


class VideoWriters:
    """Writes videos `<target>_<name>.mp4`; a video begins with its first picture and is finished on exit.

    After an error, unfinished videos are removed.

    Raises:
        DataError: on exit, if not all frames could be written; an older video of this name is kept.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._open: dict[str, cv2.VideoWriter] = {}
        self._counts: dict[str, int] = {}  # number of pictures added
        self._token = uuid.uuid4().hex  # makes the temporary names unique to this process

    def __enter__(self) -> VideoWriters:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._open.values():
            writer.release()
        try:
            for name in self._open if error is None else ():
                self._finish(name, self._final(name))
        finally:
            for name in self._open:
                self._temporary(name).unlink(missing_ok=True)

    def _finish(self, name: str, path: Path) -> None:
        """Rename a finished video. OpenCV does not report a full disk, so the written frames are counted."""
        capture = open_capture(self._temporary(name))
        written = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        if written != self._counts[name]:
            raise DataError(
                f"{path}: the video could not be written in full ({written} of {self._counts[name]} frames). Check "
                "the free space of the disk."
            )
        self._temporary(name).replace(path)

    def add(self, name: str, picture: Pixels, rate: float) -> None:
        """Add a picture (H, W, 3) RGB to video `name`; all pictures of a video have the same size.

        Raises:
            DataError: if OpenCV cannot write the video.
            OSError: if its name is too long.
        """
        # MPEG-4 requires even sides: in pictures with odd sides, the last row or column is repeated.
        bottom, right = picture.shape[0] % 2, picture.shape[1] % 2
        even = cv2.copyMakeBorder(picture, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
        if name not in self._open:
            path = self._temporary(name)
            make_folder(path.parent)
            self._final(name).exists()  # an OSError for a name that is too long comes before all frames are predicted
            size = (even.shape[1], even.shape[0])
            rate = rate if 0 < rate <= MAX_RATE else DEFAULT_RATE
            self._open[name] = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*CODEC), rate, size)
            if not self._open[name].isOpened():
                raise DataError(f"{self._final(name)}: the video cannot be written ({CODEC}, {size[0]} x {size[1]}).")
        self._counts[name] = self._counts.get(name, 0) + 1
        self._open[name].write(cv2.cvtColor(even, cv2.COLOR_RGB2BGR))

    def _final(self, name: str) -> Path:
        return self.target.with_name(f"{self.target.name}_{name}.mp4")

    def _temporary(self, name: str) -> Path:
        return self.target.with_name(f".{self.target.name[:40]}_{name}.{self._token}.tmp.mp4")
