"""Label Studio JSON: a list of tasks with polygons and boxes in percent, and brushes as run lengths of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np

from semseg.config.schema import ImportConfig
from semseg.data import store
from semseg.data.folders import IMAGE_SUFFIXES
from semseg.data.geometry import Size
from semseg.data.importing.files import (
    EntryError,
    describe_entry,
    find_split,
    get,
    get_or,
    list_json_files,
    read_json_file,
)
from semseg.data.importing.image_finder import ImageFinder
from semseg.data.importing.model import (
    AnnotatedImage,
    Annotation,
    BrushRuns,
    Ellipse,
    Export,
    Polygon,
    Shape,
    make_ring,
)
from semseg.data.records import Problem
from semseg.errors import DataError
from semseg.system.text import format_quantity, format_subject

UPLOAD_PREFIX = re.compile(r"[0-9a-f]{8}-")  # before the names of uploaded files
REGIONS = ("polygon", "brush", "rectangle", "ellipse")
SHAPES_WITHOUT_AREA = ("keypoint",)
ANSWERS = ("choices", "datetime", "number", "rating", "taxonomy", "textarea")  # about a region, whose id they have
NUM_ELLIPSE_POINTS = 720


def find_label_studio_files(files: Sequence[Path]) -> list[Path]:
    """The exports of Label Studio among JSON files; JSON-MIN, which cannot be imported, counts."""
    return list_json_files(files, b"[", holds_tasks)


def holds_tasks(content: bytes) -> bool:
    """Whether the text of a list is one of tasks."""
    has_tasks = b'"data"' in content and any(key in content for key in (b'"annotations"', b'"completions"'))
    return has_tasks or b'"original_width"' in content


class Task(NamedTuple):
    """A task and the annotation of it that is used."""

    content: Any
    results: list[Any]
    origin: str


def read_label_studio(root: Path, files: Sequence[Path], finder: ImageFinder, options: ImportConfig) -> Export:
    """All tasks with an annotation; the classes are the labels that occur, sorted.

    Raises:
        DataError: if a file is not a list of tasks, or nothing is annotated.
    """
    reader = LabelStudioReader(finder)
    items: list[AnnotatedImage | Problem] = []
    tasks: list[tuple[Task, str]] = []
    for path in files:
        split = find_split(*path.relative_to(root).with_suffix("").parts)
        for task in reader.list_tasks(path):
            if isinstance(task, Problem):
                items.append(task)
            else:
                tasks.append((task, split))
    names = sorted({label for task, _ in tasks for label in find_labels(task.results)})
    index_of = {name: index for index, name in enumerate(names)}
    for task, split in tasks:
        try:
            items.append(reader.read_task(task, split, index_of))
        except EntryError as error:
            items.append(Problem(f"{task.origin}: {error}."))
    if not names and not any(isinstance(item, Problem) for item in items):  # regions of a kind that cannot be read
        raise DataError(f"{files[0]}: no task has a region with a label. Annotate the images first.")
    return Export("Label Studio", tuple(names), None, items, tuple(reader.describe()))


def find_labels(results: Sequence[Any]) -> Iterator[str]:
    """The labels of the regions of an annotation, one of each region."""
    for result in results:
        is_of_region = isinstance(result, dict) and result.get("type") == "labels"
        label = find_first(result, "labels") if is_of_region else find_label(result, {})
        if label is not None:
            yield label


def find_label(result: Any, by_id: dict[Any, str]) -> str | None:
    """The label of a region: its own, or that of the result `labels` with the same id."""
    if not isinstance(result, dict) or not isinstance(result.get("type"), str):
        return None
    kind = result["type"].removesuffix("labels")
    if kind not in REGIONS:
        return None
    key = result.get("id")
    return find_first(result, f"{kind}labels") or (by_id.get(key) if isinstance(key, str) else None)


def find_first(result: Any, key: str) -> str | None:
    """The first label of a result."""
    value = result.get("value")
    labels = value.get(key) if isinstance(value, dict) else None
    is_text = isinstance(labels, list) and labels and isinstance(labels[0], str) and labels[0]
    return labels[0] if is_text and store.is_utf8(labels[0]) else None  # pyright: ignore[reportOptionalSubscript]


class LabelStudioReader:
    """Reads tasks of Label Studio, and counts what was decided."""

    def __init__(self, finder: ImageFinder) -> None:
        self.finder = finder
        self.num_open, self.num_several, self.num_other, self.num_labels = 0, 0, 0, 0

    def list_tasks(self, path: Path) -> Iterator[Task | Problem]:
        """The tasks of a file that are annotated.

        Raises:
            DataError: if the file is no list of tasks.
        """
        content = read_json_file(path)
        if not isinstance(content, list):
            raise DataError(f"{path}: must be a list of tasks. Export it from Label Studio as JSON.")
        for position, task in enumerate(content):
            origin = f"{path}: task {describe_entry(task, 'id', position)}"
            if isinstance(task, dict) and not {"annotations", "completions"} & set(task):
                if "predictions" in task:
                    raise DataError(
                        f"{origin}: has predictions only, which nobody has accepted. Accept them in Label Studio, and "
                        "export its annotations as JSON."
                    )
                raise DataError(
                    f"{origin}: has no annotations: this may be JSON-MIN. Export it from Label Studio as JSON."
                )
            try:
                results = self.choose_annotation(task)
            except EntryError as error:
                yield Problem(f"{origin}: {error}.")
                continue
            data = task["data"] if isinstance(task.get("data"), dict) else {}
            self.finder.expect([choose_image_name(data, results or []) or ""])
            if results is None:
                self.num_open += 1
            else:
                yield Task(task, results, origin)

    def choose_annotation(self, task: Any) -> list[Any] | None:
        """The results of the newest annotation that is not cancelled; None if there is none.

        Raises:
            EntryError: if they are wrong.
        """
        key = "completions" if isinstance(task, dict) and "annotations" not in task else "annotations"
        valid = [each for each in get(task, key, list) if not (isinstance(each, dict) and each.get("was_cancelled"))]
        if not valid:
            return None
        self.num_several += len(valid) > 1
        newest = max(enumerate(valid), key=lambda each: (describe_time(each[1]), each[0]))[1]
        return get(newest, "result", list)

    def read_task(self, task: Task, split: str, index_of: dict[str, int]) -> AnnotatedImage:
        """The image of a task with its annotations.

        Raises:
            EntryError: if it, or one of its regions, cannot be read.
        """
        path = self.find_image(choose_image_name(get(task.content, "data", dict), task.results))
        by_id = {
            result["id"]: label
            for result in task.results
            if isinstance(result, dict) and result.get("type") == "labels" and isinstance(result.get("id"), str)
            if (label := find_first(result, "labels"))
        }
        named = (each.get("to_name") for each in task.results if find_label(each, by_id) is not None)
        pictures = {name: None for name in named if isinstance(name, str)}
        if len(pictures) > 1:
            raise EntryError(
                f"has regions in {len(pictures)} pictures ({', '.join(pictures)}). Make a task of each, and annotate it"
            )
        annotations, size = [], None
        for position, result in enumerate(task.results):
            name = f"region {describe_entry(result, 'id', position)}"
            try:
                kind = get(result, "type", str).removesuffix("labels")
                label = find_label(result, by_id)
                if label is None:
                    self.refuse_other_region(kind, result, by_id)
                    self.num_other += kind != ""
                    continue
                own = Size(get(result, "original_height", int), get(result, "original_width", int))
                if min(own) < 1 or (size or own) != own:
                    raise EntryError(f"has the original size {own}, another region {size or 'none'}")
                size = own
                if get_or(result, "image_rotation", float, 0.0) % 360:
                    raise EntryError("belongs to a picture that was rotated in Label Studio, which is not supported")
                value = get(result, "value", dict)
                self.num_labels += len(value.get(f"{kind}labels") or ()) > 1
                shape = READ_REGION[kind](value, own)
            except (EntryError, ValueError) as error:
                raise EntryError(f"{name}: {error}") from None
            annotations.append(Annotation(index_of[label], (shape,), name))
        return AnnotatedImage(str(path), self.finder.relative(path), split, size, task.origin, tuple(annotations))

    def refuse_other_region(self, kind: str, result: Any, by_id: dict[Any, str]) -> None:
        """Refuse a labelled area of a kind that cannot be read, which would become background.

        Only areas have the size of the picture; labels of text and sound do not.

        Raises:
            EntryError: naming the kind.
        """
        if kind in ("", *REGIONS, *SHAPES_WITHOUT_AREA, *ANSWERS) or "original_width" not in result:
            return
        if find_first(result, f"{kind}labels") or result.get("id") in by_id:
            kinds = ", ".join(f"{each}labels" for each in REGIONS)
            raise EntryError(f"is of the type {kind}labels, which cannot be read. Draw it again as one of {kinds}")

    def find_image(self, name: str | None) -> Path:
        """The image of a task, with or without the eight digits that Label Studio puts before uploaded names.

        Raises:
            EntryError: if there is none, or both names exist.
        """
        if name is None:
            raise EntryError("has no image in data")
        folder, _, last = name.rpartition("/")
        plain = UPLOAD_PREFIX.sub("", last, count=1) if UPLOAD_PREFIX.match(last) else last
        names = dict.fromkeys([name, f"{folder}/{plain}".lstrip("/")])
        found, errors = dict[Path, None](), []
        for each in names:
            try:
                found[self.finder.find(each)] = None
            except EntryError as error:
                errors.append(error)
        if len(found) > 1:
            raise EntryError(f"its image may be {' or '.join(map(str, found))}. Remove one of them")
        if not found:
            raise errors[0]
        return next(iter(found))

    def describe(self) -> Iterator[str]:
        """Sentences about what was decided."""
        if self.num_open:
            yield f"{format_subject(self.num_open, 'task has', 'tasks have')} no annotation: left out."
        if self.num_several:
            several = format_subject(self.num_several, "task has", "tasks have")
            yield f"{several} several annotations: the newest is used."
        if self.num_labels:
            yield f"{format_subject(self.num_labels, 'region has', 'regions have')} several labels: the first is used."
        if self.num_other:
            yield f"{format_quantity(self.num_other, 'result')} without an area or a label: left out."


def describe_time(annotation: Any) -> str:
    """When an annotation was changed, as text that sorts by time."""
    times = [annotation.get(key) for key in ("updated_at", "created_at")] if isinstance(annotation, dict) else []
    return next((time for time in times if isinstance(time, str)), "")


def choose_image_name(data: dict[str, Any], results: Sequence[Any]) -> str | None:
    """The path of the image in the data of a task; None if there is none.

    A task may have a preview, too. The key of the image is often, not always, the name of its tag.
    """
    targets = {str(result.get("to_name")) for result in results if isinstance(result, dict)}
    values = (data[key] for key in sorted(data, key=lambda key: key not in targets))
    named = (find_image_name(value) for value in values if isinstance(value, str))
    return next((name for name in named if name), None)


def find_image_name(value: str) -> str | None:
    """The path of an image in a value of a task, a path, an address, or /data/local-files/?d=<path>; None for others.

    >>> find_image_name("/data/local-files/?d=photos/a%20b.jpg"), find_image_name("s3://bucket/a.png")
    ('photos/a b.jpg', 'bucket/a.png')
    """
    if "?d=" in value:
        path = unquote(value.partition("?d=")[2].partition("&")[0])
    elif "://" in value:
        try:
            address = urlsplit(value)
        except ValueError:
            return None
        path = unquote(f"{address.netloc}{address.path}")
    else:
        path = value
    path = path.replace("\\", "/")
    return path if any(path.lower().endswith(suffix) for suffix in IMAGE_SUFFIXES) else None


# ---- regions


def read_polygon(value: dict[str, Any], size: Size) -> Shape:
    points = make_ring(get(value, "points", list))
    return Polygon((points * (size.width / 100, size.height / 100),))


def read_brush(value: dict[str, Any], size: Size) -> Shape:
    if value.get("format") != "rle":
        raise EntryError(f"has a brush in the format {value.get('format')!r:.40}, only rle is supported")
    data = get(value, "rle", list)
    if not all(type(each) is int and 0 <= each <= 255 for each in data):
        raise EntryError("rle must be a list of numbers from 0 to 255")
    return BrushRuns(bytes(data), size)


def read_rectangle(value: dict[str, Any], size: Size) -> Shape:
    x, y, width, height = (get(value, key, float) for key in ("x", "y", "width", "height"))
    sides = np.array([[0, 0], [width, 0], [width, height], [0, height]]) * (size.width / 100, size.height / 100)
    corner = np.array([x * size.width / 100, y * size.height / 100])
    return Polygon((corner + rotate(sides, get_or(value, "rotation", float, 0.0)),))


def read_ellipse(value: dict[str, Any], size: Size) -> Shape:
    x, radius_x = (get(value, key, float) * size.width / 100 for key in ("x", "radiusX"))
    y, radius_y = (get(value, key, float) * size.height / 100 for key in ("y", "radiusY"))
    rotation = get_or(value, "rotation", float, 0.0)
    if not rotation % 180:
        return Ellipse(x, y, radius_x, radius_y)
    angles = np.linspace(0, 2 * np.pi, NUM_ELLIPSE_POINTS, endpoint=False)
    outline = np.stack([radius_x * np.cos(angles), radius_y * np.sin(angles)], axis=1)
    return Polygon((np.array([x, y]) + rotate(outline, rotation),))


def rotate(points: np.ndarray, degrees: float) -> np.ndarray:
    """Points (n, 2) rotated clockwise, as y points down: in pixels, and not in percent."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return points @ np.array([[cosine, sine], [-sine, cosine]])


READ_REGION = {"polygon": read_polygon, "brush": read_brush, "rectangle": read_rectangle, "ellipse": read_ellipse}
