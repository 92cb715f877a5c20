"""The documentation is built without a warning, and what it points at is there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.command_line import RUN

ROOT = RUN.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_of_a_page_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert target.startswith(("https://", "http://")) or (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation_and_none_is_empty() -> None:
    def pages(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        assert isinstance(node, list | dict)
        return [page for part in (node.values() if isinstance(node, dict) else node) for page in pages(part)]

    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    assert all((ROOT / "docs" / name).stat().st_size > 200 for name in named)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "semseg").symlink_to(ROOT / "semseg")  # for the API reference
    build = [str(Path(sys.executable).with_name("zensical")), "build", "--strict"]
    result = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    reference = (tmp_path / "site" / "api.html").read_text()
    assert "semseg.load" in reference and "Chan" in (tmp_path / "site" / "distributed.html").read_text()
    assert not re.findall(r'<script[^>]+src="https?://', reference)  # it opens without a network
