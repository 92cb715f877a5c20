"""A page as a real browser sees it; tests that need one are skipped where there is none."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium")


def in_browser(page: Path, expression: str, *, width: int = 1280) -> Any:
    """Open `page` in a frame of `width` pixels and return what a JavaScript expression says of it.

    Fails if the page writes an error to the console.
    """
    assert BROWSER is not None
    script = f"<script>parent.document.body.dataset.answer = JSON.stringify({expression});</script></body>"
    inner = page.read_text(encoding="utf-8").replace("</body>", script)
    # A frame, for windows are at least 500 pixels wide.
    frame = f'<!doctype html><body><iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{escape(inner)}">'
    probe = page.with_name("probe.html")
    probe.write_text(frame, encoding="utf-8")
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    result = subprocess.run(
        [BROWSER, *words, f"--user-data-dir={page.parent / 'browser'}", probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in result.stderr, result.stderr
    answer = re.search(r'<body data-answer="([^"]*)"', result.stdout)
    assert answer, result.stderr[-500:]
    return json.loads(unescape(answer[1]))
