"""Files import from lower layers only, and the first layer knows no torch."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "semseg"

# One group of files per layer; a file may import from its own layer and from those above it in this list.
LAYERS = [
    [
        "errors",
        "hints",
        "secrets",
        "archive",
        "digest",
        "files",
        "process",
        "text",
        "seeding",
        "transfer",
        "zoo",
        "data.convention",
        "data.decoders",
        "data.geometry",
        "data.headers",
        "data.store",
    ],
    ["config", "data.classes", "data.records", "data.plan", "data.scenes", "run_lock", "download", "inputs", "jobs"],
    ["data.orientation", "data.sources", "data.overlap"],
    ["data.label_cache", "handover"],
    ["data.images", "data.scan", "data.augment", "collate", "data.datasets", "nets", "syncbn.reduce", "syncbn.layer"],
    ["losses", "unused", "optim", "metrics", "evaluation", "inference", "draw", "report", "pages"],
    ["doctor", "memory", "summary"],
    ["report_page", "compare_page", "sweep_page", "check_page"],
    ["outputs", "video", "predictor"],
    ["machine"],
    ["checkpoint", "weights", "published", "exported"],
    ["export", "quantize"],
    ["stopping"],
    ["syncbn.plugin", "checkpoint_io", "csv_log", "loggers", "guards", "bad_images", "averaging", "odd_labels"],
    ["restoring", "resume", "saving", "panels", "callbacks", "datamodule", "lit_module"],
    ["console", "connections"],
    ["build", "server"],
    ["supervise"],
    ["sweep"],
    ["launch"],
    ["modes"],
    ["entry"],
]
PAGES = {"pages.charts", "pages.comparison", "pages.curves", "pages.pictures", "pages.run_card", "pages.templates"}
PAGES |= {"draw", "report_page", "compare_page", "sweep_page", "modes.compare"}
TORCH_FREE = (
    {name for layer in LAYERS[:3] for name in layer}
    | {"launch", "entry", "supervise", "sweep", "modes.download"}
    | PAGES
)
HEAVY = {"torch", "torchvision", "torchmetrics", "pytorch_lightning"}


def modules() -> dict[str, Path]:
    files = (path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}


def layer_of(module: str) -> int:
    for index, names in enumerate(LAYERS):
        if module in names or module.split(".", maxsplit=1)[0] in names:
            return index
    raise AssertionError(f"semseg/{module.replace('.', '/')}.py is in no layer of this test")


def imports(path: Path) -> set[str]:
    """Modules that a file imports when it is loaded."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def test_every_file_imports_from_its_own_layer_or_a_lower_one() -> None:
    known = modules()
    for module, path in known.items():
        for imported in imports(path):
            name = imported.removeprefix("semseg.")
            if imported.startswith("semseg.") and name in known:
                assert layer_of(name) <= layer_of(module), f"{module} imports {name}"


def test_the_first_layers_know_no_torch() -> None:
    for module, path in modules().items():
        if module in TORCH_FREE:
            assert not {name.split(".")[0] for name in imports(path)} & HEAVY, module


def test_importing_the_package_costs_nothing() -> None:
    for package in PACKAGE.rglob("__init__.py"):
        assert not {name.split(".")[0] for name in imports(package)} & HEAVY, package
