"""The number of workers follows the processors that a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from semseg.system import processors
from semseg.system.processors import choose_num_workers, count_processors


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 16 processors; the folder of its cgroups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(processors, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(processors, "OWN_CGROUPS", tmp_path / "own")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_limit_all_processors_of_the_affinity_count(machine: Path) -> None:
    assert count_processors() == 16
    write(machine / "own", "0::/job\n")
    write(machine / "groups/job/cpu.max", "max 100000\n")
    assert count_processors() == 16


@pytest.mark.parametrize(("group", "count"), [("job/step", 6), ("job", 6), ("", 6), ("job/step/deeper", 16)])
def test_a_quota_of_the_group_or_of_one_above_it_counts(machine: Path, group: str, count: int) -> None:
    write(machine / "own", "0::/job/step\n")
    write(machine / "groups" / group / "cpu.max", "650000 100000\n")
    assert count_processors() == count


def test_a_quota_of_the_first_version_counts(machine: Path) -> None:
    write(machine / "own", "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n")
    write(machine / "groups/cpu/cpu.cfs_quota_us", "50000\n")
    write(machine / "groups/cpu/cpu.cfs_period_us", "100000\n")
    assert count_processors() == 1


@pytest.mark.parametrize(
    ("given", "ranks", "workers"), [(None, 1, 4), (None, 8, 2), (None, 64, 1), (0, 1, 0), (12, 8, 12)]
)
def test_ranks_share_the_processors_unless_a_number_is_given(
    machine: Path, given: int | None, ranks: int, workers: int
) -> None:
    assert choose_num_workers(given, ranks) == workers
