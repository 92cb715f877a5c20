"""mode=predict: write class maps and pictures for images and videos."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from semseg.build import open_predictor
from semseg.checkpoints.zoo import DEMONSTRATION_IMAGE
from semseg.config.schema import Config
from semseg.data.band_windows import BandWindows, open_windows
from semseg.data.bands import BandOptions, draw_bands, measure_stretches
from semseg.data.datasets import report_out_of_memory_reading
from semseg.data.folders import Naming
from semseg.data.geometry import Size
from semseg.data.label_map import LabelMap, ignore_missing
from semseg.data.loaders import WatchedLoader
from semseg.data.store import UnusedFiles
from semseg.data.windows import spread_windows
from semseg.errors import ConfigError, DataError, OutOfMemoryError, install_command
from semseg.prediction.annotations import ANNOTATION_FILES, AnnotationFiles, AnnotationSettings
from semseg.prediction.earlier_outputs import describe_replaced, require_same_classes
from semseg.prediction.geotiff import (
    GeoReference,
    GeoTiffSink,
    OverlaySink,
    ReadValid,
    SeveralSinks,
    has_rasterio,
    is_georeferenced,
    may_have_mask,
    open_mask,
    read_georeference,
    read_whole_mask,
    write_geotiff,
)
from semseg.prediction.inputs import AS_PATH_LIST, Input, find_inputs, is_path_list
from semseg.prediction.outputs import CLASSES_FILE, array_on_disk, write_classes, write_outputs
from semseg.prediction.pictures import read_band_picture, read_picture
from semseg.prediction.predictor import PredictionResult, Predictor
from semseg.prediction.video import Frame, LostFramesError, VideoWriters, read_frames
from semseg.reports.draw import Pixels, colour_class_map, draw_overlay
from semseg.storage import run_lock
from semseg.storage.commands import relative_to_cwd
from semseg.storage.download import fetch_file
from semseg.storage.ranks import print_once
from semseg.system.processors import choose_num_workers
from semseg.system.text import escape_lines, escape_unprintable, format_quantity


def run(config: Config, overrides: list[str]) -> None:
    """Predict every file of `input` and write the outputs listed in `predict.save`.

    A file that cannot be read is reported and skipped; the others are predicted.

    Raises:
        DataError: at the end, if files were skipped.
        SemsegError: for any other error that the user can fix.
    """
    folder, inputs = Path(config.run_dir), list_inputs(config)  # missing files are reported before the network is read
    replaced = describe_replaced(folder, inputs, config.predict.save)
    predictor = open_predictor(config, overrides)
    require_same_classes(folder, predictor.classes, predictor.label_map)
    print_once(replaced)
    run_lock.on_folder_taken()
    predict_inputs(predictor, config, inputs)


def list_inputs(config: Config) -> list[Input]:
    """The files of `input`, or the demonstration image; files that are not used are reported."""
    source = config.input or str(fetch_file(DEMONSTRATION_IMAGE, config.download))
    unused = UnusedFiles()
    inputs = find_inputs(source, Path(config.run_dir), unused=unused)
    if unused.count:
        print_once(f"input: not used: {unused.describe(source)}")
    return inputs


def leave_out_bands(inputs: Sequence[Input], bands: BandOptions | None) -> list[Input]:
    """The inputs that stand for an image; the files with further bands of an image (data.band_files) are left out.

    Raises:
        DataError: if none is left.
    """
    if bands is None or not bands.other_suffixes:
        return list(inputs)
    naming = Naming(bands.main_suffix, band_suffixes=bands.other_suffixes)
    kept = [
        item for item in inputs if item.path.stem.endswith(bands.main_suffix) and not naming.is_band_file(item.path)
    ]
    if not kept:
        raise DataError(
            f"input: no file of {len(inputs)} has a name that ends in {bands.main_suffix} (data.band_files)."
        )
    return kept


def predict_inputs(predictor: Predictor, config: Config, inputs: Sequence[Input] | None = None) -> None:
    """Predict `inputs`, or every file of `input`, and write the outputs into the run folder.

    Raises:
        DataError: at the end, if files could not be read.
    """
    folder = Path(config.run_dir)
    inputs = leave_out_bands(list_inputs(config) if inputs is None else inputs, predictor.bands)
    if predictor.bands is not None and any(item.is_video for item in inputs):
        raise ConfigError(f"input={config.input}: a video has red, green and blue, the network takes other bands.")
    settings = AnnotationSettings(config.predict.polygon_tolerance, config.predict.image_prefix)
    annotations = AnnotationFiles(folder, config.predict.save, predictor.classes, predictor.label_map, settings)
    job = PredictionJob(
        predictor,
        folder,
        config.predict.save,
        annotations,
        num_workers=min(1, choose_num_workers(config.data.num_workers, num_ranks=1)),
        timeout_s=config.data.worker_timeout_s,
    )
    if annotations.outputs and any(item.is_video for item in inputs):
        print(f"{' and '.join(annotations.outputs)}: for images, and not for the frames of videos")
    failures = []
    with annotations, Progress(disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("predicting", total=len(inputs))
        for failure in job.predict_all(inputs, lambda done: bar.update(task, completed=done)):
            if failure:
                print(escape_lines(failure), file=sys.stderr, flush=True)
                failures.append(failure)
    write_classes(folder / CLASSES_FILE, predictor.classes, predictor.label_map)
    summary = f"{len(inputs) - len(failures)} of {len(inputs)} files predicted, written to {relative_to_cwd(folder)}"
    if failures:
        kind = f" {config.input}: {AS_PATH_LIST}" if config.input and is_path_list(config.input) else ""
        count = format_quantity(len(failures), "file")
        raise DataError(f"{count} could not be read, see above; {summary}.{kind}")
    print(escape_unprintable(summary))


class PredictionJob:
    """Predicts files and writes their outputs.

    Args:
        outputs: names as in predict.save.
        annotations: receives the class maps of images for annotation tools; must be open during `predict_all`.
        num_workers: processes that read images while the network computes; 0 or 1.
        timeout_s: how long to wait for an image; 0 means without limit.
    """

    def __init__(
        self,
        predictor: Predictor,
        folder: Path,
        outputs: Sequence[str],
        annotations: AnnotationFiles | None = None,
        *,
        num_workers: int = 0,
        timeout_s: float = 0,
    ) -> None:
        self.predictor, self.folder, self.annotations = predictor, folder, annotations
        self.outputs = [output for output in outputs if output not in ANNOTATION_FILES]  # one file for each input
        self.num_workers, self.timeout_s = num_workers, timeout_s
        self.has_named_others = False  # outputs that images beyond data.max_pixels do not have

    def predict_all(
        self, inputs: Sequence[Input], on_progress: Callable[[float], object] = lambda done: None
    ) -> Iterator[str]:
        """Predict each input; yields its error, or an empty string.

        Args:
            on_progress: called after each image and each frame with the number of inputs that are done; of a video, a
                fraction.
        """
        images = [item for item in inputs if not item.is_video]
        loader = WatchedLoader(
            InputImages(images, self.predictor),
            lambda index: [str(images[index].path)],
            self.timeout_s,
            batch_size=None,
            num_workers=self.num_workers,
        )
        for done, (item, loaded) in enumerate(zip(images, loader, strict=True), start=1):
            failure = loaded.failure
            if loaded.is_by_window:
                failure = describe_failure(item, self.predict_windows, item)
            elif not failure:
                failure = describe_failure(item, self.predict_image, item, loaded)
            on_progress(done)
            yield failure
        videos = [item for item in inputs if item.is_video]
        for done, item in enumerate(videos, start=len(images)):
            failure = describe_failure(
                item, self.predict_video, item, lambda share, done=done: on_progress(done + share)
            )
            on_progress(done + 1)
            yield failure

    def predict_image(self, item: Input, loaded: LoadedImage) -> None:
        """Predict a loaded image and write its outputs."""
        predictor, pixels, target = self.predictor, loaded.pixels.numpy(), self.folder / item.output_path
        with self.open_probabilities(target, pixels) as probabilities:
            ids = predictor.predict_class_map(pixels.shape[:2], loaded.scales, probabilities)
            reference = self.find_georeference(item.path) if "ids" in self.outputs else None
            is_valid = None if loaded.is_valid is None else loaded.is_valid.numpy()
            if predictor.bands is None:
                is_valid = read_whole_mask(item.path)
            ignore_missing(ids, is_valid)
            result = PredictionResult(pixels, ids, predictor.classes, predictor.label_map, probabilities)
            write_outputs(result, target, self.outputs)
            if reference is not None:
                path = target.with_name(f"{target.name}_ids.tif")
                write_geotiff(path, ids, predictor.classes, predictor.label_map, reference, is_valid=is_valid)
        if self.annotations is not None:
            self.annotations.add((item.output_path.parent / item.path.name).as_posix(), ids)

    def predict_windows(self, item: Input) -> None:
        """Predict an image beyond data.max_pixels by windows, and write ids, colours and overlay as TIFF, row by row.

        Raises:
            DataError: if the file is damaged, or no output of such an image was asked for.
            ConfigError: without rasterio.
        """
        predictor, target = self.predictor, self.folder / item.output_path
        written = [output for output in self.outputs if output in ROW_OUTPUTS]
        others = [output for output in self.outputs if output not in ROW_OUTPUTS] + list(self.annotation_outputs)
        limit = f"for images of up to data.max_pixels, of larger ones only {', '.join(ROW_OUTPUTS)} are written"
        if not written:
            raise DataError(f"{item.path}: {', '.join(others)}: {limit}. Add one of them to predict.save.")
        if others and not self.has_named_others:
            print_once(f"{', '.join(others)}: {limit}")
            self.has_named_others = True
        reader = open_windows(item.path, predictor.bands)
        assert reader is not None, "the loader has opened it"
        with reader, ExitStack() as opened:
            reference = self.find_georeference(item.path)
            read_valid = reader.read_valid if reader.may_lack_values else None
            if predictor.bands is None and may_have_mask(item.path):
                read_valid = opened.enter_context(open_mask(item.path))
            sinks = [
                opened.enter_context(self.open_sink(output, target, reader, reference, read_valid))
                for output in written
            ]
            predictor.predict_rows(reader, SeveralSinks(sinks))

    def open_sink(
        self,
        output: str,
        target: Path,
        reader: BandWindows,
        reference: GeoReference | None,
        read_valid: ReadValid | None,
    ) -> GeoTiffSink | OverlaySink:
        """What writes one of ROW_OUTPUTS of an image."""
        predictor, size = self.predictor, Size(reader.height, reader.width)
        classes, path = predictor.classes, target.with_name(f"{target.name}_{output}.tif")
        if output == "overlay":
            return OverlaySink(path, size, classes, reader, choose_drawing(predictor, reader), reference=reference)
        label_map = predictor.label_map if output == "ids" else LabelMap(classes.num_classes, 0, [classes.num_classes])
        return GeoTiffSink(path, size, classes, label_map, reference=reference, read_valid=read_valid)

    @property
    def annotation_outputs(self) -> Sequence[str]:
        """The outputs for annotation tools."""
        return () if self.annotations is None else self.annotations.outputs

    def find_georeference(self, path: Path) -> GeoReference | None:
        """Where an image lies on the earth; None if that is unknown, which is reported once if it could be known.

        Raises:
            DataError: if its georeference is damaged.
        """
        if not is_georeferenced(path):
            return None
        if not has_rasterio():
            print_once(f"{path}: is georeferenced; to keep this in predictions: {install_command('geo')}")
            return None
        reference = read_georeference(path)
        if reference is not None and reference.crs is None and not reference.gcps[0]:
            print_once(f"{path}: has a transform, but no CRS, and so has its prediction")
        return reference

    def open_probabilities(self, target: Path, pixels: Pixels) -> AbstractContextManager[NDArray[np.float16] | None]:
        """Open an array on disk for the probabilities of an image, if they are an output."""
        if "probabilities" not in self.outputs:
            return nullcontext()
        shape = (self.predictor.classes.num_classes, *pixels.shape[:2])
        return array_on_disk(target.with_name(f"{target.name}_probabilities.npz"), shape)

    def predict_video(self, item: Input, on_progress: Callable[[float], object] = lambda share: None) -> None:
        """Predict every frame; writes pictures as videos of the same rate, ids and probabilities as files per frame.

        Args:
            on_progress: called after each frame with the share of the video that is done.

        Raises:
            DataError: if the video cannot be read, or, after all other frames, if some frames cannot.
        """
        lost_frames = None
        target = self.folder / item.output_path
        with VideoWriters(target) as writers:
            try:
                for frame in read_frames(item.path):
                    self.predict_frame(frame, target, writers)
                    on_progress(min(1.0, (frame.number + 1) / frame.announced) if frame.announced else 0.0)
            except LostFramesError as error:
                lost_frames = error
        if lost_frames is not None:
            raise lost_frames

    def predict_frame(self, frame: Frame, target: Path, writers: VideoWriters) -> None:
        """Predict a frame of a video and write its outputs."""
        per_frame = [name for name in self.outputs if name not in FRAME_PICTURES]
        result = self.predictor.predict(frame.pixels, probabilities="probabilities" in per_frame)
        for name in self.outputs:
            if name in FRAME_PICTURES:
                writers.add(name, FRAME_PICTURES[name](result), frame.rate)
        write_outputs(result, target / f"{frame.number:06d}", per_frame)


def describe_failure(item: Input, predict: Callable[..., object], *arguments: Any) -> str:
    """Predict an input; returns the error that leaves out this one alone, or an empty string."""
    try:
        predict(*arguments)
    except DataError as error:
        return str(error)
    except OutOfMemoryError as error:
        return f"{item.path}: {error}"
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return f"{item.path}: its name is too long for the names of the outputs. Shorten it."
    return ""


def choose_drawing(predictor: Predictor, reader: BandWindows) -> Callable[[NDArray], Pixels]:
    """How rows of an image are drawn, the same for all: with the stretches of windows that are spread over it."""
    bands = predictor.bands
    if bands is None:
        return lambda pixels: pixels
    size = Size(reader.height, reader.width)
    parts = [reader.read_image(*window) for window in spread_windows(size, NUM_STRETCHED, STRETCHED_SIDE)]
    known = [part.pixels if part.is_valid is None else part.pixels[part.is_valid] for part in parts]
    sample = np.concatenate([pixels.reshape(-1, 1, reader.num_bands) for pixels in known])
    if not len(sample):
        sample = parts[0].pixels
    stretches = measure_stretches(sample, bands.names, predictor.show_bands)
    return partial(draw_bands, names=bands.names, shown=predictor.show_bands, stretches=stretches)


def draw_side_by_side(result: PredictionResult) -> Pixels:
    """Draw image | overlay."""
    return np.concatenate([result.image, draw_overlay(result.image, result.ids, result.classes)], axis=1)


NUM_STRETCHED, STRETCHED_SIDE = 64, 256  # windows of a large image that say how it is drawn, and their side
ROW_OUTPUTS = ("ids", "color", "overlay")  # of images that are too large to be held whole
# Outputs that become videos; without a legend, because its height would change from frame to frame.
FRAME_PICTURES = {
    "color": lambda result: colour_class_map(result.ids, result.classes),
    "overlay": lambda result: draw_overlay(result.image, result.ids, result.classes),
    "panel": draw_side_by_side,
}


class LoadedImage(NamedTuple):
    """An image from a worker, or the reason why it could not be read."""

    pixels: Tensor  # (H, W, 3) uint8 RGB, as drawn
    scales: list[Tensor]  # (C, h, w) each, uint8 RGB or bands
    failure: str
    is_valid: Tensor | None = None  # (H, W) bool: whether any band has a value; None: all have one everywhere
    is_by_window: bool = False  # whether it is too large to be read at once, and can be read by window


def is_larger_by_window(path: Path, bands: BandOptions | None, max_pixels: int) -> bool:
    """Whether an image has more than `max_pixels`, and can be read by window.

    Raises:
        DataError: if it is damaged, or does not hold the bands.
    """
    windows = open_windows(path, bands)
    if windows is None:
        return False
    with windows:
        return windows.height * windows.width > max_pixels


class InputImages(Dataset[LoadedImage]):
    """Reads and resizes images. An image that cannot be read becomes an error message, so that the others are read."""

    def __init__(self, inputs: Sequence[Input], predictor: Predictor) -> None:
        self.inputs = inputs
        # Workers receive a copy of these attributes, so they hold no weights.
        self.resize, self.max_pixels = predictor.build_resizer(), predictor.settings.max_pixels
        self.bands, self.show_bands = predictor.bands, predictor.show_bands
        self.is_native = predictor.settings.crop is not None

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> LoadedImage:
        path = self.inputs[index].path
        try:
            with report_out_of_memory_reading(path):
                return self.load_image(path)
        except (DataError, OutOfMemoryError) as error:
            return LoadedImage(torch.empty(0), [], str(error))

    def load_image(self, path: Path) -> LoadedImage:
        """Read and resize an image, unless it is to be read by window.

        Raises:
            DataError: if it cannot be read.
        """
        key = "data.max_pixels"
        if self.is_native and is_larger_by_window(path, self.bands, self.max_pixels):
            return LoadedImage(torch.empty(0), [], "", is_by_window=True)
        if self.bands is None:
            pixels = read_picture(path, self.max_pixels, key=key)
            return LoadedImage(torch.from_numpy(pixels), self.resize(pixels), "")
        image = read_band_picture(path, self.bands, self.max_pixels, key=key)
        drawn = draw_bands(image.pixels, self.bands.names, self.show_bands)
        is_valid = None if image.is_valid is None else torch.from_numpy(image.is_valid)
        return LoadedImage(torch.from_numpy(drawn), self.resize(image.pixels), "", is_valid)
