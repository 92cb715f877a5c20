"""Measure a GPU in one call of less than eight minutes.

    pip install --editable ".[bench]"
    python benchmarks/gpu.py                                      # parts without time left are skipped and named
    python benchmarks/gpu.py --device cpu --small --minutes 5     # tests the script itself; its figures mean nothing

1. Matrix products: the peak that a network could reach, by type.
2. Training steps at the size of the published recipes, ours and those of other libraries in the same run: images per
   second, memory, and the fraction of the peak (operations of the architecture, counted by torch, times 3 for the
   backward pass). "factored" is the convolution of upsampled maps that only the CPU uses by default.
3. torch.compile with sizes that change from step to step: number of compilations, and time.
4. Memory of UPerNet-101 with two images of the largest published size.
5. Inference at one scale and at five scales.
6. The cost of synchronised normalisation, and training with its loader (mode=bench).
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
from training_step import (
    NETWORKS,
    NUM_CLASSES,
    build_ours,
    make_batch,
    segmentation_models_pytorch,
    set_kernels,
    training_step,
    transformers,
)

from semseg.config.preprocessing import PREPROCESSING
from semseg.evaluation.inference import predict
from semseg.nets.cost import count_operations
from semseg.nets.registry import build_segmenter
from semseg.training.losses import segmentation_loss

ROW = "{:<58}{:>12}{:>12}{:>12}"
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
SIZES = [(320, 416), (384, 512), (448, 608), (512, 672), (608, 800), (416, 320), (512, 384), (608, 448)]
TRAINING_FRACTION = 0.6  # part of the minutes that training may take
HERE = Path(__file__).resolve().parent


class Setting(NamedTuple):
    """One row of the table of training steps."""

    model: str  # ours, or the name of a library
    images: int
    precision: str
    layout: str = "eager"  # eager, channels_last, compiled (channels_last too) or factored (channels_last too)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--minutes", type=float, default=7.5, help="no part starts later than this")
    parser.add_argument("--small", action="store_true", help="small images, for testing the script")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all")
    options = parser.parse_args()
    options.height, options.width = (64, 96) if options.small else (448, 608)
    options.end = time.monotonic() + 60 * options.minutes
    options.end_of_training = time.monotonic() + TRAINING_FRACTION * 60 * options.minutes
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {device}, {options.height} x {options.width} pixels")
    peaks = measure_matrix_products(options)
    for name, part in PARTS.items():
        if options.parts and name not in options.parts:
            continue
        if time.monotonic() > options.end:
            print(f"\n{name}: skipped, no time left")
            continue
        print(f"\n{(part.__doc__ or '').splitlines()[0]}")
        part(options, peaks)


def measure_matrix_products(options: argparse.Namespace) -> dict[str, float]:
    """Operations per second of a large product, by precision."""
    side = 512 if options.small else 8192
    peaks = {}
    for precision, dtype in DTYPES.items():
        set_precision(precision)
        one = torch.randn(side, side, device=options.device, dtype=dtype)
        seconds = statistics.median(measure_seconds(lambda one=one: one @ one, options) for _ in range(10))
        peaks[precision] = 2 * side**3 / seconds
        print(f"matrix product, {precision}: {peaks[precision] / 1e12:.1f} TFLOP/s")
    return peaks


def settings() -> Iterator[Setting]:
    """All rows of the table, the most informative first, because time may run out before the last."""
    peers = ("segmentation-models-pytorch", "transformers")
    for images in (2, 8):
        yield from (Setting(peer, images, "float32") for peer in peers)
        yield from (Setting("upernet50", images, "float32"), Setting("upernet50", images, "bf16", "channels_last"))
    yield from (Setting(name, 8, "bf16", "compiled") for name in ("upernet50", *peers))
    for model in NETWORKS:
        for images in (2, 8):
            for precision in DTYPES:
                for layout in ("eager", "channels_last", "factored"):
                    yield Setting(model, images, precision, layout)
    yield from (Setting(name, 2, "bf16", "compiled") for name in ("upernet50", *peers))
    yield from (Setting("resnet50_dilated8_ppm_deepsup", images, "bf16", "compiled") for images in (8, 2))


def measure_training(options: argparse.Namespace, peaks: dict[str, float]) -> None:
    """Training: forward, loss, backward, SGD step."""
    print(ROW.format("", "images/s", "peak MB", "of the peak"))
    for setting in dict.fromkeys(settings()):
        if time.monotonic() > options.end_of_training:
            print(f"{format_setting(setting)}: skipped, no time left")
            continue
        try:
            rate, memory, fraction = measure_step(setting, options, peaks[setting.precision])
        except (ImportError, torch.OutOfMemoryError) as error:
            print(f"{format_setting(setting)}: skipped, {str(error).splitlines()[0]}")
            continue
        print(ROW.format(format_setting(setting), f"{rate:.1f}", f"{memory:.0f}", fraction))


def measure_step(setting: Setting, options: argparse.Namespace, peak: float) -> tuple[float, float, str]:
    """Images per second, peak memory in MB, and the fraction of the matrix peak ("" for other libraries)."""
    options = copy.copy(options)
    options.images, options.precision = setting.images, setting.precision
    set_precision(setting.precision)
    clear(options)
    step = build_step(setting, options)
    for _ in range(3):
        measure_seconds(step, options)
    seconds = statistics.median(measure_seconds(step, options) for _ in range(3 if options.small else 12))
    fraction = f"{count_step_operations(setting, options) / seconds / peak:.0%}" if setting.model in NETWORKS else ""
    return setting.images / seconds, peak_memory_mb(options), fraction


def build_step(setting: Setting, options: argparse.Namespace) -> Callable[[], Tensor]:
    if setting.model not in NETWORKS:
        build = segmentation_models_pytorch if setting.model.startswith("seg") else transformers
        return build(options, compiled=setting.layout == "compiled")
    net = build_ours(setting.model).to(options.device)
    image, label = make_batch(options, net.label_stride)  # pyright: ignore[reportArgumentType]
    if setting.layout != "eager":
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        image = image.contiguous(memory_format=torch.channels_last)
    if setting.layout == "compiled":
        net.compile(dynamic=True)
    if setting.layout == "factored":
        set_kernels(net, cpu_kernels=True, factored=True)
    return training_step(net, lambda: segmentation_loss(net(image), label).total, options)


def count_step_operations(setting: Setting, options: argparse.Namespace) -> float:
    """Operations of a training step: three times those of the forward pass, counted on meta tensors."""
    net = build_ours(setting.model).to("meta")
    image = torch.empty(setting.images, 3, options.height, options.width, device="meta")
    return 3 * count_operations(net, image).get_total_flops()


def measure_changing_sizes(options: argparse.Namespace, peaks: dict[str, float]) -> None:
    """UPerNet-50, bf16, 2 images, a new size at every step: seconds of a pass over the sizes."""
    sizes = [(height // 8 // 32 * 32 or 32, width // 8 // 32 * 32 or 32) for height, width in SIZES]
    sizes = sizes if options.small else SIZES
    for layout in ("channels_last", "compiled"):
        clear(options)
        torch._dynamo.reset()
        counters.clear()
        net = build_ours("upernet50").to(options.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if layout == "compiled":
            net.compile(dynamic=True)
        seconds = [
            sum(measure_seconds(build_changing_step(net, size, options), options) for size in sizes) for _ in range(3)
        ]
        compiled = counters["stats"]["unique_graphs"]
        print(f"{layout}: first pass {seconds[0]:.2f} s, third {seconds[2]:.2f} s, {compiled} graphs compiled")


def build_changing_step(net: nn.Module, size: tuple[int, int], options: argparse.Namespace) -> Callable[[], Tensor]:
    options = copy.copy(options)
    options.images, options.precision, (options.height, options.width) = 2, "bf16", size
    image, label = make_batch(options, net.label_stride)  # pyright: ignore[reportArgumentType]
    image = image.contiguous(memory_format=torch.channels_last)
    return training_step(net, lambda: segmentation_loss(net(image), label).total, options)


def measure_largest_network(options: argparse.Namespace, peaks: dict[str, float]) -> None:
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
        image, label = make_batch(options, net.label_stride)
        step = training_step(net, lambda net=net, i=image, t=label: segmentation_loss(net(i), t).total, options)
        for _ in range(2):
            measure_seconds(step, options)
        print(f"{precision}: {peak_memory_mb(options):.0f} MB")


def measure_inference(options: argparse.Namespace, peaks: dict[str, float]) -> None:
    """Evaluation of one image of 512 x 683, class map at its size: images per second."""
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

            def predict_once(net: nn.Module = net, images: list[Tensor] = images) -> object:
                return predict(net, images, (height, width), PREPROCESSING["rgb_mean_std"])

            for _ in range(2):
                measure_seconds(predict_once, options)
            seconds = statistics.median(
                measure_seconds(predict_once, options) for _ in range(3 if options.small else 10)
            )
            print(f"{model}, {len(edges)} scale{'s' if len(edges) > 1 else ''}: {1 / seconds:.1f} images/s")


def measure_loop(options: argparse.Namespace, peaks: dict[str, float]) -> None:
    """Synchronised normalisation against plain, and training with its loader, in separate processes."""
    with TemporaryDirectory() as folder:
        small = ["data.short_edges=[64]", "bench.steps=2", "bench.warmup=1", "bench.images=2"] if options.small else []
        overrides = ["mode=bench", "data=scenes", "model=upernet50", "model.encoder.weights=none", "data.num_workers=8"]
        trainer = "gpu" if options.device == "cuda" else "cpu"
        bench = [str(HERE.parent / "run.py"), *overrides, *small, f"trainer={trainer}"]
        syncbn = [str(HERE / "syncbn.py"), "--device", options.device, "--processes", "1", "--rounds", "3"]
        for command in [bench] if options.small else [syncbn, bench]:
            subprocess.run([sys.executable, *command], cwd=folder, check=False)


# ---- measuring


def measure_seconds(action: Callable[[], object], options: argparse.Namespace) -> float:
    """Seconds, with the device synchronised before and after."""
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


def peak_memory_mb(options: argparse.Namespace) -> float:
    """Peak memory of the device since the last `clear`; NaN on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else float("nan")


def set_precision(precision: str) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # convolutions, which use tf32 by default


def format_setting(setting: Setting) -> str:
    return f"{setting.model}, {setting.images} images, {setting.precision}, {setting.layout}"


PARTS = {
    "training": measure_training,
    "changing_sizes": measure_changing_sizes,
    "largest_network": measure_largest_network,
    "inference": measure_inference,
    "loop": measure_loop,
}

if __name__ == "__main__":
    main()
