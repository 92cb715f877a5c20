"""Training steps of our networks and of other libraries, side by side in the same run.

    pip install segmentation-models-pytorch transformers      # missing ones are reported and skipped
    python benchmarks/training_step.py                        # UPerNet on ResNet-50, 2 images of 256 x 352, on the CPU
    python benchmarks/training_step.py --model resnet50_dilated8_ppm_deepsup
    python benchmarks/training_step.py --device cuda --height 448 --width 608 --precision bf16

A step is forward, loss, backward and an SGD step, with the labels and the loss that each library trains with. Every
contender runs in its own process, and they take turns, one step each, so that other load on the machine affects all of
them. Wall time and CPU time are medians. "Tensors" is the peak size of the tensors that a step creates, gradients
included, measured in a separate step. "Process" is the peak of the process above its size with the network built,
including memory that the allocator holds back (it varies by 5 % from run to run). On CUDA both are device memory.

"direct" is our network with the operators of the published architecture: maps are upsampled and concatenated before a
convolution. "factored" mixes channels before upsampling (`UpsampledConcatConv`). On the CPU "ours" is factored and uses
the kernels of nets/cpu, elsewhere it is direct. The script first asserts that both give the same logits and gradients.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from semseg.nets.compilation import compile_network
from semseg.nets.registry import build_segmenter
from semseg.nets.segmenter import Segmenter
from semseg.nets.upsampled_conv import UpsampledConcatConv
from semseg.training.losses import segmentation_loss

NUM_CLASSES = 150
ROW = "{:<34}{:>10}{:>10}{:>12}{:>14}{:>14}"
Step = Callable[[], Tensor]


class Round(NamedTuple):
    """Time and memory of one step."""

    wall: float  # seconds
    cpu: float  # seconds of all threads
    memory: float  # MB, the peak so far above that of the network alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="upernet50")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="float32")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--height", type=int, default=256, help="pixels, a multiple of 32")
    parser.add_argument("--width", type=int, default=352)
    parser.add_argument("--threads", type=int, default=2, help="threads of each process")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each contender, after one for warming up")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {options}")
    compare_with_direct(options)
    rounds, tensors = take_turns(MODELS[options.model], options)
    first = next(iter(rounds.values()))
    print(ROW.format("", "wall s", "CPU s", "wall ratio", "tensors MB", "process MB"))
    for name, steps in rounds.items():
        wall, cpu = (statistics.median(values) for values in list(zip(*steps, strict=True))[:2])
        ratio = statistics.median(one.wall / other.wall for one, other in zip(first, steps, strict=True))
        memory_mb = f"{tensors[name]:.0f}", f"{steps[-1].memory:.0f}"
        print(ROW.format(name, f"{wall:.2f}", f"{cpu:.2f}", f"{ratio:.2f}", *memory_mb))
    print("wall ratio: our time over this one, median of the rounds")


# ---- the contenders


def ours(
    options: argparse.Namespace,
    model: str,
    *,
    channels_last: bool = False,
    compiled: bool = False,
    cpu_kernels: bool = True,
    factored: bool | None = None,
) -> Step:
    net = build_ours(model).to(options.device)
    set_kernels(net, cpu_kernels=cpu_kernels, factored=factored)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    image, label = make_batch(options, net.label_stride)
    image = image.contiguous(memory_format=layout)
    if compiled:
        compile_network(net)
    return training_step(net, lambda: segmentation_loss(net(image), label).total, options)


def build_ours(model: str) -> Segmenter:
    torch.manual_seed(0)
    encoder, decoder = NETWORKS[model]
    return build_segmenter(encoder, decoder, NUM_CLASSES).train()


def segmentation_models_pytorch(options: argparse.Namespace, *, compiled: bool = False, small: bool = False) -> Step:
    """UPerNet; `small` is for testing programs."""
    import segmentation_models_pytorch as smp

    encoder, width = ("resnet18", 16) if small else ("resnet50", 512)
    net = smp.UPerNet(encoder, encoder_weights=None, decoder_channels=width, classes=NUM_CLASSES).train()
    image, label = make_batch(options, 1)
    net = net.to(options.device)
    if compiled:
        net.compile(dynamic=True)
    return training_step(net, lambda: F.cross_entropy(net(image), label, ignore_index=-1), options)


def transformers(options: argparse.Namespace, *, compiled: bool = False, small: bool = False) -> Step:
    """UPerNet; `small` is for testing programs."""
    from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation

    stages = ["stage1", "stage2", "stage3", "stage4"]
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]} if small else {}
    config = UperNetConfig(
        backbone_config=ResNetConfig(out_features=stages, **sizes),
        hidden_size=16 if small else 512,
        num_labels=NUM_CLASSES,
        use_auxiliary_head=False,  # ours has none
        loss_ignore_index=-1,
    )
    net = UperNetForSemanticSegmentation(config).train().to(options.device)
    image, label = make_batch(options, 1)
    if compiled:
        net.compile(dynamic=True)
    return training_step(net, lambda: net(pixel_values=image, labels=label).loss, options)


NETWORKS = {
    "upernet50": ("resnet50", "upernet"),
    "resnet50_dilated8_ppm_deepsup": ("resnet50_dilated8", "ppm_bilinear_deepsup"),
}
MODELS: dict[str, dict[str, tuple[Callable[..., Step], dict[str, Any]]]] = {
    name: {
        "ours": (ours, {"model": name}),
        "ours, channels_last": (ours, {"model": name, "channels_last": True}),
        "ours, factored": (ours, {"model": name, "cpu_kernels": False, "factored": True}),
        "ours, direct": (ours, {"model": name, "cpu_kernels": False, "factored": False}),
    }
    for name in NETWORKS
}
MODELS["upernet50"] |= {
    "segmentation-models-pytorch": (segmentation_models_pytorch, {}),
    "transformers": (transformers, {}),
}


def make_batch(options: argparse.Namespace, label_stride: int) -> tuple[Tensor, Tensor]:
    """(N, 3, H, W) normalised pixels and (N, H / stride, W / stride) labels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(options.images, 3, options.height, options.width, generator=generator)
    shape = (options.images, options.height // label_stride, options.width // label_stride)
    label = torch.randint(-1, NUM_CLASSES, shape, generator=generator)
    return image.to(options.device), label.to(options.device)


def training_step(net: nn.Module, loss: Step, options: argparse.Namespace) -> Step:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    is_half = options.precision == "bf16"

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(options.device, torch.bfloat16, enabled=is_half):
            value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


# ---- the direct network


def set_kernels(net: Segmenter, *, cpu_kernels: bool, factored: bool | None) -> None:
    """Choose the kernels of a network: those of nets/cpu, and the factored convolution of upsampled maps."""
    net.has_cpu_kernels = cpu_kernels
    for module in net.modules():
        if isinstance(module, UpsampledConcatConv):
            module.factored = factored


def compare_with_direct(options: argparse.Namespace) -> None:
    """Assert that our step and the direct one give the same loss and gradients, in float64 on small images."""
    small = copy.copy(options)
    small.device, small.images, small.height, small.width = "cpu", 2, 96, 128
    outcomes = []
    for is_direct in (False, True):
        net = build_ours(options.model).double()
        set_kernels(net, cpu_kernels=not is_direct, factored=not is_direct)
        for layer in net.modules():
            if isinstance(layer, nn.Dropout2d):
                layer.p = 0.0
        image, label = make_batch(small, net.label_stride)
        loss = segmentation_loss(net(image.double()), label).total
        loss.backward()
        outcomes.append([loss.detach(), *(weight.grad for weight in net.parameters() if weight.grad is not None)])
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*outcomes, strict=True))
    print(f"ours and direct: loss and all gradients equal to {worst:.1e} (float64)")
    assert worst < 1e-9


# ---- taking turns


def take_turns(
    contenders: dict[str, tuple[Callable[..., Step], dict[str, Any]]], options: argparse.Namespace
) -> tuple[dict[str, list[Round]], dict[str, float]]:
    """The rounds of each contender and its peak of tensors in MB; those that cannot be built are skipped."""
    context = mp.get_context("spawn")
    pipes = {}
    for name, (build, arguments) in contenders.items():
        here, there = context.Pipe()
        context.Process(target=run_contender, args=(there, build, arguments, options), daemon=True).start()
        there.close()
        problem = here.recv()  # one builds at a time
        if problem:
            print(f"{name}: skipped, {problem}")
        else:
            pipes[name] = here
    rounds: dict[str, list[Round]] = {name: [] for name in pipes}
    for number in range(options.rounds + 1):
        for name, pipe in pipes.items():
            pipe.send("step")
            measured = pipe.recv()
            if number:  # the first one warms up
                rounds[name].append(measured)
    tensors = {}
    for name, pipe in pipes.items():
        pipe.send("tensors")
        tensors[name] = pipe.recv()
    return rounds, tensors


def run_contender(
    pipe: Any, build: Callable[..., Step], arguments: dict[str, Any], options: argparse.Namespace
) -> None:
    torch.set_num_threads(options.threads)
    if options.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        step = build(options, **arguments)
    except ImportError as error:
        pipe.send(str(error))
        return
    pipe.send("")
    on_cuda = options.device == "cuda"
    base = process_memory_mb("VmRSS", on_cuda=on_cuda)
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        if request == "tensors":
            pipe.send(process_memory_mb("VmHWM", on_cuda=True) - base if on_cuda else peak_tensor_mb(step))
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        if on_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        pipe.send(Round(*seconds, process_memory_mb("VmHWM", on_cuda=on_cuda) - base))


def peak_tensor_mb(step: Step) -> float:
    """The peak size of the tensors on the CPU that a step creates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    assert record.profiler is not None and record.profiler.kineto_results is not None, "the profiler has been running"
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes)) / 2**20


def process_memory_mb(field: str, *, on_cuda: bool) -> float:
    """Memory of this process: VmRSS, the current one, or VmHWM, the peak."""
    if on_cuda:
        return (torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()) / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
