"""Fixtures that several test files share."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from helpers.browser import shared_browser
from helpers.fork_server import SERVER_ADDRESS, skip_sync, start_server
from helpers.reference import SHARED
from semseg.system.process import STOP_SIGNALS, SWEEP_VARIABLE

CACHE_VARIABLE = "XDG_CACHE_HOME"
caches = ExitStack()


@pytest.fixture
def shared() -> Path:
    """The folder of real images beside the checkout; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("needs the real images of ../shared, which are not part of the repository")
    return SHARED


@pytest.fixture(autouse=True)
def forget_sweep() -> Iterator[None]:
    """What a test announces to the jobs of a sweep is not in the environment of the next one."""
    yield
    os.environ.pop(SWEEP_VARIABLE, None)


@pytest.fixture
def signals_restored() -> Iterator[None]:
    """Training takes over signals; give them back afterwards."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data-loading workers that hang are found out and killed sooner."""
    monkeypatch.setattr("semseg.data.loaders.POLL_S", 0.1)
    monkeypatch.setattr("semseg.data.workers.GRACE_S", 0.2)


def pytest_configure(config: pytest.Config) -> None:
    os.environ.pop("SEMSEG_CACHE", None)  # which comes before it
    if CACHE_VARIABLE not in os.environ:  # what runs keep for the next ones; the processes of pytest-xdist inherit it
        os.environ[CACHE_VARIABLE] = caches.enter_context(TemporaryDirectory())
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        os.environ[SERVER_ADDRESS] = start_server()  # it imports while the test processes do
        return  # this process runs no tests, and imports nothing that takes seconds
    from helpers.composition import cache_defaults, cache_modes, cache_option_files, cache_schema
    from semseg.storage.commands import PROGRAM_VARIABLE

    os.environ[PROGRAM_VARIABLE] = "python run.py"  # however a test starts the program, and from where
    os.fsync = skip_sync
    # Every trainer asks for plugins, which takes a twentieth of a short run.
    importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)
    cache_option_files()
    cache_defaults()
    cache_modes()
    cache_schema()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "long" not in str(config.getoption("markexpr")):
        # Here, since a -m of the command line takes the place of one in pyproject.toml.
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Files are handed out in this order (--no-loadscope-reorder): those that take long must not come last.
        num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -num_slow[item.path])
    import torch  # not in the process that hands out the tests

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    # Collections of garbage leave out what was imported, and forks need no copy of it.
    gc.freeze()


def pytest_sessionfinish() -> None:
    shared_browser.close()


def pytest_unconfigure() -> None:
    gc.unfreeze()
    caches.close()
