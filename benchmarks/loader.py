"""Reading and preparing training images, ours and the original code's, side by side in the same run.

    python benchmarks/loader.py                       # 48 generated images, long sides of 256 to 1600 pixels
    python benchmarks/loader.py --folder my_photos    # *.jpg, each with a label *.png of the same stem

CPU time in ms of one image at a time in one thread. "Original" are the steps of the 2020 release: Pillow decodes and
resizes, then float32, normalisation and a padded batch; ours ends with a padded batch of uint8, which the device
normalises. "Decode" is OpenCV reading the file at full size and nothing else, with and without its label. Contenders
take turns; medians of rounds. Then the same images, two per sub-batch, with 0, 1, 2, ... worker processes (wall time),
transferred in our shared slots and by PyTorch; and the update of the metric.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from semseg.collate import collate
from semseg.data.datasets import ReadOptions, TrainDataset
from semseg.data.geometry import Size, canvas_size, label_size, scaled_size
from semseg.data.label_cache import LabelCache
from semseg.data.label_map import LabelMap
from semseg.data.loaders import SlotDemand, WatchedLoader
from semseg.data.plan import SubBatch
from semseg.data.records import Record
from semseg.data.scenes import draw_scene
from semseg.evaluation.metrics import ConfusionMatrix, confusion_counts

SHORT_EDGES = (300, 375, 450, 525, 600)
MAX_LONG_EDGE, STRIDE = 1000, 8
NUM_CLASSES = 150
ROW = "{:<44}{:>12}{:>12}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, OpenCV {cv2.__version__}, {options}")
    with TemporaryDirectory() as generated, TemporaryDirectory() as label_cache:
        folder = options.folder or draw_images(Path(generated))
        records = list_records(folder)
        compare_images(records, label_cache, options.rounds)
        compare_workers(records, label_cache, options.workers, options.rounds)
    compare_metric()


def draw_images(folder: Path, count: int = 48) -> Path:
    """Generated scenes with sensor noise (JPEGs of flat areas decode too fast), long sides 256 to 1600, quality 90."""
    rng = np.random.default_rng(0)
    for index, long_edge in enumerate(np.linspace(256, 1600, count).astype(int)):
        scene = draw_scene(rng)
        height, width = scene.label.shape
        size = (round(width * long_edge / max(height, width)), round(height * long_edge / max(height, width)))
        image = cv2.resize(scene.image, size, interpolation=cv2.INTER_CUBIC)
        coarse = rng.normal(0, 12, (size[1] // 3 + 1, size[0] // 3 + 1, 3)).astype(np.float32)
        image = np.clip(image + cv2.resize(coarse, size) + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
        label = cv2.resize(scene.label, size, interpolation=cv2.INTER_NEAREST)
        Image.fromarray(image).save(folder / f"{index:02d}.jpg", quality=90)
        Image.fromarray(label).save(folder / f"{index:02d}.png")
    return folder


def list_records(folder: Path) -> list[Record]:
    paths = sorted(folder.glob("*.jpg"))
    sizes = [Image.open(path).size for path in paths]
    return [
        Record(str(path), str(path.with_suffix(".png")), Size(height, width), str(path))
        for path, (width, height) in zip(paths, sizes, strict=True)
    ]


def build_dataset(records: list[Record], *, exact: bool, label_cache: str | None = None) -> TrainDataset:
    """Our data set; `label_cache` is the folder of data.label_cache, filled here."""
    label_map = LabelMap(NUM_CLASSES, 1, [0])
    cache = LabelCache(label_cache, label_map) if label_cache else None
    data = TrainDataset(
        records,
        label_map,
        ReadOptions(MAX_LONG_EDGE, STRIDE, cache=cache),
        collate=collate,
        label_stride=STRIDE,
        exact=exact,
    )
    for index in range(len(records) if label_cache else 0):
        data[build_sub_batch(index)]
    return data


def build_sub_batch(index: int) -> SubBatch:
    return SubBatch(index, (index,), SHORT_EDGES[index % len(SHORT_EDGES)], (index % 2 == 0,))


def read_as_original(record: Record, short_edge: int, flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The steps of the 2020 release: a batch of one image in float32 and its label in int64."""
    image, label = Image.open(record.image).convert("RGB"), Image.open(record.label or "")
    if flip:
        image, label = (part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in (image, label))
    size = scaled_size(record.size, short_edge, MAX_LONG_EDGE)
    image = image.resize((size.width, size.height), Image.Resampling.BILINEAR)
    label = label.resize((size.width, size.height), Image.Resampling.NEAREST)
    canvas = canvas_size([size], STRIDE)
    padded = Image.new("L", (canvas.width, canvas.height))
    padded.paste(label)
    label = padded.resize((canvas.width // STRIDE, canvas.height // STRIDE), Image.Resampling.NEAREST)
    pixels = torch.from_numpy(np.ascontiguousarray((np.asarray(image, np.float32) / 255.0).transpose(2, 0, 1)))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images, labels = torch.zeros(1, 3, *canvas), torch.zeros(1, *label_size(canvas, STRIDE), dtype=torch.int64)
    images[0, :, : size.height, : size.width] = (pixels - mean[:, None, None]) / std[:, None, None]
    labels[0] = torch.from_numpy(np.array(label)).long() - 1
    return images, labels


def compare_images(records: list[Record], label_cache: str, rounds: int) -> None:
    exact, fast, cached = (
        build_dataset(records, exact=True),
        build_dataset(records, exact=False),
        build_dataset(records, exact=False, label_cache=label_cache),
    )
    contenders: dict[str, Callable[[int], object]] = {
        "original, 2020 release": lambda index: read_as_original(
            records[index], build_sub_batch(index).short_edge, index % 2 == 0
        ),
        "ours, data.decode=exact": lambda index: exact[build_sub_batch(index)],
        "ours, data.decode=fast": lambda index: fast[build_sub_batch(index)],
        "the same, data.label_cache filled": lambda index: cached[build_sub_batch(index)],
        "decode image, full size": lambda index: cv2.imread(records[index].image),
        "decode image and label, full size": lambda index: (
            cv2.imread(records[index].image),
            cv2.imread(records[index].label or "", cv2.IMREAD_UNCHANGED),
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, action in contenders.items():
            times[name].append(measure_cpu_ms(action, len(records)))
    print(ROW.format(f"{len(records)} images, ms each", "CPU", "original /"))
    for name, measured in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["original, 2020 release"], measured, strict=True))
        print(ROW.format(name, f"{statistics.median(measured):.2f}", f"{ratio:.2f}"))
    differences = [mean_difference(exact, cached, index) for index in range(len(records))]
    print(
        f"fast - exact: equal labels, images differ by {np.mean(differences):.2f} grey levels on average, "
        f"{max(differences):.2f} at most"
    )


def mean_difference(exact: TrainDataset, fast: TrainDataset, index: int) -> float:
    """Mean difference of the two decodings in grey levels.

    Raises:
        AssertionError: if their labels differ.
    """
    first, second = exact[build_sub_batch(index)], fast[build_sub_batch(index)]
    assert torch.equal(first.label, second.label), "labels must be the same"
    return float((first.image.float() - second.image.float()).abs().mean())


def measure_cpu_ms(action: Callable[[int], object], count: int) -> float:
    start = time.process_time()
    for index in range(count):
        action(index)
    return (time.process_time() - start) / count * 1e3


def compare_workers(records: list[Record], label_cache: str, workers: list[int], rounds: int) -> None:
    """Images per second with a filled label cache in sub-batches of two, without the start of the processes."""
    fast = build_dataset(records, exact=False, label_cache=label_cache)
    settings = [(count, slots) for count in workers for slots in ((True, False) if count else (True,))]
    rates: dict[tuple[int, bool], list[float]] = {setting: [] for setting in settings}
    for _ in range(rounds):
        for setting in settings:
            rates[setting].append(measure_images_per_s(fast, *setting))
    print(ROW.format("worker processes (0: in the main one)", "images/s", "one worker"))
    one = statistics.median(rates.get((1, True), rates[settings[0]]))
    for (count, slots), measured in rates.items():
        rate = statistics.median(measured)
        name = f"{count}" if slots else f"{count}, PyTorch's shared memory"
        print(ROW.format(name, f"{rate:.0f}", f"{rate / one:.2f}"))


def measure_images_per_s(data: TrainDataset, workers: int, slots: bool, passes: int = 6) -> float:
    """Images per second of a few passes, without the first one."""
    count = len(data.records)
    plan = [build_pair(index, count) for index in range(0, passes * count, 2)]
    demand = SlotDemand(1, 2 * 3 * MAX_LONG_EDGE**2) if slots else None
    batches = iter(WatchedLoader(data, lambda _: [], 0, demand, sampler=plan, batch_size=None, num_workers=workers))
    for _ in range(count // 2):
        next(batches)
    start = time.perf_counter()
    return sum(len(batch.paths) for batch in batches) / (time.perf_counter() - start)


def build_pair(index: int, count: int) -> SubBatch:
    """Two consecutive images as one sub-batch."""
    first, second = index % count, (index + 1) % count
    return SubBatch(index, (first, second), SHORT_EDGES[index // 2 % len(SHORT_EDGES)], (True, False))


def compare_metric(rounds: int = 50) -> None:
    rng = np.random.default_rng(0)
    # Areas of one class, as in labels, because the time depends on them a little.
    label, ids = (rng.integers(0, NUM_CLASSES, (14, 20)).repeat(50, 0).repeat(50, 1).astype(np.int16) for _ in range(2))
    metric = ConfusionMatrix(NUM_CLASSES)
    contenders: dict[str, Callable[[], object]] = {
        "original, 2018 release": lambda: score_as_original(ids.astype(np.int64), label.astype(np.int64)),
        "ours": lambda: metric.update(confusion_counts(torch.from_numpy(ids), torch.from_numpy(label), NUM_CLASSES)),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, action in contenders.items():
            start = time.perf_counter()
            action()
            times[name].append((time.perf_counter() - start) * 1e3)
    print(ROW.format(f"metric update, {label.shape[0]} x {label.shape[1]}, {NUM_CLASSES} classes", "ms", ""))
    for name, measured in times.items():
        print(ROW.format(name, f"{statistics.median(measured):.2f}", ""))


def score_as_original(ids: NDArray[np.int64], label: NDArray[np.int64]) -> tuple[float, NDArray, NDArray]:
    """Accuracy, and the pixels of intersection and union of each class, from histograms of whole images."""
    scored = label >= 0
    accuracy = float((scored & (ids == label)).sum() / scored.sum())
    predicted, labelled = (ids + 1) * scored, label + 1
    correct = predicted * (predicted == labelled)
    intersection, predicted_pixels, labelled_pixels = (
        np.histogram(values, bins=NUM_CLASSES, range=(1, NUM_CLASSES))[0] for values in (correct, predicted, labelled)
    )
    return accuracy, intersection, predicted_pixels + labelled_pixels - intersection


if __name__ == "__main__":
    main()
