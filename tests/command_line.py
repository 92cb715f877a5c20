"""The real command line, and a run of it that takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from semseg.launch import CONFIG_DIR

RUN = CONFIG_DIR.parent / "run.py"
TINY = [
    "data=scenes", "data.make.num_train=6", "data.make.num_val=7", "data.root=scenes", "data.batch_size=1",
    "data.short_edges=[32]", "data.max_long_edge=64", "data.num_workers=0", "data.steps_per_epoch=2",
    "model/encoder=resnet18", "model.encoder.weights=none", "model/decoder=c1", "eval.scales=[32]",
    "trainer.accelerator=cpu", "trainer.max_epochs=1",
]  # fmt: skip


def run(cwd: Path, *words: str, code: int = 0) -> str:
    """What `python run.py <words>` prints in the folder `cwd`; it must end with the exit code `code`."""
    result = subprocess.run(
        [sys.executable, str(RUN), *words], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr
