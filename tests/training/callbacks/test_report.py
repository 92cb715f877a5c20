"""The page of a run in training: what is on it, when it is written, and that it never ends the training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from helpers.in_process import prepare_run
from semseg.modes.train_start import lock_run_folder
from semseg.storage.atomic import temporary_path
from semseg.training.callbacks.report import REPORT_FILE


class KeepPages(Callback):
    """Keeps the page as it is while the run continues."""

    def __init__(self, page: Path) -> None:
        self.page = page
        self.pages: list[str] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.page.exists():
            self.pages.append(self.page.read_text())


def train(root: Path, run_dir: Path, *words: str, resume: Path | None = None) -> list[str]:
    """Train; returns the pages that were there at the start of each epoch and at the end."""
    run = prepare_run(root, run_dir, *words)
    keep = KeepPages(run_dir / REPORT_FILE)
    run.trainer.callbacks.append(keep)  # pyright: ignore[reportAttributeAccessIssue]
    run.fit(resume)
    return [*keep.pages, (run_dir / REPORT_FILE).read_text()]


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', page)


@pytest.mark.slow
def test_the_page_is_rewritten_after_every_validation_and_continues_after_a_resume(root: Path, tmp_path: Path) -> None:
    pages = train(root, tmp_path, "trainer.max_epochs=2")
    assert len(pages) == 2
    assert sections(pages[0]) == ["training", "scores", "classes", "confusion", "examples", "run"]
    assert [len(re.findall(r"val/miou: \S+ at \d+<", page)) for page in pages] == [1, 2]
    assert "epoch 1 of 2" in pages[0] and "epoch 2 of 2" in pages[1]
    assert "best validation" in pages[1] and "Scores of 1 image<" in pages[1]
    assert pages[1].count("data:image/") == 4  # one validation image, with label, prediction and errors
    resumed = train(root, tmp_path, "trainer.max_epochs=3", resume=tmp_path / "checkpoints/last.ckpt")
    assert len(re.findall(r"val/miou: \S+ at \d+<", resumed[-1])) == 3


def test_without_validation_the_page_has_the_curves(root: Path, tmp_path: Path) -> None:
    (page,) = train(root, tmp_path, "trainer.limit_val_batches=0")
    assert sections(page) == ["training", "run"]
    assert "train/loss" in page and "val/miou:" not in page and "best validation" not in page


def test_a_page_that_cannot_be_written_gives_one_warning_and_does_not_end_the_run(root: Path, tmp_path: Path) -> None:
    (tmp_path / REPORT_FILE).mkdir(parents=True)
    run = prepare_run(root, tmp_path, "trainer.max_epochs=2", "data.steps_per_epoch=1")
    with pytest.warns(UserWarning, match="report.html") as caught:
        run.fit()
    assert run.trainer.current_epoch == 2
    assert sum(REPORT_FILE in str(warning.message) for warning in caught) == 1


def test_a_run_without_the_csv_log_has_a_page_without_curves(root: Path, tmp_path: Path) -> None:
    run = prepare_run(root, tmp_path, "data.steps_per_epoch=1")
    run.trainer.loggers = []
    run.fit()
    assert sections((tmp_path / REPORT_FILE).read_text()) == ["scores", "classes", "confusion", "examples", "run"]


def test_a_page_that_a_killed_run_was_writing_is_removed_when_it_resumes(tmp_path: Path) -> None:
    leftover = temporary_path(tmp_path / REPORT_FILE)
    leftover.write_text("<!doctype html>")
    with lock_run_folder(tmp_path):
        assert not leftover.exists()
