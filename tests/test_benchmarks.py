"""Programs of benchmarks/ that need no other library and no time."""

from __future__ import annotations

from pathlib import Path

from helpers.fork_server import run_python

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_the_model_of_a_step_counts_a_backward_pass_as_two_forward_passes(tmp_path: Path) -> None:
    program = run_python(str(BENCHMARKS / "step_model.py"), "--height", "256", "--width", "384", cwd=tmp_path)
    assert program.returncode == 0, program.stdout
    rows = [line.strip("|").split("|") for line in program.stdout.splitlines() if line.startswith("| ")]
    tables = [index for index, row in enumerate(rows) if row[0].strip() == "stage"]
    assert len(tables) == 2
    for first in tables:
        end = next(index for index in range(first, len(rows)) if rows[index][0].strip() == "all")
        counts = {row[0].strip(): float(row[1]) for row in rows[first + 1 : end + 1]}
        decoder = counts["decoder"]
        assert 1.9 < counts["decoder, backward"] / decoder < 2.1
        assert counts["all"] > 3 * decoder
