"""The training step of our networks against those of other libraries, side by side in the same run.

    pip install segmentation-models-pytorch transformers      # those that are missing are left out, saying so
    python benchmarks/training_step.py                        # UPerNet on ResNet-50, 2 images of 256 x 352, on the CPU
    python benchmarks/training_step.py --model resnet50_dilated8_ppm_deepsup
    python benchmarks/training_step.py --device cuda --height 448 --width 608 --precision bf16

A step is forward, loss, backward and an SGD step, with the labels and the loss of each library's own training. Every
contender lives in a process of its own and they take turns, one step each, so that what else the machine does falls
on all of them. Wall time and the processor's time are medians. "Tensors" is the most that the tensors made by a step
(its gradients are among them) take at once, in a step of its own after the others. "Process" is the peak of the process
above that with the network built, with what the system's allocator holds back (it varies by 5 % from run to run). On
CUDA both are the device's memory.

"plain" is our network with its maps joined before a convolution, as papers draw it, and that convolution direct, where
ours convolves coarse maps before they are upsampled and, on the CPU, goes Winograd's way; "direct" is ours without the
latter. That ours and plain give the same logits and gradients is asserted first.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from semseg.nets.blocks import resize
from semseg.nets.decoders import ppm, upernet
from semseg.nets.registry import build_segmenter
from semseg.nets.segmenter import Segmenter
from semseg.training.losses import segmentation_loss

NUM_CLASSES = 150
ROW = "{:<34}{:>10}{:>10}{:>12}{:>14}{:>14}"
Step = Callable[[], Tensor]


class Round(NamedTuple):
    """What one step took."""

    wall: float  # seconds
    processor: float  # seconds of all threads
    memory: float  # MB, the peak so far above the network's own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="upernet50")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="float32")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--height", type=int, default=256, help="pixels, a multiple of 32")
    parser.add_argument("--width", type=int, default=352)
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each, after one that is not")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {options}")
    compare_with_plain(options)
    rounds, tensors = take_turns(MODELS[options.model], options)
    first = next(iter(rounds.values()))
    print(ROW.format("", "wall s", "CPU s", "wall ratio", "tensors MB", "process MB"))
    for name, taken in rounds.items():
        wall, processor = (statistics.median(values) for values in list(zip(*taken, strict=True))[:2])
        ratio = statistics.median(one.wall / other.wall for one, other in zip(first, taken, strict=True))
        memory_mb = f"{tensors[name]:.0f}", f"{taken[-1].memory:.0f}"
        print(ROW.format(name, f"{wall:.2f}", f"{processor:.2f}", f"{ratio:.2f}", *memory_mb))
    print("wall ratio: our step in units of this one's, median of the rounds")


# ---- the contenders


def ours(
    options: argparse.Namespace,
    model: str,
    *,
    channels_last: bool = False,
    compiled: bool = False,
    winograd: bool = True,
) -> Step:
    net = build_ours(model).to(options.device)
    net.winograd = winograd
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    image, label = batch(options, net.label_stride)
    image = image.contiguous(memory_format=layout)
    if compiled:
        net.compile(dynamic=True)
    return stepping(net, lambda: segmentation_loss(net(image), label).total, options)


def plain(options: argparse.Namespace, model: str) -> Step:
    step = ours(options, model, winograd=False)

    def with_joined_maps() -> Tensor:
        with joined_maps():
            return step()

    return with_joined_maps


def build_ours(model: str) -> Segmenter:
    torch.manual_seed(0)
    encoder, decoder = NETWORKS[model]
    return build_segmenter(encoder, decoder, NUM_CLASSES).train()


def segmentation_models_pytorch(options: argparse.Namespace, *, compiled: bool = False) -> Step:
    import segmentation_models_pytorch as smp

    net = smp.UPerNet("resnet50", encoder_weights=None, decoder_channels=512, classes=NUM_CLASSES).train()
    image, label = batch(options, 1)
    net = net.to(options.device)
    if compiled:
        net.compile(dynamic=True)
    return stepping(net, lambda: F.cross_entropy(net(image), label, ignore_index=-1), options)


def transformers(options: argparse.Namespace, *, compiled: bool = False) -> Step:
    from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation

    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = UperNetConfig(
        backbone_config=ResNetConfig(out_features=stages),
        hidden_size=512,
        num_labels=NUM_CLASSES,
        use_auxiliary_head=False,  # ours has none
        loss_ignore_index=-1,
    )
    net = UperNetForSemanticSegmentation(config).train().to(options.device)
    image, label = batch(options, 1)
    if compiled:
        net.compile(dynamic=True)
    return stepping(net, lambda: net(pixel_values=image, labels=label).loss, options)


NETWORKS = {
    "upernet50": ("resnet50", "upernet"),
    "resnet50_dilated8_ppm_deepsup": ("resnet50_dilated8", "ppm_bilinear_deepsup"),
}
MODELS: dict[str, dict[str, tuple[Callable[..., Step], dict[str, Any]]]] = {
    name: {
        "ours": (ours, {"model": name}),
        "ours, channels_last": (ours, {"model": name, "channels_last": True}),
        "ours, direct": (ours, {"model": name, "winograd": False}),
        "ours, plain": (plain, {"model": name}),
    }
    for name in NETWORKS
}
MODELS["upernet50"] |= {
    "segmentation-models-pytorch": (segmentation_models_pytorch, {}),
    "transformers": (transformers, {}),
}


def batch(options: argparse.Namespace, label_stride: int) -> tuple[Tensor, Tensor]:
    """(N, 3, H, W) normalised pixels and (N, H / stride, W / stride) labels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(options.images, 3, options.height, options.width, generator=generator)
    shape = (options.images, options.height // label_stride, options.width // label_stride)
    label = torch.randint(-1, NUM_CLASSES, shape, generator=generator)
    return image.to(options.device), label.to(options.device)


def stepping(net: nn.Module, loss: Step, options: argparse.Namespace) -> Step:
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


# ---- the plain form


@contextmanager
def joined_maps() -> Any:
    """Our decoders with their maps joined before the convolution."""
    modules = (upernet, ppm)
    ours = [module.apply_to_joined for module in modules]
    for module in modules:
        module.apply_to_joined = convolve_joined
    try:
        yield
    finally:
        for module, function in zip(modules, ours, strict=True):
            module.apply_to_joined = function


def convolve_joined(layers: nn.Module, maps: Sequence[Tensor]) -> Tensor:
    return layers(torch.cat([resize(features, maps[0]) for features in maps], 1))


def compare_with_plain(options: argparse.Namespace) -> None:
    """Assert that a step of both forms gives the same loss and gradients, in float64 on small images."""
    small = copy.copy(options)
    small.device, small.images, small.height, small.width = "cpu", 2, 96, 128
    found = []
    for form in ("ours", "plain"):
        net = build_ours(options.model).double()
        net.winograd = form == "ours"
        for layer in net.modules():
            if isinstance(layer, nn.Dropout2d):
                layer.p = 0.0
        image, label = batch(small, net.label_stride)
        with joined_maps() if form == "plain" else torch.enable_grad():
            loss = segmentation_loss(net(image.double()), label).total
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in net.parameters() if weight.grad is not None)])
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))
    print(f"ours and plain: loss and all gradients equal to {worst:.1e} (float64)")
    assert worst < 1e-9


# ---- taking turns


def take_turns(
    contenders: dict[str, tuple[Callable[..., Step], dict[str, Any]]], options: argparse.Namespace
) -> tuple[dict[str, list[Round]], dict[str, float]]:
    """Rounds and MB of tensors of each contender; those that cannot be built are left out."""
    context = mp.get_context("spawn")
    pipes = {}
    for name, (build, arguments) in contenders.items():
        here, there = context.Pipe()
        context.Process(target=work, args=(there, build, arguments, options), daemon=True).start()
        there.close()
        trouble = here.recv()  # one builds at a time
        if trouble:
            print(f"{name}: left out, {trouble}")
        else:
            pipes[name] = here
    rounds: dict[str, list[Round]] = {name: [] for name in pipes}
    for number in range(options.rounds + 1):
        for name, pipe in pipes.items():
            pipe.send("step")
            taken = pipe.recv()
            if number:  # the first warms up
                rounds[name].append(taken)
    tensors = {}
    for name, pipe in pipes.items():
        pipe.send("tensors")
        tensors[name] = pipe.recv()
    return rounds, tensors


def work(pipe: Any, build: Callable[..., Step], arguments: dict[str, Any], options: argparse.Namespace) -> None:
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
    base = memory("VmRSS", on_cuda=on_cuda)
    while True:
        try:
            wanted = pipe.recv()
        except EOFError:
            return
        if wanted == "tensors":
            pipe.send(memory("VmHWM", on_cuda=True) - base if on_cuda else most_at_once(step))
            continue
        wall, processor = time.perf_counter(), time.process_time()
        step()
        if on_cuda:
            torch.cuda.synchronize()
        spent = time.perf_counter() - wall, time.process_time() - processor
        pipe.send(Round(*spent, memory("VmHWM", on_cuda=on_cuda) - base))


def most_at_once(step: Step) -> float:
    """MB of tensors on the CPU that a step makes, at the moment when there are most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    assert record.profiler is not None and record.profiler.kineto_results is not None, "it has been running"
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes)) / 2**20


def memory(field: str, *, on_cuda: bool) -> float:
    """MB: VmRSS, what this process has now, or VmHWM, the most that it ever had."""
    if on_cuda:
        return (torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()) / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
