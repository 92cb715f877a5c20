"""Predictions for annotation tools: COCO JSON and Label Studio JSON, to correct instead of to draw."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
from numpy.typing import NDArray

from semseg.data.brush_runs import encode_brush
from semseg.data.classes import ClassTable, is_background
from semseg.data.geometry import Size
from semseg.data.label_map import LabelMap
from semseg.data.regions import Patch, encode_patch_runs, encode_text, trace_rings
from semseg.storage.atomic import atomic_write

COCO_FILE, LABEL_STUDIO_FILE, LABEL_STUDIO_CONFIG = "coco.json", "label_studio.json", "label_studio.xml"
DEFAULT_TOLERANCE = 1.0  # pixels
MAX_REGIONS = 500  # of a class in an image; the smaller ones become one region


class Region(NamedTuple):
    """Connected pixels of a class in an image."""

    class_index: int
    patch: Patch
    ring: NDArray[np.int64] | None  # (n, 2) corners x, y; None: it has holes, and no polygon shows it
    is_rest: bool = False  # whether it holds all regions of the class that are too small to be listed


def find_regions(ids: NDArray[np.integer], classes: ClassTable, tolerance: float) -> Iterator[Region]:
    """The regions of a class map (H, W), of each class the largest first.

    Those of the background, and pixels that are not scored (-1), are left out.

    Args:
        tolerance: how far a polygon may lie from the corners of the region's pixels, in pixels.
    """
    for class_index in np.unique(ids).tolist():
        if class_index < 0 or is_background(classes.names[class_index]):
            continue
        mask = (ids == class_index).astype(np.uint8)
        count, numbers, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
        by_area = sorted(range(1, count), key=lambda number: (-int(stats[number, cv2.CC_STAT_AREA]), number))
        for number in by_area[:MAX_REGIONS]:
            left, top, width, height = stats[number, :4].tolist()
            patch = Patch(top, left, numbers[top : top + height, left : left + width] == number)
            rings = trace_rings(patch.mask)
            yield Region(class_index, patch, simplify(rings[0] + (left, top), tolerance) if len(rings) == 1 else None)
        if by_area[MAX_REGIONS:]:
            is_rest = np.isin(numbers, by_area[MAX_REGIONS:])
            yield Region(class_index, Patch(0, 0, is_rest), None, is_rest=True)


def simplify(ring: NDArray[np.int64], tolerance: float) -> NDArray[np.int64]:
    """A ring with fewer corners, all of them corners of `ring`, which is nowhere farther away than `tolerance`."""
    if not tolerance:
        return ring
    simpler = cv2.approxPolyDP(ring.astype(np.int32)[:, None], tolerance, closed=True)[:, 0].astype(np.int64)
    return simpler if len(simpler) >= 3 else ring


class AnnotationSettings(NamedTuple):
    """How predictions are written for annotation tools."""

    tolerance: float = DEFAULT_TOLERANCE  # predict.polygon_tolerance
    prefix: str = ""  # predict.image_prefix


class CocoFile:
    """Writes COCO JSON, one image after the other; nothing but names and sizes of images is kept in memory."""

    def __init__(self, file: IO[str], classes: ClassTable, label_map: LabelMap, settings: AnnotationSettings) -> None:
        self.file, self.classes, self.settings = file, classes, settings
        self.ids = label_map.class_ids
        self.images: list[dict[str, Any]] = []
        self.count = 0
        rows = zip(self.ids, classes.names, strict=True)
        categories = [{"id": number, "name": name} for number, name in rows if not is_background(name)]
        file.write(f'{{"categories": {json.dumps(categories, ensure_ascii=False)},\n"annotations": [')

    def add(self, name: str, ids: NDArray[np.integer]) -> None:
        """Add the class map (H, W) of an image."""
        size = Size(*ids.shape)
        number = len(self.images) + 1
        image = {"id": number, "file_name": self.settings.prefix + name, "height": size.height, "width": size.width}
        self.images.append(image)
        for region in find_regions(ids, self.classes, self.settings.tolerance):
            self.count += 1
            entry = self.describe(region, size) | {"id": self.count, "image_id": number}
            self.file.write(f"{',' if self.count > 1 else ''}\n{json.dumps(entry)}")

    def describe(self, region: Region, size: Size) -> dict[str, Any]:
        """The annotation of a region: a polygon, or run lengths where it has holes."""
        (top, left, mask), ring = region.patch, region.ring
        if ring is None:
            counts = encode_text(encode_patch_runs(region.patch, size))
            segmentation: Any = {"size": list(size), "counts": counts}
        else:
            segmentation = [ring.ravel().tolist()]
        return {
            "category_id": self.ids[region.class_index],
            "segmentation": segmentation,
            "area": region.patch.area,
            "bbox": [left, top, mask.shape[1], mask.shape[0]],
            "iscrowd": int(region.is_rest),
        }

    def finish(self) -> None:
        self.file.write(f'\n],\n"images": {json.dumps(self.images, ensure_ascii=False)}}}\n')


class LabelStudioFile:
    """Writes Label Studio JSON: tasks with predictions."""

    def __init__(self, file: IO[str], classes: ClassTable, label_map: LabelMap, settings: AnnotationSettings) -> None:
        self.file, self.classes, self.settings = file, classes, settings
        self.count = 0
        file.write("[")

    def add(self, name: str, ids: NDArray[np.integer]) -> None:
        """Add the class map (H, W) of an image."""
        size = Size(*ids.shape)
        regions = find_regions(ids, self.classes, self.settings.tolerance)
        results = [self.describe(region, size, f"r{number}") for number, region in enumerate(regions, start=1)]
        task = {
            "data": {"image": self.address(name)},
            "predictions": [{"model_version": "semseg", "result": results}],
        }
        self.file.write(f"{',' if self.count else ''}\n{json.dumps(task, ensure_ascii=False)}")
        self.count += 1

    def address(self, name: str) -> str:
        """Where Label Studio finds an image: its name behind the prefix, encoded if that makes an address of it."""
        prefix = self.settings.prefix
        return prefix + (quote(name) if "://" in prefix or "?" in prefix else name)

    def describe(self, region: Region, size: Size, name: str) -> dict[str, Any]:
        """The result for a region: a polygon in percent, or a brush where it has holes."""
        label = [self.classes.names[region.class_index]]
        kind = "polygon" if region.ring is not None else "brush"
        if region.ring is not None:
            points = (region.ring * (100 / size.width, 100 / size.height)).tolist()
            value: dict[str, Any] = {"points": points, "closed": True, "polygonlabels": label}
        else:
            (top, left, mask), whole = region.patch, np.zeros(size, np.bool_)
            whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
            value = {"format": "rle", "rle": encode_brush(whole), "brushlabels": label}
        return {
            "id": name, "type": f"{kind}labels", "from_name": kind, "to_name": "image",
            "original_width": size.width, "original_height": size.height, "image_rotation": 0, "value": value,
        }  # fmt: skip

    def finish(self) -> None:
        self.file.write("\n]\n")


AnnotationFile = CocoFile | LabelStudioFile
ANNOTATION_FILES: dict[str, tuple[str, Callable[..., AnnotationFile]]] = {
    "coco": (COCO_FILE, CocoFile),
    "label_studio": (LABEL_STUDIO_FILE, LabelStudioFile),
}  # output -> name of its file, and its writer


class AnnotationFiles:
    """The files for annotation tools of several images, which appear on exit unless there was an error.

    Args:
        outputs: names as in predict.save; those that are not for annotation tools are left out.
    """

    def __init__(
        self,
        folder: Path,
        outputs: Sequence[str],
        classes: ClassTable,
        label_map: LabelMap,
        settings: AnnotationSettings,
    ) -> None:
        self.folder, self.classes, self.label_map, self.settings = folder, classes, label_map, settings
        self.outputs = [output for output in outputs if output in ANNOTATION_FILES]
        self._writers: list[AnnotationFile] = []
        self._stack = ExitStack()

    def __enter__(self) -> AnnotationFiles:
        with ExitStack() as stack:
            for output in self.outputs:
                name, create = ANNOTATION_FILES[output]
                temporary = stack.enter_context(atomic_write(self.folder / name))
                file = stack.enter_context(temporary.open("w", encoding="utf-8"))
                self._writers.append(create(file, self.classes, self.label_map, self.settings))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if error is not None:
                raise error
            for writer in self._writers:
                writer.finish()
        config = self.folder / LABEL_STUDIO_CONFIG
        if "label_studio" in self.outputs and not config.exists():  # else it has the same classes, and may be edited
            write_label_studio_config(config, self.classes)

    def add(self, name: str, ids: NDArray[np.integer]) -> None:
        """Add the class map (H, W) of an image."""
        for writer in self._writers:
            writer.add(name, ids)


def write_label_studio_config(path: Path, classes: ClassTable) -> None:
    """The labelling interface for Label Studio, with the names that the results refer to."""
    rows = zip(classes.names, classes.palette, strict=True)
    labels = [
        f"    <Label value={quoteattr(name)} background={quoteattr('#{:02x}{:02x}{:02x}'.format(*colour))}/>\n"
        for name, colour in rows
        if not is_background(name)
    ]
    tags = "".join(
        f'  <{tag} name="{name}" toName="image">\n{"".join(labels)}  </{tag}>\n'
        for tag, name in (("PolygonLabels", "polygon"), ("BrushLabels", "brush"))
    )
    with atomic_write(path) as temporary:
        temporary.write_text(f'<View>\n  <Image name="image" value="$image"/>\n{tags}</View>\n', encoding="utf-8")


def write_annotations(
    output: str, path: Path, ids: NDArray[np.integer], *, name: str, classes: ClassTable, label_map: LabelMap
) -> Path:
    """Write the file for an annotation tool of one image.

    Args:
        name: of the image.
    """
    create = ANNOTATION_FILES[output][1]
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        writer = create(file, classes, label_map, AnnotationSettings())
        writer.add(name, ids)
        writer.finish()
    return path
