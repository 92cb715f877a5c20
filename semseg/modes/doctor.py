"""mode=doctor: whether this machine can train, and what is missing if it cannot."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from semseg.checks.machine import ERROR, WARNING, examine
from semseg.config.schema import Config
from semseg.errors import SemsegError


class MachineError(SemsegError):
    """Something that every training run needs does not work here."""

    exit_code = 1


def run(config: Config, overrides: list[str]) -> None:
    """Look at everything and print a line for each, then a verdict.

    Raises:
        MachineError: if this machine cannot train.
    """
    findings = examine(Path(config.runs_dir), config.data.num_workers)
    table = Table(title="this machine", show_header=False)
    for finding in findings:
        table.add_row(finding.level, finding.name, finding.text)
    Console().print(table)
    wrong = [finding.name for finding in findings if finding.level == ERROR]
    if wrong:
        raise MachineError(f"NOT READY: {', '.join(wrong)}. See above.")
    doubtful = [finding.name for finding in findings if finding.level == WARNING]
    print(f"READY to train, with warnings: {', '.join(doubtful)}." if doubtful else "READY to train.")
