"""Open pages in Debian's Chromium with Playwright; tests that need a browser are skipped without Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, ViewportSize

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or find_spec("playwright") is None,
    reason="needs chromium on the PATH (apt-get install chromium) and the package playwright",
)
FLAGS = [
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
TIMEOUT_MS = 60_000  # for any single wait; a busy machine is slow

Answer = TypeVar("Answer")


class SharedBrowser:
    """One Chromium for all tests of a process.

    Playwright occupies the event loop of the thread that uses it, so the browser has a thread of its own, in which
    `run` calls its argument.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "browser")
        self._open = ExitStack()
        self._browser: Browser | None = None

    def run(self, work: Callable[[Page], Answer], size: ViewportSize, expected_errors: Sequence[str]) -> Answer:
        return self._thread.submit(self._call_with_page, work, size, expected_errors).result()

    def close(self) -> None:
        if self._browser is not None:
            self._thread.submit(self._open.close).result()
            self._browser = None

    def _call_with_page(
        self, work: Callable[[Page], Answer], size: ViewportSize, expected_errors: Sequence[str]
    ) -> Answer:
        if self._browser is None:
            self._browser = self._start()
        errors: list[str] = []
        with self._browser.new_context(viewport=size) as context:
            context.set_default_timeout(TIMEOUT_MS)
            page = context.new_page()
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda message: errors.append(f"{message.type}: {message.text}"))
            answer = work(page)
        unexpected = [error for error in errors if not any(part in error for part in expected_errors)]
        assert not unexpected, unexpected
        return answer

    def _start(self) -> Browser:
        from playwright.sync_api import sync_playwright

        playwright = self._open.enter_context(sync_playwright())
        return self._open.enter_context(playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS))


shared_browser = SharedBrowser()


def run_in_browser(work: Callable[[Page], Answer], *, width: int = 1280, expected_errors: Sequence[str] = ()) -> Answer:
    """Call `work` with an empty page of `width` x 900 pixels.

    Fails if the page raises an error or writes to the console, unless the text has one of `expected_errors` in it.
    """
    return shared_browser.run(work, {"width": width, "height": 900}, expected_errors)


def evaluate_in_browser(file: Path, expression: str, *, width: int = 1280) -> Any:
    """Open an HTML file and return the value of a JavaScript expression."""

    def evaluate(page: Page) -> Any:
        page.goto(file.resolve().as_uri())
        return page.evaluate(expression)

    return run_in_browser(evaluate, width=width)
