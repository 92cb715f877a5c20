"""Packages import only from lower ones (listed in pyproject.toml), and modules that start fast import no torch."""

from __future__ import annotations

import ast
import logging.config
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

PACKAGE = Path(__file__).resolve().parent.parent / "semseg"
HEAVY = {"torch", "torchvision", "torchmetrics", "pytorch_lightning"}
# Modules used before a command is checked, or by processes that watch others: folders, and files of other folders.
FAST = ("errors.py", "api", "cli", "config", "reports", "storage", "system", "checkpoints/zoo.py", "modes/compare.py",
        "modes/download.py", *(f"data/{name}.py" for name in (
            "classes", "folders", "geometry", "header_cache", "headers", "label_map", "list_files", "orientation",
            "overlap", "palette", "plan", "records",
            "scenes", "seeding", "sources", "store")))  # fmt: skip


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports when it is loaded."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_packages_import_from_lower_ones_and_files_do_not_form_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.config, "dictConfig", lambda config: None)  # it would disable all other loggers
    assert lint_imports(config_filename=str(PACKAGE.parent / "pyproject.toml")) == 0


@pytest.mark.slow
def test_modules_that_start_fast_import_no_torch() -> None:
    for name in FAST:
        root = PACKAGE / name
        assert root.exists(), name
        for path in [root] if root.is_file() else root.rglob("*.py"):
            assert not imported_packages(path) & HEAVY, path


def test_importing_a_package_costs_nothing() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        assert not imported_packages(path) & HEAVY, path


def test_the_root_of_the_package_holds_six_files() -> None:
    files = {path.name for path in PACKAGE.glob("*.py")}
    assert files == {"__init__.py", "build.py", "collate.py", "datamodule.py", "errors.py", "lit_module.py"}


def test_the_whole_configuration_goes_no_further_than_build() -> None:
    """Below build.py everything gets the sections and values it uses; `Config` is for what opens a saved one."""
    above = ("build.py", "config", "serving", "modes", "cli", "api")
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in above and "Config" in names_from_the_schema(path)
    }
    assert users == {"checkpoints/format.py", "checkpoints/published.py"}


def names_from_the_schema(path: Path) -> set[str]:
    """What a file imports from semseg/config/schema.py."""
    imports = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom))
    return {name.name for node in imports if node.module == "semseg.config.schema" for name in node.names}


def public_names(path: Path) -> set[str]:
    """Functions, classes and constants that a file defines at its top level, without those that begin with _."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_a_public_name_is_defined_in_one_file() -> None:
    files: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in public_names(path) - {"run"}:  # what each file in modes/ is called by
            files.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in files.items() if len(paths) > 1} == {}


def test_test_files_have_different_names() -> None:
    """pytest imports a test file by its name alone, and stops the whole run at the second of a name."""
    names = [path.name for path in (PACKAGE.parent / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
