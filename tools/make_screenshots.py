"""Take the pictures of pages in docs/images, from the folder in which docs/your-own-data.md was followed.

    python tools/make_screenshots.py <folder> docs/images
    python tools/make_screenshots.py <folder> docs/images http://localhost:8000 <image>    # serve.png, from mode=serve

Needs Chromium and Playwright. The parts of the pages with photographs are left out; facades.png has the
predictions of the validation images only.
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
PREDICTION_HEIGHT, GAP = 260, 8  # pixels
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
            take_shot(page, last).save(target / f"{name}.png", optimize=True)


def make_serve_screenshot(address: str, image: Path, target: Path) -> None:
    """Write serve.png, the page of a running mode=serve after it has predicted `image`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--disable-gpu"])
        page = browser.new_page(viewport={"width": 1200, "height": 760})
        page.goto(address)
        page.set_input_files("input[type=file]", image)
        page.wait_for_selector("td.score")
        page.wait_for_timeout(500)  # until the overlay is drawn
        page.screenshot(path=target / "serve.png")


def draw_predictions(source: Path, target: Path) -> None:
    """Write the predictions side by side, from the panels image | label | prediction of the evaluation."""
    predictions = []
    for file in sorted((source / "facades_run" / "eval" / "panels").rglob("*.png")):
        panel = Image.open(file).convert("RGB")
        width = panel.width // 3
        prediction = panel.crop((2 * width, 0, panel.width, panel.height))
        size = (round(PREDICTION_HEIGHT * width / panel.height), PREDICTION_HEIGHT)
        predictions.append(prediction.resize(size, Image.Resampling.NEAREST))
    picture = Image.new("RGB", (sum(one.width + GAP for one in predictions) - GAP, PREDICTION_HEIGHT), "white")
    left = 0
    for prediction in predictions:
        picture.paste(prediction, (left, 0))
        left += prediction.width + GAP
    picture.quantize().save(target / "facades.png", optimize=True)  # few colours, all of which are kept


if __name__ == "__main__":
    folder, images, *served = sys.argv[1:]
    if served:
        make_serve_screenshot(served[0], Path(served[1]), Path(images))
    else:
        make_screenshots(Path(folder), Path(images))
        draw_predictions(Path(folder), Path(images))
