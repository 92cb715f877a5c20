"""Entry point of `semseg` and `python run.py`: prepares the process before anything slow is imported."""

from __future__ import annotations

from semseg.system.process import prepare_process


def run_program() -> None:
    """Run the command line in sys.argv; ends the process."""
    prepare_process()
    from semseg.cli import main  # noqa: PLC0415

    main.main()
