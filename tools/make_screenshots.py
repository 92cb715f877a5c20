"""Take the pictures of pages in docs/images, from the folder in which docs/your-own-data.md was followed.

    python tools/make_screenshots.py <folder> docs/images

Needs Chromium and Playwright. The parts of the pages with photographs are left out.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

WIDTH = 1100  # of the window, CSS pixels
SCALE = 0.75
NUM_COLOURS = 200  # of the files, to keep them small
# Name of the picture, page, and the element with which the picture ends.
SHOTS = (
    ("check", "checked/check.html", "#classes"),
    ("report", "facades_run/eval/report.html", ".ranking"),
    ("training", "facades_run/report.html", "#training"),
)


def take_shot(page: Page, last: str) -> Image.Image:
    """The page from its top to the end of the element `last`."""
    box = page.locator(last).first.bounding_box()
    assert box is not None, f"{last} is not on the page"
    area = {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + 16}
    picture = page.screenshot(clip=area, full_page=True)  # pyright: ignore[reportArgumentType]
    return Image.open(io.BytesIO(picture)).convert("RGB")


def make_screenshots(source: Path, target: Path) -> None:
    """Write the pictures of the pages below `source` to `target`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, device_scale_factor=SCALE)
        for name, file, last in SHOTS:
            page.goto((source / file).resolve().as_uri())
            take_shot(page, last).quantize(NUM_COLOURS).save(target / f"{name}.png", optimize=True)


if __name__ == "__main__":
    make_screenshots(Path(sys.argv[1]), Path(sys.argv[2]))
