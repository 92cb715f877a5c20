"""Keep a prediction from replacing other files than those of an earlier one. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from semseg.config.overrides import RECORD_FOLDER
from semseg.data.classes import ClassTable
from semseg.data.label_map import LabelMap
from semseg.errors import ConfigError
from semseg.prediction.annotations import ANNOTATION_FILES, LABEL_STUDIO_CONFIG
from semseg.prediction.inputs import Input
from semseg.prediction.outputs import CLASSES_FILE, list_class_rows
from semseg.storage.commands import relative_to_cwd
from semseg.storage.run_folders import is_of_run
from semseg.system.text import escape_unprintable, format_quantity

OUTPUT_SUFFIXES = frozenset({".png", ".tif", ".npz", ".mp4"})
FRAME_NAME = re.compile(r"\d{6,}_(\w+)")  # of an output of a frame, without suffix


def describe_replaced(folder: Path, inputs: Sequence[Input], outputs: Sequence[str]) -> str | None:
    """A line about the files of an earlier prediction that the outputs replace; None if there are none.

    Raises:
        ConfigError: if no command of ours has written into the folder, so that the files are those of somebody else.
    """
    existing = list(find_existing_outputs(folder, inputs, outputs))
    shown = relative_to_cwd(folder)
    if not is_of_run(folder):
        config = folder / LABEL_STUDIO_CONFIG
        foreign = [*existing, *([config] if "label_studio" in outputs and config.exists() else [])]
        if foreign:
            raise ConfigError(
                f"run_dir={shown}: holds {format_quantity(len(foreign), 'file')} with the names of outputs, such as "
                f"{foreign[0].relative_to(folder).as_posix()}, and no record ({RECORD_FOLDER}) of a prediction that "
                "wrote them. Give another folder."
            )
    if not existing:
        return None
    example = existing[0].relative_to(folder).as_posix()
    line = f"{len(existing)} files in {shown} are replaced, such as {example}"
    return escape_unprintable(line if len(existing) > 1 else f"{shown}/{example} is replaced")


def find_existing_outputs(folder: Path, inputs: Sequence[Input], outputs: Sequence[str]) -> Iterator[Path]:
    """Yield the files in `folder` that have the names of outputs.

    Args:
        outputs: names as in predict.save.
    """
    annotations = [folder / name for output, (name, _) in ANNOTATION_FILES.items() if output in outputs]
    yield from (path for path in annotations if path.exists())
    stems = {folder / f"{item.output_path}_{output}" for item in inputs for output in outputs}
    for parent in sorted({stem.parent for stem in stems}):
        for file in _list_output_files(parent):
            if file.with_suffix("") in stems:
                yield file
    for item in inputs:
        for file in _list_output_files(folder / item.output_path) if item.is_video else ():
            frame = FRAME_NAME.fullmatch(file.stem)
            if frame is not None and frame[1] in outputs:
                yield file


def _list_output_files(folder: Path) -> list[Path]:
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for file in files if file.suffix in OUTPUT_SUFFIXES)


def require_same_classes(folder: Path, classes: ClassTable, label_map: LabelMap) -> None:
    """Check that a class table in the folder is the one that the prediction writes.

    Raises:
        ConfigError: if it is that of a data set, or of the predictions of another network, which would be replaced.
    """
    path = folder / CLASSES_FILE
    if not path.exists():
        return
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        table = None
    if table != {"classes": list_class_rows(classes, label_map)}:
        shown = relative_to_cwd(folder)
        raise ConfigError(
            f"run_dir={shown}: holds {CLASSES_FILE} with other classes than this prediction has, of a data set or of "
            "the predictions of another network. Give another folder."
        )
