"""The messages that matter to users, word for word: tests/golden/messages.json, written by `make messages`."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.messages import collect_messages, read_golden


@pytest.mark.slow
def test_messages_are_those_of_the_golden_file(tmp_path: Path) -> None:
    found, golden = collect_messages(tmp_path), read_golden()
    changed = {name: text for name, text in found.items() if golden.get(name) != text}
    assert not changed, "if the new wording is intended, run `make messages`"
    assert set(found) == set(golden)
