"""Start-up times of commands, and the cost of a plan of sub-batches for large data sets.

    python benchmarks/startup.py

Wall time of `--help`, of an unknown key, and from `python run.py` to the end of the first training step (default
network, generated images), medians of rounds; then time and memory of a plan for 10^4 to 10^7 records, and of seeking
to a sub-batch at any position.
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
TRAINING_OVERRIDES = (
    "data=scenes data.make.num_train=6 data.make.num_val=1 data.batch_size=2 data.steps_per_epoch=1"
    " model.encoder.weights=none trainer=cpu trainer.max_epochs=1 trainer.limit_val_batches=0"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        measure_until(TRAINING_OVERRIDES.split(), "step 1/1", Path(folder))  # generates the images
        for name, arguments, marker in (
            ("--help", ["--help"], "Groups"),
            ("an unknown key", ["optm.lr=1"], "Did you mean"),
            ("mode=models", ["mode=models"], "upernet50"),
            ("first training step", TRAINING_OVERRIDES.split(), "step 1/1"),
        ):
            seconds = [measure_until(arguments, marker, Path(folder)) for _ in range(options.rounds)]
            print(ROW.format(name, f"{statistics.median(seconds):.1f} s"))
    print(ROW.format("plan of", "built") + "{:>12}{:>16}{:>18}".format("memory", "first, anywhere", "following"))
    for count in (10**4, 10**5, 10**6, 10**7):
        print(format_plan_row(count))


def measure_until(arguments: list[str], marker: str, folder: Path) -> float:
    """Seconds until a command prints `marker`."""
    command = [sys.executable, "-u", str(RUN), *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if marker in line:
            seconds = time.perf_counter() - start
            process.communicate()
            return seconds
    raise AssertionError("".join(printed))


def format_plan_row(count: int) -> str:
    sizes = np.random.default_rng(0).integers(200, 1600, (count, 2))
    tracemalloc.start()
    start = time.perf_counter()
    plan = TrainPlan(sizes, seed=0, batch_size=2, short_edges=[300, 375, 450, 525, 600])
    built = time.perf_counter() - start
    start = time.perf_counter()
    plan.sub_batch(10**9 + 7)
    seek = time.perf_counter() - start
    start = time.perf_counter()
    for number in range(1000):
        plan.sub_batch(10**9 + 8 + number)
    following = (time.perf_counter() - start) / 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    cells = f"{peak / 2**20:.0f} MiB", f"{seek * 1e3:.0f} ms", f"{following * 1e3:.2f} ms"
    return ROW.format(f"{count:,} records", f"{built * 1e3:.0f} ms") + "{:>12}{:>16}{:>18}".format(*cells)


if __name__ == "__main__":
    main()
