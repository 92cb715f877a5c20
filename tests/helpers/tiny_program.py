"""run.py with a gate at which a test can stop it.

`GATE=<step>:<path>` in the environment lets every rank wait before that step: it writes `<path>.<rank>` and goes
through once `<path>` exists.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from semseg.system.process import prepare_process

PROGRAM = Path(__file__)
GATE = "GATE"


class Gate:
    """A step at which a run waits, seen from the test."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.variables = path, {GATE: f"{step}:{path}"}

    def wait(self, *ranks: int, seconds: float = 120.0) -> None:
        """Wait until `ranks`, or rank 0, are at the gate."""
        deadline = time.monotonic() + seconds
        while not all(Path(f"{self.path}.{rank}").exists() for rank in ranks or (0,)):
            assert time.monotonic() < deadline, f"no rank has reached {self.path}"
            time.sleep(0.02)

    def open(self) -> None:
        self.path.touch()


def add_gate() -> None:
    """In the program: have training wait at the gate of the environment."""
    from semseg.lit_module import SegmentationModule

    number, _, name = os.environ[GATE].partition(":")
    step_without = SegmentationModule.training_step

    def step_with(module: SegmentationModule, batch: Any, batch_idx: int) -> Any:
        if module.trainer.global_step == int(number):
            Path(f"{name}.{module.trainer.global_rank}").touch()
            while not Path(name).exists():
                time.sleep(0.02)
        return step_without(module, batch, batch_idx)

    SegmentationModule.training_step = step_with  # pyright: ignore[reportAttributeAccessIssue]


def main() -> None:
    prepare_process()
    from semseg.cli.main import main

    if GATE in os.environ:
        add_gate()
    main()


if __name__ == "__main__":
    main()
