"""Exports of annotation tools in the layout of each tool, with images of noise. Imports no pytest.

Every export has the same picture of 48 x 64 pixels: a cat of 30 x 20 pixels (width x height), on it a dog of 10 x 8.
Their corners are at whole pixels, so that every rule of drawing gives the same mask.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from semseg.config.schema import DataConfig, ImportConfig
from semseg.data.importing.formats import choose_export
from semseg.data.importing.write import Imported, write_export
from semseg.data.labels import read_label

HEIGHT, WIDTH = 48, 64
CAT, DOG = (10, 5, 30, 20), (15, 8, 10, 8)  # x, y, width, height
NAMES = ["a", "b", "c", "d"]
COLOURS = {"background": (0, 0, 0), "cat": (250, 50, 83), "dog: small": (51, 221, 255)}


def expected(cat: int = 1, dog: int = 2, other: int = 3) -> NDArray[np.uint8]:
    """The ids of the mask that every export gives."""
    label = np.full((HEIGHT, WIDTH), other, np.uint8)
    for (x, y, width, height), number in ((CAT, cat), (DOG, dog)):
        label[y : y + height, x : x + width] = number
    return label


def corners(box: tuple[int, int, int, int]) -> list[list[float]]:
    x, y, width, height = map(float, box)
    return [[x, y], [x + width, y], [x + width, y + height], [x, y + height]]


def flat(box: tuple[int, int, int, int]) -> list[float]:
    return [number for corner in corners(box) for number in corner]


def photo(name: str = "a", size: tuple[int, int] = (HEIGHT, WIDTH), orientation: int = 1) -> bytes:
    """A JPEG of noise; it differs for every name."""
    pixels = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (*size, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", exif=exif)
    return stream.getvalue()


def put(path: Path, content: bytes | str | Any) -> Path:
    """Write bytes, text, a picture or JSON to a file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
        content.save(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def png(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


# ---- one function for each tool


def write_coco(root: Path, names: list[str] = NAMES, **changes: Any) -> Path:
    """As CVAT writes COCO 1.0: images/ and annotations/instances_default.json. The ids of categories have gaps."""
    content: dict[str, Any] = {"info": {}, "licenses": [], "images": [], "annotations": []}
    content["categories"] = [{"id": 90, "name": "dog", "supercategory": ""}, {"id": 3, "name": "cat"}]
    for number, name in enumerate(names, start=1):
        put(root / "images" / f"{name}.jpg", photo(name))
        image = {"id": number, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH}
        content["images"].append(image)
        for category, box in ((90, DOG), (3, CAT)):  # the dog comes first, and is on top because it is smaller
            entry = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
            entry |= {"segmentation": [flat(box)], "area": 1.0, "bbox": list(box)}
            content["annotations"].append(entry)
    return put(root / "annotations" / "instances_default.json", content | changes)


def write_yolo(root: Path, names: list[str] = NAMES) -> Path:
    """As Roboflow writes YOLO: train/ and valid/ with images and labels, and paths with ../."""
    for position, name in enumerate(names):
        folder = root / ("valid" if position == 0 else "train")
        put(folder / "images" / f"{name}.jpg", photo(name))
        boxes = [
            [number / side for number, side in zip(flat(box), [WIDTH, HEIGHT] * 4, strict=True)] for box in (CAT, DOG)
        ]
        lines = [" ".join(map(str, [index, *box])) for index, box in enumerate(boxes)]
        put(folder / "labels" / f"{name}.txt", "\n".join(lines) + "\n")
    content = {"train": "../train/images", "val": "../valid/images", "nc": 2, "names": ["cat", "dog"]}
    return put(root / "data.yaml", yaml.safe_dump(content))


def write_voc(root: Path, names: list[str] = NAMES, *, with_images: bool = True, palette: bool = False) -> Path:
    """As CVAT writes "Segmentation mask 1.1"."""
    label_map = "# label:color_rgb:parts:actions\n"
    label_map += "".join(f"{name}:{','.join(map(str, colour))}::\n" for name, colour in COLOURS.items())
    indices = expected(1, 2, 0)
    colours = np.array(list(COLOURS.values()), np.uint8)
    for name in names:
        picture = Image.fromarray(colours[indices])
        if palette:  # other tools number the palette as they like
            picture = Image.fromarray(np.array([5, 9, 7], np.uint8)[indices], "P")
            table = np.zeros((256, 3), np.uint8)
            table[[5, 9, 7]] = colours
            picture.putpalette(table.tobytes())
        put(root / "SegmentationClass" / f"{name}.png", picture)
        put(root / "SegmentationObject" / f"{name}.png", picture)
        if with_images:
            put(root / "JPEGImages" / f"{name}.jpg", photo(name))
    put(root / "ImageSets" / "Segmentation" / "default.txt", "\n".join(names) + "\n")
    return put(root / "labelmap.txt", label_map)


def labelme_shape(
    label: str, points: Sequence[Sequence[float]], kind: str | None = "polygon", **more: Any
) -> dict[str, Any]:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}, **more}


def labelme_content(name: str, shapes: list[dict[str, Any]], data: str | None = None) -> dict[str, Any]:
    return {
        "version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"..\\photos\\{name}.jpg", "imageData": data,
        "imageHeight": HEIGHT, "imageWidth": WIDTH,
    }  # fmt: skip


def write_labelme(root: Path, names: list[str] = NAMES) -> Path:
    """A JSON file beside each image; the path in it is of another folder and written on Windows."""
    for name in names:
        put(root / f"{name}.jpg", photo(name))
        shapes = [
            labelme_shape("cat", corners(CAT)),
            labelme_shape("dog", [corners(DOG)[2], corners(DOG)[0]], "rectangle"),
        ]
        put(root / f"{name}.json", labelme_content(name, shapes))
    return root / f"{names[0]}.json"


def studio_region(label: str, kind: str, value: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "id": f"r{len(str(value))}", "type": f"{kind}labels", "from_name": kind, "to_name": "image",
        "original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0,
        "value": {**value, f"{kind}labels": [label]}, **more,
    }  # fmt: skip


def percent(box: tuple[int, int, int, int]) -> list[list[float]]:
    return [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in corners(box)]


def studio_task(number: int, image: str, results: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    annotation = {"id": number, "result": results, "was_cancelled": False, "created_at": "2026-11-01T10:00:00Z", **more}
    return {"id": number, "data": {"image": image}, "annotations": [annotation], "predictions": []}


def write_label_studio(root: Path, names: list[str] = NAMES) -> Path:
    """As Label Studio writes JSON, with the folder of its uploads."""
    tasks = []
    for number, name in enumerate(names, start=1):
        put(root / "upload" / f"0a1b2c3d-{name}.jpg", photo(name))
        results = [
            studio_region("cat", "polygon", {"points": percent(CAT), "closed": True}),
            studio_region(
                "dog", "rectangle",
                {"x": 100 * DOG[0] / WIDTH, "y": 100 * DOG[1] / HEIGHT, "width": 100 * DOG[2] / WIDTH,
                 "height": 100 * DOG[3] / HEIGHT, "rotation": 0},
            ),
        ]  # fmt: skip
        tasks.append(studio_task(number, f"/data/upload/1/0a1b2c3d-{name}.jpg", results))
    return put(root / "project-1-at-2026-11-29.json", tasks)


def write_roboflow(root: Path, names: list[str] = NAMES) -> Path:
    """As Roboflow writes "Semantic Segmentation Masks", with two copies of one photograph in train."""
    for position, name in enumerate(names):
        folder = root / ("valid" if position == 0 else "train")
        for copy in ("11aa", "22bb")[: 1 + (position == 1)]:
            stem = f"{name}_jpg.rf.{copy}"
            put(folder / f"{stem}.jpg", photo(f"{name}{copy}"))
            put(folder / f"{stem}_mask.png", png(expected(1, 2, 0)))
    for folder in ("train", "valid"):
        put(root / folder / "_classes.csv", "\ufeffPixel Value, Class\n0, background\n1, cat\n2, dog\n")
    return root / "train" / "_classes.csv"


WRITERS = {
    "coco": write_coco,
    "yolo": write_yolo,
    "voc": write_voc,
    "labelme": write_labelme,
    "label_studio": write_label_studio,
    "roboflow": write_roboflow,
}


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def import_here(root: Path, output: Path, *words: str) -> Imported:
    """Import an export in this process; keys of `import` and `data` as on the command line, but composed in no time."""
    options, data = ImportConfig(), DataConfig()
    for word in words:
        key, _, value = word.partition("=")
        section, _, name = key.partition(".")
        target: Any = {"import": options, "data": data}[section]
        old = getattr(target, name)
        setattr(target, name, value == "true" if isinstance(old, bool) else type(old or "")(value))
    export = choose_export(root, options.format).read(options)
    return write_export(export, output, options, data)


def masks_of(output: Path) -> dict[str, NDArray[np.integer]]:
    """The masks of an imported folder by the stem of their path."""
    paths = sorted((output / "masks").rglob("*.png"))
    return {path.relative_to(output / "masks").with_suffix("").as_posix(): read_label(path) for path in paths}
