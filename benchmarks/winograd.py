"""3 x 3 convolutions on the CPU: Winograd's algorithm and direct, side by side in the same run.

    OMP_NUM_THREADS=1 python benchmarks/winograd.py

CPU time in ms of layers of our networks: forward as in evaluation (channels_last), forward and backward as in training
(contiguous). Both take turns, two calls each, of which the second is timed; medians of rounds. Then the errors of both
against float64, and that of Winograd's algorithm with the common interpolation points.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from semseg.nets.cpu import winograd

# name, images, channels in and out, height and width of the map, dilation
LAYERS = {
    "ResNet-18 stage 2, 1/8 of 456 x 608": (1, 128, 57, 76, 1),
    "ResNet-18 dilated, stage 3": (1, 256, 57, 76, 2),
    "ResNet-18 dilated, stage 4": (1, 512, 57, 76, 4),
    "UPerNet of 256 channels, 1/4": (1, 256, 114, 152, 1),
    "UPerNet, 1/8": (1, 512, 57, 76, 1),
    "UPerNet, 1/16": (1, 512, 29, 38, 1),
    "UPerNet, 1/4": (1, 512, 114, 152, 1),
    "UPerNet, 1/4, 2 x 256 x 352": (2, 512, 64, 88, 1),
}
COMMON_POINTS = (0.0, 1.0, -1.0, 2.0, -2.0)
ROW = "{:<40}{:>10}{:>10}{:>8}{:>12}{:>10}{:>8}"
Convolution = Callable[[Tensor, Tensor, int], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options}")
    print(ROW.format("ms", "forward", "Winograd", "ratio", "and backward", "Winograd", "ratio"))
    for name, (count, channels, height, width, dilation) in LAYERS.items():
        image, weight = make_tensors(count, channels, height, width)
        inputs = {forward: image.contiguous(memory_format=torch.channels_last), forward_and_backward: image}
        times = [compare(run, laid_out, weight, dilation, options.rounds) for run, laid_out in inputs.items()]
        print(ROW.format(name, *(text for pair in times for text in format_times(*pair))))
    print_errors()


def make_tensors(count: int, channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Inputs of a layer: values after a ReLU, weights that keep their variance."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(count, channels, height, width, generator=generator).relu()
    weight = torch.randn(channels, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
    return image, weight


def direct(image: Tensor, weight: Tensor, dilation: int) -> Tensor:
    return F.conv2d(image, weight, padding=dilation, dilation=dilation)


def winograd_conv(image: Tensor, weight: Tensor, dilation: int) -> Tensor:
    return winograd.conv2d(image, weight, dilation, dilation)


@torch.no_grad()
def forward(convolution: Convolution, image: Tensor, weight: Tensor, dilation: int) -> None:
    convolution(image, weight, dilation)


def forward_and_backward(convolution: Convolution, image: Tensor, weight: Tensor, dilation: int) -> None:
    output = convolution(image.requires_grad_(), weight.requires_grad_(), dilation)
    torch.autograd.grad(output, (image, weight), output.detach())


def compare(
    run: Callable[..., None], image: Tensor, weight: Tensor, dilation: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of each round: direct, Winograd."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for convolution, measured in zip((direct, winograd_conv), times, strict=True):
            run(convolution, image, weight, dilation)  # warms up: the allocator holds memory of the other contender
            start = time.process_time()
            run(convolution, image, weight, dilation)
            measured.append((time.process_time() - start) * 1e3)
    return times


def format_times(before: list[float], after: list[float]) -> list[str]:
    ratio = statistics.median(b / a for a, b in zip(before, after, strict=True))
    return [f"{statistics.median(before):.1f}", f"{statistics.median(after):.1f}", f"{ratio:.2f}"]


@torch.no_grad()
def print_errors() -> None:
    """Print the root mean square error against float64, for values of a standard deviation of about 1."""
    ours = winograd.TRANSFORMS
    for channels in (128, 512):
        image, weight = make_tensors(1, channels, 57, 76)
        exact = direct(image.double(), weight.double(), 1)
        errors = {"direct": rms(direct(image, weight, 1) - exact)}
        errors["Winograd"] = rms(winograd_conv(image, weight, 1) - exact)
        winograd.TRANSFORMS = winograd.build_transforms(COMMON_POINTS)
        errors[f"Winograd at {COMMON_POINTS}"] = rms(winograd_conv(image, weight, 1) - exact)
        winograd.TRANSFORMS = ours
        print(f"error at {channels} channels:", ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


if __name__ == "__main__":
    main()
