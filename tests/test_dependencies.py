"""What is installed and what runs on the build machine is named to the last bit, so that it cannot change unseen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import semseg

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()
# Part of every virtual environment, as far as pip is concerned: it leaves it out of a list of what is installed.
NOT_LISTED = {"setuptools"}

pytestmark = pytest.mark.reliability


def needed_by(requirements: list[str]) -> set[str]:
    """Names of all distributions that are needed on this machine, those that others need included."""
    found: set[str] = set()
    waiting = [(Requirement(text), frozenset[str]()) for text in requirements]
    done: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement, requested = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        applies = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("", *requested)
        )
        if not applies or (name, extras) in done:
            continue
        done.add((name, extras))
        found.add(name)
        try:
            further = requires(requirement.name) or []
        except PackageNotFoundError:  # an extra that is not installed
            continue
        waiting += [(Requirement(text), extras) for text in further]
    return found


def test_g10_every_dependency_has_one_version() -> None:
    pinned = [re.fullmatch(r"([A-Za-z0-9][\w.-]*)==(\d[\w.+!]*)", line) for line in CONSTRAINTS]
    assert all(pinned), "constraints.txt: every line is <name>==<version>"
    names = [canonicalize_name(match[1]) for match in pinned if match]
    assert len(names) == len(set(names))
    extras = [text for group in PROJECT["optional-dependencies"].values() for text in group]
    missing = needed_by([*PROJECT["dependencies"], *extras]) - set(names) - NOT_LISTED
    assert not missing, "make lock"


def test_g10_actions_are_pinned_by_commit_and_cannot_write() -> None:
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert workflows
    for path in workflows:
        used = re.findall(r"uses:\s*(\S+)", path.read_text())
        assert used and all(re.fullmatch(r"[\w-]+/[\w./-]+@[0-9a-f]{40}", action) for action in used), path
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}, path
        further = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
        # Trusted publishing: an identity for PyPI, no password, and for the one job that builds nothing.
        assert further == ({"publish": {"id-token": "write"}} if path.stem == "release" else {}), path
        assert "password:" not in path.read_text() and "secrets." not in path.read_text()


def test_g10_a_wheel_holds_every_package_and_every_file_that_is_read() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"only-include": ["semseg", "configs"], "sources": {"configs": "semseg/configs"}}
    if not (ROOT / ".git").exists():
        pytest.skip("what a wheel leaves out is what git ignores, and this is not a git checkout")
    files = [str(path) for name in ("semseg", "configs") for path in (ROOT / name).rglob("*") if path.is_file()]
    kept = [path for path in files if "__pycache__" not in path]
    ignored = subprocess.run(["git", "check-ignore", *kept], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ignored.returncode == 1 and not ignored.stdout, ignored  # 1: git ignores none of them


def test_the_version_is_one_everywhere() -> None:
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == cited == semseg.__version__


def test_g10_an_editable_install_is_found_in_the_folder_that_holds_the_checkout(tmp_path: Path) -> None:
    # In that folder the checkout itself, which is called semseg too, could be imported as a namespace package.
    (folder,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["dev-mode-dirs"]
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "_semseg.pth").write_text(f"{(ROOT / folder).resolve()}\n")  # what the installation writes
    (tmp_path / "semseg").symlink_to(ROOT, target_is_directory=True)
    code = (
        f"import site; site.addsitedir({str(tmp_path / 'site')!r}); import semseg; print(semseg.load, semseg.__file__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", code]  # -S: without what else is installed
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == str(ROOT / "semseg" / "__init__.py")
