"""Which of the processes of a run prints. No torch."""

from __future__ import annotations

import os
import sys

from semseg.system.text import escape_lines

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # environment variables that number the processes of a run
LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")  # on this machine


def is_first_rank() -> bool:
    """Whether this process is the one of its run that prints and writes files."""
    return all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES)


def is_first_rank_of_machine() -> bool:
    """Whether no other process of the run on this machine has a lower number."""
    return all(os.environ.get(name, "0") == "0" for name in LOCAL_RANK_VARIABLES)


def print_once(line: str | None) -> None:
    """Print a line, if there is one, on the first rank only. Warnings go to standard error, which quiet=true keeps."""
    if line and is_first_rank():
        print(escape_lines(line), file=sys.stderr if line.startswith("warning: ") else sys.stdout, flush=True)
