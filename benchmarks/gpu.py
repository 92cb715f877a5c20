"""Everything that is to be known of a GPU, in one call of under eight minutes.

    pip install --editable ".[bench]"
    python benchmarks/gpu.py                                      # what there is no time for is left out, saying so
    python benchmarks/gpu.py --device cpu --small --minutes 5     # tries the program itself, its figures mean nothing

1. Matrix products: the peak that a network could reach, by type.
2. Training steps at the published size, ours and other libraries' in the same run: images a second, memory, and the
   share of the peak (operations of the architecture counted by torch, times 3 for the backward pass).
3. torch.compile under sizes that change from step to step: how often it compiles again, and whether it pays.
4. Memory of UPerNet-101 with two images of the largest published size.
5. Inference at one scale and at five.
6. The cost of synchronised normalisation, and the whole of training with its loader (mode=bench).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from training_step import NETWORKS, NUM_CLASSES, batch, build_ours, segmentation_models_pytorch, stepping, transformers

from semseg.config.preprocessing import PREPROCESSING
from semseg.evaluation.inference import predict
from semseg.nets.cost import count_operations
from semseg.nets.registry import build_segmenter
from semseg.training.losses import segmentation_loss

ROW = "{:<58}{:>12}{:>12}{:>12}"
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
SIZES = [(320, 416), (384, 512), (448, 608), (512, 672), (608, 800), (416, 320), (512, 384), (608, 448)]
TRAINING = 0.6  # of the minutes
HERE = Path(__file__).resolve().parent


class Way(NamedTuple):
    """One row of the table of training steps."""

    model: str  # ours, or the name of a library
    images: int
    precision: str
    layout: str = "eager"  # eager, channels_last or compiled (channels_last too)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which nothing new is begun")
    parser.add_argument("--small", action="store_true", help="small images, for trying the program")
    parser.add_argument("--parts", nargs="+", choices=[part.__name__ for part in PARTS], help="all")
    options = parser.parse_args()
    options.height, options.width = (64, 96) if options.small else (448, 608)
    options.end = time.monotonic() + 60 * options.minutes
    options.end_of_training = time.monotonic() + TRAINING * 60 * options.minutes
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}, {options.height} x {options.width} pixels")
    peaks = matrix_products(options)
    for part in PARTS:
        if options.parts and part.__name__ not in options.parts:
            continue
        if time.monotonic() > options.end:
            print(f"\n{part.__name__}: left out, the time is over")
            continue
        print(f"\n{(part.__doc__ or '').splitlines()[0]}")
        part(options, peaks)


def matrix_products(options: argparse.Namespace) -> dict[str, float]:
    """Operations a second of a large product, by precision."""
    side = 512 if options.small else 8192
    peaks = {}
    for precision, dtype in DTYPES.items():
        set_precision(precision)
        one = torch.randn(side, side, device=options.device, dtype=dtype)
        seconds = statistics.median(timed(lambda one=one: one @ one, options) for _ in range(10))
        peaks[precision] = 2 * side**3 / seconds
        print(f"matrix product, {precision}: {peaks[precision] / 1e12:.1f} TFLOP/s")
    return peaks


def ways() -> Iterator[Way]:
    """The most telling first, since time may be over before the last."""
    peers = ("segmentation-models-pytorch", "transformers")
    for images in (2, 8):
        yield from (Way(peer, images, "float32") for peer in peers)
        yield from (Way("upernet50", images, "float32"), Way("upernet50", images, "bf16", "channels_last"))
    yield from (Way(name, 8, "bf16", "compiled") for name in ("upernet50", *peers))
    for model in NETWORKS:
        for images in (2, 8):
            for precision in DTYPES:
                for layout in ("eager", "channels_last"):
                    yield Way(model, images, precision, layout)
    yield from (Way(name, 2, "bf16", "compiled") for name in ("upernet50", *peers))
    yield from (Way("resnet50_dilated8_ppm_deepsup", images, "bf16", "compiled") for images in (8, 2))


def training(options: argparse.Namespace, peaks: dict[str, float]) -> None:
    """Training: forward, loss, backward, SGD step."""
    print(ROW.format("", "images/s", "peak MB", "of the peak"))
    for way in dict.fromkeys(ways()):
        if time.monotonic() > options.end_of_training:
            print(f"{in_words(way)}: left out, the time is over")
            continue
        try:
            rate, memory, share = measured(way, options, peaks[way.precision])
        except (ImportError, torch.OutOfMemoryError) as error:
            print(f"{in_words(way)}: left out, {str(error).splitlines()[0]}")
            continue
        print(ROW.format(in_words(way), f"{rate:.1f}", f"{memory:.0f}", share))


def measured(way: Way, options: argparse.Namespace, peak: float) -> tuple[float, float, str]:
    """Images a second, MB at the peak, and the share of the matrix peak ("" for other libraries)."""
    options = copy.copy(options)
    options.images, options.precision = way.images, way.precision
    set_precision(way.precision)
    clear(options)
    step = step_of(way, options)
    for _ in range(3):
        timed(step, options)
    seconds = statistics.median(timed(step, options) for _ in range(3 if options.small else 12))
    share = f"{operations(way, options) / seconds / peak:.0%}" if way.model in NETWORKS else ""
    return way.images / seconds, peak_memory(options), share


def step_of(way: Way, options: argparse.Namespace) -> Callable[[], Tensor]:
    if way.model not in NETWORKS:
        build = segmentation_models_pytorch if way.model.startswith("seg") else transformers
        return build(options, compiled=way.layout == "compiled")
    net = build_ours(way.model).to(options.device)
    image, label = batch(options, net.label_stride)  # pyright: ignore[reportArgumentType]
    if way.layout != "eager":
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        image = image.contiguous(memory_format=torch.channels_last)
    if way.layout == "compiled":
        net.compile(dynamic=True)
    return stepping(net, lambda: segmentation_loss(net(image), label).total, options)


def operations(way: Way, options: argparse.Namespace) -> float:
    """Of a training step: three times those of the forward pass, counted on tensors without numbers."""
    net = build_ours(way.model).to("meta")
    image = torch.empty(way.images, 3, options.height, options.width, device="meta")
    return 3 * count_operations(net, image).get_total_flops()


def changing_sizes(options: argparse.Namespace, peaks: dict[str, float]) -> None:
    """UPerNet-50, bf16, 2 images, another size at every step: seconds of a pass over the sizes."""
    sizes = [(height // 8 // 32 * 32 or 32, width // 8 // 32 * 32 or 32) for height, width in SIZES]
    sizes = sizes if options.small else SIZES
    for layout in ("channels_last", "compiled"):
        clear(options)
        torch._dynamo.reset()
        counters.clear()
        net = build_ours("upernet50").to(options.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if layout == "compiled":
            net.compile(dynamic=True)
        seconds = [sum(timed(changing_step(net, size, options), options) for size in sizes) for _ in range(3)]
        compiled = counters["stats"]["unique_graphs"]
        print(f"{layout}: first pass {seconds[0]:.2f} s, third {seconds[2]:.2f} s, {compiled} graphs compiled")


def changing_step(net: nn.Module, size: tuple[int, int], options: argparse.Namespace) -> Callable[[], Tensor]:
    options = copy.copy(options)
    options.images, options.precision, (options.height, options.width) = 2, "bf16", size
    image, label = batch(options, net.label_stride)  # pyright: ignore[reportArgumentType]
    image = image.contiguous(memory_format=torch.channels_last)
    return stepping(net, lambda: segmentation_loss(net(image), label).total, options)


def largest_network(options: argparse.Namespace, peaks: dict[str, float]) -> None:
    """Memory of UPerNet-101, 2 images of 608 x 992 (short edge 600, long edge 1000), to fit 12 GB."""
    options = copy.copy(options)
    options.images = 2
    if not options.small:
        options.height, options.width = 608, 992
    for precision in ("float32", "bf16"):
        options.precision = precision
        clear(options)
        torch.manual_seed(0)
        net = build_segmenter("resnet101", "upernet", NUM_CLASSES).train().to(options.device)
        image, label = batch(options, net.label_stride)
        step = stepping(net, lambda net=net, i=image, t=label: segmentation_loss(net(i), t).total, options)
        for _ in range(2):
            timed(step, options)
        print(f"{precision}: {peak_memory(options):.0f} MB")


def inference(options: argparse.Namespace, peaks: dict[str, float]) -> None:
    """Evaluation of one image of 512 x 683, class map at its size: images a second."""
    set_precision("tf32")
    height, width = (64, 85) if options.small else (512, 683)
    for model in NETWORKS:
        net = build_ours(model).eval().to(options.device)
        for edges in ((450,), (300, 375, 450, 525, 600)):
            scales = [
                torch.randint(0, 256, (3, edge * height // 512 // 32 * 32, edge * width // 512 // 32 * 32 or 32))
                for edge in (max(edge, 512 if options.small else 0) for edge in edges)
            ]
            images = [scale.to(torch.uint8).to(options.device) for scale in scales]

            def once(net: nn.Module = net, images: list[Tensor] = images) -> object:
                return predict(net, images, (height, width), PREPROCESSING["rgb_mean_std"])

            for _ in range(2):
                timed(once, options)
            seconds = statistics.median(timed(once, options) for _ in range(3 if options.small else 10))
            print(f"{model}, {len(edges)} scale{'s' if len(edges) > 1 else ''}: {1 / seconds:.1f} images/s")


def whole(options: argparse.Namespace, peaks: dict[str, float]) -> None:
    """Synchronised normalisation against plain, and training with its loader (programs of their own)."""
    with TemporaryDirectory() as folder:
        small = ["data.short_edges=[64]", "bench.steps=2", "bench.warmup=1", "bench.images=2"] if options.small else []
        words = ["mode=bench", "data=scenes", "model=upernet50", "model.encoder.weights=none", "data.num_workers=8"]
        trainer = "gpu" if options.device == "cuda" else "cpu"
        bench = [str(HERE.parent / "run.py"), *words, *small, f"trainer={trainer}"]
        syncbn = [str(HERE / "syncbn.py"), "--device", options.device, "--processes", "1", "--rounds", "3"]
        for command in [bench] if options.small else [syncbn, bench]:
            subprocess.run([sys.executable, *command], cwd=folder, check=False)


# ---- measuring


def timed(action: Callable[[], object], options: argparse.Namespace) -> float:
    """Seconds, with the device's work done before and after."""
    synchronise(options)
    started = time.perf_counter()
    action()
    synchronise(options)
    return time.perf_counter() - started


def synchronise(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def clear(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(options: argparse.Namespace) -> float:
    """MB of the device since the last `clear`; not counted on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else float("nan")


def set_precision(precision: str) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # convolutions, which are tf32 unless told


def in_words(way: Way) -> str:
    return f"{way.model}, {way.images} images, {way.precision}, {way.layout}"


PARTS = (training, changing_sizes, largest_network, inference, whole)

if __name__ == "__main__":
    main()
