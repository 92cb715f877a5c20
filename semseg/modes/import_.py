"""mode=import: the export of an annotation tool as a data set that data=folder trains on."""

from __future__ import annotations

import sys
from collections.abc import Set
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from semseg.config.schema import Config
from semseg.data import store
from semseg.data.classes import ClassTable
from semseg.data.images import read_image
from semseg.data.importing.formats import choose_export
from semseg.data.importing.write import Imported, summarise_import, write_export
from semseg.data.labels import read_label
from semseg.errors import ConfigError
from semseg.reports.draw import draw_panel
from semseg.storage.commands import format_command, relative_to_cwd
from semseg.system.text import escape_lines

NUM_EXAMPLES = 6


def run(config: Config, overrides: list[str]) -> None:
    """Write the export `input` as a data set to the new folder `output`.

    Raises:
        SemsegError: for any error that the user can fix; `output` does not exist then.
    """
    assert config.input and config.output, "find_mode_problems asks for both"
    source, output = store.resolve_path(config.input), Path(config.output).expanduser()
    if output.resolve().is_relative_to(source.resolve()) and source.is_dir():
        raise ConfigError(f"output={config.output}: lies in the export. Give a folder outside of {config.input}.")
    found = choose_export(source, config.import_.format)
    shown = ", ".join(str(relative_to_cwd(path)) for path in found.files[:3])
    print(escape_lines(f"reading {found.title}: {shown}{', ...' if len(found.files) > 3 else ''}"), flush=True)
    export = found.read(config.import_)
    imported = write_export(
        export,
        output,
        config.import_,
        config.data,
        track=lambda jobs, count: track(jobs, "drawing masks", count, disable=not sys.stdout.isatty()),
        add_examples=partial(write_examples, max_pixels=config.data.max_pixels),
    )
    for line in summarise_import(imported):
        print(escape_lines(line))
    root = relative_to_cwd(output)
    print(escape_lines(f"written to {root}: masks, classes.csv, lists, semseg.yaml, {describe_images(output)}"))
    for purpose, words in list_next_commands({image.split for image in imported.images}).items():
        print(escape_lines(f"to {purpose}: {format_command([*words, 'data=folder', f'data.root={root}'])}"))


def list_next_commands(splits: Set[str]) -> dict[str, list[str]]:
    """What can be done with a data set that has these splits, with the words of the command but those of the data."""
    if "train" in splits:
        return {"check": ["mode=check"], "train": []}
    split = [] if "val" in splits else ["eval.split=test"]
    return {"evaluate a network": ["mode=eval", "ckpt=best", *split]}


def describe_images(output: Path) -> str:
    """What the folder of images holds: links only where files are not in an archive, and import.copy is false."""
    has_links = any(path.is_symlink() for path in (output / "images").rglob("*"))
    return "links to the images (import.copy=true copies them)" if has_links else "copies of the images"


def write_examples(folder: Path, imported: Imported, max_pixels: int) -> None:
    """Draw some photographs of which no size shows how they are turned, with their masks, to examples/."""
    classes = ClassTable.from_names(imported.names)
    for item in [image for image in imported.images if image.is_assumed][:NUM_EXAMPLES]:
        pixels = read_image(folder / item.image, max_pixels=max_pixels, upright=True)
        ids = read_label(folder / item.mask, max_pixels=max_pixels).astype(np.int16) - 1
        path = folder / "examples" / f"{Path(item.mask).stem}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw_panel(pixels, ids, classes)).save(path)
