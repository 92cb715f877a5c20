"""The memory that a photo of 4000 x 3000 pixels with 150 classes takes above the network's own.

    python benchmarks/inference_memory.py                    # two scales of logits: 375 x 500 and 188 x 250
    python benchmarks/inference_memory.py --limits 64 1024   # megabytes

Every limit runs in a process of its own. Printed are the peak of the resident memory above that with the logits there,
the time, and whether the class map is the same as for the first limit, to the last pixel.
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
        child = mp.get_context("spawn").Process(target=work, args=(there, limit, options.threads))
        child.start()
        peak, seconds, digest = here.recv()
        child.join()
        first = first or digest
        print(ROW.format(limit, f"{peak:.0f}", f"{seconds:.1f}", "the same" if digest == first else "ANOTHER"))


def work(pipe: Any, limit: int, threads: int) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(1, *shape, NUM_CLASSES, generator=generator) for shape in ((375, 500), (188, 250))]
    merge_scales([scale[:, :8, :8] for scale in logits], (8, 8))  # what torch loads on first use
    base, started = memory("VmRSS"), time.perf_counter()
    ids = merge_scales(logits, SIZE, memory_limit_mb=limit).ids
    seconds = time.perf_counter() - started
    pipe.send((memory("VmHWM") - base, seconds, hashlib.sha256(ids.numpy().tobytes()).hexdigest()))


def memory(field: str) -> float:
    """MB of this process: VmRSS, now, or VmHWM, at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
