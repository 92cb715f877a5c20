"""What a run prints: in a terminal, in a pipe, and with quiet=true."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
from rich.console import Console

from helpers.command_line import TINY, TINY_NETWORK, call_main, run, run_here
from helpers.in_process import configured, prepare_run
from semseg.config.schema import config_to_plain
from semseg.evaluation.metrics import Scores
from semseg.training.callbacks.console import ReportValidation, build_config_tree, validation_table

RUN_WORDS = [*TINY, *TINY_NETWORK, "data.steps_per_epoch=3", "trainer.max_epochs=2"]


def scores(mean_iou: float | None, iou: list[float | None]) -> Scores:
    return Scores(0.75, mean_iou, 0.6, 0.5, 0.5, 0.5, iou, iou, iou, iou, [1] * len(iou), 3, [], "present")


def text_of(printed: object, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(printed)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def in_terminal(words: list[str], folder: Path) -> str:
    """What a command prints to a terminal of 160 columns, without its colours."""
    ours, theirs = pty.openpty()
    with (
        ThreadPoolExecutor(1) as pool,
        patch.dict(os.environ, {"COLUMNS": "160", "TERM": "xterm-256color"}),
        os.fdopen(theirs, "w", encoding="utf-8") as terminal,
    ):
        printed = pool.submit(read_to_end, ours)
        code = call_main(folder, words, terminal)
        terminal.close()
        text = printed.result(timeout=60).decode()
    assert code == 0, text
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def read_to_end(descriptor: int) -> bytes:
    """All that is written to a terminal until its other side is closed."""
    printed = b""
    with contextlib.suppress(OSError):  # how Linux reports that
        while block := os.read(descriptor, 65536):
            printed += block
    os.close(descriptor)
    return printed


@pytest.mark.slow
def test_a_terminal_gets_a_bar_and_a_table_per_validation(tmp_path: Path) -> None:
    printed = in_terminal(RUN_WORDS, tmp_path)
    assert printed.index("network ") < printed.index("given ") < printed.index("images/s")
    assert re.search(
        r"epoch 2/2 .* 3/3 +[\d.]+ images/s +\d:\d\d:\d\d left +loss \(mean of [1-6]\): [\d.]+ accuracy: ", printed
    )
    for epoch in (1, 2):
        assert printed.count(f"validation after epoch {epoch}/2") == 1
    assert "weakest: " in printed and "best before" in printed


@pytest.mark.slow
def test_a_pipe_gets_plain_lines(tmp_path: Path) -> None:
    printed = run_here(tmp_path, *RUN_WORDS)
    assert "\x1b" not in printed and "\r" not in printed
    lines = printed.splitlines()
    progress = (
        r"epoch (.)/2  step 3/3  loss [\d.]+  accuracy [\d.]+ \(mean of (.) steps\)"
        r"  [\d.]+ images/s  \d:\d\d:\d\d left"
    )
    found = [match.groups() for line in lines if (match := re.fullmatch(progress, line))]
    assert found == [("1", "3"), ("2", "6")]
    validation = r"epoch ./2  validation  mean IoU 0\.\d{4}  .*"
    assert sum(bool(re.fullmatch(validation, line)) for line in lines) == 2


@pytest.mark.slow
def test_a_quiet_run_prints_warnings_only(tmp_path: Path) -> None:
    printed = run(tmp_path, *TINY, *TINY_NETWORK, "run_dir=quiet", "quiet=true", "after_training=[eval]")
    assert all(line.startswith("warning: ") for line in printed.splitlines()), printed
    assert (tmp_path / "quiet" / "checkpoints" / "best.ckpt").is_file()
    assert (tmp_path / "quiet" / "eval" / "report.html").is_file()


@pytest.mark.slow
def test_quiet_leaves_errors_and_is_refused_where_there_is_nothing_else_to_do(tmp_path: Path) -> None:
    refused = run_here(tmp_path, "mode=models", "quiet=true", code=2)
    assert "quiet=true" in refused and "mode=models" in refused
    assert "nowhere.ckpt" in run(tmp_path, "mode=eval", "ckpt=nowhere.ckpt", "quiet=true", code=1)


def test_the_tree_shows_what_training_reads_and_marks_what_was_given() -> None:
    words = ["data=scenes", "optim.lr=0.5", "trainer.max_epochs=7"]
    tree = build_config_tree(config_to_plain(configured(*words)), words)
    printed = text_of(tree, 200)
    assert "lr=0.5" in printed and "max_epochs=7" in printed and "given  data=scenes  optim.lr=0.5" in printed
    assert "max_upload_mb" not in printed and "None" not in printed
    bold = [
        str(branch.label)[span.start : span.end]
        for branch in tree.children
        for span in branch.label.spans  # pyright: ignore[reportAttributeAccessIssue]
        if span.style == "bold"
    ]
    assert [word.strip() for word in bold[:-1]] == ["0.5", "7"]


def test_the_table_of_a_validation_names_the_weakest_classes() -> None:
    names = ["sky", "tree", "car", "road", "sign", "person", "fence"]
    iou = [0.9, 0.2, None, 0.8, 0.0, 0.3, 0.5]
    printed = text_of(validation_table(scores(0.45, iou), 0.4, names, "validation after epoch 2/3"))
    assert "0.4500" in printed and "0.4000" in printed
    assert "weakest: sign 0.000, tree 0.200, person 0.300, fence 0.500, road 0.800" in printed
    first = text_of(validation_table(scores(None, [None] * 7), None, names, "validation"))
    assert "nan" not in first.lower() and "None" not in first


def test_a_resumed_run_knows_the_best_score_before() -> None:
    before, after = ReportValidation(), ReportValidation()
    before.best = 0.25
    after.load_state_dict(before.state_dict())
    assert after.best == 0.25


def test_a_run_that_resumes_inside_an_epoch_prints_its_speed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["trainer.enable_progress_bar=true", "trainer.log_images=0"]
    prepare_run(root, tmp_path, *words, "trainer.max_steps=2").fit()
    capsys.readouterr()
    prepare_run(root, tmp_path, *words).fit(tmp_path / "checkpoints" / "last.ckpt")
    rates = re.findall(r"([\d.]+) images/s", capsys.readouterr().out)
    assert rates and all(float(rate) > 0 for rate in rates)
