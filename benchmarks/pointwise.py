"""1 x 1 convolutions on the CPU: PyTorch's choice and oneDNN, side by side in the same run.

    python benchmarks/pointwise.py                # with one thread, where PyTorch does not choose oneDNN

Shapes are those of UPerNet-50 for an image of 480 x 608, in both memory layouts. Medians in ms of the forward pass, and
of forward and backward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from semseg.nets.cpu.pointwise import OneDnnPointwise, is_onednn_faster

SHAPES = (  # channels, out channels, height, width
    (512, 1536, 60, 76),
    (256, 512, 120, 152),
    (64, 256, 120, 152),
    (1024, 256, 30, 38),
    (2048, 512, 15, 19),
    (2048, 512, 6, 6),
)
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
ROW = "{:<38}{:>10}{:>10}{:>8}{:>12}{:>10}{:>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    use = "is used" if is_onednn_faster() else "is not used here"
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {options}; in a network oneDNN {use}")
    print(ROW.format("", "PyTorch", "oneDNN", "ratio", "+ backward", "oneDNN", "ratio"))
    for channels, out_channels, height, width in SHAPES:
        weight = torch.randn(out_channels, channels, 1, 1).requires_grad_()
        for name, layout in LAYOUTS.items():
            image = torch.randn(1, channels, height, width).contiguous(memory_format=layout).requires_grad_()
            figures = []
            for backward in (False, True):
                times = compare(image, weight, options.rounds, backward=backward)
                figures += [f"{times[0]:.2f}", f"{times[1]:.2f}", f"{times[1] / times[0]:.2f}"]
            print(ROW.format(f"{channels} -> {out_channels}, {height} x {width}, {name}", *figures))


def compare(image: torch.Tensor, weight: torch.Tensor, rounds: int, *, backward: bool) -> list[float]:
    """Median milliseconds of PyTorch's choice and of oneDNN, taking turns."""

    def step() -> None:
        with torch.set_grad_enabled(backward):
            output = F.conv2d(image, weight)
        if backward:
            torch.autograd.grad(output, (image, weight), torch.ones_like(output))

    contexts: tuple[Callable[[], OneDnnPointwise | nullcontext[None]], ...] = (nullcontext, OneDnnPointwise)
    times: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for context, measured in zip(contexts, times, strict=True):
            with context():
                start = time.perf_counter()
                step()
                if number:  # the first one warms up
                    measured.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(measured) for measured in times]


if __name__ == "__main__":
    main()
