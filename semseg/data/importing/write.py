"""Write an export as a data set: masks, classes, lists, a description, and images by reference."""

from __future__ import annotations

import csv
import posixpath
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray

from semseg.config.overrides import DESCRIPTION_FILE
from semseg.config.schema import SPLITS, DataConfig, ImportConfig
from semseg.data import store
from semseg.data.classes import BACKGROUND, is_background
from semseg.data.importing.draw import Drawing, draw_label
from semseg.data.importing.model import UNLABELLED, AnnotatedImage, Export
from semseg.data.label_map import IGNORED, MAX_CLASSES
from semseg.data.palette import Colour, generated_palette
from semseg.data.records import Problem, separate_problems
from semseg.errors import ConfigError, DataError
from semseg.storage.atomic import name_file_in_errors
from semseg.storage.new_folder import create_folder
from semseg.system.processors import count_processors
from semseg.system.text import escape_csv_cell, escape_unprintable, format_quantity, format_subject

NOT_SCORED = 0  # id in the masks; class index i has the id i + 1
MAX_SHOWN = 5  # problems in a message


class ImportedImage(NamedTuple):
    """An image of the new data set."""

    image: str  # path in the folder
    mask: str
    split: str  # train, val or test
    pixels: dict[int, int]  # class index, IGNORED or UNLABELLED -> number of pixels
    is_rotated: bool
    is_assumed: bool
    lost: tuple[str, ...]  # annotations of which no pixel is in the image


class Imported(NamedTuple):
    """What was written."""

    title: str
    images: list[ImportedImage]
    names: tuple[str, ...]  # of the classes
    problems: list[str]  # of the images that are left out
    num_empty: int  # images that are left out because nothing is annotated in them
    unlabelled: int  # pixels nobody annotated, in `images`
    background: int | None  # class index of these pixels; None: they are ignored
    notes: tuple[str, ...]


def write_export(
    export: Export,
    output: Path,
    options: ImportConfig,
    data: DataConfig,
    *,
    track: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, count: items,
    add_examples: Callable[[Path, Imported], None] = lambda folder, imported: None,
) -> Imported:
    """Draw and write all images of an export to a new folder.

    Args:
        data: data.on_bad decides what becomes of images that cannot be read; data.max_pixels limits their size.
        track: wraps the images to show progress, with their number.
        add_examples: adds files to the folder before it appears.

    Raises:
        DataError: if images cannot be read, or none is left. The folder does not exist then.
        ConfigError: if the folder exists, or there are too many or too few classes.
    """
    items, found = separate_problems(export.items)
    items, repeated, repeated_notes = drop_repeated_images(items)
    problems = [problem.message for problem in (*found, *repeated)]
    background = find_background(export.names) if options.unlabelled == "background" else None
    if len(export.names) + (background is not None) > MAX_CLASSES:
        raise DataError(f"{export.title}: has {len(export.names)} classes; at most {MAX_CLASSES} are possible.")
    writer = FolderWriter(export, options, data.max_pixels, background)
    with create_folder(output, "output") as folder:
        images: list[ImportedImage] = []
        written: list[AnnotatedImage] = []
        num_empty = 0
        with ThreadPoolExecutor(count_processors()) as pool:
            jobs = [pool.submit(writer.write_image, folder, *job) for job in writer.name_files(items)]
            try:
                for item, job in zip(items, track(jobs, len(jobs)), strict=True):
                    result = job.result()
                    if isinstance(result, ImportedImage):
                        images.append(result)
                        written.append(item)
                    elif result:
                        problems.append(result)
                    else:
                        num_empty += 1
            finally:
                pool.shutdown(cancel_futures=True)
        check_problems(problems, len(export.items), data)
        if not images:
            reason = "nothing is annotated in its images" if num_empty else "it names no images"
            raise DataError(f"{export.title}: no image is left: {reason}.")
        unlabelled = sum(image.pixels.get(UNLABELLED, 0) for image in images)
        names = list(export.names)
        if background == len(names) and unlabelled:
            names.append(BACKGROUND)
        if len(names) < 2:
            advice = "With import.unlabelled=background, pixels nobody annotated are one."
            if background == len(export.names):
                advice = "Every pixel is annotated as it: annotate another one."
            raise DataError(
                f"{export.title}: {names[0] if names else 'no class'} is the only class, and a network needs two. "
                f"{advice}"
            )
        write_class_table(folder / "classes.csv", names, export.palette)
        splits = [split for split in SPLITS if any(image.split == split for image in images)]
        for split in splits:
            write_list(folder / f"{split}.csv", [image for image in images if image.split == split])
        is_rotated = any(image.is_rotated for image in images)
        write_settings(folder / DESCRIPTION_FILE, output, export, splits, is_rotated=is_rotated)
        odd = [*describe_odd_classes(export, written, images), *describe_lost_annotations(images)]
        title, notes = export.title, (*export.notes, *repeated_notes, *odd)
        imported = Imported(title, images, tuple(names), problems, num_empty, unlabelled, background, notes)
        add_examples(folder, imported)
    return imported


def drop_repeated_images(items: Sequence[AnnotatedImage]) -> tuple[list[AnnotatedImage], list[Problem], list[str]]:
    """Each image once, problems for images that are annotated twice, and a note about those that are only listed twice.

    An image of several splits belongs to the one that names it first.
    """
    first_of: dict[str, AnnotatedImage] = {}
    kept, problems, listed_again = [], list[Problem](), list[AnnotatedImage]()
    for item in items:
        first = item if item.content is not None else first_of.setdefault(item.path, item)
        if first is item:
            kept.append(item)
        elif item.origin == first.origin or (item.split != first.split and paint_the_same(item, first)):
            listed_again.append(item)
        else:
            problems.append(
                Problem(f"{item.origin}: annotates {item.path}, as {first.origin} does. Remove one of them.")
            )
    if not listed_again:
        return kept, problems, []
    count = format_quantity(len(listed_again), "image")
    note = f"{count}, such as {listed_again[0].path}, listed again: each is in the split that names it first."
    return kept, problems, [note]


def paint_the_same(one: AnnotatedImage, other: AnnotatedImage) -> bool:
    """Whether the annotations of two images are equal, whatever their names and order are."""
    if one.mask is not None and other.mask is not None:
        same_file = one.mask.path == other.mask.path
        return are_equal(one.mask.read, other.mask.read) and (
            same_file or store.read_file(Path(one.mask.path)) == store.read_file(Path(other.mask.path))
        )
    rest = [(note.class_index, note.shapes) for note in other.annotations]
    for note in one.annotations:
        equal = next((at for at, each in enumerate(rest) if are_equal((note.class_index, note.shapes), each)), None)
        if equal is None:
            return False
        del rest[equal]
    return not rest and one.mask is other.mask


def are_equal(one: Any, other: Any) -> bool:
    """Whether two values are equal, also within arrays, sequences and partial functions."""
    if isinstance(one, partial) and isinstance(other, partial):
        return are_equal((one.func, *one.args), (other.func, *other.args))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, tuple | list) and type(one) is type(other):
        return len(one) == len(other) and all(map(are_equal, one, other))
    return bool(one == other)


def describe_odd_classes(
    export: Export, items: Sequence[AnnotatedImage], images: Sequence[ImportedImage]
) -> Iterator[str]:
    """Sentences about classes of one name, and about those of whose annotations no pixel is left.

    Args:
        items: those of `images`.

    Raises:
        DataError: if no annotation covers a pixel.
    """
    repeated = [name for name, count in Counter(export.names).items() if count > 1]
    if repeated:
        yield f"Several classes are called {', '.join(repeated)}."
    annotated = {note.class_index for item in items for note in item.annotations if note.class_index >= 0}
    lost = sorted(annotated - {index for image in images for index in image.pixels})
    if not lost:
        return
    if len(lost) == len(annotated):
        raise DataError(
            f"{export.title}: no annotation covers a pixel of its image: their coordinates may be fractions of the "
            "image, or those of another size. Export them in pixels."
        )
    listed = ", ".join(export.names[index] for index in lost)
    yield (
        f"No pixel is left of the annotations of {listed}: others hide them, or their coordinates are fractions or "
        "outside of the image."
    )


def describe_lost_annotations(images: Sequence[ImportedImage]) -> Iterator[str]:
    """A sentence about annotations that cover no pixel of their image."""
    lost = [name for image in images for name in image.lost]
    if lost:
        yield (
            f"{format_subject(len(lost), 'annotation covers', 'annotations cover')} no pixel, such as {lost[0]}: "
            "outside of the image, or smaller than a pixel."
        )


def find_background(names: Sequence[str]) -> int:
    """The class index of pixels nobody annotated: a class with such a name, or one more class."""
    return next((index for index, name in enumerate(names) if is_background(name)), len(names))


def check_problems(problems: Sequence[str], num_entries: int, data: DataConfig) -> None:
    """Stop if entries cannot be read, or too many of them if data.on_bad=skip.

    Raises:
        DataError: with the first ones.
    """
    if not problems:
        return
    if data.on_bad == "skip":
        if len(problems) <= data.max_bad * num_entries:
            return
        advice = f"More than data.max_bad={data.max_bad} of {num_entries} entries are bad; nothing is written."
    else:
        advice = "Nothing is written; data.on_bad=skip leaves such images out."
    if len(problems) == 1:
        raise DataError(f"{problems[0]} {advice}")
    more = [f"... and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
    listed = "\n  ".join([*problems[:MAX_SHOWN], *more])
    raise DataError(f"{len(problems)} entries cannot be imported. {advice}\n  {listed}")


class FolderWriter:
    """Writes the images and masks of an export.

    Args:
        background: class index of pixels nobody annotated; None: they are ignored.
    """

    def __init__(self, export: Export, options: ImportConfig, max_pixels: int, background: int | None) -> None:
        self.options, self.max_pixels, self.background = options, max_pixels, background
        self.smaller_on_top = options.overlaps == "area" or (options.overlaps == "auto" and export.smaller_on_top)
        num_ids = len(export.names) + 2
        self.id_type = np.uint8 if num_ids <= 256 else np.uint16

    def name_files(self, items: Sequence[AnnotatedImage]) -> Iterator[tuple[AnnotatedImage, str, str]]:
        """Each image with the paths of itself and its mask in the new folder, which differ in more than their case."""
        taken = set[str]()
        names = [clean_name(item.name) for item in items]
        top = posixpath.commonpath([PurePosixPath(name).parent for name in names]) if names else ""
        for item, name in zip(items, names, strict=True):
            path = PurePosixPath(name).relative_to(top)
            stem, suffix = path.with_suffix("").as_posix(), path.suffix
            free = stem if stem.casefold() not in taken else f"{stem}_{suffix[1:].lower()}"
            number = 2
            while free.casefold() in taken:
                free, number = f"{stem}_{number}", number + 1
            taken.add(free.casefold())
            yield item, f"images/{free}{suffix}", f"masks/{free}.png"

    def write_image(self, folder: Path, item: AnnotatedImage, image: str, mask: str) -> ImportedImage | str:
        """Write an image and its mask.

        Returns:
            What was written; or why the image cannot be read; or "" if nothing is annotated in it.
        """
        try:
            drawing = draw_label(item, smaller_on_top=self.smaller_on_top, max_pixels=self.max_pixels)
        except DataError as error:
            return str(error) if str(error).startswith(item.origin) else f"{item.origin}: {error}"
        raw = self.to_ids(drawing)
        if not raw.any():
            return ""
        self.write_mask(folder / mask, raw)
        self.write_picture(folder / image, item)
        values, counts = np.unique(drawing.label, return_counts=True)
        pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
        return ImportedImage(image, mask, item.split or "train", pixels, *drawing[1:])

    def to_ids(self, drawing: Drawing) -> NDArray[np.integer]:
        """The ids that the mask holds."""
        ids = (drawing.label + 1).astype(self.id_type)
        ids[drawing.label == IGNORED] = NOT_SCORED
        ids[drawing.label == UNLABELLED] = NOT_SCORED if self.background is None else self.background + 1
        return ids

    def write_mask(self, path: Path, ids: NDArray[np.integer]) -> None:
        is_written, data = cv2.imencode(".png", ids)
        assert is_written, "PNG files hold ids of 8 and 16 bits"
        with name_file_in_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.tobytes())

    def write_picture(self, path: Path, item: AnnotatedImage) -> None:
        """Link to an image, or copy it; one inside an archive is copied.

        Raises:
            ConfigError: if this system has no links.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        source = Path(item.path)
        with name_file_in_errors(path):
            if item.content is not None:
                path.write_bytes(item.content())
            elif not source.is_file():  # inside an archive
                path.write_bytes(store.read_file(source))
            elif self.options.copy:
                shutil.copyfile(source, path)
            else:
                try:
                    path.symlink_to(source.absolute())
                except (OSError, NotImplementedError) as error:
                    raise ConfigError(
                        f"import.copy=false: links to images cannot be created here ({error}). Use import.copy=true."
                    ) from error


def clean_name(name: str) -> str:
    """A path of the export that is safe on every system and in lists."""
    parts = (part for part in PurePosixPath(name).parts if part not in ("..", ".", "/"))
    return "/".join("".join(c if c.isprintable() and c not in '\\<>:"|?*' else "_" for c in part) for part in parts)


# ---- files of the folder


def write_class_table(path: Path, names: Sequence[str], palette: Sequence[Colour] | None) -> None:
    """The class table; colours that the export lacks are generated."""
    colours = [*(palette or ()), *generated_palette(len(names))[len(palette or ()) :]]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "name", "R", "G", "B"])
        for index, (name, colour) in enumerate(zip(names, colours, strict=True)):
            writer.writerow([index, escape_unprintable(name), *colour])


def write_list(path: Path, images: Sequence[ImportedImage]) -> None:
    """The list of a split."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "mask"])
        writer.writerows([escape_csv_cell(image.image), escape_csv_cell(image.mask)] for image in images)


def write_settings(path: Path, output: Path, export: Export, splits: Sequence[str], *, is_rotated: bool) -> None:
    """The settings of the data set, which data=folder data.root=<folder> uses."""
    content: dict[str, Any] = {"name": output.absolute().name, "classes": "classes.csv"}
    for split in SPLITS:
        if split in splits:
            content[split] = {"list": f"{split}.csv", "images": None, "masks": None}
    if "train" not in splits:
        content["train"] = {"list": None, "images": None, "masks": None}
    if is_rotated:
        content["label_orientation"] = "upright"
    header = f"# Written by mode=import from {export.title}. Ids in masks: 0 is not scored, 1 is the first class.\n"
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    path.write_text(header + text, encoding="utf-8")


# ---- summary


def summarise_import(imported: Imported) -> Iterator[str]:
    """The lines that tell what was imported."""
    counts = Counter(image.split for image in imported.images)
    listed = ", ".join(f"{counts[split]} {split}" for split in SPLITS if counts[split])
    yield f"{imported.title}: {len(imported.images)} images ({listed})"
    total = sum(sum(image.pixels.values()) for image in imported.images)
    pixels = Counter[int]()
    for image in imported.images:
        pixels.update(image.pixels)
    shown = [f"{name} {100 * pixels[index] / total:.3g} %" for index, name in enumerate(imported.names)]
    if imported.background is not None and imported.background < len(imported.names):
        share = pixels[imported.background] + imported.unlabelled
        shown[imported.background] = f"{imported.names[imported.background]} {100 * share / total:.3g} %"
    yield f"classes {len(imported.names)}: {', '.join(shown[:12])}{', ...' if len(shown) > 12 else ''}"
    yield describe_unlabelled(imported, total)
    if pixels[IGNORED]:
        yield f"{100 * pixels[IGNORED] / total:.3g} % of the pixels are ignored, as the export says"
    yield from imported.notes
    if imported.num_empty:
        yield f"{format_subject(imported.num_empty, 'image is', 'images are')} left out: nothing is annotated in them"
    assumed = [image.image for image in imported.images if image.is_assumed]
    if assumed:
        yield (
            f"{format_quantity(len(assumed), 'photograph')} turned by EXIF, and no size shows whether annotations are "
            f"for the stored or the upright picture, such as {assumed[0]}: the upright one is assumed. See examples/."
        )
    yield from (f"left out: {problem}" for problem in imported.problems)


def describe_unlabelled(imported: Imported, total: int) -> str:
    """What became of the pixels nobody annotated."""
    share = f"{100 * imported.unlabelled / total:.3g} %"
    if not imported.unlabelled:
        return "every pixel is annotated"
    if imported.background is None:
        return f"{share} of the pixels are not annotated and ignored (import.unlabelled=background: a class)"
    name = imported.names[imported.background]
    return f"{share} of the pixels are not annotated and of the class {name} (import.unlabelled=ignore: not scored)"
