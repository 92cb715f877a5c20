"""Writes messages.json, the messages that matter to users: run it after a change of wording, and read the diff.

python tests/golden/make_messages.py     (or: make messages)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]

from helpers.messages import collect_messages, write_golden  # noqa: E402 - found by the line above

if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="semseg_") as folder:
        write_golden(collect_messages(Path(folder).resolve()))
