"""Frames of video files, and videos of pictures, by OpenCV's FFmpeg."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import cv2
import numpy as np

from semseg.draw import Pixels
from semseg.errors import DataError

CODEC = "mp4v"  # MPEG-4 part 2: the one that OpenCV's own build can always write
DEFAULT_RATE = 25.0  # where a file does not say


class Frame(NamedTuple):
    """A picture of a video."""

    pixels: Pixels  # (H, W, 3) uint8 RGB, turned as the file says
    rate: float  # of the video, frames per second


def frames_of(path: Path) -> Iterator[Frame]:
    """The frames of a video in order.

    Raises:
        DataError: if there is no such file, or it has no frame that can be decoded.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    capture = cv2.VideoCapture(str(path))
    try:
        rate = capture.get(cv2.CAP_PROP_FPS) or DEFAULT_RATE
        is_read, pixels = capture.read()
        if not is_read:
            raise DataError(f"{path}: is not a video that can be decoded, or has no frame.")
        while is_read:
            yield Frame(np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8), rate)
            is_read, pixels = capture.read()
    finally:
        capture.release()


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
