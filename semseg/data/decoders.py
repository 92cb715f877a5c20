"""Process-wide settings of image decoders: Pillow's limit of pixels, and what libtiff prints on standard error."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

from PIL import Image

State = TypeVar("State")


class ProcessWideChange(Generic[State]):
    """A context that changes state of the whole process for as long as any thread is in it.

    Args:
        change: makes the change and returns the previous state.
        restore: restores that state.
    """

    def __init__(self, change: Callable[[], State], restore: Callable[[State], None]) -> None:
        self._change, self._restore = change, restore
        self._lock, self._users = Lock(), 0
        self._before: list[State] = []
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._restore_in_child
            )

    def _restore_in_child(self) -> None:
        """Restore the state in a forked child, which has none of the parent's threads."""
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


def _remove_pixel_limit() -> int | None:
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    return before


def _restore_pixel_limit(before: int | None) -> None:
    Image.MAX_IMAGE_PIXELS = before


def _mute_stderr() -> int | None:
    try:
        saved = os.dup(2)
    except OSError:  # standard error is closed
        return None
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    return saved


def _unmute_stderr(saved: int | None) -> None:
    if saved is not None:
        os.dup2(saved, 2)
        os.close(saved)


# While a header is read, Pillow's limit of pixels is off; data.max_pixels is checked right after it.
pillow_without_limit = ProcessWideChange(_remove_pixel_limit, _restore_pixel_limit)

# Hides what libtiff and FFmpeg print about a damaged file, which our own error reports.
silent_stderr = ProcessWideChange(_mute_stderr, _unmute_stderr)
