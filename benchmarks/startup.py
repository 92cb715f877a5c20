"""From the command to its first sign of life, and how large a data set a plan of sub-batches can carry.

    python benchmarks/startup.py

Wall seconds of `--help`, of a wrong key, and from `python run.py` to the end of the first training step (default
network, drawn images), medians of rounds; then seconds and memory of a plan for 10^4 to 10^7 records, and of going to a
sub-batch anywhere in it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from semseg.data.plan import TrainPlan

RUN = Path(__file__).resolve().parent.parent / "run.py"
ROW = "{:<40}{:>12}"
STEP = (
    "data=scenes data.make.num_train=6 data.make.num_val=1 data.batch_size=2 data.steps_per_epoch=1"
    " model.encoder.weights=none trainer=cpu trainer.max_epochs=1 trainer.limit_val_batches=0"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        seconds_until(STEP.split(), "step 1/1", Path(folder))  # draws the images
        for name, words, sign in (
            ("--help", ["--help"], "Groups"),
            ("a wrong key", ["optm.lr=1"], "Did you mean"),
            ("mode=models", ["mode=models"], "upernet50"),
            ("first training step", STEP.split(), "step 1/1"),
        ):
            taken = [seconds_until(words, sign, Path(folder)) for _ in range(options.rounds)]
            print(ROW.format(name, f"{statistics.median(taken):.1f} s"))
    print(ROW.format("plan of", "built") + "{:>12}{:>16}{:>18}".format("memory", "first anywhere", "next ones"))
    for count in (10**4, 10**5, 10**6, 10**7):
        print(plan_row(count))


def seconds_until(words: list[str], sign: str, folder: Path) -> float:
    """Until a command has printed `sign`."""
    command = [sys.executable, "-u", str(RUN), *words]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if sign in line:
            seconds = time.perf_counter() - started
            process.communicate()
            return seconds
    raise AssertionError("".join(printed))


def plan_row(count: int) -> str:
    sizes = np.random.default_rng(0).integers(200, 1600, (count, 2))
    tracemalloc.start()
    started = time.perf_counter()
    plan = TrainPlan(sizes, seed=0, batch_size=2, short_edges=[300, 375, 450, 525, 600])
    built = time.perf_counter() - started
    started = time.perf_counter()
    plan.sub_batch(10**9 + 7)
    far = time.perf_counter() - started
    started = time.perf_counter()
    for number in range(1000):
        plan.sub_batch(10**9 + 8 + number)
    following = (time.perf_counter() - started) / 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    cells = f"{peak / 2**20:.0f} MiB", f"{far * 1e3:.0f} ms", f"{following * 1e3:.2f} ms"
    return ROW.format(f"{count:,} records", f"{built * 1e3:.0f} ms") + "{:>12}{:>16}{:>18}".format(*cells)


if __name__ == "__main__":
    main()
