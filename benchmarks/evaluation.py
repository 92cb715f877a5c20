"""Multi-scale evaluation of images of one size, ours and the direct way, side by side in the same run.

    python benchmarks/evaluation.py                                           # UPerNet-50, 512 x 683, five scales, CPU
    python benchmarks/evaluation.py --model resnet18_dilated8_ppm_deepsup --scales 450
    python benchmarks/evaluation.py --images 4                                # the effect of eval.batch_size=4
    python benchmarks/evaluation.py --reading 24 --scales 300 --threads 1     # reading beside the network

The direct way is that of the 2018 code: the network with the operators of the published architecture, and for every
scale the logits of all classes upsampled to the full size, softmax, and a sum of full-size maps. Ours uses the kernels
of nets/cpu on the CPU and averages strip by strip. "Batched" is ours with all images as one batch per scale. All start
from the scaled images and end with class indices, and they take turns. Printed are medians of wall time, of CPU time,
and of the ratios.

--reading N instead evaluates N generated JPEGs, read one after the other with the network, ahead of it in a thread (as
with data.num_workers=0), and ahead in one and two workers: the time per image, and how long of that the network waited.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from loader import draw_images, list_records
from torch import Tensor
from training_step import NUM_CLASSES

from semseg.data.batch import LABEL_TYPE
from semseg.data.datasets import EvalDataset, ReadOptions
from semseg.data.geometry import Size, stretched_size
from semseg.data.label_map import LabelMap
from semseg.data.loaders import WatchedLoader
from semseg.evaluation.inference import batch_logits, merge_scales, scale_logits
from semseg.nets.normalise import normalise
from semseg.nets.registry import build_segmenter
from semseg.nets.segmenter import Segmenter

NETWORKS = {
    "upernet50": ("resnet50", "upernet"),
    "resnet18_dilated8_ppm_deepsup": ("resnet18_dilated8", "ppm_bilinear_deepsup"),
    "resnet50_dilated8_ppm_deepsup": ("resnet50_dilated8", "ppm_bilinear_deepsup"),
}
ROW = "{:<34}{:>10}{:>10}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(NETWORKS), default="upernet50")
    parser.add_argument("--scales", type=int, nargs="+", default=[300, 375, 450, 525, 600])
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=683)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reading", type=int, metavar="N", help="evaluate N files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options}")
    torch.manual_seed(0)
    net = build_segmenter(*NETWORKS[options.model], NUM_CLASSES).eval().to(options.device)
    if options.reading:
        compare_reading(net, options)
        return
    size = Size(options.height, options.width)
    images = [
        [
            torch.randint(0, 256, (3, *stretched_size(size, edge, 1000, net.size_divisor)), dtype=torch.uint8)
            for edge in options.scales
        ]
        for _ in range(options.images)
    ]
    contest = Contest(net, images, size)
    expected, ours, batched = contest.direct(), contest.ours(), contest.batched()
    for name, class_maps in {"ours": ours, "batched": batched}.items():
        fraction = (expected != class_maps).float().mean()
        print(f"{name}: classes differ from the direct way (ties up to rounding) in {fraction:.1e} of the pixels")
    names = ("direct", "network", "merge", "ours", *(("batched",) if options.images > 1 else ()))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, measured in times.items():
            measured.append(measure_seconds(getattr(contest, name)))
    print(ROW.format("seconds, median", "wall", "CPU"))
    labels = {"network": "of which the network", "merge": "of which merging"}
    for name, measured in times.items():
        wall, cpu = (statistics.median(values) for values in zip(*measured, strict=True))
        print(ROW.format(labels.get(name, name), f"{wall:.3f}", f"{cpu:.3f}"))
    for name in ("ours", "batched")[: 1 + (options.images > 1)]:
        ratios = [
            statistics.median(one[kind] / other[kind] for one, other in zip(times[name], times["direct"], strict=True))
            for kind in (0, 1)
        ]
        print(ROW.format(f"{name} / direct", *(f"{ratio:.2f}" for ratio in ratios)))


class Contest:
    """The contenders, on the same images at every scale; each returns class maps (N, height, width)."""

    def __init__(self, net: Segmenter, images: list[list[Tensor]], size: Size) -> None:
        self.net, self.images, self.size = net, images, size
        self.logits: list[list[Tensor]] = []

    def direct(self) -> Tensor:
        return torch.stack([self._direct(scales) for scales in self.images])

    @torch.no_grad()
    def _direct(self, scales: list[Tensor]) -> Tensor:
        device = next(self.net.parameters()).device
        total = torch.zeros(1, NUM_CLASSES, *self.size, device=device)
        self.net.has_cpu_kernels = False
        for scale in scales:
            image = normalise(scale[None].to(device), self.net.convention)
            logits = self.net(image).main
            upsampled = F.interpolate(logits, size=tuple(self.size), mode="bilinear", align_corners=False)
            total = total + upsampled.softmax(1) / len(scales)
        return total.max(1).indices[0]

    def ours(self) -> Tensor:
        self.network()
        return self.merge()

    def network(self) -> None:
        self.net.has_cpu_kernels = True
        self.logits = [scale_logits(self.net, scales, self.net.convention) for scales in self.images]

    def merge(self) -> Tensor:
        return torch.stack([merge_scales(scales, tuple(self.size)).ids for scales in self.logits])

    def batched(self) -> Tensor:
        self.net.has_cpu_kernels = True
        self.logits = batch_logits(self.net, self.images, self.net.convention)
        return self.merge()


WAYS = {
    "one after the other": {"num_workers": 0},
    "ahead in a thread": {"num_workers": 0, "is_ahead": True},
    "ahead in one worker": {"num_workers": 1},
    "ahead in two workers": {"num_workers": 2},
}


def compare_reading(net: Segmenter, options: argparse.Namespace) -> None:
    """Evaluate files in all WAYS of reading them, which take turns."""
    with TemporaryDirectory() as folder:
        records = list_records(draw_images(Path(folder), options.reading))
        settings = ReadOptions(1000, net.size_divisor)
        data = EvalDataset(
            records, LabelMap(NUM_CLASSES, 1, [0]), settings, short_edges=options.scales, antialias=True,
            label_type=LABEL_TYPE,
        )  # fmt: skip
        found: dict[str, list[ReadingTimes]] = {name: [] for name in WAYS}
        for _ in range(options.rounds):
            for name, way in WAYS.items():
                found[name].append(measure_reading(net, data, way))
    pixels = {one.correct_pixels for measured in found.values() for one in measured}
    assert len(pixels) == 1, f"results differ: {pixels}"
    print(ROW.format("ms per image, median", "all", "waiting"))
    for name, measured in found.items():
        whole, waiting = (statistics.median(one[index] for one in measured) for index in (0, 1))
        print(ROW.format(name, f"{whole:.0f}", f"{waiting:.0f}"))


class ReadingTimes(NamedTuple):
    """Milliseconds per image after the first one, which waits for the workers to start."""

    whole: float
    waiting: float
    correct_pixels: int  # of all images


def measure_reading(net: Segmenter, data: EvalDataset, way: dict[str, Any]) -> ReadingTimes:
    loader = WatchedLoader(data, lambda number: [data.records[number].image], 0, None, **way, batch_size=None)
    device = next(net.parameters()).device
    samples, waiting, correct = iter(loader), 0.0, 0
    ready = next(samples)
    start = time.perf_counter()
    for number in range(len(data)):
        label = ready.label.to(device, non_blocking=True).long()
        logits = scale_logits(net, ready.scales, net.convention)
        prediction = merge_scales(logits, (label.shape[0], label.shape[1])).ids
        correct += int((prediction == label).sum())  # waits for the device
        if number + 1 < len(data):
            before = time.perf_counter()
            ready = next(samples)
            waiting += time.perf_counter() - before
    seconds = time.perf_counter() - start
    samples.close()  # pyright: ignore[reportAttributeAccessIssue] - a generator
    return ReadingTimes(seconds / len(data) * 1e3, waiting / len(data) * 1e3, correct)


def measure_seconds(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds of an action: wall time, CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
