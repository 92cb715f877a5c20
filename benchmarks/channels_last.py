"""Training steps in both memory layouts: what model.channels_last=auto is chosen by.

    python benchmarks/channels_last.py                                  # one thread of the CPU
    python benchmarks/channels_last.py --device cuda --precision bf16   # a GPU
    python benchmarks/channels_last.py --networks upernet50 --rounds 7

A row for each network: seconds of a step (forward, loss, backward) with images and weights as they are made, and in
channels_last, the least of all rounds, and their ratio; below 1, channels_last is faster. Steps of both take turns. On
a CPU it is CPU time, which other work on the machine can only make longer; on a GPU the time between two events.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from semseg.checkpoints.network import build_network
from semseg.config.load import load_config
from semseg.nets.depthwise import fraction_of_depthwise
from semseg.nets.precision import create_autocast
from semseg.nets.segmenter import is_convolutional
from semseg.training.losses import segmentation_loss

NETWORKS = {
    "upernet + efficientnet_lite0": [
        "model/encoder=timm", "model.encoder.name=tf_efficientnet_lite0", "model/decoder=upernet",
    ],
    "upernet_lite + mobilenetv2": ["model/encoder=mobilenetv2", "model/decoder=upernet_lite"],
    "mobilenetv2_dilated8_c1_deepsup": ["model=mobilenetv2_dilated8_c1_deepsup"],
    "upernet + resnet18": ["model/encoder=resnet18", "model/decoder=upernet"],
    "resnet18_dilated8_ppm_deepsup": ["model=resnet18_dilated8_ppm_deepsup"],
    "upernet50": ["model=upernet50"],
    "upernet_resnext101": ["model=upernet_resnext101"],
    "hrnetv2_c1": ["model=hrnetv2_c1"],
}  # fmt: skip
PRECISIONS = {"float32": "32-true", "bf16": "bf16-mixed"}


def main() -> None:
    options = read_options()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(f"{options.images} images of {options.height} x {options.width}, {options.precision}, {device.type}")
    print("| network | depthwise | contiguous s | channels_last s | ratio |\n|---|---|---|---|---|")
    for name in options.networks:
        words = NETWORKS.get(name, [f"model={name}"])
        share, plain, last = compare(words, options, device)
        print(f"| {name} | {share:.0%} | {plain:.3f} | {last:.3f} | {last / plain:.2f} |", flush=True)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--height", type=int, default=160)
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def compare(words: list[str], options: argparse.Namespace, device: torch.device) -> tuple[float, float, float]:
    """The depthwise fraction of a network's convolutions, and the least seconds of a step in both layouts."""
    model = load_config([*words, "model.encoder.weights=none"])[0].model
    steps = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = build_network(model, 150).to(device)
        if layout is torch.channels_last and is_convolutional(net):
            net.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        steps.append((build_step(net.train(), options, device, layout), net))
    times: list[list[float]] = [[], []]
    for number in range(options.rounds + 1):
        for found, (step, _) in zip(times, steps, strict=True):
            seconds = time_step(step, device)
            if number:  # the first one allocates
                found.append(seconds)
    plain, last = map(min, times)
    return fraction_of_depthwise(steps[0][1]), plain, last


def build_step(
    net: torch.nn.Module, options: argparse.Namespace, device: torch.device, layout: torch.memory_format
) -> Callable[[], None]:
    """A training step without the optimiser, on random pixels."""
    image = torch.randn(options.images, 3, options.height, options.width, device=device).to(memory_format=layout)
    stride = int(net.label_stride)  # pyright: ignore[reportArgumentType]
    shape = (options.images, options.height // stride, options.width // stride)
    label = torch.randint(0, 150, shape, device=device)

    def step() -> None:
        net.zero_grad()
        with create_autocast(PRECISIONS[options.precision], device):
            loss = segmentation_loss(net(image), label).total
        loss.backward()

    return step


def time_step(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a step: CPU time of this process, or the time on the GPU."""
    if device.type != "cuda":
        start = time.process_time()
        step()
        return time.process_time() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


if __name__ == "__main__":
    main()
