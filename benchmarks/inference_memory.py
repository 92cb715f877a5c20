"""The memory that inference on a photo of 4000 x 3000 pixels with 150 classes needs beside the network.

    python benchmarks/inference_memory.py                    # two scales of logits: 375 x 500 and 188 x 250
    python benchmarks/inference_memory.py --limits 64 1024   # megabytes

Every limit runs in a separate process. Printed are the peak of the resident memory above that with the logits loaded,
the time, and whether the class map equals that of the first limit in every pixel.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from semseg.evaluation.inference import merge_scales

SIZE = (3000, 4000)
NUM_CLASSES = 150
ROW = "{:>10}{:>14}{:>10}{:>14}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limits", type=int, nargs="+", default=[16, 256, 1024, 4096], help="MB")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(ROW.format("limit MB", "peak MB", "seconds", "class map"))
    first = ""
    for limit in options.limits:
        here, there = mp.get_context("spawn").Pipe()
        child = mp.get_context("spawn").Process(target=measure, args=(there, limit, options.threads))
        child.start()
        peak, seconds, digest = here.recv()
        child.join()
        first = first or digest
        print(ROW.format(limit, f"{peak:.0f}", f"{seconds:.1f}", "equal" if digest == first else "DIFFERENT"))


def measure(pipe: Any, limit: int, threads: int) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(1, *shape, NUM_CLASSES, generator=generator) for shape in ((375, 500), (188, 250))]
    merge_scales([scale[:, :8, :8] for scale in logits], (8, 8))  # loads what torch needs on first use
    base, start = process_memory_mb("VmRSS"), time.perf_counter()
    ids = merge_scales(logits, SIZE, memory_limit_mb=limit).ids
    seconds = time.perf_counter() - start
    pipe.send((process_memory_mb("VmHWM") - base, seconds, hashlib.sha256(ids.numpy().tobytes()).hexdigest()))


def process_memory_mb(field: str) -> float:
    """Memory of this process: VmRSS, the current one, or VmHWM, the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
