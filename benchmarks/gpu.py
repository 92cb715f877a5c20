"""Measure a GPU in one call of less than eight minutes: one table, and the best settings.

    pip install --editable ".[bench]"                    # the other libraries; without them their rows are skipped
    python benchmarks/gpu.py                             # parts without time left are skipped and named
    python benchmarks/gpu.py --device cpu --toy          # tests the script itself in seconds; its figures mean nothing

1. Matrix products: the peak that a network could reach, by type.
2. Training steps at the size of the published recipes, ours and those of other libraries on the same images in the same
   run: images per second, memory, and the fraction of the peak (operations of the architecture, counted by torch,
   times 3 for the backward pass). "factored" is the convolution of upsampled maps that only the CPU uses by default.
3. torch.compile with sizes that change from step to step: number of graphs, and time.
4. Memory of UPerNet-101 with two images of the largest published size.
5. Inference at one scale and at five scales.
6. The cost of synchronised normalisation, and training with its loader (mode=bench).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import syncbn
import torch
import torch.distributed as dist
import training_step
from torch import Tensor, nn
from torch._dynamo.utils import counters
from training_step import NUM_CLASSES, make_batch, set_kernels

from semseg.config.preprocessing import PREPROCESSING
from semseg.evaluation.inference import predict_class_map
from semseg.nets.blocks import conv_norm_relu
from semseg.nets.compilation import compile_network
from semseg.nets.cost import count_operations
from semseg.nets.decoders.upernet import UPerNet
from semseg.nets.interfaces import Encoder
from semseg.nets.registry import build_segmenter
from semseg.nets.segmenter import Segmenter
from semseg.training.losses import segmentation_loss

ROW = "{:<62}{:>10} {:<10}{:>10}{:>12}"
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
SIZES = [(320, 416), (384, 512), (448, 608), (512, 672), (608, 800), (416, 320), (512, 384), (608, 448)]
TOY_SIZES = [(32, 64), (64, 96)]
LARGEST_NETWORK = ("resnet101", "upernet")
TRAINING_FRACTION = 0.6  # part of the minutes that training may take
PEERS: dict[str, Callable[..., Callable[[], Tensor]]] = {
    "segmentation-models-pytorch": training_step.segmentation_models_pytorch,
    "transformers": training_step.transformers,
}
HERE = Path(__file__).resolve().parent


class Setting(NamedTuple):
    """One row of the training steps."""

    model: str  # ours, or the name of a library
    images: int
    precision: str
    layout: str = "eager"  # eager, channels_last, compiled (channels_last too) or factored (channels_last too)

    def __str__(self) -> str:
        return f"{self.model}, {self.images} images, {self.precision}, {self.layout}"


class ToyEncoder(Encoder):
    """Two maps of a few channels: for tests of this program, in place of all encoders."""

    channels, strides = (8, 16), (4, 8)

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(conv_norm_relu(3, 8, 3, stride=2), conv_norm_relu(8, 8, 3, stride=2))
        self.coarse = conv_norm_relu(8, 16, 3, stride=2)

    def forward(self, image: Tensor) -> list[Tensor]:
        fine = self.fine(image)
        return [fine, self.coarse(fine)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--minutes", type=float, default=7.5, help="no part starts later than this")
    parser.add_argument("--toy", action="store_true", help="tiny images and networks, to test the script")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all")
    options = parser.parse_args()
    options.height, options.width = (32, 64) if options.toy else (448, 608)
    options.end = time.monotonic() + 60 * options.minutes
    options.end_of_training = time.monotonic() + TRAINING_FRACTION * 60 * options.minutes
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {device}, {options.height} x {options.width} pixels")
    print(ROW.format("", "result", "", "peak MB", "of the peak"))
    results: dict[Setting, float] = {}
    peaks = measure_matrix_products(options)
    for name, part in PARTS.items():
        if options.parts and name not in options.parts:
            continue
        if time.monotonic() > options.end:
            skip(name, "no time left")
            continue
        part(options, peaks, results)
    print("\n".join(["", *describe_best(results)]))


def show(name: str, value: float, unit: str, *, memory: float | None = None, fraction: float | None = None) -> None:
    """Print one row of the table."""
    parts = "" if memory is None else f"{memory:.0f}", "" if fraction is None else f"{fraction:.0%}"
    print(ROW.format(name, f"{value:.4g}", unit, *parts), flush=True)


def skip(name: str, reason: str) -> None:
    print(f"{name}: skipped, {reason}", flush=True)


# ---- the parts


def measure_matrix_products(options: argparse.Namespace) -> dict[str, float]:
    """Operations per second of a large product, by precision."""
    side = 128 if options.toy else 8192
    peaks = {}
    for precision, dtype in DTYPES.items():
        set_precision(precision)
        one = torch.randn(side, side, device=options.device, dtype=dtype)
        peaks[precision] = 2 * side**3 / measure_median(partial(torch.matmul, one, one), options, warmup=3)
        show(f"matrix product, {precision}", peaks[precision] / 1e12, "TFLOP/s")
    return peaks


def settings(*, toy: bool) -> Iterator[Setting]:
    """All training steps, the most informative first, because time may run out before the last."""
    if toy:
        yield from (Setting(peer, 2, "float32") for peer in PEERS)
        yield from (Setting("upernet50", 2, "tf32", layout) for layout in ("eager", "factored"))
        yield Setting("upernet50", 2, "bf16", "channels_last")  # networks are compiled in measure_changing_sizes
        return
    for images in (2, 8):
        yield from (Setting(peer, images, "float32") for peer in PEERS)
        yield from (Setting("upernet50", images, "float32"), Setting("upernet50", images, "bf16", "channels_last"))
        yield from (Setting(peer, images, "bf16") for peer in PEERS)
    yield from (Setting(name, 8, "bf16", "compiled") for name in ("upernet50", *PEERS))
    for model in training_step.NETWORKS:
        for images in (2, 8):
            for precision in DTYPES:
                for layout in ("eager", "channels_last", "factored"):
                    yield Setting(model, images, precision, layout)
    yield from (Setting(name, 2, "bf16", "compiled") for name in ("upernet50", *PEERS))
    yield from (Setting("resnet50_dilated8_ppm_deepsup", images, "bf16", "compiled") for images in (8, 2))


def measure_training(options: argparse.Namespace, peaks: dict[str, float], results: dict[Setting, float]) -> None:
    """Training: forward, loss, backward, SGD step."""
    for setting in dict.fromkeys(settings(toy=options.toy)):
        if time.monotonic() > options.end_of_training:
            skip(str(setting), "no time left")
            continue
        try:
            seconds, memory = measure_step(setting, options)
        except (ImportError, torch.OutOfMemoryError) as error:
            skip(str(setting), str(error).splitlines()[0])
            continue
        results[setting] = setting.images / seconds
        is_ours = setting.model not in PEERS
        fraction = count_step_operations(setting, options) / seconds / peaks[setting.precision] if is_ours else None
        show(str(setting), results[setting], "images/s", memory=memory, fraction=fraction)


def measure_step(setting: Setting, options: argparse.Namespace) -> tuple[float, float | None]:
    """Seconds of a training step, and the peak memory in MB."""
    options = copy.copy(options)
    options.images, options.precision = setting.images, setting.precision
    set_precision(setting.precision)
    clear(options)
    step = build_step(setting, options)
    seconds = measure_median(step, options, warmup=1 if options.toy else 3)
    return seconds, peak_memory_mb(options)


def build_step(setting: Setting, options: argparse.Namespace) -> Callable[[], Tensor]:
    if setting.model in PEERS:
        return PEERS[setting.model](options, compiled=setting.layout == "compiled", small=options.toy)
    net = build_ours(setting.model, options).to(options.device)
    image, label = make_batch(options, net.label_stride)
    if setting.layout != "eager":
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        image = image.contiguous(memory_format=torch.channels_last)
    if setting.layout == "compiled":
        compile_network(net, choose_backend(options))
    if setting.layout == "factored":
        set_kernels(net, cpu_kernels=True, factored=True)
    return training_step.training_step(net, lambda: segmentation_loss(net(image), label).total, options)


def build_ours(model: str, options: argparse.Namespace) -> Segmenter:
    if options.toy:
        encoder = ToyEncoder()
        return Segmenter(encoder, UPerNet(encoder.channels, NUM_CLASSES, width=16), NUM_CLASSES).train()
    torch.manual_seed(0)
    encoder, decoder = training_step.NETWORKS.get(model, LARGEST_NETWORK)
    return build_segmenter(encoder, decoder, NUM_CLASSES).train()


def choose_backend(options: argparse.Namespace) -> str:
    return "eager" if options.toy else "inductor"


def count_step_operations(setting: Setting, options: argparse.Namespace) -> float:
    """Operations of a training step: three times those of the forward pass, counted on meta tensors."""
    net = build_ours(setting.model, options).to("meta")
    image = torch.empty(setting.images, 3, options.height, options.width, device="meta")
    return 3 * count_operations(net, image).get_total_flops()


def measure_changing_sizes(options: argparse.Namespace, peaks: dict[str, float], results: dict[Setting, float]) -> None:
    """UPerNet-50, bf16, 2 images, a new size at every step: seconds of a pass over the sizes."""
    for layout in ("channels_last", "compiled"):
        clear(options)
        torch._dynamo.reset()
        counters.clear()
        net = build_ours("upernet50", options).to(options.device)
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if layout == "compiled":
            compile_network(net, choose_backend(options))
        sizes = TOY_SIZES if options.toy else SIZES
        first, *_, last = [
            sum(measure_seconds(build_changing_step(net, size, options), options) for size in sizes)
            for _ in range(2 if options.toy else 3)
        ]
        show(f"{len(sizes)} sizes of upernet50, {layout}, first pass", first, "s")
        show(f"{len(sizes)} sizes of upernet50, {layout}, later", last, "s")
    show("graphs that were compiled", counters["stats"]["unique_graphs"], "graphs")


def build_changing_step(net: Segmenter, size: tuple[int, int], options: argparse.Namespace) -> Callable[[], Tensor]:
    options = copy.copy(options)
    options.images, options.precision, (options.height, options.width) = 2, "bf16", size
    image, label = make_batch(options, net.label_stride)
    image = image.contiguous(memory_format=torch.channels_last)
    return training_step.training_step(net, lambda: segmentation_loss(net(image), label).total, options)


def measure_largest_network(
    options: argparse.Namespace, peaks: dict[str, float], results: dict[Setting, float]
) -> None:
    """Memory of UPerNet-101, 2 images of 608 x 992 (short edge 600, long edge 1000), to fit 12 GB."""
    options = copy.copy(options)
    options.images = 2
    if not options.toy:
        options.height, options.width = 608, 992
    for precision in ("float32", "bf16"):
        options.precision = precision
        clear(options)
        net = build_ours("upernet101", options).to(options.device)
        image, label = make_batch(options, net.label_stride)
        loss = partial(compute_loss, net, image, label)
        seconds = measure_median(training_step.training_step(net, loss, options), options, rounds=1)
        show(f"upernet101, 2 images of {options.height} x {options.width}, {precision}", 2 / seconds, "images/s",
             memory=peak_memory_mb(options))  # fmt: skip


def compute_loss(net: Segmenter, image: Tensor, label: Tensor) -> Tensor:
    return segmentation_loss(net(image), label).total


def measure_inference(options: argparse.Namespace, peaks: dict[str, float], results: dict[Setting, float]) -> None:
    """Evaluation of one image of 512 x 683, class map at its size: images per second."""
    set_precision("tf32")
    height, width = (64, 85) if options.toy else (512, 683)
    for model in ("upernet50",) if options.toy else training_step.NETWORKS:
        net = build_ours(model, options).eval().to(options.device)
        for edges in ((450,), (300, 375, 450, 525, 600)):
            sizes = [(edge * height // 512 // 32 * 32 or 32, edge * width // 512 // 32 * 32 or 32) for edge in edges]
            images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8).to(options.device) for size in sizes]
            action = partial(predict_class_map, net, images, (height, width), PREPROCESSING["rgb_mean_std"])
            scales = f"{len(edges)} scale{'s' if len(edges) > 1 else ''}"
            show(f"inference of {model}, {scales}", 1 / measure_median(action, options, rounds=10), "images/s")


def measure_synchronised_norms(
    options: argparse.Namespace, peaks: dict[str, float], results: dict[Setting, float]
) -> None:
    """Synchronised normalisation against plain, in one process, with the reduction enforced."""
    small = argparse.Namespace(
        device=options.device, processes=1, convention="torch", encoder="resnet18", batch=2,
        size=32 if options.toy else 320,
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        backend = "gloo" if options.device == "cpu" else "nccl"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            plain, synchronised = (
                measure_median(step, options) for step in syncbn.build_step_pair("channels_last", small)
            )
        finally:
            dist.destroy_process_group()
    show("a step with synchronised normalisation, of one without", synchronised / plain, "times")


def measure_loop(options: argparse.Namespace, peaks: dict[str, float], results: dict[Setting, float]) -> None:
    """Training with its loader, in a process of its own (mode=bench)."""
    overrides = ["mode=bench", "data=scenes", "model=upernet50", "model.encoder.weights=none", "data.num_workers=8"]
    if options.toy:
        overrides += [
            "model/encoder=resnet18", "model/decoder=c1", "data.short_edges=[64]", "eval.scales=[64]", "bench.steps=1",
            "bench.warmup=1", "bench.images=1", "data.num_workers=0", "data.make.num_train=2", "data.make.num_val=1",
            "data.batch_size=1",
        ]  # fmt: skip
    trainer = "gpu" if options.device == "cuda" else "cpu"
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE.parent / "run.py"), *overrides, f"trainer={trainer}", "run_dir=bench"]
        program = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
        if program.returncode:
            skip("mode=bench", (program.stderr.strip().splitlines() or ["it ended without a message"])[-1])
            return
        figures = json.loads((Path(folder) / "bench" / "bench.json").read_text())
    show("mode=bench: the loader alone", figures["loading"]["images_per_s"], "images/s")
    memory = figures["training"]["memory"] / 2**20
    show("mode=bench: training with its loader", figures["training"]["images_per_s"], "images/s", memory=memory)


# ---- the best settings


def describe_best(results: dict[Setting, float]) -> list[str]:
    """The fastest setting of each of our networks as a command, and how it compares with the other libraries.

    Args:
        results: images per second.
    """
    lines = []
    for model in dict.fromkeys(setting.model for setting in results if setting.model not in PEERS):
        ours = {setting: rate for setting, rate in results.items() if setting.model == model}
        usable = [setting for setting in ours if setting.precision != "float32" and setting.layout != "factored"]
        if not usable:
            continue
        best = max(usable, key=ours.__getitem__)
        lines.append(f"best settings of {model}: {best.images} images, {best.precision}, {best.layout}: "
                     f"{ours[best]:.4g} images/s")  # fmt: skip
        lines.append(f"    python run.py {' '.join(list_overrides(best))}")
        fastest = max(ours, key=ours.__getitem__)
        if fastest.layout == "factored":
            lines.append(f"    faster yet, but not a setting: {fastest}: {ours[fastest]:.4g} images/s")
    for peer in PEERS:
        for setting, rate in results.items():
            same = setting._replace(model="upernet50", layout="compiled" if setting.layout == "compiled" else "eager")
            if setting.model == peer and same in results:
                lines.append(f"{same}: {results[same] / rate:.2f} times the images/s of {peer}")
    return lines or ["no training step was measured"]


def list_overrides(setting: Setting) -> list[str]:
    """What chooses a setting on a command line."""
    words = [f"model={setting.model}", "trainer=gpu", f"data.batch_size={setting.images}"]
    if setting.precision == "tf32":
        words.append("trainer.precision=32-true")
    if setting.layout == "eager":
        words.append("model.channels_last=false")
    if setting.layout == "compiled":
        words.append("model.compile=true")
    return words


# ---- measuring


def measure_median(
    action: Callable[[], object], options: argparse.Namespace, *, warmup: int = 1, rounds: int = 12
) -> float:
    """Seconds, the median of `rounds` after `warmup`."""
    rounds = min(rounds, 2) if options.toy else rounds
    seconds = [measure_seconds(action, options) for _ in range(warmup + rounds)]
    return statistics.median(seconds[warmup:])


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


def peak_memory_mb(options: argparse.Namespace) -> float | None:
    """Peak memory of the device since the last `clear`; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else None


def set_precision(precision: str) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # convolutions, which use tf32 by default


PARTS = {
    "training": measure_training,
    "changing_sizes": measure_changing_sizes,
    "largest_network": measure_largest_network,
    "inference": measure_inference,
    "synchronised_norms": measure_synchronised_norms,
    "loop": measure_loop,
}

if __name__ == "__main__":
    main()
