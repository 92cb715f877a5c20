"""Where the commands `semseg` and `python run.py` begin: with what must be done before anything slow is imported."""

from __future__ import annotations

import sys

from semseg.process import StopRequest, prepare


def main() -> None:
    """Run the command line in sys.argv; ends the process."""
    prepare()
    try:
        from semseg import launch  # noqa: PLC0415
    except StopRequest as stop:
        print(stop, file=sys.stderr)
        raise
    launch.main()
