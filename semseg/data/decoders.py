"""What Pillow and the libraries below it do to the whole process: a limit of pixels, and lines on standard error."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

from PIL import Image

State = TypeVar("State")


class WhileUsed(Generic[State]):
    """A context in which something of the whole process is changed, for as long as any thread is in it.

    Args:
        change: makes the change and returns what it was before.
        restore: takes that back.
    """

    def __init__(self, change: Callable[[], State], restore: Callable[[State], None]) -> None:
        self._change, self._restore = change, restore
        self._lock, self._users = Lock(), 0
        self._before: list[State] = []
        os.register_at_fork(before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._forked)

    def _forked(self) -> None:
        """The child has none of the parent's threads, and so none of its users."""
        self._users = 0
        while self._before:
            self._restore(self._before.pop())
        self._lock.release()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._before.append(self._change())
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._restore(self._before.pop())


def _take_limit() -> int | None:
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    return before


def _give_limit_back(before: int | None) -> None:
    Image.MAX_IMAGE_PIXELS = before


def _turn_stderr_off() -> int | None:
    try:
        own = os.dup(2)
    except OSError:  # closed
        return None
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    return own


def _turn_stderr_on(own: int | None) -> None:
    if own is not None:
        os.dup2(own, 2)
        os.close(own)


# Pillow's own limit is off while a header is read: data.max_pixels follows right behind.
pillow_without_limit = WhileUsed(_take_limit, _give_limit_back)

# What libtiff and FFmpeg print of a damaged file goes nowhere; that it is damaged is in an error of ours.
silent_stderr = WhileUsed(_turn_stderr_off, _turn_stderr_on)
