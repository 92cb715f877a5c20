"""Entry point of `semseg` and `python run.py`: prepares the process before anything slow is imported."""

from __future__ import annotations

import sys

from semseg.errors import is_clone
from semseg.system.process import prepare_process


def run_program() -> None:
    """Run the command line in sys.argv; ends the process."""
    prepare_process()
    try:
        from semseg.cli import main  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "semseg").partition(".")[0] == "semseg":
            raise
        command = "pip install --constraint constraints.txt --editable ." if is_clone() else "pip install semseg"
        sys.exit(
            f"error: the package {error.name} is not installed for {sys.executable}. Activate the environment of the "
            f"installation (. .venv/bin/activate), or install it: {command}"
        )
    main.main()
