"""mode=predict: class maps and pictures of anyone's images and videos."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from semseg.build import open_predictor, tell
from semseg.checkpoints.zoo import DEMONSTRATION
from semseg.config.schema import Config
from semseg.data.images import read_image
from semseg.data.loaders import WatchedLoader
from semseg.data.store import Unused
from semseg.errors import DataError
from semseg.prediction.inputs import Input, find_inputs
from semseg.prediction.outputs import array_on_disk, write_classes, write_outputs
from semseg.prediction.predictor import Predictor, Result
from semseg.prediction.video import Frame, LostFramesError, VideoWriters, frames_of
from semseg.reports.draw import Pixels, colour_class_map, draw_overlay
from semseg.storage.download import fetch
from semseg.system.text import lines_printable, printable


def run(config: Config, overrides: list[str]) -> None:
    """Predict everything that `input` means and write what `predict.save` asks for.

    A file that cannot be read is reported and left out; the others are done.

    Raises:
        DataError: in the end, if any file was left out.
        SemsegError: for anything else the user can mend.
    """
    folder = Path(config.run_dir)
    word = config.input or str(fetch(DEMONSTRATION, config.download))
    unused = Unused()
    inputs = find_inputs(word, folder, unused=unused)
    if unused.count:
        tell(f"input: {unused.count} files or folders are not used: {unused.words(word)}")
    predictor = open_predictor(config, overrides)
    work = Work(predictor, folder, config.predict.save, min(1, config.data.num_workers))
    work.patience_s = config.data.worker_timeout_s
    failures = []
    for failure in track(work.all(inputs), "predicting", len(inputs), disable=not sys.stdout.isatty()):
        if failure:
            print(lines_printable(failure), file=sys.stderr, flush=True)
            failures.append(failure)
    write_classes(folder / "classes.json", predictor.classes, predictor.label_map)
    done = f"{len(inputs) - len(failures)} of {len(inputs)} files predicted, written below {folder}"
    if failures:
        raise DataError(f"{len(failures)} files could not be read, see above; {done}.")
    print(printable(done))


class Work:
    """What is done to each input.

    Args:
        outputs: as predict.save names them.
        num_workers: that read images while the network runs; 0 or 1.
    """

    def __init__(self, predictor: Predictor, folder: Path, outputs: Sequence[str], num_workers: int) -> None:
        self.predictor, self.folder, self.outputs, self.num_workers = predictor, folder, outputs, num_workers
        self.patience_s = 0.0  # to wait for an image; 0: for ever

    def all(self, inputs: Sequence[Input]) -> Iterator[str]:
        """Predict each input; gives what went wrong with it, or an empty string."""
        images = [item for item in inputs if not item.is_video]
        loader = WatchedLoader(
            Images(images, self.predictor),
            lambda number: [str(images[number].path)],
            self.patience_s,
            batch_size=None,
            num_workers=self.num_workers,
        )
        for item, loaded in zip(images, loader, strict=True):
            if not loaded.failure:
                self.image(item, loaded)
            yield loaded.failure
        for item in inputs:
            if item.is_video:
                try:
                    self.video(item)
                except DataError as error:
                    yield str(error)
                else:
                    yield ""

    def image(self, item: Input, loaded: Loaded) -> None:
        """Predict an image that was read, and write its outputs."""
        pixels, target = loaded.pixels.numpy(), self.folder / item.place
        with self.place_for_probabilities(target, pixels) as kept:
            ids = self.predictor.class_map(pixels.shape[:2], loaded.scales, kept)
            found = Result(pixels, ids, self.predictor.classes, self.predictor.label_map, kept)
            write_outputs(found, target, self.outputs)

    def place_for_probabilities(
        self, target: Path, pixels: Pixels
    ) -> AbstractContextManager[NDArray[np.float16] | None]:
        if "probabilities" not in self.outputs:
            return nullcontext()
        shape = (self.predictor.classes.num_classes, *pixels.shape[:2])
        return array_on_disk(target.with_name(f"{target.name}_probabilities.npz"), shape)

    def video(self, item: Input) -> None:
        """Predict every frame: pictures become videos of the same rate, ids and probabilities a file for each frame.

        Raises:
            DataError: if it cannot be read, or, when the others are done, some of its frames cannot.
        """
        lost = None
        target, files = self.folder / item.place, [name for name in self.outputs if name in ("ids", "probabilities")]
        with VideoWriters(target) as writers:
            try:
                for frame in frames_of(item.path):
                    self.frame(frame, target, files, writers)
            except LostFramesError as error:
                lost = error
        if lost is not None:
            raise lost

    def frame(self, frame: Frame, target: Path, files: Sequence[str], writers: VideoWriters) -> None:
        """Predict a frame of a video."""
        found = self.predictor.predict(frame.pixels, probabilities="probabilities" in files)
        write_outputs(found, target / f"{frame.number:06d}", files)
        for name in self.outputs:
            if name in PICTURES:
                writers.add(name, PICTURES[name](found), frame.rate)


def side_by_side(found: Result) -> Pixels:
    return np.concatenate([found.image, draw_overlay(found.image, found.ids, found.classes)], axis=1)


# Without a legend, whose height would change from frame to frame.
PICTURES = {
    "color": lambda found: colour_class_map(found.ids, found.classes),
    "overlay": lambda found: draw_overlay(found.image, found.ids, found.classes),
    "panel": side_by_side,
}


class Loaded(NamedTuple):
    """An image as a worker hands it over, or why there is none."""

    pixels: Tensor  # (H, W, 3) uint8 RGB
    scales: list[Tensor]  # (3, h, w) uint8 each
    failure: str


class Images(Dataset[Loaded]):
    """Reads and scales images. One that cannot be read is handed over as a sentence: the others go on."""

    def __init__(self, inputs: Sequence[Input], predictor: Predictor) -> None:
        self.inputs = inputs
        # Workers get a copy of all that is here: no weights.
        self.scaled, self.max_pixels = predictor.scaler(), predictor.settings.max_pixels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Loaded:
        try:
            pixels = read_image(self.inputs[index].path, upright=True, max_pixels=self.max_pixels)
        except DataError as error:
            return Loaded(torch.empty(0), [], str(error))
        return Loaded(torch.from_numpy(pixels), self.scaled(pixels), "")
